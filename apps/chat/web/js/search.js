// Search over all conversations: a palette with a list that the arrow keys walk.
import { get } from "./api.js";
import { attempt, el } from "./dom.js";
import { openDialog } from "./dialogs.js";
import { openConversation } from "./conversation.js";
import { closeDrawer } from "./sidebar.js";

const KINDS = { message: "", title: "Title · ", attachment: "Attachment · " };

/** An excerpt whose matches, between \x02 and \x03, are marked. */
function excerpt(text) {
  return text.split(/(\x02[^\x03]*\x03)/).map((part) => (part.startsWith("\x02") ? el("mark", {}, part.slice(1, -1)) : part));
}

export async function openSearch() {
  let hits = [];
  let at = 0;
  let asked = 0;
  const chosen = await openDialog({
    title: "Search all conversations", className: "palette",
    fill: (body, close) => {
      const note = el("p.hits-note", { role: "status" }, "Words in titles, messages and attachments; “in quotes” for phrases.");
      const list = el("ul.hits", { id: "hits", role: "listbox", ariaLabel: "Found" });
      const input = el("input", { type: "search", autofocus: "", placeholder: "Search", ariaLabel: "Search all conversations", role: "combobox",
        ariaExpanded: "true", ariaControls: "hits", autocomplete: "off" });
      const select = (next) => {
        at = Math.max(0, Math.min(hits.length - 1, next));
        [...list.children].forEach((node, i) => node.setAttribute("aria-selected", String(i === at)));
        list.children[at]?.scrollIntoView({ block: "nearest" });
        if (hits.length) input.setAttribute("aria-activedescendant", `hit-${at}`);
        else input.removeAttribute("aria-activedescendant");
      };
      const look = async () => {
        const mine = ++asked;
        const found = await attempt(() => get(`search?q=${encodeURIComponent(input.value)}`));
        if (!found || mine !== asked) return;
        hits = found.hits;
        note.textContent = !input.value.trim() ? "Words in titles, messages and attachments; “in quotes” for phrases."
          : hits.length ? `${hits.length}${hits.length === 50 ? " or more" : ""} found` : "Nothing found";
        list.replaceChildren(...hits.map((hit, i) => el("li.hit", { id: `hit-${i}`, role: "option", onclick: () => close(hit) },
          el("b", {}, hit.title), el("span", {}, KINDS[hit.kind], ...excerpt(hit.excerpt)))));
        select(0);
      };
      let timer = 0;
      input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(look, 90); });
      input.addEventListener("keydown", (event) => {
        const next = { ArrowDown: at + 1, ArrowUp: at - 1 }[event.key];
        if (next !== undefined) {
          event.preventDefault();
          select(next);
        } else if (event.key === "Escape") { // which would only empty a search box
          event.preventDefault();
          close();
        } else if (event.key === "Enter" && hits[at]) {
          event.preventDefault();
          close(hits[at]);
        }
      });
      body.append(input, list, note);
    },
  });
  if (!chosen) return;
  closeDrawer();
  await openConversation(chosen.conversation, chosen.message);
}
