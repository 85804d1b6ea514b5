// The server's routes. An error is an Error whose message is the server's one line.

export class Refusal extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

export const key = {
  get: () => sessionStorage.getItem("modalloy.key") || "",
  set: (value) => sessionStorage.setItem("modalloy.key", value),
};

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key.get() ? { Authorization: `Bearer ${key.get()}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server is not reached. Does it still run?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const told = body.error || {};
  throw new Refusal(told.message || `The server answered ${response.status}.`, { ...told, status: response.status });
}

const json = async (path, options) => (await request(path, options)).json();
const named = (id) => id.split("/").map(encodeURIComponent).join("/");

export const models = async () => (await json("/v1/models")).data;
export const merge = (id) => json(`/modalloy/models/${named(id)}/merge`);
export const inspection = (id, signal) => json(`/modalloy/models/${named(id)}/inspection`, { signal });

/** A sample that ships with the server, as a file. */
export async function sample(name) {
  const blob = await (await request(`/samples/${encodeURIComponent(name)}`)).blob();
  return new File([blob], name, { type: blob.type });
}

/** Ask, and hand on every piece of the answer. Gives {finish, facts, usage}; an abort throws AbortError. */
export async function ask(body, { signal, onText }) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const found = { finish: null, facts: null, usage: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return found;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.message, chunk.error);
    found.usage = chunk.usage || found.usage;
    found.facts = chunk.modalloy || found.facts;
    for (const choice of chunk.choices) {
      if (choice.delta.content) onText(choice.delta.content);
      found.finish = choice.finish_reason || found.finish;
    }
  }
  throw new Refusal("The answer broke off before its end. Ask again.");
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
