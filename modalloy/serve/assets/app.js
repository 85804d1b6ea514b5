// The page: what is asked, of whom, and what comes back.

import * as api from "./api.js";
import { mediumAt, snippets, whole } from "./asking.js";
import { $, h, refuse, say } from "./dom.js";
import { modalitiesOf, preview, refusalOf } from "./media.js";
import { openMerge } from "./merge.js";
import { record } from "./sound.js";
import * as store from "./store.js";
import { strip } from "./strip.js";
import { welcome } from "./welcome.js";

let served = []; // models of the server
let turns = []; // {text, media, answers: {model: {text, state, error, facts, usage}}}
let attached = []; // media of the question that is being written
let stopRecording = null;
let asksForKey = false;
const running = new Map(); // AbortController by answer

const chosen = () => {
  const names = store.settings.get().models;
  const found = served.filter((one) => (names || []).includes(one.id));
  return found.length ? found : served.slice(0, 1);
};
const able = () => [...new Set(chosen().flatMap((one) => one.modalities))].filter((name) => name !== "text");
const identity = () => [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(16)).join("");

function save() {
  try {
    store.save(turns);
  } catch {
    refuse("This browser has no more room: the conversation is shown, but not kept. Export it, or begin a new one.");
  }
}

// ---- models

async function loadModels() {
  try {
    served = await api.models();
    refuse("");
  } catch (error) {
    if (error.status === 401) {
      asksForKey = true;
      openSettings();
    }
    refuse(error.message);
    return;
  }
  if (api.key.get()) asksForKey = true;
  showModels();
}

function showModels() {
  const names = chosen().map((one) => one.id);
  const boxes = served.map((one) => {
    const box = h("input", { type: "checkbox", value: one.id });
    box.checked = names.includes(one.id);
    box.addEventListener("change", () => {
      const now = [...$("models").querySelectorAll("input:checked")].map((other) => other.value);
      if (!now.length) box.checked = true; // at least one is asked
      store.settings.set({ models: now.length ? now : [one.id] });
      welcome(able(), turns.length > 0, askSample);
    });
    const senses = one.modalities.join(", ");
    return h("label", { class: "chip", title: `${senses}; ${one.context_length || "any number of"} tokens` }, box, h("span", { text: one.id }));
  });
  $("models").replaceChildren($("models").querySelector("legend"), ...boxes);
  welcome(able(), turns.length > 0, askSample);
}

// ---- media

let modelsKnown;
const known = new Promise((resolve) => (modelsKnown = resolve));

async function add(files) {
  await known; // which media fit is told by the models
  refuse("");
  for (const file of files) {
    const kinds = await modalitiesOf(file, able());
    const refused = refusalOf(file, attached, kinds, able());
    if (refused) {
      refuse(refused);
      continue;
    }
    attach(file, kinds.possible[0], kinds.possible);
  }
}

function attach(file, modality, possible) {
  attached.push({ id: identity(), file, name: file.name || "pasted", type: file.type, size: file.size, modality, possible });
  showAttached();
}

function showAttached() {
  $("attachments").replaceChildren(...attached.map((medium) => {
    medium.shown ||= preview(medium);
    const kind = h("select", { "aria-label": `Show ${medium.name} to the model as` }, ...medium.possible.map((name) => h("option", { value: name, text: name })));
    kind.value = medium.modality;
    kind.addEventListener("change", () => {
      Object.assign(medium, { modality: kind.value, shown: null });
      showAttached();
    });
    const away = h("button", { type: "button", "aria-label": `Take ${medium.name} away`, text: "×", onclick: () => {
      attached = attached.filter((other) => other !== medium);
      showAttached();
      $("question").focus();
    } });
    return h("div", { class: "attachment" }, medium.shown,
      h("div", { class: "row" }, medium.possible.length > 1 ? kind : h("span", { class: "note", text: medium.modality }), away));
  }));
}

