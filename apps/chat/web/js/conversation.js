// The open conversation: loaded, shown as the path to its leaf, kept up to date while replies stream.
import { call, get, post, remove } from "./api.js";
import { announce, attempt, byId, el } from "./dom.js";
import { confirmDialog } from "./dialogs.js";
import { splitReasoning } from "./markdown.js";
import { MessageView } from "./message.js";
import { emit, on, state } from "./state.js";
import { added, catchUp, forget, forgetAll, keep } from "./told.js";
import { openEditor } from "./edit.js";

const views = new Map();
const early = new Map(); // replies that ended before their conversation was the open one
let beginning = 0; // requests for a reply that are on their way
let opening = 0; // counts what was to be opened: the last one is
let sticking = true;
const scroller = byId("scroller");

export const actions = {
  goOn: (message) => begin(() => post(`messages/${message.id}/continue`)),
  regenerate: (message) => begin(() => post(`messages/${message.id}/regenerate`)),
  select: (id) => attempt(async () => {
    await post(`messages/${id}/select`);
    await reload();
    byId(`m${id}`)?.focus();
    announce("Version switched");
  }),
  fork: (message) => attempt(async () => {
    const found = await post(`messages/${message.id}/fork`);
    await openConversation(found.conversation);
    announce("Forked into a new conversation");
  }),
  deleteBranch: (message) => attempt(async () => {
    const sure = await confirmDialog({
      title: "Delete this branch?", danger: true, action: "Delete",
      text: "This message and everything below it is deleted. Other versions of it stay.",
    });
    if (!sure) return;
    await remove(`messages/${message.id}`);
    await reload();
    byId("composer-text").focus();
  }),
  edit: (view) => openEditor(view, (text) => begin(() => post(`messages/${view.message.id}/edit`, { text }))),
  grown: () => { if (sticking) toEnd(); },
  waitingFor: () => {
    const { model } = state;
    if (model.state === "loading") return `Waiting for ${model.name} to load…`;
    return model.state === "failed" ? "Waiting for a model…" : "Reading…";
  },
};

/** Start a reply; the page then follows it, unless it has gone elsewhere meanwhile. Returns whether it began. */
export async function begin(work) {
  const where = state.current?.id;
  beginning += 1;
  const found = await attempt(work);
  beginning -= 1;
  if (!found) return false;
  sticking = true;
  announce("The reply is being written");
  if (state.current?.id === found.conversation) {
    if (!views.has(found.reply)) { // else its events were faster, and know more
      state.current = { ...found.opened, draft: state.current.draft };
      show();
    }
    reload();
  } else if (state.current?.id === where) await openConversation(found.conversation, undefined, found.opened);
  emit("running");
  const over = early.get(found.reply);
  if (over) ended(over);
  return true;
}

/** message: to be looked at; given: the conversation, where it came with something else. */
export async function openConversation(id, message, given) {
  opening += 1;
  const mine = opening;
  emit("leaving");
  if (id === null) {
    state.current = null;
    show();
    history.replaceState(null, "", "#");
    emit("opened");
    return;
  }
  const found = given || await attempt(() => get(`conversations/${id}`));
  if (mine !== opening) return;
  if (!found) {
    if (state.current?.id === id) await openConversation(null);
    return;
  }
  if (message && !found.messages.some((one) => one.id === message)) {
    await attempt(() => post(`messages/${message}/select`));
    Object.assign(found, await get(`conversations/${id}`));
  }
  state.current = found;
  history.replaceState(null, "", `#c/${id}`);
  sticking = !message;
  show();
  emit("opened");
  // The end of a reply may have been told before this conversation was the open one.
  if (found.messages.some((one) => one.status === "streaming")) reload();
  if (message) {
    const target = byId(`m${message}`);
    target?.scrollIntoView({ block: "center" });
    target?.classList.add("flash");
    target?.focus();
  }
}

let loading = null;
let stale = false;

/** The same conversation as the server has it now. Calls that come together share a request, but none is answered with
 * what was so before it asked. */
export function reload() {
  stale = true;
  loading ??= (async () => {
    try {
      while (stale) {
        stale = false;
        await fetchCurrent();
      }
    } finally {
      loading = null;
    }
  })();
  return loading;
}

