// Where the tokens went: the prompt's tokens as a strip, coloured by the weights that each used, and the answer's figures.

import { h } from "./dom.js";

const NAMED = ["text", "image", "audio", "video", "point"];
const MOST_CELLS = 400; // beyond, single tokens are not told apart

/** The class that colours what uses these weights. */
export const tone = (weights) => `tone-${NAMED.includes(weights) ? weights : "other"}`;

const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

/** The strip, its legend and the figures of one answer. */
export function strip(facts, usage) {
  const total = facts.owners.reduce((sum, [, , length]) => sum + length, 0);
  const counts = new Map();
  for (const [name, , length] of facts.owners) counts.set(name, (counts.get(name) || 0) + length);
  const told = (name) => {
    const own = facts.weights[name];
    return `${name} ${counts.get(name).toLocaleString("en")}${own === name ? "" : ` (${own} weights)`}`;
  };
  const bar = h("div", {
    class: total > MOST_CELLS ? "strip dense" : "strip", role: "img",
    "aria-label": `Tokens of the prompt by the weights that they used: ${[...counts.keys()].map(told).join(", ")}`,
  });
  for (const [name, start, length] of facts.owners) {
    const weights = facts.weights[name];
    const run = h("span", {
      class: `${tone(weights)}${weights === name ? "" : " borrowed"}`,
      title: `${name}: ${length === 1 ? `token ${start + 1}` : `tokens ${start + 1} to ${start + length}`}, ${weights} weights`,
    });
    run.style.flexGrow = length;
    run.style.setProperty("--cells", length);
    bar.append(run);
  }
  const legend = [...counts.keys()].map((name) =>
    h("li", {}, h("span", { class: `swatch ${tone(facts.weights[name])}`, "aria-hidden": "true" }), told(name)));
  const figures = [
    `${plural(total, "token")} in`,
    usage ? `${plural(usage.completion_tokens, "token")} out` : null,
    facts.time_to_first_token_s === null ? null : `first after ${facts.time_to_first_token_s.toFixed(2)} s`,
    facts.tokens_per_s === null ? null : `${facts.tokens_per_s.toFixed(1)} tokens/s`,
    facts.reused_tokens ? `${facts.reused_tokens.toLocaleString("en")} known from before` : null,
  ];
  return h("div", { class: "facts" }, h("h4", { text: "Where the tokens went" }), bar, h("ul", { class: "legend", "aria-label": "Tokens by modality" }, ...legend),
    h("p", { class: "figures", text: figures.filter(Boolean).join(" · ") }));
}
