// The list of conversations: pinned ones, folders, the rest; rename, pin, file, export, delete.
import { get, patch, post, remove } from "./api.js";
import { announce, attempt, byId, el, icon, iconButton } from "./dom.js";
import { askDialog, confirmDialog } from "./dialogs.js";
import { openConversation } from "./conversation.js";
import { exportConversation } from "./exchange.js";
import { openMenu } from "./menu.js";
import { emit, isBusy, on, state } from "./state.js";

const app = byId("app");
const narrow = window.matchMedia("(max-width: 760px)");

export function newChat(folder = null) {
  state.newFolder = folder;
  openConversation(null);
  closeDrawer();
  byId("composer-text").focus();
}

export async function refresh() {
  const found = await get("start");
  Object.assign(state, { conversations: found.conversations, folders: found.folders, presets: found.presets, settings: found.settings,
    defaultPreset: found.default_preset, drafts: new Set(found.drafts), model: found.model, kv: found.kv, version: found.version });
  emit("drafts");
  emit("model", found.model);
  if (found.kv) emit("kv", found.kv);
}

function render() {
  const focused = document.activeElement?.closest?.(".conversation")?.dataset.key;
  const root = byId("conversations");
  const rows = state.conversations;
  const pinned = rows.filter((one) => one.pinned);
  const parts = [];
  const group = (heading, list) => { if (list.length || heading.folder) parts.push(section(heading, list)); };
  group({ name: "Pinned", icon: "pin" }, pinned);
  for (const folder of state.folders) group({ name: folder.name, icon: "folder", folder }, rows.filter((one) => !one.pinned && one.folder === folder.id));
  const rest = rows.filter((one) => !one.pinned && !state.folders.some((folder) => folder.id === one.folder));
  for (const [name, list] of byAge(rest)) group({ name }, list);
  if (!rows.length) parts.push(el("p.empty", {}, "No conversations yet. What you write appears here."));
  root.replaceChildren(...parts);
  if (focused) root.querySelector(`[data-key="${focused}"] .open`)?.focus();
}

function byAge(rows) {
  const midnight = new Date().setHours(0, 0, 0, 0) / 1000;
  const groups = new Map([["Today", []], ["Last 7 days", []], ["Older", []]]);
  for (const one of rows) groups.get(one.updated >= midnight ? "Today" : one.updated >= midnight - 6 * 86400 ? "Last 7 days" : "Older").push(one);
  return groups;
}

function section(heading, list) {
  const title = el("h2", {}, heading.icon && icon(heading.icon), el("span.name", {}, heading.name));
  if (heading.folder) {
    const more = iconButton("more", `Folder ${heading.name}`, () => folderMenu(more, heading.folder), { ariaHaspopup: "menu" });
    title.append(more);
  }
  return el("section", { ariaLabel: heading.name }, title, el("ul", {}, ...list.map(row)));
}

function row(one) {
  const current = state.current?.id === one.id;
  const open = el("button.open", { type: "button", ariaCurrent: current ? "page" : undefined, title: one.title,
    onclick: () => { openConversation(one.id); closeDrawer(); }, ondblclick: () => rename(one) }, one.title);
  const more = iconButton("more", `Menu of ${one.title}`, () => conversationMenu(more, one), { ariaHaspopup: "menu", className: "icon small more" });
  const mark = isBusy(one.id) ? el("span.dot.busy", { role: "img", ariaLabel: "A reply is being written" })
    : state.drafts.has(`c:${one.id}`) && !current ? el("span.dot.draft", { role: "img", ariaLabel: "Has a draft" }) : null;
  return el(current ? "li.conversation.current" : "li.conversation", { "data-key": String(one.id) }, open, mark, more);
}

const change = (one, values) => attempt(() => patch(`conversations/${one.id}`, values));

async function rename(one) {
  const title = await askDialog({ title: "Rename conversation", label: "Title", value: one.title });
  if (title) await change(one, { title });
}

export async function deleteConversation(one) {
  const sure = await confirmDialog({ title: "Delete this conversation?", danger: true, action: "Delete",
    text: `“${one.title}” with all its versions and attachments is deleted. Export it first if you may want it again.` });
  if (sure && await attempt(() => remove(`conversations/${one.id}`))) announce("Conversation deleted");
}