async function toggleRecording() {
  refuse("");
  const label = (text) => ($("record").lastElementChild.textContent = text);
  try {
    if (stopRecording) {
      const stop = stopRecording;
      stopRecording = null;
      const file = await stop();
      const refused = refusalOf(file, attached, { known: ["audio"], possible: ["audio"] }, able());
      if (refused) refuse(refused);
      else attach(file, "audio", ["audio"]);
    } else if (!able().includes("audio")) {
      refuse("The chosen models take no sound.");
    } else {
      stopRecording = await record((time) => ($("record").firstElementChild.textContent = `■ ${time}`));
      say("Recording.");
    }
  } catch (error) {
    stopRecording = null;
    refuse(error.message);
  }
  $("record").setAttribute("aria-pressed", String(Boolean(stopRecording)));
  if (!stopRecording) $("record").firstElementChild.textContent = "●";
  label(stopRecording ? "Stop recording" : "Record");
}

// ---- asking

async function askSample(text, media) {
  for (const [modality, file] of media) attach(file, modality, [modality]);
  $("question").value = text;
  await submit();
}

async function submit() {
  const text = $("question").value.trim();
  if (stopRecording) await toggleRecording();
  if (running.size || (!text && !attached.length)) return;
  if (!served.length) return void loadModels();
  refuse("");
  const media = attached.map(({ shown: _, possible: __, ...medium }) => medium);
  const turn = { text, media, answers: {} };
  for (const one of chosen()) turn.answers[one.id] = { text: "", state: "running" };
  attached = [];
  $("question").value = "";
  fit();
  showAttached();
  turns.push(turn);
  for (const medium of media) {
    await store.keep(medium).catch(() => refuse(`${medium.name} is asked about, but this browser has no room to keep it.`));
  }
  save();
  welcome(able(), true, askSample);
  $("turns").lastElementChild?.querySelectorAll(".again").forEach((button) => button.remove());
  $("turns").append(turnElement(turn, turns.length - 1));
  $("turns").lastElementChild.scrollIntoView({ block: "end" });
  await Promise.all(Object.keys(turn.answers).map((model) => answer(turns.length - 1, model)));
}

async function answer(index, model) {
  const turn = turns[index];
  const found = (turn.answers[model] = { text: "", state: "running" });
  const controller = new AbortController();
  running.set(found, controller);
  busy();
  const place = () => document.getElementById(`answer-${index}-${Object.keys(turn.answers).indexOf(model)}`);
  if (place().contains(document.activeElement)) $("question").focus(); // the button that is replaced
  place().replaceWith(answerElement(index, model));
  const words = place().querySelector(".words");
  say(`${model} is answering.`);
  try {
    const body = await whole(turns, model, index);
    const told = await api.ask(body, { signal: controller.signal, onText: (text) => {
      found.text += text;
      words.append(text);
    } });
    Object.assign(found, told, { state: "done" });
  } catch (error) {
    found.state = "stopped";
    if (error.name !== "AbortError") {
      const name = mediumAt(turns, model, index, error.param);
      found.error = name ? error.message.replaceAll(error.param, name) : error.message;
      if (error.status === 401) asksForKey = true;
    }
  }
  running.delete(found);
  busy();
  if (turns[index] !== turn) return; // a new conversation was begun
  const [old, end] = [place(), atEnd()];
  old.replaceWith(answerElement(index, model));
  if (end) window.scrollTo(0, document.body.scrollHeight);
  say(found.error ? `${model}: ${found.error}` : `${model} ${found.state === "done" ? "answered" : "was stopped"}: ${found.text}`);
  save();
}

const atEnd = () => window.innerHeight + window.scrollY > document.body.scrollHeight - 200;

function busy() {
  $("send").hidden = running.size > 0;
  $("stop").hidden = !running.size;
}

// ---- what is shown

function turnElement(turn, index) {
  const media = turn.media.map((medium) => preview(medium));
  return h("article", { class: "turn", "aria-label": `Question ${index + 1}` },
    h("div", { class: "asked" }, media.length ? h("div", { class: "samples" }, ...media) : null, turn.text ? h("p", { text: turn.text }) : null),
    h("div", { class: "answers" }, ...Object.keys(turn.answers).map((model) => answerElement(index, model))));
}

