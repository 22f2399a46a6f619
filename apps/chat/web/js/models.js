// The model picker: what there is, whether it fits, loading with progress, files and pulls.
import { get, post, remove } from "./api.js";
import { announce, attempt, byId, bytes, el, toast } from "./dom.js";
import { openDialog } from "./dialogs.js";
import { on, state } from "./state.js";

const SOURCES = { bundled: "ships with Edge Runtime", file: "file on this machine", pulled: "pulled from a hub" };
const STAGES = { plan: "Planning", close: "Closing the one before", load: "Loading weights", compile: "Compiling kernels (first use)",
  measure: "Measuring device and processor (first use)" };
let refreshList = null;

export async function openModels() {
  await openDialog({
    title: "Models", className: "wide-dialog",
    fill: (body) => {
      const list = el("ul.models", { ariaLabel: "Models" });
      const progress = el("div", { role: "status" });
      body.append(progress, list, addForm(), pullForm());
      let asked = 0;
      refreshList = async () => {
        const mine = ++asked; // an answer that was overtaken would show what was
        const found = await attempt(() => get("models"));
        if (!found || mine !== asked || !list.isConnected) return;
        showProgress(progress);
        list.replaceChildren(...found.models.map(entry));
      };
      refreshList();
    },
  });
  refreshList = null;
  byId("composer-text").focus();
}

function entry(model) {
  const loading = state.model.state === "loading";
  const fit = el("div.fit", {}, "Estimating…");
  const button = el(model.current ? "button.button" : "button.button.primary", {
    type: "button", disabled: model.current || loading, ariaLabel: model.current ? `${model.name} is open` : `Open ${model.name}`,
    onclick: () => attempt(() => post("models/load", { name: model.name })) }, model.current ? "Open" : "Use");
  const row = el(model.current ? "li.model.current" : "li.model", { "data-model": model.name },
    el("div.name", {}, model.name), el("div.facts", {}, `${SOURCES[model.source] || model.source} · ${bytes(model.bytes)}`), el("div.act", {}, button), fit);
  estimate(model, fit, row, button);
  return row;
}

async function estimate(model, fit, row, button) {
  let plan;
  try {
    plan = await get(`models/plan?name=${encodeURIComponent(model.name)}`);
  } catch (error) {
    plan = { error: error.message };
  }
  if (plan.error) {
    fit.className = "fit no";
    fit.textContent = plan.error;
    button.disabled = true;
    return;
  }
  fit.className = plan.fits ? "fit" : "fit no";
  fit.textContent = plan.fits
    ? `Fits: needs ${bytes(plan.needed)} of ${bytes(plan.available)} free, context ${plan.context.toLocaleString("en")} tokens`
    : plan.message;
  button.disabled ||= !plan.fits;
  row.append(el("details", {}, el("summary", {}, "Plan"), el("table", {}, el("tbody", {},
    ...plan.rows.map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", {}, value)))))));
}

function addForm() {
  const input = el("input", { type: "text", placeholder: "/path/to/model.gguf", ariaLabel: "Path of a GGUF file", spellcheck: "false" });
  return el("form", { id: "add-model", onsubmit: async (event) => {
    event.preventDefault();
    const found = await attempt(() => post("models/add", { path: input.value }));
    if (!found) return;
    input.value = "";
    toast(`${found.name} was added`);
    await refreshList?.();
    [...document.querySelectorAll("[data-model]")].find((row) => row.dataset.model === found.name)?.querySelector("button")?.focus();
  } }, el("h3", {}, "Add a file"), el("div.inline", {}, input, el("button.button", { type: "submit" }, "Add")));
}

function pullForm() {
  const input = el("input", { type: "text", placeholder: "org/repo:Q4_0", ariaLabel: "Model on the hub", spellcheck: "false" });
  const form = el("form", { id: "pull-model", onsubmit: async (event) => {
    event.preventDefault();
    if (input.value.trim()) await attempt(() => post("models/pull", { model: input.value.trim() }));
  } }, el("h3", {}, "Pull from the Hugging Face hub"), el("div.inline", {}, input, el("button.button", { type: "submit" }, "Pull")));
  form.append(el("div", { id: "pull-state", role: "status" }));
  requestAnimationFrame(showPull);
  return form;
}

function showPull() {
  const place = byId("pull-state");
  if (!place) return;
  const { pull } = state;
  if (pull.state === "pulling") {
    const text = pull.total ? `${bytes(pull.done)} of ${bytes(pull.total)}` : "asking the hub…";
    place.replaceChildren(el("p.inline", {}, el("span", {}, `${pull.model}: ${text}`),
      el("button.button", { type: "button", onclick: () => attempt(() => remove("models/pull")) }, "Stop")),
    el("progress", { max: "1", value: pull.total ? String(pull.done / pull.total) : undefined, ariaLabel: "Download" }));
  } else if (pull.state === "failed") place.replaceChildren(el("p.problem", {}, pull.error));
  else if (pull.state === "stopped") place.replaceChildren(el("p.muted", {}, "Stopped. Pulling it again goes on from there."));
  else if (pull.state === "done") place.replaceChildren(el("p.muted", {}, `${pull.model} is here.`));
  else place.replaceChildren();
}

function showProgress(place) {
  const { model } = state;
  if (model.state === "failed") place.replaceChildren(el("p.problem", {}, `${model.name}: ${model.error}`));
  else if (model.state === "loading") {
    place.replaceChildren(el("p.muted", {}, stageText(model)), el("progress", { max: "1", value: String(model.fraction || 0), ariaLabel: "Loading the model" }));
  } else place.replaceChildren();
}

const stageText = (model) => `${STAGES[model.stage] || "Loading"} · ${model.name}${model.detail ? ` · ${model.detail}` : ""}`
  + `${model.stage === "load" ? ` · ${Math.round(100 * model.fraction)} %` : ""}`;

export function showModel(model) {
  const bar = byId("load-bar");
  bar.hidden = model.state !== "loading";
  if (model.state === "loading") {
    bar.value = model.fraction || 0;
    bar.setAttribute("aria-valuetext", stageText(model));
  }
  const name = { loading: `Loading ${model.name}…`, failed: "Choose a model", ready: model.name }[model.state] || "No model";
  byId("model-name").textContent = name;
  byId("model-button").setAttribute("aria-label", `Model: ${name}. Choose another`);
  byId("model-button").title = model.state === "ready" ? `${model.name}, context ${model.context} tokens, KV ${model.kv_dtype}, on ${model.device}` : name;
}

let before = "";
on("model", (model) => {
  state.model = model;
  showModel(model);
  if (model.state === "failed" && before !== "failed") toast(`${model.name} could not be opened. ${model.error}`, true);
  if (model.state === "ready" && before === "loading") announce(`${model.name} is ready`);
  if (model.state !== before) refreshList?.();
  else if (model.state === "loading") {
    const place = document.querySelector("dialog [role=status]");
    if (refreshList && place) showProgress(place);
  }
  before = model.state;
});
on("pull", (pull) => {
  const done = pull.state === "done" && state.pull.state === "pulling";
  state.pull = pull;
  showPull();
  if (done) {
    toast(`${pull.model} was pulled`);
    refreshList?.();
  }
});
byId("model-button").addEventListener("click", openModels);
