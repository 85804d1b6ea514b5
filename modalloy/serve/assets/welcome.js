// What a first visit shows: three questions about samples that ship with the server, of what the chosen models take.

import { sample } from "./api.js";
import { $, h, refuse } from "./dom.js";
import { preview } from "./media.js";
import { tone } from "./strip.js";

const QUESTIONS = [
  { media: { image: "horse.webp", audio: "is-this-a-horse.flac" }, text: "" },
  { media: { video: "cow-animated.webp", audio: "how-does-it-move.flac" }, text: "" },
  { media: { point: "car.npy" }, text: "What is this shape?" },
  { media: { image: "camera.webp" }, text: "Which is it: a ship, a camera, an owl or a hammer?" },
  { media: { audio: "dog.flac" }, text: "Which word is it: a harp, a car, a dog or a duck?" },
  { media: { video: "elephant-animated.webp" }, text: "How does it move?" },
  { media: { image: "violin.webp" }, text: "What is this?" },
  { media: {}, text: "What is the capital of France?" },
  { media: {}, text: "Name three animals that live on a farm." },
  { media: {}, text: "Why is the sky blue?" },
];

let shownFor = null;

/** Show three questions, or none when the conversation has begun. `onAsk` gets the text and [modality, file] pairs. */
export async function welcome(able, begun, onAsk) {
  const place = $("welcome");
  place.hidden = begun;
  if (begun || shownFor === able.join()) return;
  shownFor = able.join();
  const fit = QUESTIONS.filter(({ media }) => Object.keys(media).every((name) => able.includes(name))).slice(0, 3);
  const cards = fit.map(({ media, text }) => {
    const shown = h("div", { class: "samples" });
    const files = Promise.all(Object.entries(media).map(async ([modality, name]) => [modality, await sample(name)]));
    files.then((found) => shown.append(...found.map(([modality, file]) => preview({ file, modality, name: file.name, size: file.size }))),
      (error) => refuse(error.message));
    const ask = h("button", { type: "button", text: text || "Answer what is said", onclick: async () => onAsk(text, await files) });
    return h("article", { class: "card" }, shown, ask);
  });
  place.replaceChildren(
    h("h2", { text: "Ask about anything that can be seen or heard" }),
    h("ul", { class: "senses", "aria-label": "What these models take" }, ...["text", ...able].map((name) => h("li", { class: tone(name), text: name }))),
    h("p", { class: "note", text: able.length ? "Drop files anywhere, paste a picture, record a sound; or begin with one of these." : "Ask below, or begin with one of these." }),
    h("div", { class: "cards" }, ...cards),
  );
}
