// Draws the maps, and shows where the token under the pointer looks.
const data = JSON.parse(document.getElementById("data").textContent);
const T = data.tokens.length;
const COLUMNS = data.heads + 2; // the heads, their mean, the rollout
const FLOOR = 4; // powers of ten below 1 that the logarithmic scale shows
const find = (id) => document.getElementById(id);

const codes = (() => {
  const bytes = Uint8Array.from(atob(data.codes), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, n) => view.getUint16(2 * n, true));
})();
const SIZE = data.triangle ? (T * (T + 1)) / 2 : T * T; // numbers a map

// What token i gives to token j; null where it cannot look.
const weight = (layer, column, i, j) => {
  if (data.triangle && j > i) return null;
  const start = (layer * COLUMNS + column) * SIZE;
  return codes[start + (data.triangle ? (i * (i + 1)) / 2 : i * T) + j] / 65535;
};
const columnName = (column) =>
  column < data.heads ? `${column}` : column === data.heads ? "mean" : "rollout";
const headName = ({ layer, column }) =>
  `layer ${layer}, ${column < data.heads ? "head " : ""}${columnName(column)}`;

const chosen = { layer: 0, column: 0, token: T - 1, kept: T - 1, log: false };
const shade = (w) => (chosen.log ? Math.max(0, 1 + Math.log10(Math.max(w, 1e-9)) / FLOOR) : w);
const percent = (w) =>
  w >= 0.9995 ? "100" : w >= 0.0995 ? (100 * w).toFixed(1) : w >= 0.0005 ? (100 * w).toFixed(2) : w ? "<0.05" : "0";

// Colours: from the card's own through the accent to the ink, in either theme.
let colours = [];
const readColours = () => {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => {
    const hex = style.getPropertyValue(name).trim().slice(1);
    const long = hex.length === 3 ? [...hex].map((c) => c + c).join("") : hex;
    return [0, 2, 4].map((at) => parseInt(long.slice(at, at + 2), 16));
  };
  const stops = ["--card", "--accent", "--ink"].map(rgb);
  colours = Array.from({ length: 256 }, (_, n) => {
    const at = (n / 255) * 1.6; // four fifths of the way: the darkest still has a hue
    const [low, high] = at < 1 ? [stops[0], stops[1]] : [stops[1], stops[2]];
    const part = at < 1 ? at : at - 1;
    return low.map((c, k) => Math.round(c + (high[k] - c) * part));
  });
};
const colour = (w) => colours[Math.round(255 * Math.min(1, shade(w)))];

// A T×T picture, one pixel a weight; what cannot be seen is left clear.
const picture = (layer, column) => {
  const image = new ImageData(T, T);
  for (let i = 0; i < T; i++) {
    for (let j = 0; j < T; j++) {
      const w = weight(layer, column, i, j);
      if (w !== null) image.data.set([...colour(w), 255], 4 * (i * T + j));
    }
  }
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = T;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
};

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

// Tokens.
const chips = data.tokens.map((label, index) => {
  const spaces = label.match(/^ */)[0].length;
  const word = element("span", {}, element("span", { class: "space" }, "␣".repeat(spaces)), label.slice(spaces));
  const number = element("small");
  const chip = element("button", { type: "button", class: "token", tabindex: -1 }, word, number);
  chip.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && look(index));
  chip.addEventListener("focus", () => keep(index));
  chip.addEventListener("click", () => keep(index));
  find("tokens").append(element("li", {}, chip));
  return { chip, number };
});
find("tokens").addEventListener("pointerleave", () => look(chosen.kept));
find("tokens").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  chips[Math.min(T - 1, Math.max(0, chosen.kept + step))].chip.focus();
});

const keep = (index) => {
  chips[chosen.kept].chip.tabIndex = -1;
  chosen.kept = index;
  chips[index].chip.tabIndex = 0;
  look(index);
};

const quoted = (index) => `“${data.tokens[index]}”`;

