// Point clouds: reading .npy and .ply, and a turntable that one can rotate. The server reads them itself; this is a preview.

import { h } from "./dom.js";

const MOST_SHOWN = 200_000;
const FRAME_MS = 30; // of a cloud that turns by itself
const PLY_TYPES = {
  char: "i1", uchar: "u1", short: "i2", ushort: "u2", int: "i4", uint: "u4", float: "f4", double: "f8",
  int8: "i1", uint8: "u1", int16: "i2", uint16: "u2", int32: "i4", uint32: "u4", float32: "f4", float64: "f8",
};
const READ = {
  i1: (v, at) => v.getInt8(at), u1: (v, at) => v.getUint8(at),
  i2: (v, at, little) => v.getInt16(at, little), u2: (v, at, little) => v.getUint16(at, little),
  i4: (v, at, little) => v.getInt32(at, little), u4: (v, at, little) => v.getUint32(at, little),
  f4: (v, at, little) => v.getFloat32(at, little), f8: (v, at, little) => v.getFloat64(at, little),
  f2: (v, at, little) => half(v.getUint16(at, little)),
};

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

/** {count, shown, xyz, rgb}: at most MOST_SHOWN points, evenly chosen, in a box of size 2 around 0; rgb 0…1 or null. */
export function parseCloud(buffer) {
  const bytes = new Uint8Array(buffer);
  const begin = String.fromCharCode(...bytes.subarray(0, 6));
  if (begin.startsWith("\x93NUMPY")) return fitted(npy(buffer));
  if (/^ply\s/.test(begin)) return fitted(ply(buffer, bytes));
  if (begin.startsWith("PK")) throw new Error("A .npz file has no preview here; the model reads it.");
  throw new Error("This is no .npy or .ply file.");
}

/** Count, and a function that gives values of a point: column 0 to 2 of place, 3 to 5 of colour. */
function npy(buffer) {
  const view = new DataView(buffer);
  const long = view.getUint8(6) > 1;
  const length = long ? view.getUint32(8, true) : view.getUint16(8, true);
  const begin = (long ? 12 : 10) + length;
  const head = new TextDecoder("latin1").decode(new Uint8Array(buffer, long ? 12 : 10, length));
  const kind = /'descr':\s*'([<>|=])([a-z]\d)'/.exec(head);
  const shape = /'shape':\s*\((\d+),\s*(\d+)\s*,?\)/.exec(head);
  if (!kind || !READ[kind[2]] || !shape || !["3", "6"].includes(shape[2])) {
    throw new Error("Its array is not of numbers (points, 3) or (points, 6).");
  }
  const [count, columns, width] = [Number(shape[1]), Number(shape[2]), Number(kind[2][1])];
  if (begin + count * columns * width > buffer.byteLength) throw new Error("The file ends before its last point.");
  const fortran = /'fortran_order':\s*True/.test(head);
  const little = kind[1] !== ">";
  const read = READ[kind[2]];
  const at = (row, column) => read(view, begin + width * (fortran ? column * count + row : row * columns + column), little);
  return { count, at, coloured: columns === 6, whole: kind[2][0] !== "f" };
}

function ply(buffer, bytes) {
  const head = new TextDecoder("latin1").decode(bytes.subarray(0, 65536));
  const end = /end_header\r?\n/.exec(head);
  const format = /^format (\w+) 1\.0\s*$/m.exec(head);
  if (!end || !format) throw new Error("Its header is damaged.");
  const begin = end.index + end[0].length;
  const elements = head.slice(0, end.index).split(/^element /m).slice(1);
  if (!elements.length || !elements[0].startsWith("vertex ")) throw new Error("Its vertices do not come first.");
  const count = Number(elements[0].split(/\s+/)[1]);
  const properties = [...elements[0].matchAll(/^property (\w+) (\w+)\s*$/gm)];
  const names = properties.map((one) => one[2]);
  const triple = [["red", "green", "blue"], ["diffuse_red", "diffuse_green", "diffuse_blue"], ["r", "g", "b"]]
    .find((three) => three.every((name) => names.includes(name)));
  const columns = [..."xyz", ...(triple || [])].map((name) => names.indexOf(name));
  const types = properties.map((one) => PLY_TYPES[one[1]]);
  if (columns.includes(-1) || types.includes(undefined)) throw new Error("Its vertices have no x, y and z.");
  const whole = Boolean(triple) && types[columns[3]][0] !== "f";
  if (format[1] === "ascii") {
    const lines = new TextDecoder("latin1").decode(bytes.subarray(begin)).split("\n", count);
    const rows = lines.map((line) => line.trim().split(/\s+/));
    if (rows.length < count) throw new Error("The file ends before its last point.");
    return { count, at: (row, column) => Number(rows[row][columns[column]]), coloured: Boolean(triple), whole };
  }
  const little = format[1] === "binary_little_endian";
  const offsets = [0];
  for (const type of types) offsets.push(offsets.at(-1) + Number(type[1]));
  const stride = offsets.at(-1);
  if (begin + count * stride > buffer.byteLength) throw new Error("The file ends before its last point.");
  const view = new DataView(buffer);
  const at = (row, column) => READ[types[columns[column]]](view, begin + row * stride + offsets[columns[column]], little);
  return { count, at, coloured: Boolean(triple), whole };
}

