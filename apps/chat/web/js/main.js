// The beginning: what the server knows, then the page, then its events.
import "./composer.js";
import "./exchange.js";
import "./settings.js";
import "./shortcuts.js";
import { draftLoaded, fill } from "./composer.js";
import { openConversation, reload, suggestion } from "./conversation.js";
import { byId } from "./dom.js";
import { saveAll } from "./drafts.js";
import { connect } from "./events.js";
import { openModels, showModel } from "./models.js";
import { applySidebar, refresh } from "./sidebar.js";
import { on, state } from "./state.js";
import { banner } from "./status.js";
import { applyTheme } from "./theme.js";

const REPORT = `At 08:40 on 3 June users lost access to the payroll portal. For 95 minutes, 1,240 people could not work. The problem was \
traced to an expired certificate. No data was lost. Ravi Okafor fixed it with a restart of the login service. As a follow-up, the team must \
automate the update process by 20 June.`;

const wanted = () => {
  const found = /^#c\/(\d+)$/.exec(location.hash);
  return found ? Number(found[1]) : null;
};

async function begin() {
  try {
    await refresh();
  } catch (error) {
    banner(error.message, true);
    setTimeout(begin, 1000);
    return;
  }
  applyTheme();
  applySidebar();
  showModel(state.model);
  connect();
  const id = wanted();
  await openConversation(state.conversations.some((one) => one.id === id) ? id : null);
  await draftLoaded();
  byId("composer-text").focus();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

byId("suggestions").append(
  suggestion("Summarize a report", "An example that the bundled model knows", () => fill(`Summarize the following text.\n\n${REPORT}`)),
  suggestion("Ask about a document", "Attach a text, Markdown or PDF file", () => byId("attach").click()),
  suggestion("Choose a model", "The bundled one is small; use a larger one of yours", openModels),
);

window.addEventListener("hashchange", () => {
  const id = wanted();
  if (id !== null && id !== state.current?.id) openConversation(id);
});
window.addEventListener("error", (event) => banner(`Something went wrong in the page: ${event.message}. Reload it; nothing you typed is lost.`, true));

// After a gap the page asks for everything anew, and gives what only it has.
on("online", async (again) => {
  if (!again) return;
  saveAll();
  await refresh();
  await reload();
});

begin();
