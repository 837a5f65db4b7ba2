// The drawing surface: a picture with boxes on it, and a pen that works by mouse, touch and keys.
// Gradio runs this once with `element`, `trigger`, `props` and `watch`. Texts of visitors and models
// enter the page as textContent alone.
//
// props.value: {image, alt, marks: [{box, color, tag, group, dashed, by, score}], region, heat, python}
// Boxes and points are in 0..1 of the picture. Events: "drawn" {kind, points, typing}, "cleared".

const SVG = "http://www.w3.org/2000/svg";
const MAX_POINTS = 400;
const STILL_PX = 4; // a press that moves less is a tap
const STEP = 0.02, FINE_STEP = 0.004;

const stage = element.querySelector(".stage");
const picture = element.querySelector(".picture");
const heat = element.querySelector(".heat");
const drawing = element.querySelector("svg");
const tags = element.querySelector(".tags");
const cursor = element.querySelector(".cursor");
const said = element.querySelector(".said");
const tools = [...element.querySelectorAll("[data-tool]")];

let tool = "box";
let pen = null; // the points of the stroke that is being drawn
let cross = null; // where the keyboard's cross is
let pinned = null; // the group that a click chose

const clamp = (v) => Math.min(1, Math.max(0, v));
const value = () => props.value || { marks: [] };

function add(parent, name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, text] of Object.entries(attributes)) node.setAttribute(key, text);
  parent.append(node);
  return node;
}

function addBox(box, attributes) {
  const [left, top, right, bottom] = box.map((v) => 1000 * v);
  const place = { x: left, y: top, width: right - left, height: bottom - top };
  // white below, so that the colour shows on any picture
  if (!attributes["data-group"]) add(drawing, "rect", { ...place, class: "halo" });
  return add(drawing, "rect", { ...place, ...attributes });
}

function addTag(mark) {
  const tag = document.createElement("span");
  tag.textContent = mark.tag;
  tag.dataset.group = mark.group;
  tag.style.background = mark.color;
  const [left, top, right] = mark.box;
  // near the right edge a tag grows to the left
  if (left > 0.6) tag.style.right = `${100 * (1 - right)}%`;
  else tag.style.left = `${100 * left}%`;
  if (top > 0.06) tag.style.bottom = `${100 * (1 - top)}%`;
  else tag.style.top = `${100 * top}%`;
  tags.append(tag);
}

