// The one stream of events from the server, opened again for as long as it takes.
import { get } from "./api.js";
import { emit, state } from "./state.js";

const NAMES = ["delta", "reply", "replies", "conversation", "gone", "folders", "model", "pull", "kv", "trouble"];
const RETRY = 800;
let source = null;
let wait = null;

export function connect() {
  clearTimeout(wait);
  source?.close();
  source = new EventSource("/api/events");
  for (const name of NAMES) {
    source.addEventListener(name, (event) => emit(name, JSON.parse(event.data)));
  }
  source.addEventListener("ready", () => {
    const again = !state.online;
    state.online = true;
    emit("online", again);
  });
  source.addEventListener("bye", () => lost("The chat was closed. Start it again with edge-runtime chat; what you type meanwhile is kept in this browser."));
  source.onerror = () => lost("The chat's server does not answer. Start it again with edge-runtime chat; what you type meanwhile is kept in this browser.");
}

function lost(message) {
  source?.close();
  state.online = false;
  emit("offline", message);
  clearTimeout(wait);
  wait = setTimeout(again, RETRY);
}

async function again() {
  try {
    await get("start");
    connect();
  } catch (error) {
    lost(error.status === 401 || error.status === 403 ? error.message
      : "The chat's server does not answer. Start it again with edge-runtime chat; what you type meanwhile is kept in this browser.");
  }
}