async function fetchCurrent() {
  const id = state.current?.id;
  if (id === undefined) return;
  try {
    const found = await get(`conversations/${id}`);
    if (stale) return; // it is older than what was told meanwhile, and asked for again
    if (state.current?.id === id) {
      state.current = { ...found, draft: state.current.draft };
      show();
    }
  } catch (error) {
    if (error.status === 404 && state.current?.id === id) await openConversation(null);
  }
}

function show() {
  const messages = state.current?.messages || [];
  byId("title").textContent = state.current?.title || "New chat";
  document.title = state.current ? `${state.current.title} · Edge Runtime` : "Edge Runtime";
  byId("welcome").hidden = messages.length > 0;
  const list = byId("messages");
  const wanted = new Set(messages.map((message) => message.id));
  for (const message of messages) if (message.status === "streaming" && !catchUp(message)) reload();
  for (const [id, view] of views) {
    if (!wanted.has(id)) {
      view.element.remove();
      views.delete(id);
    }
  }
  messages.forEach((message, at) => {
    let view = views.get(message.id);
    const last = at === messages.length - 1;
    if (!view) {
      view = new MessageView(message, actions);
      views.set(message.id, view);
    }
    view.update(message, last);
    if (list.children[at] !== view.element) list.insertBefore(view.element, list.children[at] || null);
    if (message.status === "streaming") state.running.set(message.id, state.current.id);
    else state.running.delete(message.id);
  });
  if (sticking) toEnd();
  emit("shown");
}

on("delta", (delta) => {
  early.delete(delta.message);
  state.running.set(delta.message, delta.conversation);
  keep(delta);
  const view = views.get(delta.message);
  if (!view || view.message.status !== "streaming" || state.current?.id !== delta.conversation) return;
  const more = added(view.message.content, delta);
  if (more === null && !loading) reload();
  if (!more) return;
  const first = !view.message.content;
  view.append(more);
  if (first) emit("first", delta);
});

on("reply", async (reply) => {
  state.running.delete(reply.message);
  forget(reply.message);
  emit("running");
  if (state.current?.id !== reply.conversation) {
    early.set(reply.message, reply);
    if (early.size > 20) early.delete(early.keys().next().value);
    return;
  }
  const view = views.get(reply.message);
  if (view) view.update(Object.assign(view.message, { content: reply.content, status: reply.status, error: reply.error, stats: reply.stats, model: reply.model }), view.last);
  await reload();
  ended(reply);
});

function ended(reply) {
  early.delete(reply.message);
  emit("finished", reply);
  const said = splitReasoning(reply.content).answer;
  const how = { complete: "Reply", stopped: "Stopped", interrupted: "Interrupted", length: "Reply, cut at its length", error: "The reply failed" };
  announce(`${how[reply.status] || "Reply"}: ${reply.status === "error" ? reply.error : said.slice(0, 300)}`);
}

// What runs as the stream of events begins; what they said before is missing.
on("replies", ({ running }) => {
  forgetAll();
  state.running = new Map(running.map((one) => [one.message, one.conversation]));
  emit("running");
  if (streamingReply() !== undefined) reload();
});

// Another page may have sent a message here.
on("conversation", (one) => {
  if (!beginning && state.current?.id === one.id && state.current.messages.at(-1)?.id !== one.leaf) reload();
});

on("gone", ({ conversation }) => { if (state.current?.id === conversation) openConversation(null); });
on("model", () => { for (const view of views.values()) if (view.message.status === "streaming" && !view.message.content) view.update(view.message, view.last); });

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

scroller.addEventListener("scroll", () => {
  const left = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  sticking = left < 60;
  byId("to-end").hidden = left < 240;
}, { passive: true });
byId("to-end").addEventListener("click", () => { sticking = true; toEnd(); byId("composer-text").focus(); });

/** The reply that is written in the open conversation, if one is. */
export const streamingReply = () => [...state.running].find(([, conversation]) => conversation === state.current?.id)?.[0];

export const stop = () => {
  const reply = streamingReply();
  return reply === undefined ? undefined : attempt(() => call("POST", `messages/${reply}/stop`, {}));
};

export const lastReply = () => [...(state.current?.messages || [])].reverse().find((message) => message.role === "assistant");
export const lastQuestion = () => {
  const found = [...(state.current?.messages || [])].reverse().find((message) => message.role === "user");
  return found && views.get(found.id);
};
export const suggestion = (title, text, action) => el("button", { type: "button", onclick: action }, el("b", {}, title), el("span", {}, text));
