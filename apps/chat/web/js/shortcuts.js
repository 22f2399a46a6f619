// The keyboard: every command has keys, and ? shows them.
import { byId, el } from "./dom.js";
import { dialogIsOpen, openDialog } from "./dialogs.js";
import { actions, lastQuestion, lastReply, openConversation, stop, streamingReply } from "./conversation.js";
import { closeMenu } from "./menu.js";
import { openModels } from "./models.js";
import { openSearch } from "./search.js";
import { openSettings } from "./settings.js";
import { closeDrawer, newChat, toggleSidebar } from "./sidebar.js";
import { copyText } from "./dom.js";
import { splitReasoning } from "./markdown.js";
import { state } from "./state.js";
import { nextTheme } from "./theme.js";

const mac = /Mac|iPhone|iPad/.test(navigator.platform);
const MOD = mac ? "⌘" : "Ctrl";

const step = (by) => {
  const all = [...document.querySelectorAll("#conversations .conversation")].map((row) => Number(row.dataset.key));
  if (!all.length) return;
  const at = all.indexOf(state.current?.id);
  openConversation(all[Math.max(0, Math.min(all.length - 1, at < 0 ? 0 : at + by))]);
};

// [keys to show, what, test of an event, action]
const SHORTCUTS = [
  [["Enter"], "Send the message", null, null],
  [["Shift", "Enter"], "New line", null, null],
  [["Esc"], "Stop the reply, close what is open", null, null],
  [[MOD, "K"], "Search all conversations", (e) => mod(e) && e.key.toLowerCase() === "k", openSearch],
  [["Alt", "N"], "New chat", (e) => e.altKey && e.code === "KeyN", () => newChat()],
  [["Alt", "M"], "Choose a model", (e) => e.altKey && e.code === "KeyM", openModels],
  [["Alt", "S"], "System prompt and sampling", (e) => e.altKey && e.code === "KeyS", openSettings],
  [["Alt", "B"], "Show or hide the conversations", (e) => e.altKey && e.code === "KeyB", toggleSidebar],
  [["Alt", "↑"], "Previous conversation", (e) => e.altKey && e.key === "ArrowUp", () => step(-1)],
  [["Alt", "↓"], "Next conversation", (e) => e.altKey && e.key === "ArrowDown", () => step(1)],
  [["Alt", "R"], "Regenerate the last reply", (e) => e.altKey && e.code === "KeyR", () => { const last = lastReply(); if (last && streamingReply() === undefined) actions.regenerate(last); }],
  [["Alt", "E"], "Edit the last message", (e) => e.altKey && e.code === "KeyE", () => { const last = lastQuestion(); if (last && streamingReply() === undefined) actions.edit(last); }],
  [["Alt", "C"], "Copy the last reply", (e) => e.altKey && e.code === "KeyC", () => { const last = lastReply(); if (last) copyText(splitReasoning(last.content).answer, "Reply copied"); }],
  [["Alt", "A"], "Attach files", (e) => e.altKey && e.code === "KeyA", () => byId("file-input").click()],
  [["Alt", "T"], "Light, dark or system theme", (e) => e.altKey && e.code === "KeyT", nextTheme],
  [["/"], "Go to the message box", (e) => !typing(e) && e.key === "/" && plain(e), () => byId("composer-text").focus()],
  [["?"], "This help", (e) => !typing(e) && e.key === "?", openHelp],
  [[MOD, "/"], "This help, also while typing", (e) => mod(e) && e.key === "/", openHelp],
];

const mod = (event) => (mac ? event.metaKey : event.ctrlKey) && !event.altKey;
const plain = (event) => !event.ctrlKey && !event.metaKey && !event.altKey;
const typing = (event) => /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);

export function openHelp() {
  return openDialog({
    title: "Keyboard shortcuts",
    fill: (body) => body.append(el("dl.keys", {}, ...SHORTCUTS.flatMap(([keys, what]) =>
      [el("dt", {}, what), el("dd", {}, ...keys.map((key) => el("kbd", {}, key)))]))),
  });
}

document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Escape" && !dialogIsOpen()) {
    if (closeMenu() || closeDrawer()) event.preventDefault();
    else if (streamingReply() !== undefined) {
      event.preventDefault();
      stop();
    }
    return;
  }
  if (dialogIsOpen()) return;
  for (const [, , test, action] of SHORTCUTS) {
    if (test?.(event)) {
      event.preventDefault();
      closeMenu();
      action();
      return;
    }
  }
});
byId("help").addEventListener("click", openHelp);
byId("open-search").addEventListener("click", openSearch);
