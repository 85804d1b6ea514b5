// How a served model was merged: manifest, recipe and card of its folder, and what `inspect` measures of the updates.

import { inspection, merge } from "./api.js";
import { $, h, say, table } from "./dom.js";

const short = (hash) => h("code", { title: hash, text: hash.slice(0, 12) });
const section = (title, ...children) => h("section", {}, h("h3", { text: title }), ...children);
const figure = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

let leaving = new AbortController();

/** Open the view for these models, the first of them shown. */
export async function openMerge(names) {
  const chosen = h("div", { class: "row", role: "group", "aria-label": "Model" });
  const place = h("div", { "aria-live": "polite" });
  const show = async (name) => {
    for (const button of chosen.children) button.setAttribute("aria-pressed", String(button.textContent === name));
    place.replaceChildren(h("p", { text: "…" }));
    try {
      place.replaceChildren(...facts(name, await merge(name)));
    } catch (error) {
      place.replaceChildren(h("p", { class: "error", text: error.message }));
    }
  };
  chosen.append(...names.map((name) => h("button", { type: "button", text: name, onclick: () => show(name) })));
  chosen.hidden = names.length < 2;
  $("merge-body").replaceChildren(chosen, place);
  leaving = new AbortController();
  $("merge").addEventListener("close", () => leaving.abort(), { once: true });
  $("merge").showModal();
  await show(names[0]);
}

function facts(name, { merge: found, reason, inspection: able }) {
  if (!found) return [h("p", { class: "note", text: reason })];
  const parameters = Object.entries(found.parameters).map(([key, value]) => `${key} ${figure(value)}`).join(", ");
  const fates = new Map();
  for (const [, fate, , count] of found.fates) fates.set(fate, (fates.get(fate) || 0) + count);
  const plan = [...fates].map(([fate, count]) => `${count.toLocaleString("en")} ${fate}`).join(" · ");
  const inputs = Object.entries(found.inputs).map(([label, input]) => [
    label, input.name || input.modality || "–", input.layout || "base",
    h("div", {}, ...Object.entries(input.sha256).map(([file, hash]) => h("div", {}, `${file} `, short(hash)))),
  ]);
  return [
    h("p", {}, h("strong", { text: found.method }), parameters ? ` (${parameters})` : "", `, form ${found.form}, made by modalloy ${found.modalloy}.`),
    h("p", { text: `Tensors: ${plan}.` }),
    section("From what", table("Inputs of the merge", ["input", "what", "layout", "files and their sha256"], inputs)),
    section("What happened to each tensor", table("Fates of the tensors", ["source", "fate", "why", "tensors"],
      found.fates.map(([source, fate, detail, count]) => [source, fate, detail, count.toLocaleString("en")]))),
    measures(name, able),
    section("What was written", table("Files of the result", ["file", "sha256"],
      Object.entries(found.outputs).map(([file, hash]) => [file, short(hash)]))),
    written("Recipe", found.recipe),
    written("Card", found.card),
  ];
}

function written(title, { text, unchanged }) {
  if (text === null) return section(title, h("p", { class: "note", text: "The folder has none." }));
  const note = unchanged ? null : h("p", { class: "error", text: "It was changed after the merge: its sha256 is another." });
  return h("details", {}, h("summary", { text: title }), note, h("pre", { tabindex: "0", "aria-label": title, text }));
}

function measures(name, able) {
  const place = section("Is it sane?");
  if (!able.possible) {
    place.append(h("p", { class: "note", text: `Not measured: ${able.reason}.` }));
    return place;
  }
  const button = h("button", { type: "button", text: "Measure the updates" });
  const told = h("p", { class: "note", text: "Norms, overlaps and conflicts of the specialists' updates, as modalloy inspect measures them. It takes some seconds to minutes." });
  button.addEventListener("click", async () => {
    button.disabled = true;
    told.textContent = "Measuring …";
    try {
      place.replaceChildren(h("h3", { text: "Is it sane?" }), ...measured(await inspection(name, leaving.signal)));
      say("The updates are measured.");
    } catch (error) {
      button.disabled = false;
      if (error.name !== "AbortError") told.textContent = error.message;
    }
  });
  place.append(told, button);
  return place;
}

function measured(found) {
  const captions = ["Updates, medians over the layers", "Pairs of updates, medians over the layers"];
  return [
    h("p", {}, h("strong", { text: found.verdict })),
    h("ul", {}, ...found.findings.map((one) => h("li", { text: `${one.level}: ${one.message}` }))),
    chart("Norm of each specialist's update, by layer", found.layers, found.norms, 0),
    chart("Cosine between two specialists' updates, by layer", found.layers, found.cosines, null),
    ...found.tables.map(({ head, rows }, index) =>
      h("details", {}, h("summary", { text: captions[index] }), table(captions[index], head, rows))),
  ].filter(Boolean);
}

/** Lines over the layers. `from`: the least value of the axis, null: that of the data. */
function chart(title, layers, lines, from) {
  const all = Object.values(lines).flat().filter((value) => value !== null);
  if (!all.length || layers.length < 2) return null;
  const low = Math.min(from ?? Infinity, 0, ...all);
  const high = Math.max(...all, low + 1e-9);
  const [width, height, left, bottom] = [560, 180, 44, 24];
  const x = (index) => left + ((width - left - 8) * index) / (layers.length - 1);
  const y = (value) => height - bottom - ((height - bottom - 10) * (value - low)) / (high - low);
  const svg = h("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${Object.keys(lines).join(", ")}` });
  for (const value of [low, (low + high) / 2, high]) {
    svg.append(h("line", { class: "axis", x1: left, x2: width - 8, y1: y(value), y2: y(value) }),
      h("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", text: value.toPrecision(2) }));
  }
  for (const index of [0, Math.floor((layers.length - 1) / 2), layers.length - 1]) {
    svg.append(h("text", { x: x(index), y: height - 6, "text-anchor": "middle", text: `${layers[index]}` }));
  }
  Object.entries(lines).forEach(([label, values], number) => {
    const points = values.map((value, index) => (value === null ? null : `${x(index).toFixed(1)} ${y(value).toFixed(1)}`)).filter(Boolean);
    svg.append(h("path", { class: `line line-${number % 6}`, d: `M${points.join("L")}` }, h("title", { text: label })));
  });
  const legend = Object.keys(lines).map((label, number) =>
    h("li", {}, h("span", { class: `swatch back-${number % 6}`, "aria-hidden": "true" }), label));
  return h("figure", { class: "plot" }, h("figcaption", { text: title }), svg, h("ul", { class: "legend" }, ...legend));
}
