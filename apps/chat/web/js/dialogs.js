// Modal dialogs, over the browser's own <dialog>: it keeps the focus inside and gives it back.
import { el, iconButton } from "./dom.js";

/** Open a dialog; `fill(body, close, dialog)` puts something into it. Returns what `close(value)` was given. */
export function openDialog({ title, className = "", fill, foot }) {
  return new Promise((resolve) => {
    const before = document.activeElement;
    const dialog = el("dialog", { className, ariaLabelledby: "dialog-title" });
    let value;
    const close = (given) => {
      value = given;
      dialog.close();
    };
    const body = el("div.dialog-body");
    const head = el("div.dialog-head", {}, el("h2", { id: "dialog-title" }, title), iconButton("close", "Close", () => close()));
    dialog.append(head, body);
    fill(body, close, dialog);
    if (foot) dialog.append(el("div.dialog-foot", {}, ...foot(close, dialog)));
    dialog.addEventListener("close", () => {
      dialog.remove();
      if (before && before.isConnected) before.focus();
      resolve(value);
    });
    dialog.addEventListener("mousedown", (event) => { if (event.target === dialog) close(); });
    document.body.append(dialog);
    dialog.showModal();
    (dialog.querySelector("[autofocus]") || dialog).focus();
  });
}

export function confirmDialog({ title, text, action = "OK", danger = false }) {
  return openDialog({
    title,
    className: "narrow",
    fill: (body) => body.append(el("p", {}, text)),
    foot: (close) => [
      el("button.button", { type: "button", onclick: () => close(false) }, "Cancel"),
      el(danger ? "button.button.danger" : "button.button.primary", { type: "button", autofocus: "", onclick: () => close(true) }, action),
    ],
  });
}

/** Ask for one line; undefined where it was called off. */
export function askDialog({ title, label, value = "", action = "Save" }) {
  return openDialog({
    title,
    className: "narrow",
    fill: (body, close) => {
      const input = el("input", { type: "text", value, autofocus: "", ariaLabel: label, maxlength: "200" });
      body.append(el("form", { id: "ask", onsubmit: (event) => {
        event.preventDefault();
        if (input.value.trim()) close(input.value.trim());
      } }, el("label.field", {}, el("span", {}, label), input)));
      requestAnimationFrame(() => input.select());
    },
    foot: (close) => [
      el("button.button", { type: "button", onclick: () => close() }, "Cancel"),
      el("button.button.primary", { type: "submit", form: "ask" }, action),
    ],
  });
}

export const dialogIsOpen = () => document.querySelector("dialog[open]") !== null;