function addRegion(region, className) {
  if (!region || !region.points.length) return;
  const scaled = region.points.map(([x, y]) => `${1000 * x},${1000 * y}`).join(" ");
  if (region.kind === "box" && region.points.length > 1) {
    const [[x0, y0], [x1, y1]] = [region.points[0], region.points.at(-1)];
    const box = [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
    addBox(box, { class: className });
  } else if (region.kind === "scribble" && region.points.length > 1) {
    add(drawing, "polyline", { points: scaled, class: "halo" });
    add(drawing, "polyline", { points: scaled, class: className });
  } else {
    add(drawing, "polyline", { points: `${scaled} ${scaled}`, class: "dot halo" });
    add(drawing, "polyline", { points: `${scaled} ${scaled}`, class: `dot ${className}` });
  }
}

function draw() {
  const { image, alt, marks, region, heat: heatImage } = value();
  if (image && picture.getAttribute("src") !== image) picture.src = image;
  picture.alt = alt || "the chosen picture";
  heat.hidden = !heatImage;
  if (heatImage) heat.src = heatImage;
  drawing.replaceChildren();
  tags.replaceChildren();
  for (const mark of marks || []) {
    addBox(mark.box, { class: "halo" });
    addBox(mark.box, {
      class: `mark ${mark.dashed ? "dashed" : ""}`,
      "data-group": mark.group,
      stroke: mark.color,
    });
    if (mark.tag) addTag(mark);
  }
  if (region && region.box && region.kind !== "box") addBox(region.box, { class: "asked dashed" });
  addRegion(pen ? { kind: tool, points: pen } : region, "asked");
  cursor.hidden = !cross;
  if (cross) {
    cursor.style.left = `${100 * cross[0]}%`;
    cursor.style.top = `${100 * cross[1]}%`;
  }
  light(pinned);
}

// --- phrases and boxes, linked by their group

const answersOf = () => document.querySelectorAll(".answers [data-group]");

function light(group) {
  const all = [...drawing.querySelectorAll("[data-group]"), ...tags.children, ...answersOf()];
  for (const node of all) {
    node.classList.toggle("lit", group !== null && node.dataset.group === String(group));
    node.classList.toggle("dim", group !== null && node.dataset.group !== String(group));
    if (node.matches("button[data-group]"))
      node.setAttribute("aria-pressed", String(pinned !== null && node.dataset.group === pinned));
  }
}

function pin(group) {
  pinned = group === null || String(group) === pinned ? null : String(group);
  light(pinned);
}

// the smallest box below a point, so that one inside another can be reached
function groupAt([x, y]) {
  const area = ({ box: [l, t, r, b] }) => (r - l) * (b - t);
  const hit = (value().marks || [])
    .filter(({ box: [l, t, r, b] }) => l <= x && x <= r && t <= y && y <= b)
    .sort((a, b) => area(a) - area(b));
  return hit.length ? hit[0].group : null;
}

const groupOf = (event) => event.target.closest?.(".answers [data-group]")?.dataset.group ?? null;
const onAnswers = {
  mouseover: (event) => groupOf(event) !== null && light(groupOf(event)),
  mouseout: (event) => groupOf(event) !== null && light(pinned),
  focusin: (event) => groupOf(event) !== null && light(groupOf(event)),
  focusout: (event) => groupOf(event) !== null && light(pinned),
  click: (event) => groupOf(event) !== null && pin(groupOf(event)),
};
for (const [name, listener] of Object.entries(onAnswers)) document.addEventListener(name, listener);

// --- the pen, the same for all ways to move it

function down(point) {
  pen = [point];
  draw();
}

function move(point) {
  if (tool === "scribble" && pen.length < MAX_POINTS) pen.push(point);
  else if (tool === "box") pen[1] = point;
  draw();
}

function up() {
  const points = pen;
  pen = null;
  const moved = points.some(([x, y]) => {
    const { width, height } = stage.getBoundingClientRect();
    return Math.hypot((x - points[0][0]) * width, (y - points[0][1]) * height) >= STILL_PX;
  });
  if (tool === "point") return ask("point", [points.at(-1)]);
  if (moved) return ask(tool, points);
  const group = groupAt(points[0]);
  pin(group);
  if (group === null) say(tool === "box" ? "Drag to draw a box." : "Keep the button down and scribble.");
  else document.querySelector(`.answers [data-group="${group}"]`)?.scrollIntoView({ block: "nearest" });
  draw();
}

function ask(kind, points) {
  pinned = null;
  props.value = { ...value(), marks: [], region: { kind, points }, heat: null, python: "" };
  draw();
  say(`${kind} drawn`);
  // from the tab of phrases the page goes on to the one of regions
  const typing = Boolean(document.querySelector("#tab-ground")?.offsetParent);
  trigger("drawn", { kind, points, typing });
}

function clear() {
  pen = pinned = null;
  props.value = { ...value(), marks: [], region: null, heat: null, python: "" };
  draw();
  say("cleared");
  trigger("cleared", {});
}

const say = (text) => (said.textContent = text);

// --- mouse and touch

function pointOf(event) {
  const { left, top, width, height } = picture.getBoundingClientRect();
  return [clamp((event.clientX - left) / width), clamp((event.clientY - top) / height)];
}

stage.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || pen) return; // a second finger draws nothing
  event.preventDefault();
  stage.focus({ preventScroll: true });
  stage.setPointerCapture(event.pointerId);
  cross = null;
  down(pointOf(event));
});
stage.addEventListener("pointermove", (event) => {
  if (pen && stage.hasPointerCapture(event.pointerId)) move(pointOf(event));
  else if (!pen && event.pointerType === "mouse") light(groupAt(pointOf(event)) ?? pinned);
});
stage.addEventListener("pointerup", (event) => {
  if (!pen || !stage.hasPointerCapture(event.pointerId)) return;
  move(pointOf(event));
  up();
});
stage.addEventListener("pointercancel", () => {
  pen = null;
  draw();
});
// a quick stroke is no fling, after which the browser would swallow the next tap
stage.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
stage.addEventListener("pointerleave", () => !pen && light(pinned));

