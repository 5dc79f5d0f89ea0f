// Starts the page: the form, its keys, and what they do.

import { storeKey, storedKey } from "/page/api.js";
import { Conversation, Refused } from "/page/conversation.js";
import { Status } from "/page/status.js";

const byId = (id) => document.getElementById(id);
const form = byId("composer");
const fields = form.elements;
const prompt = byId("prompt");
const send = byId("send");
const trouble = byId("trouble");
const HINTS = {
  chat: "Say something to the model.\nA model without training in chats continues text instead: choose Complete.",
  complete: "Type the beginning of a text, for example\ndef main():",
};

const conversation = new Conversation(byId("log"));
const status = new Status({
  model: byId("model"),
  health: byId("health"),
  numbers: byId("numbers"),
  plots: byId("plots"),
});

function tell(text) {
  trouble.textContent = text;
  trouble.hidden = text === "";
}

function showBusy() {
  const isBusy = conversation.isBusy;
  // One button, so that the focus stays where it is.
  send.textContent = isBusy ? "Stop" : "Send";
  send.classList.toggle("stops", isBusy);
}

function chooseMode() {
  byId("log").dataset.hint = HINTS[fields.mode.value];
  form.classList.toggle("complete-mode", fields.mode.value === "complete");
  prompt.placeholder = fields.mode.value === "complete" ? "Text to continue" : "Message";
}

/** What the fields say; an empty one leaves the choice to the server. Null if one of them makes no sense. */
function params() {
  const chosen = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    const field = fields[name];
    if (!field.checkValidity()) {
      byId("settings").open = true;
      field.focus();
      tell(`${field.labels[0].textContent.trim()}: ${field.validationMessage}`);
      return null;
    }
    if (field.value !== "") chosen[name] = Number(field.value);
  }
  return chosen;
}

async function submit() {
  const text = prompt.value;
  const chosen = params();
  if (text === "" || chosen === null || conversation.isBusy) return;
  tell("");
  prompt.value = "";
  const saying = conversation.say(text, fields.mode.value, fields.system.value, chosen);
  showBusy();
  try {
    await saying;
  } catch (error) {
    tell(error.message);
    if (error instanceof Refused && prompt.value === "") prompt.value = text;
    if (error.isAboutKey) {
      byId("settings").open = true;
      fields.key.focus();
    }
  }
  showBusy();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (conversation.isBusy) conversation.stop();
  else submit();
});

prompt.addEventListener("keydown", (event) => {
  // Enter that chooses a word of an input method sends nothing.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") conversation.stop();
});

byId("clear").addEventListener("click", () => {
  conversation.clear();
  tell("");
  prompt.focus();
});

fields.key.value = storedKey();
fields.key.addEventListener("change", () => {
  storeKey(fields.key.value.trim());
  tell("");
  status.resume();
});

for (const each of fields.mode) each.addEventListener("change", chooseMode);
chooseMode();
