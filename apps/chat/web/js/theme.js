// Light, dark, or as the system has it.
import { patch } from "./api.js";
import { announce, byId, icon } from "./dom.js";
import { state } from "./state.js";

const ORDER = ["system", "light", "dark"];
const ICONS = { system: "auto", light: "sun", dark: "moon" };

export function applyTheme() {
  const theme = state.settings.theme || "system";
  document.documentElement.dataset.theme = theme;
  const button = byId("theme");
  button.replaceChildren(icon(ICONS[theme]));
  button.setAttribute("aria-label", `Theme: ${theme}`);
  button.title = `Theme: ${theme}`;
}

export async function nextTheme() {
  state.settings.theme = ORDER[(ORDER.indexOf(state.settings.theme || "system") + 1) % ORDER.length];
  applyTheme();
  announce(`Theme: ${state.settings.theme}`);
  try {
    await patch("settings", { theme: state.settings.theme });
  } catch {
    // it holds until the page is closed
  }
}

byId("theme").addEventListener("click", nextTheme);