function fitted({ count, at, coloured, whole }) {
  if (!count) throw new Error("It has no points.");
  const shown = Math.min(count, MOST_SHOWN);
  const xyz = new Float32Array(3 * shown);
  const rgb = coloured ? new Float32Array(3 * shown) : null;
  const [low, high] = [[Infinity, Infinity, Infinity], [-Infinity, -Infinity, -Infinity]];
  let brightest = 0;
  for (let index = 0; index < shown; index += 1) {
    const row = Math.floor((index * count) / shown);
    for (let axis = 0; axis < 3; axis += 1) {
      const value = at(row, axis);
      if (!Number.isFinite(value)) throw new Error("It holds NaN or infinite values.");
      xyz[3 * index + axis] = value;
      low[axis] = Math.min(low[axis], value);
      high[axis] = Math.max(high[axis], value);
      if (rgb) brightest = Math.max(brightest, (rgb[3 * index + axis] = at(row, 3 + axis)));
    }
  }
  const reach = Math.max(...high.map((value, axis) => value - low[axis])) / 2 || 1;
  for (let index = 0; index < xyz.length; index += 1) {
    xyz[index] = (xyz[index] - (low[index % 3] + high[index % 3]) / 2) / reach;
  }
  if (rgb && (whole || brightest >= 2)) rgb.forEach((value, index) => (rgb[index] = value / 255));
  return { count, shown, xyz, rgb };
}

const VERTEX = `
attribute vec3 place; attribute vec3 tint;
uniform vec2 turn; uniform float zoom, aspect, spot;
varying vec3 shade;
void main() {
  float c = cos(turn.x), s = sin(turn.x), e = cos(turn.y), f = sin(turn.y);
  vec3 p = vec3(c * place.x + s * place.z, place.y, c * place.z - s * place.x);
  p = vec3(p.x, e * p.y - f * p.z, f * p.y + e * p.z);
  float depth = 3.4 - p.z;
  gl_Position = vec4(p.x * zoom / aspect, p.y * zoom, (depth - 3.4) / 4.0 * depth, depth);
  gl_PointSize = spot * 3.4 / depth;
  shade = tint * clamp(0.72 + 0.28 * p.z, 0.35, 1.0);
}`;
const FRAGMENT = `
precision mediump float; varying vec3 shade;
void main() {
  vec2 off = gl_PointCoord - 0.5;
  if (dot(off, off) > 0.25) discard;
  gl_FragColor = vec4(shade, 1.0);
}`;

// browsers allow few WebGL contexts on a page: one draws for all clouds, which copy its picture
let stage;

function theStage() {
  if (stage !== undefined) return stage;
  const canvas = document.createElement("canvas");
  const gl = canvas.getContext("webgl", { antialias: true, premultipliedAlpha: true, preserveDrawingBuffer: true });
  if (!gl) return (stage = null);
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return (stage = null);
  gl.useProgram(program);
  gl.enable(gl.DEPTH_TEST);
  const of = (name) => gl.getUniformLocation(program, name);
  return (stage = { canvas, gl, turn: of("turn"), zoom: of("zoom"), aspect: of("aspect"), spot: of("spot"),
    place: gl.getAttribLocation(program, "place"), tint: gl.getAttribLocation(program, "tint"), buffers: new WeakMap() });
}