// --- keys: arrows move the cross, Enter puts the pen down and lifts it

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

stage.addEventListener("keydown", (event) => {
  const arrow = ARROWS[event.key];
  if (arrow) {
    const step = event.shiftKey ? FINE_STEP : STEP;
    cross = (cross || [0.5, 0.5]).map((v, axis) => clamp(v + step * arrow[axis]));
    if (pen) move([...cross]);
    draw();
  } else if (event.key === "Enter" || event.key === " ") {
    cross ||= [0.5, 0.5];
    if (pen) up();
    else down([...cross]);
    if (pen && tool === "point") up();
    else if (pen) say("Pen down; move with the arrows, Enter lifts it.");
    draw();
  } else if (event.key === "Escape") {
    if (pen) pen = null;
    else clear();
    draw();
  } else return;
  event.preventDefault();
});
stage.addEventListener("blur", () => {
  cross = pen = null;
  draw();
});

// --- tools

function choose(name) {
  tool = name;
  for (const button of tools)
    button.setAttribute("aria-pressed", String(button.dataset.tool === name));
}
for (const button of tools) button.addEventListener("click", () => choose(button.dataset.tool));
element.querySelector(".clear").addEventListener("click", clear);

// --- export, all of it in the browser

function offer(name, address) {
  const link = document.createElement("a");
  link.download = name;
  link.href = address;
  link.click();
}

function savePicture() {
  const canvas = document.createElement("canvas");
  const [width, height] = [picture.naturalWidth, picture.naturalHeight];
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext("2d");
  pen.drawImage(picture, 0, 0);
  if (value().heat) pen.drawImage(heat, 0, 0, width, height);
  const line = Math.max(2, Math.round(width / 200)), text = Math.max(12, Math.round(width / 36));
  const region = value().region?.box && { box: value().region.box, color: "#111827", tag: "" };
  for (const mark of [...(value().marks || []), ...(region ? [region] : [])]) {
    const [left, top, right, bottom] = mark.box.map((v, i) => v * (i % 2 ? height : width));
    pen.setLineDash(mark.dashed ? [2 * line, 2 * line] : []);
    for (const [color, thickness] of [["white", line + 2], [mark.color, line]]) {
      pen.strokeStyle = color;
      pen.lineWidth = thickness;
      pen.strokeRect(left, top, right - left, bottom - top);
    }
    if (!mark.tag) continue;
    pen.font = `${text}px sans-serif`;
    const y = Math.max(0, top - 1.3 * text);
    pen.fillStyle = mark.color;
    pen.fillRect(left, y, pen.measureText(mark.tag).width + text * 0.6, 1.3 * text);
    pen.fillStyle = "white";
    pen.fillText(mark.tag, left + 0.3 * text, y + text);
  }
  offer("answer.png", canvas.toDataURL("image/png"));
}

function saveJson() {
  const { naturalWidth: width, naturalHeight: height } = picture;
  const { region, marks } = value();
  const boxes = (marks || []).map(({ box, phrase, by, score }) => ({
    phrase,
    by,
    score,
    box_norm: box,
    box_px: box.map((v, i) => v * (i % 2 ? height : width)),
  }));
  const json = JSON.stringify({ width, height, boxes, region: region || null }, null, 2);
  offer("answer.json", URL.createObjectURL(new Blob([json], { type: "application/json" })));
}

async function copyPython() {
  const code = element.querySelector(".python");
  code.value = value().python || "# ask something first\n";
  try {
    await navigator.clipboard.writeText(code.value);
    say("Python copied.");
  } catch {
    say("Copy the Python below."); // a page that is not served over HTTPS or by this machine
    code.hidden = false;
    code.select();
  }
}

element.querySelector(".save-picture").addEventListener("click", savePicture);
element.querySelector(".save-json").addEventListener("click", saveJson);
element.querySelector(".copy-python").addEventListener("click", copyPython);

watch("value", () => {
  element.querySelector(".python").hidden = true;
  pinned = null;
  if (!value().region && said.textContent.endsWith("drawn")) say("");
  draw();
});
choose("box");
draw();
