// Elements, icons, announcements, toasts.

/** el("button.icon", {onclick, ariaLabel: "…"}, child, "text") */
export function el(spec, attributes = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const node = document.createElement(tag || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria") && name !== "aria") node.setAttribute(`aria-${name.slice(4).toLowerCase()}`, String(value));
    else if (name in node && typeof value !== "string") node[name] = value;
    else if (["value", "textContent", "className", "htmlFor"].includes(name)) node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name, small = false) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  if (small) svg.classList.add("small");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows only an icon. */
export function iconButton(name, label, onclick, extra = {}) {
  return el("button.icon.small", { type: "button", ariaLabel: label, title: label, onclick, ...extra }, icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Tell people who listen instead of look. */
export function announce(text) {
  const region = byId("announcer");
  region.textContent = "";
  requestAnimationFrame(() => { region.textContent = text; });
}

export function toast(text, bad = false) {
  const close = iconButton("close", "Dismiss", () => node.remove());
  const node = el(bad ? "div.toast.bad" : "div.toast", {}, el("span", {}, text), close);
  const all = byId("toasts");
  while (all.children.length > 2) all.firstChild.remove();
  all.append(node);
  setTimeout(() => node.remove(), bad ? 12000 : 4000);
}

/** Run something that may be refused; the refusal becomes a toast. */
export async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name === "Refused" || error.status !== undefined) toast(error.message, true);
    else {
      toast(`Something went wrong in the page: ${error.message}. Reload it; nothing you typed is lost.`, true);
      console.error(error);
    }
    return undefined;
  }
}

export async function copyText(text, what = "Copied") {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(what);
}

export const bytes = (count) => {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (count >= size) return `${(count / size).toFixed(count >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${count} B`;
};