function buffersOf({ gl, buffers }, cloud) {
  if (!buffers.has(cloud)) {
    const filled = (data) => {
      const buffer = gl.createBuffer();
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
      return buffer;
    };
    const tint = cloud.rgb || Float32Array.from(cloud.xyz, (value, at) => [0.06, 0.73, 0.51][at % 3] + 0.22 * value * (at % 3 === 0));
    buffers.set(cloud, { place: filled(cloud.xyz), tint: filled(tint) });
  }
  return buffers.get(cloud);
}

function draw(canvas, cloud, { yaw, pitch, zoom }) {
  const { gl, ...at } = stage;
  const [width, height] = [canvas.width, canvas.height];
  Object.assign(at.canvas, { width, height });
  gl.viewport(0, 0, width, height);
  gl.clearColor(0, 0, 0, 0);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  for (const [name, buffer] of Object.entries(buffersOf(stage, cloud))) {
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.enableVertexAttribArray(at[name]);
    gl.vertexAttribPointer(at[name], 3, gl.FLOAT, false, 0, 0);
  }
  gl.uniform2f(at.turn, yaw, pitch);
  gl.uniform1f(at.zoom, 3.1 * zoom);
  gl.uniform1f(at.aspect, width / height);
  gl.uniform1f(at.spot, Math.max(1.5, (cloud.shown < 20_000 ? 0.016 : 0.008) * height * zoom));
  gl.drawArrays(gl.POINTS, 0, cloud.shown);
  const flat = canvas.getContext("2d");
  flat.clearRect(0, 0, width, height);
  flat.drawImage(at.canvas, 0, 0);
}

/** A turntable of a cloud: drag or arrow keys rotate, wheel or + and − zoom; it turns by itself until it is touched. */
export function turntable(cloud, name) {
  const points = `${cloud.count.toLocaleString("en")} points${cloud.shown < cloud.count ? `, ${cloud.shown.toLocaleString("en")} shown` : ""}`;
  if (!theStage()) return h("p", { class: "note", text: `${points}. This browser has no WebGL to show them.` });
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const state = { yaw: 0.6, pitch: 0.35, zoom: 1, turns: !still, from: null, seen: false, drawn: -Infinity };
  const canvas = h("canvas", {
    class: "cloud", width: 440, height: 330, tabindex: "0", role: "img",
    "aria-label": `Point cloud ${name}: ${points}. Arrow keys rotate it, plus and minus zoom.`,
  });
  const render = () => {
    draw(canvas, cloud, state);
    canvas.dataset.yaw = state.yaw.toFixed(3);
  };
  const rotate = (yaw, pitch) => {
    state.turns = false;
    state.yaw += yaw;
    state.pitch = Math.max(-1.55, Math.min(1.55, state.pitch + pitch));
    render();
  };
  const zoom = (factor) => {
    state.zoom = Math.max(0.4, Math.min(6, state.zoom * factor));
    render();
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    state.from = [event.clientX, event.clientY];
    state.turns = false;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state.from) return;
    rotate((event.clientX - state.from[0]) / 90, (event.clientY - state.from[1]) / 90);
    state.from = [event.clientX, event.clientY];
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => (state.from = null));
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas) return; // else the page scrolls
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] };
    if (steps[event.key]) rotate(...steps[event.key]);
    else if (event.key === "+" || event.key === "=") zoom(1.1);
    else if (event.key === "-") zoom(1 / 1.1);
    else return;
    event.preventDefault();
  });
  new IntersectionObserver(([entry]) => {
    const begins = entry.isIntersecting && !state.seen;
    state.seen = entry.isIntersecting;
    if (begins) requestAnimationFrame(tick);
  }).observe(canvas);
  function tick(now) {
    if (now - state.drawn >= FRAME_MS) {
      if (state.turns) state.yaw += 0.011;
      state.drawn = now;
      render();
    }
    if (state.seen && state.turns && canvas.isConnected) requestAnimationFrame(tick);
  }
  return h("figure", { class: "medium" }, canvas, h("figcaption", { text: `${name} · ${points}` }));
}
