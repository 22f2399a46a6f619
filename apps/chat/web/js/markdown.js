// Markdown to elements: parsed by marked, cleaned by DOMPurify, highlighted by highlight.js. What a model writes is never
// trusted: no script, no handlers, no styles, no addresses but http, https and mailto, and images become links.
import DOMPurify from "/web/vendor/dompurify/purify.js";
import hljs from "/web/vendor/highlight/highlight.js";
import { Marked } from "/web/vendor/marked/marked.js";
import { copyText, el, icon } from "./dom.js";

const HIGHLIGHT_LIMIT = 60000; // characters of a block: more takes longer than a frame
const CLASSES = /^(hljs(-[\w-]+)?|language-[\w+#.-]+|[a-z]+_)$/;
const escape = (text) => text.replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" }[c]));

const marked = new Marked({ gfm: true, breaks: false });
marked.use({
  renderer: {
    code({ text, lang }) {
      const name = (lang || "").trim().split(/\s+/)[0].toLowerCase();
      const known = name && hljs.getLanguage(name) && text.length < HIGHLIGHT_LIMIT;
      const body = known ? hljs.highlight(text, { language: name, ignoreIllegals: true }).value : escape(text);
      return `<pre><code class="hljs language-${escape(name.replace(/[^\w+#.-]/g, "") || "text")}">${body}</code></pre>`;
    },
    image({ href, text }) {
      return `<a href="${escape(href || "")}">${escape(text || href || "image")} (image)</a>`;
    },
  },
});

const OPTIONS = {
  RETURN_DOM_FRAGMENT: true,
  ALLOWED_TAGS: ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "b", "em", "i", "del", "s", "sub", "sup", "u", "kbd",
    "mark", "code", "pre", "span", "blockquote", "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td", "input", "img",
    "details", "summary", "div"],
  ALLOWED_ATTR: ["href", "title", "class", "start", "align", "colspan", "rowspan", "type", "checked", "disabled", "src", "alt"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class") {
    data.attrValue = data.attrValue.split(/\s+/).filter((name) => CLASSES.test(name)).join(" ");
    data.keepAttr = data.attrValue !== "";
  }
});
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName === "IMG") { // it would tell its server that this was read
    const source = node.getAttribute("src") || "";
    const link = document.createElement("a");
    if (OPTIONS.ALLOWED_URI_REGEXP.test(source)) link.setAttribute("href", source);
    link.textContent = `${node.getAttribute("alt") || source || "image"} (image)`;
    safeLink(link);
    node.replaceWith(link);
  } else if (node.nodeName === "A") safeLink(node);
  else if (node.nodeName === "INPUT") { // task lists have boxes; nothing else may be filled in
    node.setAttribute("type", "checkbox");
    node.setAttribute("disabled", "");
    node.setAttribute("aria-label", node.hasAttribute("checked") ? "done" : "to do");
  }
});

function safeLink(link) {
  link.setAttribute("target", "_blank");
  link.setAttribute("rel", "noopener noreferrer nofollow");
}

/** A clean fragment of one piece of Markdown. */
function fragment(tokens) {
  const found = DOMPurify.sanitize(marked.parser(tokens), OPTIONS);
  for (const code of found.querySelectorAll("pre > code")) frame(code);
  for (const table of found.querySelectorAll("table")) {
    const box = el("div.table", { tabindex: "0", role: "region", ariaLabel: "Table" });
    table.replaceWith(box);
    box.append(table);
  }
  return found;
}

/** Code gets a head with its language and a button to copy it. */
function frame(code) {
  const language = [...code.classList].find((name) => name.startsWith("language-"))?.slice(9) || "text";
  const pre = code.parentElement;
  const button = el("button", { type: "button", ariaLabel: `Copy ${language} code`, onclick: () => copyText(code.textContent, "Code copied") },
    icon("copy"), "Copy");
  const box = el("div.code", {}, el("div.code-head", {}, el("span", {}, language), button));
  pre.replaceWith(box);
  pre.tabIndex = 0;
  pre.setAttribute("aria-label", `${language} code`);
  box.append(pre);
}

/** Keeps an element in step with a text that grows: only the blocks that changed are made anew. */
export class MarkdownView {
  constructor() {
    this.element = el("div.prose");
    this.blocks = []; // {raw, node}
  }

  update(text) {
    const tokens = marked.lexer(text).filter((token) => token.type !== "space");
    tokens.forEach((token, at) => {
      const old = this.blocks[at];
      if (old && old.raw === token.raw && old.type === token.type) return;
      const node = el("div.block");
      node.append(fragment([token]));
      if (old) old.node.replaceWith(node);
      else this.element.append(node);
      this.blocks[at] = { raw: token.raw, type: token.type, node };
    });
    for (const gone of this.blocks.splice(tokens.length)) gone.node.remove();
  }
}

/** A reply's reasoning and answer. `open`: the reasoning has not ended yet. */
export function splitReasoning(text, streaming = false) {
  const start = /^\s*<(think|thinking)>/.exec(text);
  if (start) {
    const rest = text.slice(start[0].length);
    const end = rest.search(/<\/(?:think|thinking)>/);
    if (end < 0) return { thinking: rest, answer: "", open: true };
    return { thinking: rest.slice(0, end), answer: rest.slice(end).replace(/^<\/\w+>\s*/, ""), open: false };
  }
  const end = /<\/(?:think|thinking)>\s*/.exec(text); // the model's template had opened it
  if (end && !/<(?:think|thinking)>/.test(text)) {
    return { thinking: text.slice(0, end.index), answer: text.slice(end.index + end[0].length), open: false };
  }
  const begin = text.trimStart();
  if (streaming && begin && "<thinking>".startsWith(begin)) return { thinking: "", answer: "", open: false };
  return { thinking: "", answer: text, open: false };
}
