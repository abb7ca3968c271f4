// The Edit tab: a picture on the desk, the ones before it, and what is painted over.

import { $, $$, fit, h, iterationsOf, models, open, read } from "./controls.js";
import { ask, Cell, draw, pngUrl, refuse, say } from "./drawing.js";

const desk = { picture: null, model: null, past: [], painted: [] };
const cells = () => $$("#edit [data-token]");
const pressed = (cell) => cell.getAttribute("aria-pressed") === "true";

function put(picture, model, painted = []) {
  if (desk.picture) desk.past.push([desk.picture, desk.model]);
  Object.assign(desk, { picture, model, painted });
  show();
}

// What is drawn onto the desk gives way to another picture.
function stop(form) {
  form.drawing?.abort();
  form.drawing = null; // whose line says what follows
}

// Show the picture on the desk, or the canvas of one that is being drawn, under a button for each token.
function show(canvas = null, model = desk.model) {
  const { picture, painted } = desk;
  if (!picture && !canvas) return;
  const [rows, columns] = models[model].token_grid;
  const url = picture && pngUrl(picture.png);
  const buttons = Array.from({ length: rows * columns }, (_, i) => h("button", {
    type: "button", "data-token": i, "aria-pressed": String(painted.includes(i)), tabindex: i ? -1 : 0,
    "aria-label": `row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}`,
  }));
  const label = "Tokens: paint with the pointer, or move with the arrow keys and press Space";
  const over = h("div", { class: "cells", role: "group", "aria-label": label }, buttons);
  over.style.setProperty("--columns", columns);
  const tools = ["all", "none", "invert"].map((tool) => h("button", { type: "button", "data-tool": tool }, tool));
  const recipe = picture?.recipe ? " with its recipe" : " (an upload has no recipe until a part of it is redrawn)";
  const saving = picture ? [h("a", { href: url, download: picture.file }, "Save this picture as PNG"), recipe] : [];
  const shown = canvas ?? h("img", { src: url, alt: "the picture to edit" });
  $("#edit .canvas").replaceChildren(
    h("div", { class: painted.length ? "painter fresh" : "painter" }, shown, over),
    h("div", { class: "tools" }, h("span", { role: "group", "aria-label": "Paint" }, tools), h("output")),
    h("p", { class: "soft" }, saving),
  );
  count();
}

function count() {
  desk.painted = cells().flatMap((cell, i) => (pressed(cell) ? [i] : []));
  $("#edit output").textContent = `${desk.painted.length} of ${cells().length} tokens painted`;
}

function paint(some, value) {
  $("#edit .painter").classList.remove("fresh"); // what was redrawn is no longer outlined but painted
  some.forEach((cell) => cell.setAttribute("aria-pressed", String(value(cell))));
  count();
}

function wirePainter(area) {
  let brush = null; // what the pointer paints while it is down
  const under = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-token]");
  area.addEventListener("pointerdown", (event) => {
    const cell = under(event);
    if (!cell || event.button !== 0) return;
    brush = !pressed(cell);
    paint([cell], () => brush);
  });
  area.addEventListener("pointermove", (event) => {
    const cell = brush === null ? null : under(event);
    if (cell && pressed(cell) !== brush) paint([cell], () => brush);
  });
  for (const name of ["pointerup", "pointercancel"]) addEventListener(name, () => (brush = null));
  area.addEventListener("click", (event) => {
    const tool = event.target.dataset.tool, cell = event.target.closest("[data-token]");
    if (tool) paint(cells(), { all: () => true, none: () => false, invert: (one) => !pressed(one) }[tool]);
    else if (cell && event.detail === 0) paint([cell], (one) => !pressed(one)); // by the keyboard
  });
  area.addEventListener("keydown", (event) => {
    const at = cells().indexOf(event.target), columns = Number($(".cells", area)?.style.getPropertyValue("--columns"));
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (at < 0 || !step) return;
    event.preventDefault();
    const next = cells()[at + step];
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

// Put a picture from another place of the page onto the desk, with its model and class, and open the tab.
export function takeToDesk(picture, wanted) {
  const form = $("#edit");
  stop(form);
  $("[name=model]", form).value = wanted.model;
  fit(form);
  for (const name of ["class", "new_class"]) {
    $(`[name=${name}]`, form).value = wanted.class;
    if (wanted.style) $(`[name=${name}_style]`, form).value = wanted.style;
  }
  put(picture, wanted.model);
  open($("#tab-edit"));
  say(form, "This picture is on the desk. Now paint.");
}

// Draw onto the desk; the tokens that are painted stay outlined.
async function drawHere(form, wanted, painted, done) {
  const cell = new Cell(wanted.model, {}), before = desk.picture;
  const ended = draw(form, [wanted], async (event) => {
    await cell.show(event, wanted);
    if (event.picture) put(event.picture, wanted.model, painted);
    else show(cell.canvas, wanted.model);
  }, () => done);
  const own = form.drawing;
  await ended;
  if (form.drawing === own && desk.picture === before) show(); // stopped, or failed: what can be edited is shown again
}

export function edit(form, action) {
  const { model, seed, new_class, new_class_style, new_seed, keep, count: many, ...old } = read(form);
  const iterations = iterationsOf(model, old.iterations), { picture, painted } = desk;
  const first = { model, class: old.class, style: old.class_style, seed, iterations };
  if (action === "start") return drawHere(form, first, [], "Drawn. Now paint.");
  if (!picture) return refuse(form, "draw or upload a picture first");
  const before = { tokens: picture.tokens, recipe: picture.recipe, upload: picture.upload };
  const wanted = { model, class: new_class, style: new_class_style, seed: new_seed, iterations, picture: before };
  if (action === "redraw") {
    if (!painted.length) return refuse(form, "paint over at least one token first");
    const rest = cells().length - painted.length;
    const done = `Done: ${painted.length} tokens redrawn, the other ${rest} are the same.`;
    return drawHere(form, { ...wanted, redrawn: painted }, painted, done);
  }
  const varied = Array.from({ length: many }, (_, i) =>
    new Cell(model, { tell: () => `seed ${new_seed + i}`, take: takeToDesk }));
  $(".shown", form).replaceChildren(...varied.map((cell) => cell.root));
  const pictures = varied.map((_, i) => ({ ...wanted, seed: new_seed + i, keep }));
  draw(form, pictures, (event, one) => varied[event.index].show(event, one), () => `Done: ${many} variations.`);
}

async function upload(form, file) {
  say(form, "Uploading…", "busy");
  try {
    const model = $("[name=model]", form).value;
    const picture = await (await ask(`upload?model=${encodeURIComponent(model)}`, { body: file })).json();
    stop(form);
    put(picture, model);
    say(form, "Uploaded, cropped and encoded once. Now paint.");
  } catch (error) {
    refuse(form, error.message);
  }
}

export function wireDesk(form) {
  const file = $("[type=file]", form);
  $("[data-upload]", form).addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    if (file.files[0]) await upload(form, file.files[0]);
    file.value = ""; // so that the same file can be chosen again
  });
  $("[data-undo]", form).addEventListener("click", () => {
    if (!desk.past.length) return refuse(form, "nothing to take back");
    stop(form);
    [desk.picture, desk.model] = desk.past.pop();
    $("[name=model]", form).value = desk.model;
    fit(form);
    show();
    say(form, "Taken back.");
  });
  form.addEventListener("keydown", (event) => { // Enter presses its own section's button, not the form's first
    if (event.key !== "Enter" || event.target.tagName !== "INPUT") return;
    event.preventDefault();
    $("button:not([type])", event.target.closest("section"))?.click();
  });
  wirePainter($(".canvas", form));
}
