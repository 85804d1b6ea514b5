// The conversation in this browser: turns in localStorage, the bytes of media, which are too many for it, in IndexedDB.

const TURNS = "modalloy.conversation";
const CHOICES = "modalloy.settings";
const DEFAULTS = { temperature: "", top_p: "", max_tokens: "256", seed: "", stop: "", system: "", models: null };

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

async function media(mode) {
  const request = indexedDB.open("modalloy", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("media");
  return (await done(request)).transaction("media", mode).objectStore("media");
}

export const settings = {
  get: () => ({ ...DEFAULTS, ...JSON.parse(localStorage.getItem(CHOICES) || "{}") }),
  set: (changes) => localStorage.setItem(CHOICES, JSON.stringify({ ...settings.get(), ...changes })),
};

/** Keep the bytes of a medium. */
export async function keep(medium) {
  await done((await media("readwrite")).put({ blob: medium.file }, medium.id));
}

const kept = async (id) => (await done((await media("readonly")).get(id)))?.blob;

/** Write the turns down; media are named by their ids. Throws when the browser gives no more room. */
export function save(turns) {
  const plain = turns.map((turn) => ({ ...turn, media: turn.media.map(({ file: _, ...rest }) => rest) }));
  localStorage.setItem(TURNS, JSON.stringify(plain));
}

/** The turns as they were left. A medium whose bytes the browser has dropped has `file` null. */
export async function load() {
  let turns;
  try {
    turns = JSON.parse(localStorage.getItem(TURNS) || "[]");
  } catch {
    return [];
  }
  for (const turn of turns) {
    for (const medium of turn.media) {
      const blob = await kept(medium.id).catch(() => null); // of a browser that keeps nothing
      medium.file = blob ? new File([blob], medium.name, { type: medium.type }) : null;
    }
    for (const answer of Object.values(turn.answers)) if (answer.state === "running") answer.state = "stopped";
  }
  return turns;
}

export async function clear() {
  localStorage.removeItem(TURNS);
  await done((await media("readwrite")).clear());
}

/** data:TYPE;base64,… of a file. */
export const dataUrl = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => {
      const type = file.type || "application/octet-stream";
      resolve(`data:${type};base64,${reader.result.slice(reader.result.indexOf(",") + 1)}`);
    };
    reader.onerror = () => reject(new Error(`${file.name} cannot be read any more. Choose it again.`));
    reader.readAsDataURL(file);
  });

/** The conversation, media and all, as one JSON text. */
export async function exported(turns) {
  const { models, ...sampling } = settings.get();
  const whole = [];
  for (const turn of turns) {
    const shown = turn.media.map(async ({ file, ...rest }) => ({ ...rest, url: file ? await dataUrl(file) : null }));
    whole.push({ ...turn, media: await Promise.all(shown) });
  }
  return JSON.stringify({ format: "modalloy-conversation", version: 1, settings: sampling, turns: whole }, null, 2);
}