function answerElement(index, model) {
  const turn = turns[index];
  const found = turn.answers[model];
  const over = found.state !== "running";
  const last = index === turns.length - 1;
  const state = found.error ? null : found.state === "stopped" ? "Stopped." : found.finish === "length" ? "The most tokens were reached." : null;
  return h("section", {
    class: "answer", id: `answer-${index}-${Object.keys(turn.answers).indexOf(model)}`, "aria-label": `Answer of ${model}`, "aria-busy": String(!over),
  },
    h("h3", { text: model }),
    h("p", { class: "words", text: found.text }),
    found.error ? h("p", { class: "error", text: found.error }) : null,
    state ? h("p", { class: "note", text: state }) : null,
    found.facts ? strip(found.facts, found.usage) : null,
    over ? h("div", { class: "row" },
      last ? h("button", { type: "button", class: "again", text: "Regenerate", onclick: () => !running.size && answer(index, model) }) : null,
      h("button", { type: "button", text: "Code", onclick: () => openCode(index, model) })) : null);
}

async function openCode(index, model) {
  const code = await snippets(turns, model, index, { origin: location.origin, hasKey: asksForKey });
  const show = (name) => {
    $("snippet").textContent = code[name];
    for (const one of ["curl", "python"]) $(`as-${one}`).setAttribute("aria-pressed", String(one === name));
  };
  $("as-curl").onclick = () => show("curl");
  $("as-python").onclick = () => show("python");
  $("copy").onclick = async () => {
    try {
      await navigator.clipboard.writeText($("snippet").textContent);
      $("copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren($("snippet"));
      $("copy").textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => ($("copy").textContent = "Copy"), 2000);
  };
  $("code-note").replaceChildren(...(code.media.length ? ["The files are read from the folder where it runs: "] : []),
    ...code.media.flatMap(({ file, name }) => [file ? h("a", { href: URL.createObjectURL(file), download: name, text: name }) : name, " "]));
  show("curl");
  $("code").showModal();
}

function openSettings() {
  const form = $("settings").querySelector("form");
  const now = { ...store.settings.get(), key: api.key.get() };
  for (const field of form.elements) if (field.name) field.value = now[field.name];
  $("settings").showModal();
}

function saveSettings(event) {
  if (event.submitter?.value !== "save") return;
  const { key, ...changes } = Object.fromEntries(new FormData(event.target));
  store.settings.set(changes);
  const other = key !== api.key.get();
  api.key.set(key);
  if (other || !served.length) loadModels();
}

async function saveExport() {
  const text = await store.exported(turns);
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "modalloy-conversation.json" });
  link.click();
}

async function begin() {
  if (turns.length && !confirm("Forget this conversation and its media?")) return;
  running.forEach((controller) => controller.abort());
  turns = [];
  await store.clear().catch(() => null);
  $("turns").replaceChildren();
  welcome(able(), false, askSample);
  $("question").focus();
}

/** The question's field is as high as its text, up to a limit. */
function fit() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, 200)}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("question").addEventListener("input", fit);
$("stop").addEventListener("click", () => running.forEach((controller) => controller.abort()));
$("attach").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", async () => {
  await add([...$("files").files]);
  $("files").value = "";
});
$("record").addEventListener("click", toggleRecording);
$("open-merge").addEventListener("click", () => served.length && openMerge(served.map((one) => one.id)));
$("open-settings").addEventListener("click", openSettings);
$("settings").querySelector("form").addEventListener("submit", saveSettings);
$("export").addEventListener("click", saveExport);
$("clear").addEventListener("click", begin);
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  add(files);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  add([...event.dataTransfer.files]);
});

turns = await store.load().catch(() => []);
await loadModels();
modelsKnown();
$("turns").append(...turns.map(turnElement));
if (turns.length) window.scrollTo(0, document.body.scrollHeight);
