// Elements made in code. Whatever a model or a file says becomes text nodes, never markup.

export const $ = (id) => document.getElementById(id);

/** An element: `on…` properties are listeners, `text` is its text, others are attributes (false and null: left out). */
export function h(tag, properties = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const say = (text) => {
  $("status").textContent = text;
};

/** A line beside the question that says what is refused; none takes it away. */
export function refuse(text) {
  $("refused").textContent = text || "";
  $("refused").hidden = !text;
}

/** A table with a caption for screen readers. */
export function table(caption, head, rows) {
  const cells = (row) => row.map((cell, index) => (index ? h("td", {}, cell) : h("th", { scope: "row" }, cell)));
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { text: caption }),
      h("thead", {}, h("tr", {}, ...head.map((text) => h("th", { scope: "col", text })))),
      h("tbody", {}, ...rows.map((row) => h("tr", {}, ...cells(row))))));
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Set();

/** Draw now, and again when the colours of the page or the width of an element change, while it is on the page. */
export function keepDrawn(element, draw) {
  const entry = { element, draw, seen: false };
  drawn.add(entry);
  new ResizeObserver(draw).observe(element);
}

dark.addEventListener("change", () => {
  for (const entry of drawn) {
    entry.seen ||= entry.element.isConnected;
    if (entry.seen && !entry.element.isConnected) drawn.delete(entry);
    else entry.draw();
  }
});

/** The value of one of the page's colours. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export const size = (bytes) =>
  bytes < 1e3 ? `${bytes} B` : bytes < 1e6 ? `${(bytes / 1e3).toFixed(0)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
