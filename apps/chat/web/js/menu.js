// Menus at a button: arrow keys move, Escape closes, the focus goes back.
import { byId, el, icon } from "./dom.js";

let open = null;

/** items: {label, icon, action, danger} or "-". */
export function openMenu(button, items) {
  const again = open?.button === button;
  closeMenu();
  if (again) return;
  const menu = el("div.menu", { role: "menu" });
  for (const item of items) {
    if (item === "-") {
      menu.append(el("hr", { role: "separator" }));
      continue;
    }
    menu.append(el(item.danger ? "button.danger" : "button", {
      type: "button", role: "menuitem", tabindex: "-1",
      onclick: () => { closeMenu(); item.action(); },
    }, icon(item.icon || "right"), item.label));
  }
  menu.addEventListener("keydown", (event) => {
    const all = [...menu.querySelectorAll("button")];
    const at = all.indexOf(document.activeElement);
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next !== undefined) {
      event.preventDefault();
      all[(next + all.length) % all.length].focus();
    } else if (event.key === "Escape" || event.key === "Tab") {
      event.preventDefault();
      event.stopPropagation();
      closeMenu();
    }
  });
  byId("menu-root").append(menu);
  const spot = button.getBoundingClientRect();
  const left = Math.min(spot.left, window.innerWidth - menu.offsetWidth - 8);
  const below = spot.bottom + 4 + menu.offsetHeight < window.innerHeight;
  menu.style.left = `${Math.max(8, left)}px`;
  menu.style.top = below ? `${spot.bottom + 4}px` : `${Math.max(8, spot.top - menu.offsetHeight - 4)}px`;
  button.setAttribute("aria-expanded", "true");
  open = { button, menu };
  menu.querySelector("button").focus();
}

export function closeMenu() {
  if (!open) return false;
  const { button, menu } = open;
  open = null;
  const inside = menu.contains(document.activeElement);
  menu.remove();
  button.setAttribute("aria-expanded", "false");
  if (inside && button.isConnected) button.focus();
  return true;
}

document.addEventListener("pointerdown", (event) => {
  if (open && !open.menu.contains(event.target) && !open.button.contains(event.target)) closeMenu();
});
