// The figures below the message box: speed, first token, context, where the KV lives; and the banner for troubles.
import { byId, bytes, el, iconButton } from "./dom.js";
import { on, state } from "./state.js";

let draftTokens = 0;
const live = { began: 0, first: 0, pieces: 0 };

function figures(stats) {
  const speed = stats?.tokens_per_second;
  byId("stat-speed").textContent = speed ? `${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tok/s` : "– tok/s";
  const first = stats?.ttft;
  byId("stat-first").textContent = first ? `first ${first < 1 ? `${Math.round(first * 1000)} ms` : `${first.toFixed(1)} s`}` : "first – ms";
}

function context() {
  const stats = [...(state.current?.messages || [])].reverse().find((message) => message.stats)?.stats;
  const limit = state.model.context || stats?.context || 0;
  const used = (stats ? stats.prompt_tokens + stats.completion_tokens : 0) + draftTokens;
  const meter = byId("stat-context");
  meter.max = limit || 1;
  meter.low = limit * 0.7;
  meter.high = limit * 0.9;
  meter.value = Math.min(used, limit || 1);
  const short = (count) => (count >= 10000 ? `${Math.round(count / 1000)}k` : count.toLocaleString("en"));
  byId("stat-context-text").textContent = limit ? `${short(used)} / ${short(limit)}` : short(used);
  meter.setAttribute("aria-valuetext", `${used} of ${limit} tokens`);
}

function kv(where) {
  const total = Math.max(1, where.budget);
  const used = where.device + where.host;
  // A full bar is the budget; what little is used must still be seen.
  const share = (part) => (part ? Math.max(2, (100 * part) / total) : 0);
  byId("kv-device").setAttribute("width", String(share(where.device)));
  byId("kv-host").setAttribute("x", String(share(where.device)));
  byId("kv-host").setAttribute("width", String(share(where.host)));
  byId("kv-text").textContent = `${where.mode} · ${bytes(used)}`;
  const text = `KV cache: ${bytes(where.device)} on the device, ${bytes(where.host)} in host memory, of ${bytes(where.budget)}; mode: ${where.mode}, on ${where.on}`;
  byId("kv-bar").setAttribute("aria-label", text);
  byId("kv").title = text;
}

let told = 0; // devices whose loss the notice has told of

/** A lost device is said until it is read, or the model is opened again. */
function devices({ lost, planned, on: now }) {
  if (lost === told) return;
  const place = byId("notice");
  place.hidden = lost === 0;
  place.replaceChildren(...(lost ? [
    el("span", {}, `The device ${planned} was lost. Nothing is lost with it: ${now} goes on, perhaps slower. To use the device again, open the model again.`),
    iconButton("close", "Dismiss", () => { place.hidden = true; }),
  ] : []));
  told = lost;
}

export function banner(text, bad = false) {
  const place = byId("banner");
  place.hidden = !text;
  place.classList.toggle("bad", bad);
  place.replaceChildren(el("span", {}, text || ""));
}

on("shown", () => {
  figures([...(state.current?.messages || [])].reverse().find((message) => message.stats)?.stats);
  context();
});
on("opened", () => { draftTokens = 0; figures([...(state.current?.messages || [])].reverse().find((message) => message.stats)?.stats); context(); });
on("draft", ({ tokens, text }) => { draftTokens = text ? tokens ?? draftTokens : 0; context(); });
on("delta", (delta) => { // a guess while it streams: most pieces are one token
  if (state.current?.id !== delta.conversation) return;
  if (delta.piece === 0) Object.assign(live, { began: performance.now(), pieces: 0 });
  live.pieces = delta.next;
  const seconds = (performance.now() - live.began) / 1000;
  if (seconds > 0.3) figures({ tokens_per_second: live.pieces / seconds });
});
on("model", context);
on("kv", kv);
on("kv", devices);
let saving = "";
on("draft", ({ saved, error }) => {
  saving = saved ? "" : error?.message || "Not saved";
  byId("saved").textContent = saved ? "" : "Draft kept in this browser only";
  byId("saved").title = saving;
  if (!saved && error?.status === 507) banner(error.message, true);
});
on("trouble", ({ message }) => banner(message, true));
on("offline", (message) => banner(message));
on("online", () => banner(""));
