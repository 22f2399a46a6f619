// One message on the page: its text, reasoning, attachments, notices and tools.
import { get } from "./api.js";
import { attempt, bytes, copyText, el, icon, iconButton } from "./dom.js";
import { openDialog } from "./dialogs.js";
import { MarkdownView, splitReasoning } from "./markdown.js";

const NOTICES = {
  interrupted: "This reply was interrupted. What had come is kept.",
  stopped: "Stopped.",
  length: "The reply reached its longest allowed length, or the end of the context.",
};

export class MessageView {
  /** actions: what the tools do, by name. */
  constructor(message, actions) {
    this.actions = actions;
    this.element = el(`article.message.${message.role}`, { id: `m${message.id}`, tabindex: "-1" });
    this.frame = 0;
    this.editing = false;
    this.update(message, false);
  }

  /** Show this state of the message. */
  update(message, last) {
    this.message = message;
    this.last = last;
    this.element.classList.toggle("last", last);
    this.element.setAttribute("aria-label", message.role === "user" ? "You" : `Reply${message.model ? ` by ${message.model}` : ""}`);
    this.element.setAttribute("aria-busy", String(message.status === "streaming"));
    if (this.editing) return;
    if (message.role === "user") this.#renderUser();
    else this.#renderReply();
  }

  /** A piece more of a streaming reply. */
  append(text) {
    const first = this.message.content === "";
    this.message.content += text;
    if (first || document.hidden) this.#write();
    else if (!this.frame) this.frame = requestAnimationFrame(() => this.#write());
  }

  #renderUser() {
    const { message } = this;
    this.element.replaceChildren();
    if (message.attachments?.length) {
      this.element.append(el("ul.files", { ariaLabel: "Attachments" }, ...message.attachments.map((one) => el("li", {}, fileChip(one)))));
    }
    if (message.content) this.element.append(el("div.bubble", {}, message.content));
    this.element.append(this.#tools());
  }

  #renderReply() {
    if (!this.view) {
      this.view = new MarkdownView();
      this.notices = el("div");
      this.holder = el("div");
    }
    this.element.replaceChildren(this.holder, this.view.element, this.notices, this.#tools());
    this.#write();
  }

  #write() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { message } = this;
    const streaming = message.status === "streaming";
    const { thinking, answer, open } = splitReasoning(message.content, streaming);
    this.#writeThinking(thinking, open && streaming);
    this.view.update(answer);
    this.notices.replaceChildren(...this.#noticesFor(streaming && !answer && !thinking));
    this.actions.grown(this);
  }

  #writeThinking(text, open) {
    if (!text.trim()) {
      this.holder.replaceChildren();
      this.thinking = null;
      return;
    }
    if (!this.thinking) {
      this.thinking = new MarkdownView();
      this.summary = el("summary");
      this.holder.replaceChildren(el("details.thinking", {}, this.summary, this.thinking.element));
    }
    this.summary.textContent = open ? "Thinking…" : "Reasoning";
    this.thinking.update(text);
  }

  #noticesFor(waiting) {
    const { message, actions } = this;
    const again = (label, name) => el("button.button", { type: "button", onclick: () => actions[name](message) }, label);
    if (waiting) return [el("p.waiting", {}, el("i"), el("span", {}, this.actions.waitingFor()))];
    if (message.status === "streaming" || message.status === "complete") {
      return message.status === "complete" && !message.content ? [el("p.notice.quiet", {}, "The model said nothing.")] : [];
    }
    const go = message.content && message.status !== "error" ? [again("Continue", "goOn")] : [];
    if (message.status === "error") {
      return [el("div.notice.bad", { role: "alert" }, el("span", {}, message.error || "The reply failed."),
        again("Try again", "regenerate"), ...(message.content ? [again("Continue", "goOn")] : []))];
    }
    return [el(message.status === "interrupted" ? "div.notice" : "div.notice.quiet", {},
      el("span", {}, NOTICES[message.status] || message.status), ...go, again("Regenerate", "regenerate"))];
  }

  #tools() {
    const { message, actions } = this;
    const tools = el("div.tools", { role: "toolbar", ariaLabel: message.role === "user" ? "Your message" : "This reply" });
    const siblings = message.siblings || [message.id];
    const at = siblings.indexOf(message.id);
    if (siblings.length > 1) {
      tools.classList.add("branched");
      tools.append(el("span.branch", { role: "group", ariaLabel: `Version ${at + 1} of ${siblings.length}` },
        iconButton("left", "Previous version", () => actions.select(siblings[at - 1]), { disabled: at === 0 }),
        el("span", {}, `${at + 1} / ${siblings.length}`),
        iconButton("right", "Next version", () => actions.select(siblings[at + 1]), { disabled: at === siblings.length - 1 })));
    }
    if (message.status === "streaming") return tools;
    tools.append(iconButton("copy", "Copy text", () => copyText(splitReasoning(message.content).answer)));
    if (message.role === "user") tools.append(iconButton("edit", "Edit as a new version", () => actions.edit(this)));
    else tools.append(iconButton("redo", "Regenerate", () => actions.regenerate(message)));
    if (message.role === "user" && this.last) tools.append(iconButton("redo", "Ask for a reply", () => actions.regenerate(message)));
    tools.append(iconButton("fork", "Fork into a new conversation", () => actions.fork(message)),
      iconButton("trash", "Delete this branch", () => actions.deleteBranch(message)));
    const { stats } = message;
    if (message.role === "assistant" && stats?.completion_tokens) {
      const speed = stats.tokens_per_second ? `${Math.round(stats.tokens_per_second)} tok/s` : "";
      tools.append(el("span.figures", { title: `${message.model || ""}` }, [`${stats.completion_tokens} tokens`, speed].filter(Boolean).join(" · ")));
    }
    return tools;
  }
}

export const fileLabel = (file) => `${file.kind === "paste" ? "pasted · " : ""}${bytes(file.bytes)}`;

/** An attachment as a chip that opens its text. */
export function fileChip(file, onremove) {
  const open = () => attempt(async () => {
    const full = await get(`attachments/${file.id}`);
    await openDialog({ title: file.name, className: "wide-dialog",
      fill: (body) => body.append(el("pre.file-text", { tabindex: "0", ariaLabel: `Text of ${file.name}` }, full.text)) });
  });
  return el("span.file", {}, icon("file"), el("button.name", { type: "button", onclick: open, ariaLabel: `Show ${file.name}` }, file.name),
    el("span.size", {}, fileLabel(file)), onremove && iconButton("close", `Remove ${file.name}`, onremove));
}
