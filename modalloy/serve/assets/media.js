// Media of a question: what kind a file is, what is refused before it is sent, and its preview.

import { parseCloud, turntable } from "./cloud.js";
import { h, size } from "./dom.js";
import { waveform } from "./sound.js";

export const MOST_MEDIA = 32; // of a request, as the server has it
export const MOST_BYTES = 47_000_000; // of a request's media: in base64 they fit 64 MB
const POINTS = /\.(npy|npz|ply)$/i;
const SOUNDS = /\.(wav|flac|ogg|oga|opus|mp3|m4a|aac|aif|aiff|au|caf|amr)$/i;
const VIDEOS = /\.(mp4|m4v|mov|webm|mkv|avi|flv|mpg|mpeg|ts|3gp)$/i;
const PICTURES = /\.(png|jpe?g|webp|gif|bmp|tiff?|ppm|pgm|pbm)$/i;

/** The modality that a file is shown as at first, and all that it may be shown as, among those that the models take. */
export async function modalitiesOf(file, able) {
  const kind = (file.type || "").split("/")[0];
  let fit = able; // what is unknown here may be of a sense that the page does not know
  if (POINTS.test(file.name)) fit = ["point"];
  else if (kind === "video" || VIDEOS.test(file.name)) fit = ["video", "audio"];
  else if (kind === "audio" || SOUNDS.test(file.name)) fit = ["audio"];
  else if (kind === "image" || PICTURES.test(file.name)) fit = (await moves(file)) ? ["video", "image"] : ["image", "video"];
  const taken = [...fit, ...able.filter((name) => !["image", "audio", "video", "point"].includes(name))];
  return { known: fit, possible: [...new Set(taken)].filter((name) => able.includes(name)) };
}

/** Whether a picture is an animation. */
async function moves(file) {
  const head = new Uint8Array(await file.slice(0, 4096).arrayBuffer());
  const text = new TextDecoder("latin1").decode(head);
  if (text.startsWith("GIF8")) return text.includes("NETSCAPE2.0");
  if (text.startsWith("RIFF") && text.slice(8, 16) === "WEBPVP8X") return Boolean(head[20] & 2);
  return text.startsWith("\x89PNG") && text.includes("acTL");
}

/** Why a file cannot be added to others, or null. */
export function refusalOf(file, others, kinds, able) {
  if (!file.size) return `${file.name} is empty. Choose another file.`;
  if (others.length >= MOST_MEDIA) return `${file.name}: a question shows at most ${MOST_MEDIA} media. Take one away.`;
  const sum = others.reduce((bytes, medium) => bytes + medium.file.size, file.size);
  if (sum > MOST_BYTES) return `${file.name}: with it the media have ${size(sum)}, at most ${size(MOST_BYTES)} are sent. Choose a smaller one.`;
  if (!kinds.possible.length) {
    const what = able.length ? `the chosen models take ${able.join(", ")}` : "the chosen models take text only";
    return `${file.name} is of a kind (${kinds.known.join(", ") || "unknown"}) that cannot be asked about: ${what}.`;
  }
  return null;
}

const unseen = (medium, why) =>
  h("figure", { class: "medium" }, h("p", { class: "note", text: why }), h("figcaption", { text: `${medium.name} · ${size(medium.size)}` }));

/** An element that shows a medium. What this browser cannot show may still be read by the model, and it says so. */
export function preview(medium) {
  const { file, name, modality } = medium;
  if (!file) return unseen(medium, "No longer kept in this browser.");
  const caption = h("figcaption", { text: `${name} · ${size(file.size)}` });
  const blind = () => unseen(medium, "This browser cannot show it; the model reads it itself.");
  const place = h("div", { class: "preview" });
  const address = () => URL.createObjectURL(file);
  const isPicture = file.type.startsWith("image/") || PICTURES.test(name);
  if (modality === "image" || (modality === "video" && isPicture)) {
    const picture = h("img", { alt: `${modality === "video" ? "Animation" : "Picture"} ${name}`, src: address() });
    picture.addEventListener("error", () => place.replaceChildren(blind()));
    place.append(h("figure", { class: "medium" }, picture, caption));
  } else if (modality === "video") {
    const video = h("video", { controls: true, muted: true, playsinline: true, src: address(), "aria-label": `Video ${name}` });
    video.addEventListener("error", () => place.replaceChildren(blind()));
    place.append(h("figure", { class: "medium" }, video, caption));
  } else if (modality === "audio") {
    waveform(file, name).then((shown) => place.replaceChildren(shown), () => place.replaceChildren(blind()));
  } else if (modality === "point") {
    file.arrayBuffer().then((buffer) => place.replaceChildren(turntable(parseCloud(buffer), name)))
      .catch((error) => place.replaceChildren(unseen(medium, error instanceof RangeError ? "The file is damaged." : error.message)));
  } else {
    place.append(unseen(medium, `Shown to the model as ${modality}.`));
  }
  return place;
}