async function fileAway(one, button) {
  const into = (folder) => change(one, { folder });
  openMenu(button, [
    ...state.folders.filter((folder) => folder.id !== one.folder).map((folder) => ({ label: folder.name, icon: "folder", action: () => into(folder.id) })),
    ...(one.folder ? [{ label: "No folder", icon: "close", action: () => into(null) }] : []),
    { label: "New folder…", icon: "plus", action: async () => {
      const folder = await newFolder();
      if (folder) into(folder);
    } },
  ]);
}

export function conversationMenu(button, one) {
  openMenu(button, [
    { label: "Rename…", icon: "edit", action: () => rename(one) },
    { label: one.pinned ? "Unpin" : "Pin", icon: "pin", action: () => change(one, { pinned: !one.pinned }) },
    { label: "Move to folder…", icon: "folder", action: () => fileAway(one, button) },
    "-",
    { label: "Export as Markdown", icon: "export", action: () => exportConversation(one.id, "md") },
    { label: "Export as JSON", icon: "export", action: () => exportConversation(one.id, "json") },
    "-",
    { label: "Delete…", icon: "trash", danger: true, action: () => deleteConversation(one) },
  ]);
}

function folderMenu(button, folder) {
  openMenu(button, [
    { label: "New chat here", icon: "plus", action: () => newChat(folder.id) },
    { label: "Rename…", icon: "edit", action: async () => {
      const name = await askDialog({ title: "Rename folder", label: "Name", value: folder.name });
      if (name) await attempt(() => patch(`folders/${folder.id}`, { name }));
    } },
    { label: "Delete folder…", icon: "trash", danger: true, action: async () => {
      const sure = await confirmDialog({ title: "Delete this folder?", text: "Its conversations stay, in no folder.", action: "Delete folder", danger: true });
      if (sure) await attempt(() => remove(`folders/${folder.id}`));
    } },
  ]);
}

export async function newFolder() {
  const name = await askDialog({ title: "New folder", label: "Name", action: "Create" });
  const found = name && await attempt(() => post("folders", { name }));
  return found?.folder;
}

export function toggleSidebar() {
  if (narrow.matches) {
    if (app.classList.toggle("drawer")) byId("new-chat").focus();
    else byId("open-sidebar").focus();
  } else {
    app.classList.toggle("no-sidebar");
    attempt(() => patch("settings", { sidebar: !app.classList.contains("no-sidebar") }));
    byId(app.classList.contains("no-sidebar") ? "open-sidebar" : "close-sidebar").focus();
  }
  state.settings.sidebar = !app.classList.contains("no-sidebar");
  shape();
}

export function closeDrawer() {
  if (!app.classList.contains("drawer")) return false;
  app.classList.remove("drawer");
  shape();
  byId("open-sidebar").focus();
  return true;
}

/** A closed drawer is out of reach, an open one holds everything. */
function shape() {
  const open = narrow.matches ? app.classList.contains("drawer") : !app.classList.contains("no-sidebar");
  byId("open-sidebar").setAttribute("aria-expanded", String(open));
  byId("scrim").hidden = !app.classList.contains("drawer");
  document.querySelector("main").inert = narrow.matches && app.classList.contains("drawer");
}

export function applySidebar() {
  app.classList.toggle("no-sidebar", state.settings.sidebar === false);
  shape();
}

narrow.addEventListener("change", () => { app.classList.remove("drawer"); shape(); });
byId("new-chat").addEventListener("click", () => newChat());
byId("new-folder").addEventListener("click", newFolder);
byId("open-sidebar").addEventListener("click", toggleSidebar);
byId("close-sidebar").addEventListener("click", toggleSidebar);
byId("scrim").addEventListener("click", closeDrawer);
byId("conversation-menu").addEventListener("click", (event) => {
  if (state.current) conversationMenu(event.currentTarget, state.current);
});

on("conversation", (one) => {
  state.conversations = [one, ...state.conversations.filter((other) => other.id !== one.id)].sort((a, b) => b.updated - a.updated || b.id - a.id);
  if (state.current?.id === one.id) {
    Object.assign(state.current, one);
    byId("title").textContent = one.title;
  }
  render();
});
on("gone", ({ conversation }) => {
  state.conversations = state.conversations.filter((one) => one.id !== conversation);
  render();
});
on("folders", ({ folders }) => {
  state.folders = folders;
  for (const one of state.conversations) if (!folders.some((folder) => folder.id === one.folder)) one.folder = null;
  render();
});
on("opened", () => {
  byId("conversation-menu").disabled = !state.current;
  render();
});
on("drafts", render);
on("running", render);
