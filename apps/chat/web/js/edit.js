// Editing a message in place; the text is a draft of its own until it is sent.
import { el } from "./dom.js";
import { Draft } from "./drafts.js";

export async function openEditor(view, send) {
  if (view.editing) return;
  view.editing = true;
  const draft = new Draft(`e:${view.message.id}`);
  // First the text, then the box: it must not change under what is selected or typed in it.
  const saved = await draft.load();
  const area = el("textarea", { ariaLabel: "Edit your message", value: saved.text || view.message.content, rows: "4" });
  const close = (forget) => {
    view.editing = false;
    if (forget) draft.clear();
    view.update(view.message, view.last);
    view.element.focus();
  };
  const submit = async () => {
    const text = area.value;
    if (!text.trim() && !view.message.attachments?.length) return;
    draft.hold();
    view.editing = false;
    if (await send(text)) draft.clear();
    else {
      draft.release();
      view.editing = true;
    }
  };
  area.addEventListener("input", () => draft.set(area.value));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      submit();
    } else if (event.key === "Escape") {
      event.preventDefault();
      event.stopPropagation();
      close(true);
    }
  });
  view.element.replaceChildren(el("form.edit", { onsubmit: (event) => { event.preventDefault(); submit(); } }, area,
    el("div.row", {}, el("button.button", { type: "button", onclick: () => close(true) }, "Cancel"),
      el("button.button.primary", { type: "submit" }, "Send as new version"))));
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}
