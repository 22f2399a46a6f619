// The message box: drafts, attachments by button, drop and long paste, send and stop.
import { post, remove, upload } from "./api.js";
import { announce, attempt, byId, el, toast } from "./dom.js";
import { begin, stop, streamingReply } from "./conversation.js";
import { Draft } from "./drafts.js";
import { fileChip } from "./message.js";
import { draftKey, emit, on, state } from "./state.js";

const LONG_PASTE = 2000; // characters: more is a document, not a message
const box = byId("composer-text");
const list = byId("composer-files");
let draft = new Draft("new");
let files = [];
let sending = false;
let uploads = 0;
let loading = Promise.resolve();

/** When the box holds its draft. */
export const draftLoaded = () => loading;

export const focusComposer = () => box.focus();

/** Put a text into the box, as a suggestion does. */
export function fill(text) {
  box.value = text;
  draft.set(text);
  grow();
  box.focus();
}

async function load() {
  const key = draftKey();
  draft = new Draft(key);
  const mine = draft;
  box.value = "";
  files = [];
  const found = await draft.load(state.current?.draft);
  if (mine !== draft) return;
  box.value = found.text;
  files = found.attachments || [];
  grow();
  showFiles();
  emit("draft", { key, text: found.text, tokens: undefined, saved: true });
}

async function send() {
  const text = box.value;
  if (sending || uploads || streamingReply() !== undefined || (!text.trim() && !files.length)) return;
  if (!state.online) {
    toast("The chat's server does not answer, so nothing was sent. Your text is kept; start edge-runtime chat again.", true);
    return;
  }
  sending = true;
  box.readOnly = true; // what came after would belong to nothing
  draft.hold();
  const mine = draft;
  try {
    const last = state.current?.messages.at(-1);
    const began = await begin(async () => {
      const found = await post("messages", {
        conversation: state.current?.id ?? null, parent: last?.id ?? null, text, draft: mine.key,
        folder: state.current ? null : state.newFolder ?? null,
      });
      // Sent and stored: only now may the box forget it.
      mine.sent();
      if (draft === mine) {
        box.value = "";
        files = [];
        showFiles();
      }
      return found;
    });
    if (began) {
      state.drafts.delete(mine.key);
      emit("drafts");
    } else mine.release();
  } finally {
    sending = false;
    box.readOnly = false;
    grow();
    buttons();
    box.focus();
  }
}

export async function attach(chosen, pasted = false) {
  const { key } = draft;
  for (const file of chosen) {
    uploads += 1;
    const waiting = el("li", {}, el("span.file", {}, el("span.name", {}, `Reading ${file.name}…`)));
    list.append(waiting);
    list.hidden = false;
    buttons();
    const found = await attempt(() => upload(`attachments?draft=${encodeURIComponent(key)}&name=${encodeURIComponent(file.name)}${pasted ? "&pasted=1" : ""}`, file));
    uploads -= 1;
    waiting.remove();
    if (found && draft.key === key) {
      files.push(found);
      announce(`${file.name} attached`);
    }
    showFiles();
  }
}

function showFiles() {
  list.replaceChildren(...files.map((file) => el("li", {}, fileChip(file, () => attempt(async () => {
    await remove(`attachments/${file.id}`);
    files = files.filter((one) => one !== file);
    showFiles();
    box.focus();
  })))));
  list.hidden = files.length === 0;
  buttons();
}

function grow() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  buttons();
}

function buttons() {
  const busy = streamingReply() !== undefined;
  byId("stop").hidden = !busy;
  byId("send").hidden = busy;
  byId("send").disabled = sending || uploads > 0 || (!box.value.trim() && !files.length);
}

box.addEventListener("input", () => {
  draft.set(box.value);
  grow();
});
box.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
box.addEventListener("paste", (event) => {
  const pastedFiles = [...(event.clipboardData?.files || [])];
  const text = event.clipboardData?.getData("text/plain") || "";
  if (pastedFiles.length && !text) {
    event.preventDefault();
    attach(pastedFiles);
  } else if (text.length > LONG_PASTE) {
    event.preventDefault();
    const number = files.filter((file) => file.kind === "paste").length + 1;
    attach([new File([text], `Pasted text ${number}.txt`)], true);
    toast("The long text became an attachment");
  }
});
byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("stop").addEventListener("click", async () => { await stop(); box.focus(); });
byId("attach").addEventListener("click", () => byId("file-input").click());
byId("file-input").addEventListener("change", (event) => {
  attach([...event.target.files]);
  event.target.value = "";
});

let depth = 0;
const carriesFiles = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
window.addEventListener("dragenter", (event) => { if (carriesFiles(event)) { depth += 1; byId("drop").hidden = false; } });
window.addEventListener("dragleave", (event) => { if (carriesFiles(event)) { depth -= 1; byId("drop").hidden = depth <= 0; } });
window.addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });
window.addEventListener("drop", (event) => {
  depth = 0;
  byId("drop").hidden = true;
  if (!carriesFiles(event)) return;
  event.preventDefault();
  attach([...event.dataTransfer.files]);
});

on("leaving", () => draft.save());
on("opened", () => { loading = load(); });
on("running", buttons);
on("shown", buttons);
on("draft", ({ key, text, saved }) => {
  if (!saved) return;
  if (text || files.length) state.drafts.add(key);
  else state.drafts.delete(key);
  emit("drafts");
});