function look(index) {
  chosen.token = index;
  const seen = [];
  chips.forEach(({ chip, number }, j) => {
    const w = weight(chosen.layer, chosen.column, index, j);
    chip.classList.toggle("looks", j === index);
    chip.classList.toggle("unseen", w === null);
    const part = w === null ? 0 : 62 * Math.min(1, shade(w)); // the text stays readable on it
    chip.style.background = `color-mix(in srgb, var(--accent) ${part.toFixed(1)}%, var(--card))`;
    number.textContent = w === null ? "–" : percent(w);
    if (w === null) delete chip.dataset.weight;
    else chip.dataset.weight = w;
    chip.setAttribute("aria-label", `token ${j}, ${data.tokens[j].trim() || "space"}: ${w === null ? "not visible" : percent(w) + " %"}`);
    if (w !== null) seen.push([w, j]);
  });
  const most = seen.sort((a, b) => b[0] - a[0]).slice(0, 5).filter(([w]) => w >= 0.0005);
  const list = most.flatMap(([w, j], n) => [n ? ", " : "", element("span", {}, `${quoted(j)} (${j}) ${percent(w)} %`)]);
  find("said").replaceChildren(element("b", {}, `${quoted(index)} (${index})`), " looks at ", ...list, ".");
  drawMap();
}

// The large map, with labels where they fit.
const map = find("map");
let cell = 1, left = 0;
function drawMap() {
  const room = Math.max(200, map.parentElement.clientWidth - 30);
  const labelled = T <= 40 && room > 420;
  left = labelled ? 84 : 0;
  cell = Math.max(1, Math.min(26, Math.floor((room - left) / T)));
  const width = left + cell * T, height = cell * T + left;
  const ratio = window.devicePixelRatio || 1;
  map.width = width * ratio;
  map.height = height * ratio;
  map.style.width = `${width}px`;
  const pen = map.getContext("2d");
  pen.scale(ratio, ratio);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(picture(chosen.layer, chosen.column), left, 0, cell * T, cell * T);
  const style = getComputedStyle(document.documentElement);
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.strokeRect(left + 0.5, 0.5, cell * T - 1, cell * T - 1);
  pen.strokeStyle = style.getPropertyValue("--ink");
  pen.strokeRect(left + 0.5, chosen.token * cell + 0.5, cell * T - 1, Math.max(1, cell - 1));
  if (!labelled) return;
  pen.fillStyle = style.getPropertyValue("--ink");
  pen.font = `${Math.min(13, cell - 1)}px ${getComputedStyle(document.body).fontFamily}`;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  data.tokens.forEach((label, n) => {
    const short = [...label.trim()].length > 10 ? [...label.trim()].slice(0, 9).join("") + "…" : label.trim() || "␣";
    pen.fillText(short, left - 6, (n + 0.5) * cell);
    pen.save();
    pen.translate(left + (n + 0.5) * cell, cell * T + 6);
    pen.rotate(-Math.PI / 2);
    pen.fillText(short, 0, 0);
    pen.restore();
  });
}
map.addEventListener("pointermove", (event) => {
  const box = map.getBoundingClientRect();
  const scale = (left + cell * T) / box.width;
  const j = Math.floor(((event.clientX - box.left) * scale - left) / cell);
  const i = Math.floor(((event.clientY - box.top) * scale) / cell);
  if (i < 0 || j < 0 || i >= T || j >= T) return;
  if (i !== chosen.token) look(i);
  const w = weight(chosen.layer, chosen.column, i, j);
  const says = w === null ? "cannot see" : `gives ${percent(w)} % to`;
  find("cell").textContent = `${quoted(i)} (${i}) ${says} ${quoted(j)} (${j})`;
});
map.addEventListener("pointerleave", () => {
  find("cell").textContent = "\u00a0";
  look(chosen.kept);
});

