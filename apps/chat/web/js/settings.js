// System prompt and sampling of a conversation, and presets of both.
import { patch, post, remove } from "./api.js";
import { attempt, byId, el, toast } from "./dom.js";
import { askDialog, openDialog } from "./dialogs.js";
import { state } from "./state.js";

const FIELDS = [
  ["temperature", "Temperature", "0 takes the likeliest token each time", "0.7", { min: "0", max: "5", step: "any" }],
  ["top_p", "Top p", "Draw among the fewest that hold this share; 1: all", "0.95", { min: "0", max: "1", step: "any" }],
  ["top_k", "Top k", "Draw among the k likeliest; 0: all", "0", { min: "0", step: "1" }],
  ["min_p", "Min p", "Drop what is less than this times as likely as the best", "0", { min: "0", max: "1", step: "any" }],
  ["repetition_penalty", "Repetition penalty", "Above 1, said tokens become less likely", "1", { min: "0", step: "any" }],
  ["max_tokens", "Most tokens", "Of a reply; empty: until the context is full", "", { min: "1", step: "1" }],
  ["seed", "Seed", "The same seed gives the same text", "", { step: "1" }],
];

export async function openSettings() {
  const now = state.current || presetOf(state.settings.preset ?? state.defaultPreset) || { system_prompt: "", sampling: {} };
  const chosen = { preset: state.current ? state.current.preset : now.id };
  await openDialog({
    title: state.current ? "This conversation" : "New conversations",
    fill: (body) => {
      const system = el("textarea", { rows: "4", id: "system-prompt", placeholder: "How the model should behave", ariaLabel: "System prompt" });
      const inputs = new Map(FIELDS.map(([name, label, , placeholder, limits]) =>
        [name, el("input", { type: "number", id: `s-${name}`, placeholder, ariaLabel: label, ...limits })]));
      const stops = el("input", { type: "text", id: "s-stop", ariaLabel: "Stop texts", placeholder: "separated by |" });
      const problem = el("p.problem", { role: "alert", hidden: true });
      const select = el("select", { ariaLabel: "Preset", id: "preset" });
      const fill = (values) => {
        system.value = values.system_prompt || "";
        for (const [name, input] of inputs) input.value = values.sampling[name] ?? "";
        stops.value = [values.sampling.stop || []].flat().join("|");
      };
      const listPresets = () => {
        select.replaceChildren(...state.presets.map((one) => el("option", { value: String(one.id), selected: one.id === chosen.preset }, one.name)),
          ...(state.presets.some((one) => one.id === chosen.preset) ? [] : [el("option", { value: "", selected: true }, "Own values")]));
        removeButton.disabled = presetOf(chosen.preset)?.builtin !== false;
      };
      const sampling = () => {
        const values = {};
        for (const [name, input] of inputs) if (input.value !== "") values[name] = Number(input.value);
        if (stops.value) values.stop = stops.value.split("|").filter(Boolean);
        return values;
      };
      const save = async () => {
        try {
          problem.hidden = true;
          if (state.current) {
            Object.assign(state.current, await patch(`conversations/${state.current.id}`, { system_prompt: system.value, sampling: sampling(), preset: chosen.preset }));
          } else if (chosen.preset) state.settings = await patch("settings", { preset: chosen.preset });
        } catch (error) {
          problem.textContent = error.message;
          problem.hidden = false;
        }
      };
      let timer = 0;
      const later = () => { clearTimeout(timer); timer = setTimeout(save, 300); };
      const removeButton = el("button.button", { type: "button", onclick: () => attempt(async () => {
        const found = await remove(`presets/${chosen.preset}`);
        state.presets = found.presets;
        chosen.preset = null;
        listPresets();
        await save();
      }) }, "Delete preset");
      select.addEventListener("change", () => {
        const preset = presetOf(Number(select.value));
        if (!preset) return;
        chosen.preset = preset.id;
        fill(preset);
        listPresets();
        save();
      });
      const saveAs = el("button.button", { type: "button", onclick: async () => {
        const name = await askDialog({ title: "Save as preset", label: "Name" });
        const found = name && await attempt(() => post("presets", { name, system_prompt: system.value, sampling: sampling() }));
        if (!found) return;
        state.presets = found.presets;
        chosen.preset = found.preset;
        listPresets();
        await save();
        toast(`Preset “${name}” saved`);
      } }, "Save as preset…");
      body.append(el("div.field", {}, el("span", {}, "Preset"), el("div.inline", {}, select, saveAs, removeButton)));
      if (!state.current) body.append(el("p.muted", {}, "The preset that new conversations begin with. In a conversation each value can be changed by itself."));
      body.append(problem, el("label.field", {}, el("span", {}, "System prompt"), system), el("div.grid", {},
        ...FIELDS.map(([name, label, help]) => el("label.field", {}, el("span", {}, label), inputs.get(name), el("small", {}, help))),
        el("label.field", {}, el("span", {}, "Stop texts"), stops, el("small", {}, "End the reply; several with | between"))));
      fill(now);
      listPresets();
      body.addEventListener("input", (event) => {
        if (event.target === select) return;
        chosen.preset = null;
        listPresets();
        if (state.current) later();
      });
      body.closest("dialog").addEventListener("close", () => { if (state.current) save(); });
    },
  });
}

const presetOf = (id) => state.presets.find((one) => one.id === id);

byId("conversation-settings").addEventListener("click", openSettings);
