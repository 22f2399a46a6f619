// What the page knows, and who wants to hear when it changes.

export const state = {
  conversations: [], folders: [], presets: [], settings: {}, drafts: new Set(), running: new Map(),
  defaultPreset: null, model: { state: "empty" }, pull: { state: "idle" }, kv: null, version: "",
  current: null, // the open conversation with its messages, or null on the empty page
  online: true,
};

const listeners = new Map();

export function on(name, listener) {
  if (!listeners.has(name)) listeners.set(name, new Set());
  listeners.get(name).add(listener);
}

export function emit(name, data) {
  for (const listener of listeners.get(name) || []) listener(data);
}

/** Where the draft of the open page is kept. */
export const draftKey = () => (state.current ? `c:${state.current.id}` : "new");

export const isBusy = (conversation) => [...state.running.values()].includes(conversation);
