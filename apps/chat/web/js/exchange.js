// Export and import of conversations.
import { upload } from "./api.js";
import { announce, attempt, byId, el, toast } from "./dom.js";
import { openConversation } from "./conversation.js";
import { state } from "./state.js";

export function exportConversation(id, format) {
  const link = el("a", { href: `/api/export?format=${format}${id ? `&conversation=${id}` : ""}`, download: "" });
  document.body.append(link);
  link.click();
  link.remove();
  announce("Exported");
}

export async function importFiles(files) {
  for (const file of files) {
    const found = await attempt(() => upload(`import?name=${encodeURIComponent(file.name)}`, file));
    if (!found) continue;
    const count = found.conversations.length;
    toast(`${count} conversation${count === 1 ? "" : "s"} imported from ${file.name}`);
    if (count) await openConversation(found.conversations[0]);
  }
}

byId("import").addEventListener("click", () => byId("import-input").click());
byId("import-input").addEventListener("change", async (event) => {
  await importFiles([...event.target.files]);
  event.target.value = "";
});
byId("export-all").addEventListener("click", () => {
  if (state.conversations.length) exportConversation(null, "json");
  else toast("There is nothing to export yet");
});
