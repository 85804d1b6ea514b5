// Sounds: the waveform of a file, and the microphone as a WAV file that every server reads.

import { colour, h, keepDrawn } from "./dom.js";

const RATE = 16_000;
const MOST_SECONDS = 600; // the server's limit

/** A sound as 16 kHz samples, or an error if this browser cannot decode it. */
export const decoded = async (blob) => new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());

/** "1:05", and what is shorter than ten seconds as "0.7 s". */
const length = (seconds) => (seconds < 9.95 ? `${seconds.toFixed(1)} s` : clock(seconds));
const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

/** Lowest and highest sample of each of `n` stretches. */
function extremes(samples, n) {
  const found = [];
  for (let index = 0; index < n; index += 1) {
    const end = Math.max(Math.floor(((index + 1) * samples.length) / n), 1);
    let [low, high] = [0, 0];
    for (let at = Math.floor((index * samples.length) / n); at < end; at += 1) {
      low = Math.min(low, samples[at]);
      high = Math.max(high, samples[at]);
    }
    found.push([low, high]);
  }
  return found;
}

/** The waveform of a sound, which can be played. */
export async function waveform(file, name) {
  const buffer = await decoded(file);
  const samples = buffer.getChannelData(0);
  const player = new Audio();
  const canvas = h("canvas", { class: "waveform", height: 48, role: "img", "aria-label": `Waveform of ${name}, ${buffer.duration.toFixed(1)} s` });
  const loudest = samples.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-6);
  const render = () => {
    canvas.width = Math.max(canvas.clientWidth, 120);
    const context = canvas.getContext("2d");
    const bars = Math.floor(canvas.width / 3);
    const played = player.currentTime / buffer.duration;
    extremes(samples, bars).forEach(([low, high], index) => {
      context.fillStyle = colour(index / bars < played ? "text" : "audio");
      const top = 24 - (22 * high) / loudest;
      context.fillRect(3 * index, top, 2, Math.max(24 - (22 * low) / loudest - top, 1));
    });
  };
  const button = h("button", { type: "button", class: "play", "aria-label": `Play ${name}`, text: "▶" });
  const shown = (plays) => {
    button.textContent = plays ? "❚❚" : "▶";
    button.setAttribute("aria-label", `${plays ? "Pause" : "Play"} ${name}`);
  };
  button.addEventListener("click", () => {
    if (!player.src) player.src = URL.createObjectURL(file);
    if (player.paused) player.play().catch(() => shown(false));
    else player.pause();
  });
  for (const kind of ["play", "pause", "ended"]) player.addEventListener(kind, () => shown(!player.paused));
  player.addEventListener("timeupdate", render);
  player.addEventListener("ended", () => {
    player.currentTime = 0;
    render();
  });
  canvas.addEventListener("click", (event) => {
    if (player.src) player.currentTime = (event.offsetX / canvas.clientWidth) * buffer.duration;
  });
  keepDrawn(canvas, render);
  return h("figure", { class: "medium sound" }, h("div", { class: "row" }, button, canvas),
    h("figcaption", { text: `${name} · ${length(buffer.duration)}` }));
}

/** 16-bit mono WAV of a decoded sound. */
export function wav(buffer) {
  const samples = buffer.getChannelData(0);
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (at, text) => [...text].forEach((letter, index) => view.setUint8(at + index, letter.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, buffer.sampleRate, true);
  view.setUint32(28, 2 * buffer.sampleRate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  word(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, index) => view.setInt16(44 + 2 * index, Math.round(32767 * Math.max(-1, Math.min(1, value))), true));
  return new Blob([view.buffer], { type: "audio/wav" });
}

/** Records the microphone until `stop` is called, which gives a WAV file. `onSeconds` is told how long it has been. */
export async function record(onSeconds) {
  if (!navigator.mediaDevices) throw new Error("The microphone needs https or localhost: open the page at one of these.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    const why = { NotAllowedError: "the browser was not allowed to", NotFoundError: "there is none" }[error.name] || error.message;
    throw new Error(`The microphone cannot be recorded: ${why}.`);
  }
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  const over = new Promise((resolve) => recorder.addEventListener("stop", resolve, { once: true }));
  const begun = performance.now();
  const timer = setInterval(() => {
    const seconds = (performance.now() - begun) / 1000;
    onSeconds(clock(seconds));
    if (seconds >= MOST_SECONDS && recorder.state === "recording") recorder.stop();
  }, 250);
  recorder.start();
  return async () => {
    clearInterval(timer);
    if (recorder.state === "recording") recorder.stop();
    await over;
    stream.getTracks().forEach((track) => track.stop());
    const buffer = await decoded(new Blob(pieces, { type: recorder.mimeType })).catch(() => null);
    if (!buffer || !buffer.length) throw new Error("The recording holds no sound. Record again.");
    return new File([wav(buffer)], `recording-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.wav`, { type: "audio/wav" });
  };
}