// The grid of all heads.
const buttons = [];
const buildGrid = () => {
  const names = Array.from({ length: COLUMNS }, (_, c) =>
    element("span", { class: "name", role: "columnheader" }, columnName(c)));
  const corner = element("span", { class: "name", role: "columnheader", "aria-label": "layer" });
  find("grid").append(element("div", { class: "row names", role: "row" }, corner, ...names));
  for (let layer = 0; layer < data.layers; layer++) {
    const row = element("div", { class: "row", role: "row" },
      element("span", { class: "name", role: "rowheader" }, `${layer}`));
    for (let column = 0; column < COLUMNS; column++) {
      const button = element("button", {
        type: "button", class: "map", tabindex: -1, title: headName({ layer, column }),
        "aria-label": headName({ layer, column }), "data-layer": layer, "data-column": column,
      }, element("canvas", { width: T, height: T }));
      button.addEventListener("click", () => choose(layer, column, true));
      buttons.push(button);
      row.append(element("span", { role: "gridcell" }, button));
    }
    find("grid").append(row);
  }
};
const drawGrid = () => buttons.forEach((button) => {
  const pen = button.firstChild.getContext("2d");
  pen.clearRect(0, 0, T, T);
  pen.drawImage(picture(+button.dataset.layer, +button.dataset.column), 0, 0);
});
find("grid").addEventListener("keydown", (event) => {
  const [down, across] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [0, 0];
  if (!down && !across) return;
  event.preventDefault();
  choose(chosen.layer + down, chosen.column + across);
  buttons[chosen.layer * COLUMNS + chosen.column].focus();
});

function choose(layer, column, show = false) {
  const before = buttons[chosen.layer * COLUMNS + chosen.column];
  before.tabIndex = -1;
  before.setAttribute("aria-pressed", "false");
  chosen.layer = Math.min(data.layers - 1, Math.max(0, layer));
  chosen.column = Math.min(COLUMNS - 1, Math.max(0, column));
  const now = buttons[chosen.layer * COLUMNS + chosen.column];
  now.tabIndex = 0;
  now.setAttribute("aria-pressed", "true");
  find("layer").value = chosen.layer;
  find("head").value = chosen.column;
  find("map-title").textContent = `Who looks (rows) at whom (columns): ${headName(chosen)}`;
  for (const row of rows) row.line.classList.toggle("chosen", row.layer === chosen.layer && row.head === chosen.column);
  look(chosen.kept);
  const view = find("view").getBoundingClientRect();
  if (show && (view.bottom < 120 || matchMedia("(max-width: 900px)").matches)) find("view").scrollIntoView();
}

// Controls.
const option = (value, text) => element("option", { value }, text);
find("layer").append(...Array.from({ length: data.layers }, (_, n) => option(n, `${n}`)));
find("head").append(...Array.from({ length: COLUMNS }, (_, n) => option(n, columnName(n))));
for (const id of ["layer", "head"]) {
  find(id).addEventListener("change", () => choose(+find("layer").value, +find("head").value));
}
for (const radio of document.querySelectorAll("input[name=scale]")) {
  radio.addEventListener("change", () => {
    chosen.log = radio.value === "log";
    drawGrid();
    look(chosen.token);
  });
}

// The table, sorted by a click on a column's name: largest first, then smallest, empty ones last.
const names = Object.keys(data.statistics);
const rows = [];
for (let layer = 0; layer < data.layers; layer++) {
  for (let head = 0; head < data.heads; head++) {
    const row = { layer, head };
    for (const name of names) row[name] = data.statistics[name][layer][head];
    const button = element("button", { type: "button", "aria-label": `show layer ${layer}, head ${head}` }, `${head}`);
    button.addEventListener("click", () => choose(layer, head, true));
    const cells = names.map((name) => element("td", {}, row[name] === null ? "–" : row[name].toFixed(3)));
    row.line = element("tr", {}, element("td", {}, `${layer}`), element("td", {}, button), ...cells);
    rows.push(row);
  }
}
const body = document.querySelector("#statistics tbody");
body.append(...rows.map((row) => row.line));
for (const button of document.querySelectorAll("[data-column]:not(.map)")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, name = button.dataset.column;
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const empty = (row) => (row[name] === null ? 1 : 0);
    const order = (a, b) => empty(a) - empty(b) || (up ? a[name] - b[name] : b[name] - a[name]);
    body.append(...rows.slice().sort(order).map((row) => row.line));
  });
}

const restyle = () => {
  readColours();
  drawGrid();
  look(chosen.token);
};
buildGrid();
readColours();
drawGrid();
keep(T - 1);
choose(0, 0);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
addEventListener("resize", drawMap);
