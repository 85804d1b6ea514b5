// From the conversation to requests: what each model is asked, and the same as code.

import { dataUrl, settings } from "./store.js";

const ALIAS = { point: "point_cloud" };

/** Name of the content part that shows a medium of a modality. */
export const partName = (modality) => `${ALIAS[modality] || modality}_url`;

/** Turns that a model has answered before this one: it is told no others. */
const known = (turns, model, until) =>
  turns.slice(0, until).filter((turn) => turn.answers[model] && turn.answers[model].text && !turn.answers[model].error);

/** The body of the request for one turn. `urlOf` gives the address of a medium. */
export async function requestFor(turns, model, index, urlOf) {
  const chosen = settings.get();
  const messages = chosen.system ? [{ role: "system", content: chosen.system }] : [];
  for (const turn of [...known(turns, model, index), turns[index]]) {
    const parts = [];
    for (const medium of turn.media) {
      const name = partName(medium.modality);
      parts.push({ type: name, [name]: { url: await urlOf(medium) } });
    }
    if (turn.text) parts.push({ type: "text", text: turn.text });
    messages.push({ role: "user", content: parts });
    if (turn !== turns[index]) messages.push({ role: "assistant", content: turn.answers[model].text });
  }
  const body = { model, messages };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (chosen[name] !== "") body[name] = Number(chosen[name]);
  }
  const stop = chosen.stop.split("\n").filter((line) => line);
  return stop.length ? { ...body, stop } : body;
}

/** The request with its media in it. */
export const whole = (turns, model, index) =>
  requestFor(turns, model, index, (medium) => {
    if (!medium.file) throw new Error(`${medium.name} is no longer kept in this browser. Add it again.`);
    return dataUrl(medium.file);
  });

/** The name of the medium that an error is about, by the place in the request that it names. */
export function mediumAt(turns, model, index, param) {
  const place = /^messages\[(\d+)\]\.content\[(\d+)\]/.exec(param || "");
  if (!place) return null;
  const first = settings.get().system ? 1 : 0;
  const asked = [...known(turns, model, index), turns[index]][(Number(place[1]) - first) / 2];
  return asked && asked.media[Number(place[2])] ? asked.media[Number(place[2])].name : null;
}

/** The request as code, whose media are files beside it. `hasKey`: the server asks for one. */
export async function snippets(turns, model, index, { origin, hasKey }) {
  const media = [];
  const mark = crypto.getRandomValues(new Uint32Array(4)).join("-"); // stands for a file's content, and in no text
  const body = await requestFor(turns, model, index, (medium) => `${mark}${media.push(medium) - 1}${mark}`);
  return { curl: curl(body, media, mark, origin, hasKey), python: python(body, media, mark, origin, hasKey), media };
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const typeOf = (medium) => medium.type || "application/octet-stream";

function curl(body, media, mark, origin, hasKey) {
  const header = hasKey ? ` -H "Authorization: Bearer $MODALLOY_API_KEY"` : "";
  const tail = `curl -s ${origin}/v1/chat/completions -H 'Content-Type: application/json'${header}`;
  const text = JSON.stringify(body);
  if (!media.length) return `${tail} --data-binary ${quoted(text)}`;
  const lines = [];
  text.split(mark).forEach((piece, at) => {
    if (at % 2 === 0) return lines.push(`  printf %s ${quoted(piece)}`);
    const medium = media[Number(piece)];
    return lines.push(`  printf %s ${quoted(`data:${typeOf(medium)};base64,`)}`, `  base64 < ${quoted(`./${medium.name}`)} | tr -d '\\n'`);
  });
  return `{\n${lines.join("\n")}\n} | ${tail} --data-binary @-`;
}

function python(body, media, mark, origin, hasKey) {
  let shown = JSON.stringify(body.messages, null, 4);
  media.forEach((medium, at) => {
    shown = shown.replace(`"${mark}${at}${mark}"`, () => `data(${JSON.stringify(medium.name)}, ${JSON.stringify(typeOf(medium))})`);
  });
  const options = Object.entries(body).filter(([name]) => !["model", "messages"].includes(name));
  return [
    ...(media.length ? ["import base64"] : []),
    ...(hasKey ? ["import os"] : []),
    ...(media.length || hasKey ? [""] : []),
    "from openai import OpenAI",
    "",
    ...(media.length
      ? ["", "def data(path, kind):", '    with open(path, "rb") as file:',
         '        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"', "", ""]
      : []),
    `client = OpenAI(base_url="${origin}/v1", api_key=${hasKey ? 'os.environ["MODALLOY_API_KEY"]' : '"none"'})`,
    `messages = ${shown}`,
    "answer = client.chat.completions.create(",
    ...[["model", body.model], ...options].map(([name, value]) => `    ${name}=${JSON.stringify(value)},`),
    "    messages=messages,",
    ")",
    "print(answer.choices[0].message.content)",
    'print(answer.model_extra["modalloy"])',
    "",
  ].join("\n");
}
