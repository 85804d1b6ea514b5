const MEDIA = JSON.parse(document.getElementById("media").textContent);
const cards = [...document.querySelectorAll("article")].map(card =>
  ({card, kinds: card.dataset.kinds.split(" "), group: JSON.parse(card.dataset.group),
    text: (card.textContent + " " + [...card.querySelectorAll("figcaption")].map(one => one.title).join(" ")).toLowerCase()}));
const selects = [...document.querySelectorAll("#filters select")], search = document.getElementById("search");
function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const {card, kinds, group, text} of cards) {
    const fits = words.every(word => text.includes(word)) && selects.every(select => !select.value ||
      (select.dataset.key ? group[select.dataset.key] === select.value : kinds.includes(select.value)));
    card.hidden = !fits;
    shown += fits;
  }
  document.getElementById("count").textContent = shown + " of " + cards.length;
}
selects.forEach(select => select.addEventListener("change", filter));
search.addEventListener("input", filter);
filter();

function cloud(canvas, item) {
  const raw = Uint8Array.from(atob(item.data), c => c.charCodeAt(0)), n = item.n;
  const xyz = new Int16Array(raw.buffer, 0, 3 * n), rgb = item.coloured ? raw.subarray(6 * n) : null;
  const context = canvas.getContext("2d"), size = canvas.width, order = [...Array(n).keys()], depth = new Float32Array(n);
  const dark = matchMedia("(prefers-color-scheme: dark)"), still = matchMedia("(prefers-reduced-motion: reduce)");
  let turn = 0.6, tilt = 0.35, upright = 1, held = null, seen = false, last = 0;
  function draw() {
    const [s, c, st, ct] = [Math.sin(turn), Math.cos(turn), Math.sin(tilt), Math.cos(tilt)], places = [];
    for (let i = 0; i < n; i++) {
      const x = xyz[3 * i] / 32767, up = xyz[3 * i + upright] / 32767;
      const away = (upright === 1 ? xyz[3 * i + 2] : -xyz[3 * i + 1]) / 32767;
      const z = c * away - s * x;
      places.push([c * x + s * away, ct * up - st * z]);
      depth[i] = st * up + ct * z;
    }
    order.sort((i, j) => depth[i] - depth[j]);
    context.clearRect(0, 0, size, size);
    for (const i of order) {
      const near = (depth[i] + 1) / 2, scale = size * 0.46 / (1.25 - 0.25 * depth[i]), dot = 2 + 3.2 * near;
      context.fillStyle = rgb ? `rgb(${rgb[3 * i]},${rgb[3 * i + 1]},${rgb[3 * i + 2]})`
        : `hsl(212 55% ${dark.matches ? 25 + 50 * near : 75 - 45 * near}%)`;
      context.fillRect(size / 2 + scale * places[i][0] - dot / 2, size / 2 - scale * places[i][1] - dot / 2, dot, dot);
    }
  }
  function step(now) {
    if (!seen) return;
    if (now - last > 40) {
      if (!held && !still.matches) turn += 0.018;
      last = now;
      draw();
    }
    requestAnimationFrame(step);
  }
  canvas.addEventListener("pointerdown", event => { held = event; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", event => {
    if (!held) return;
    turn += event.movementX * 0.012;
    tilt = Math.max(-1.5, Math.min(1.5, tilt + event.movementY * 0.012));
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { held = null; });
  canvas.addEventListener("dblclick", () => { upright = 3 - upright; });
  draw();
  return visible => { if (visible && !seen) requestAnimationFrame(step); seen = visible; };
}
const clouds = new Map();
const watch = new IntersectionObserver(found => {
  for (const {target, isIntersecting} of found) {
    const item = MEDIA[target.dataset.place];
    if (item.type === "points") {
      if (isIntersecting && !clouds.has(target)) clouds.set(target, cloud(target, item));
      clouds.get(target)?.(isIntersecting);
    } else if (isIntersecting) {
      target.src = "data:" + item.type + ";base64," + item.data;
      watch.unobserve(target);
    }
  }
}, {rootMargin: "600px"});
document.querySelectorAll("[data-place]").forEach(place => watch.observe(place));
