// A text that is not sent yet, kept twice: in this browser with every key, on the server a quarter of a second later.
import { get, put } from "./api.js";
import { emit } from "./state.js";

const WAIT = 250;
const PREFIX = "edge-chat-draft:";
const open = new Set();

export class Draft {
  constructor(key) {
    this.key = key;
    this.timer = 0;
    this.held = false;
    this.dirty = false;
    this.text = "";
  }

  /** {text, attachments, tokens}: the newer of what this browser and the server have. */
  async load(given) {
    const local = this.#local();
    let saved = { text: "", updated: 0, attachments: [] };
    try {
      saved = given || await get(`drafts/${this.key}`);
    } catch {
      // the server is gone: what this browser has must do
    }
    const newer = local && local.at > saved.updated * 1000;
    const before = newer ? local.text : saved.text;
    if (this.dirty) this.set(before ? `${before}\n${this.text}` : this.text); // typed while this was on its way
    else if (newer && local.text !== saved.text) this.set(before);
    else this.text = before;
    return { ...saved, text: this.text };
  }

  set(text) {
    this.text = text;
    this.dirty = true;
    open.add(this);
    try {
      localStorage.setItem(PREFIX + this.key, JSON.stringify({ text, at: Date.now() }));
    } catch {
      // no room or no permission: the server's copy remains
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save(), WAIT);
  }

  async save(leaving = false) {
    clearTimeout(this.timer);
    if (!this.dirty || this.held) return;
    const { text } = this;
    try {
      const found = await put(`drafts/${this.key}`, { text }, leaving ? { keepalive: true } : {});
      if (this.text === text) {
        this.dirty = false;
        open.delete(this);
        if (!text) this.#forget();
      }
      emit("draft", { key: this.key, text, tokens: found.tokens, saved: true });
    } catch (error) {
      emit("draft", { key: this.key, text, saved: false, error });
      this.timer = setTimeout(() => this.save(), 2000);
    }
  }

  /** While it is being sent nothing may write it again. */
  hold() {
    this.held = true;
    clearTimeout(this.timer);
  }

  release() {
    this.held = false;
    if (this.dirty) this.save();
  }

  /** It was sent, or given up. */
  clear() {
    this.held = false;
    this.set("");
    this.save();
  }

  /** It was sent: the server has forgotten it in the same breath. */
  sent() {
    clearTimeout(this.timer);
    this.held = false;
    this.dirty = false;
    this.text = "";
    open.delete(this);
    this.#forget();
  }

  #local() {
    try {
      return JSON.parse(localStorage.getItem(PREFIX + this.key));
    } catch {
      return null;
    }
  }

  #forget() {
    try {
      localStorage.removeItem(PREFIX + this.key);
    } catch {
      // as above
    }
  }
}

/** Save everything at once: the page may be going. */
export function saveAll(leaving = false) {
  for (const draft of open) draft.save(leaving);
}

document.addEventListener("visibilitychange", () => { if (document.hidden) saveAll(true); });
window.addEventListener("pagehide", () => saveAll(true));
