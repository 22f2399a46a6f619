// Requests to the chat's own server. Every refusal carries the server's sentence about what to do.

export class Refused extends Error {
  constructor(message, status, type) {
    super(message);
    this.status = status;
    this.type = type;
  }
}

const GONE = "The chat's server does not answer. Start it again with edge-runtime chat; what you typed is kept.";

async function answer(request) {
  let response;
  try {
    response = await request;
  } catch {
    throw new Refused(GONE, 0, "Offline");
  }
  let found = {};
  try {
    found = await response.json();
  } catch {
    if (response.ok) throw new Refused(GONE, 0, "Offline");
  }
  if (!response.ok) {
    throw new Refused(found.error?.message || `The server answered ${response.status}.`, response.status,
      found.error?.type || "Error");
  }
  return found;
}

export function call(method, path, body, options = {}) {
  const init = { method, ...options };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { "content-type": "application/json" };
  }
  return answer(fetch(`/api/${path}`, init));
}

export const get = (path) => call("GET", path);
export const post = (path, body = {}) => call("POST", path, body);
export const patch = (path, body) => call("PATCH", path, body);
export const put = (path, body, options) => call("PUT", path, body, options);
export const remove = (path) => call("DELETE", path);

/** Send a file or text as the request's body. */
export function upload(path, data) {
  return answer(fetch(`/api/${path}`, { method: "POST", body: data, headers: { "content-type": "application/octet-stream" } }));
}
