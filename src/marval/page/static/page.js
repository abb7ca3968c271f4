// The page: a form becomes a list of pictures to draw; the server draws one after the other and sends what changes.

const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const SVG = "http://www.w3.org/2000/svg";
const MOST_UNDO = 30;
const OWN_ORDER = "the model's own";

// An element with attributes (an object's, before the children); a true attribute has no value, a false one is not set.
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat());
  return node;
}
const h = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => build(document.createElementNS(SVG, tag), attributes, children);
const duration = (seconds) => (seconds < 0.9995 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`);
const mean = (numbers) => numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
const pngUrl = (text) => `data:image/png;base64,${text}`;

const about = await (await fetch("models")).json();
const models = Object.fromEntries(about.models.map((model, i) => [model.name, { ...model, tint: (i % 4) + 1 }]));
const isTeacher = (name) => models[name].diffusion_steps !== null;
const studentsFirst = (a, b) => isTeacher(a.model) - isTeacher(b.model);

// ---- Controls

function choice(label, name, options, value) {
  const select = h("select", { name }, options.map((one) => new Option(one, one, one === value, one === value)));
  return h("label", { class: "field" }, h("span", {}, label), select);
}

function checks(label, name, options, chosen) {
  const boxes = options.map((one) =>
    h("label", {}, h("input", { type: "checkbox", name, value: one, checked: chosen.includes(one) }), String(one)));
  return h("fieldset", { class: "field" }, h("legend", {}, label), h("div", { class: "chips" }, boxes));
}

function slider(label, name, min, max, value, step = 1) {
  const range = h("input", { type: "range", name, min, max, step, value, "aria-label": label });
  const number = h("input", { type: "number", min, max, step, value, "aria-label": `${label}, as a number` });
  range.addEventListener("input", () => (number.value = range.value));
  number.addEventListener("input", () => (range.value = number.value));
  number.addEventListener("change", () => (number.value = range.value)); // what is out of range is brought back
  return h("div", { class: "field slider" }, h("span", {}, label), number, range);
}

// Several classes, each once: chosen in a list, taken away by their buttons.
function several(label, name, options, chosen) {
  const select = h("select", { "aria-label": `${label}: add one` });
  const chips = h("div", { class: "chips" });
  const add = (value) => {
    const remove = h("button", { type: "button", "aria-label": `Remove ${value}` }, "×");
    const chip = h("span", { class: "chip" }, value, h("input", { type: "hidden", name, value }), remove);
    remove.addEventListener("click", () => (chip.remove(), select.focus()));
    chips.append(chip);
  };
  const root = h("div", { class: "field" }, h("span", {}, label), chips, select);
  root.offer = (known) => {
    select.replaceChildren(new Option("add a class…", ""), ...known.map((one) => new Option(one, one)));
    $$("input", chips).filter((input) => !known.includes(input.value)).forEach((input) => input.parentElement.remove());
  };
  select.addEventListener("change", () => {
    if (select.value && !$$("input", chips).some((input) => input.value === select.value)) add(select.value);
    select.value = "";
  });
  root.offer(options);
  chosen.forEach(add);
  return root;
}

function field(kind, { name = kind, label, value }) {
  const names = Object.keys(models), first = models[names[0]], students = names.filter((one) => !isTeacher(one));
  const tokens = Math.min(...names.map((one) => models[one].token_grid[0] * models[one].token_grid[1]));
  const alike = names.filter((one) => String(models[one].classes) === String(first.classes)).slice(0, 3);
  const some = ["sneaker", "bag", "dress", "ankle boot"].filter((one) => first.classes.includes(one));
  const teacher = names.find(isTeacher);
  switch (kind) {
    case "model": return choice("Model", name, names, students[0]);
    case "models": return checks("Models", name, names, alike);
    case "class": return choice("Class", name, first.classes, some[0]);
    case "classes": return several("Classes, in turn", name, first.classes, some.length ? some : first.classes.slice(0, 4));
    case "seed": return slider("Seed", name, 0, 999999, value ?? 0);
    case "iterations": return slider("Iterations K", name, 1, tokens, Math.min(8, tokens));
    case "count": return slider(label ?? "Pictures of each model", name, 1, 8, value ?? 4);
    case "keep": return slider("Share of tokens to keep", name, 0, 1, 0.5, 0.05);
    case "order": return choice("Unmasking order", name, [OWN_ORDER, ...about.orders]);
    case "guidance": return teacher
      ? slider("Guidance w of a teacher (a student has it baked in)", name, 0, 10, models[teacher].guidance, 0.1) : h("span");
    case "columns": {
      const every = [1, 2, 4, 6, 8, 16, 32, 64, 128, 256].filter((k) => k <= tokens);
      return checks("Iterations K", name, every, [1, 2, 4, 8, 16]);
    }
  }
}

// The values of a form: numbers of sliders, lists of boxes and chips, texts of the others.
function read(form) {
  const data = new FormData(form), values = {};
  for (const name of new Set(data.keys())) values[name] = data.get(name);
  for (const input of $$("input[type=range]", form)) values[input.name] = Number(input.value);
  for (const name of ["models", "classes", "columns"]) values[name] = data.getAll(name);
  return values;
}

// Offer the classes that the chosen models know.
function fit(form) {
  const chosen = $$("[name=models]:checked, select[name=model]", form).map((input) => input.value);
  if (!chosen.length) return;
  const known = models[chosen[0]].classes.filter((one) => chosen.every((name) => models[name].classes.includes(one)));
  for (const select of $$("select[name$=class]", form)) {
    const now = select.value;
    select.replaceChildren(...known.map((one) => new Option(one, one, one === now, one === now)));
  }
  $$(".field", form).forEach((one) => one.offer?.(known));
  const guided = chosen.some(isTeacher);
  $$("[name=guidance]", form).forEach((one) => $$("input", one.parentElement).forEach((input) => (input.disabled = !guided)));
}

// ---- Drawing

function say(form, text, kind = "") {
  const line = $(".status", form);
  line.className = `status ${kind}`;
  line.textContent = text;
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const whole = (rest + part.value).split("\n");
    rest = whole.pop();
    yield* whole.map((line) => JSON.parse(line));
  }
}

async function ask(path, options) {
  const answer = await fetch(path, { method: "POST", ...options });
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({ error: answer.statusText }))).error);
  return answer;
}

// Draw pictures, `show` each event of them with the one that it is of, and say what goes on; a form draws one list at a time.
async function draw(form, pictures, show, done) {
  form.drawing?.abort();
  const control = (form.drawing = new AbortController());
  say(form, "Waiting for a turn…", "busy");
  try {
    const body = JSON.stringify({ pictures });
    const headers = { "content-type": "application/json" };
    for await (const event of lines((await ask("draw", { body, headers, signal: control.signal })).body)) {
      if (event.error) throw new Error(event.error);
      const wanted = pictures[event.index];
      await show(event, wanted);
      const which = pictures.length > 1 ? ` · picture ${event.index + 1} of ${pictures.length}` : "";
      say(form, `${wanted.model}${which} · iteration ${event.iteration} · ${duration(event.seconds)}`, "busy");
    }
    if (form.drawing === control) say(form, done());
  } catch (error) {
    const stopped = control.signal.aborted;
    if (form.drawing === control) say(form, stopped ? "Stopped." : `Not possible: ${error.message}`, stopped ? "" : "failed");
  }
}

const bitmap = (text) => createImageBitmap(new Blob([Uint8Array.from(atob(text), (mark) => mark.charCodeAt(0))]));

// The place of one picture: empty, then a canvas that grows, then the picture with what can be done with it.
class Cell {
  constructor(model, { caption, edit = true, strip = null } = {}) {
    Object.assign(this, { model: models[model], caption, edit, strip });
    this.root = h("figure", { class: "picture waiting" }, h("div"), h("figcaption", {}, "\u00a0"));
  }

  async show(event, wanted) {
    const [height, width] = this.model.image_size;
    if (event.picture) {
      this.finish(event, wanted);
    } else {
      if (!this.canvas) {
        this.canvas = h("canvas", { width, height, role: "img" });
        this.root.className = "picture growing";
        this.root.firstChild.replaceWith(this.canvas);
      }
      if (event.patches) this.canvas.getContext("2d").drawImage(await bitmap(event.patches), 0, 0);
      const told = `iteration ${event.iteration} of ${wanted.iterations}`;
      this.canvas.setAttribute("aria-label", `${wanted.class}, ${told}`);
      this.root.lastChild.replaceChildren(h("span", {}, told), h("span", {}, duration(event.seconds)));
    }
    this.strip?.add(event, event.picture ? await bitmap(event.picture.png) : event.patches && this.canvas, width, height);
  }

  finish(event, wanted) {
    const { picture } = event, url = pngUrl(picture.png);
    const told = this.caption ?? `${wanted.class} · seed ${wanted.seed}`;
    const actions = h("span", { class: "actions" });
    if (this.edit) {
      actions.append(h("button", { type: "button", "aria-label": `Edit ${told}` }, "Edit"));
      actions.lastChild.addEventListener("click", () => takeToDesk(picture, wanted));
    }
    actions.append(h("a", { href: url, download: picture.file, "aria-label": `Save ${told} as PNG` }, "Save"));
    this.root.className = "picture";
    const text = this.caption === "" ? duration(event.seconds) : told;
    this.root.replaceChildren(h("img", { src: url, alt: told || text }), h("figcaption", {}, h("span", {}, text), actions));
  }
}

// The partial picture after each iteration that was shown, with the time at which it was there.
class Strip {
  root = h("div", { class: "strip", tabindex: 0, role: "group", "aria-label": "After each iteration" });

  add(event, source, width, height) {
    if (event.iteration === 1) this.root.replaceChildren();
    if (!source) return;
    const scale = Math.min(1, 92 / width);
    const label = `after iteration ${event.iteration}`;
    const small = h("canvas", { width: width * scale, height: height * scale, role: "img", "aria-label": label });
    small.getContext("2d").drawImage(source, 0, 0, small.width, small.height);
    const caption = h("figcaption", {}, String(event.iteration), h("br"), duration(event.seconds));
    this.root.append(h("figure", {}, small, caption));
  }
}

function panel(name, note, ...children) {
  const head = h("header", {}, h("h3", {}, name), h("p", {}, note));
  return h("article", { class: `panel tint-${models[name].tint}`, "aria-label": name }, head, ...children);
}

// ---- The four forms

function generate(form) {
  const { models: names, classes, seed, iterations, guidance, order, count } = read(form);
  if (!names.length || !classes.length) return say(form, "Not possible: choose at least one model and one class", "failed");
  const own = order === OWN_ORDER ? null : order, panels = {};
  for (const name of names) {
    const inner = isTeacher(name) ? `${models[name].diffusion_steps} steps · w = ${guidance}` : "one call per iteration";
    const strip = new Strip(), cells = Array.from({ length: count }, () => new Cell(name, { strip }));
    const time = h("strong", {}, "–"), faster = h("span"), bar = h("progress", { max: count, value: 0 });
    bar.setAttribute("aria-label", `${name}: pictures drawn`);
    const root = panel(
      name, `K = ${iterations} · ${inner} · ${own ?? models[name].order}`,
      h("p", { class: "figures" }, h("span", {}, time, " a picture"), faster), bar,
      h("div", { class: "pictures" }, cells.map((cell) => cell.root)), strip.root,
    );
    panels[name] = { root, cells, time, faster, bar, seconds: [] };
  }
  $(".shown", form).replaceChildren(...Object.values(panels).map((one) => one.root));
  const pictures = names.flatMap((model) => Array.from({ length: count }, (_, i) => ({
    model, class: classes[i % classes.length], seed: seed + i, iterations, order: own, guidance: isTeacher(model) ? guidance : null,
  }))).sort(studentsFirst);
  const teacher = names.find(isTeacher);
  const compare = () => {
    for (const [name, { seconds, faster }] of Object.entries(panels)) {
      if (name === teacher || !teacher || !panels[teacher].seconds.length || !seconds.length) continue;
      faster.className = "speed";
      faster.textContent = `${Math.round(mean(panels[teacher].seconds) / mean(seconds))}× faster`;
    }
  };
  draw(form, pictures, async (event, wanted) => {
    const one = panels[wanted.model];
    await one.cells[wanted.seed - seed].show(event, wanted);
    if (event.picture) one.seconds.push(event.seconds);
    one.time.textContent = duration(one.seconds.length ? mean(one.seconds) : event.seconds);
    one.bar.value = one.seconds.length + (event.picture ? 0 : event.iteration / iterations);
    compare();
  }, () => `Done. Time of a picture: ${names.map((name) => `${name} ${duration(mean(panels[name].seconds))}`).join(", ")}.`);
}

function compare(form) {
  const { models: names, columns, class: label, seed } = read(form);
  if (!names.length || !columns.length) return say(form, "Not possible: choose at least one model and one K", "failed");
  const cells = {};
  const row = (name) => h(
    "tr", { class: `tint-${models[name].tint}` }, h("th", { scope: "row" }, name),
    columns.map((k) => h("td", {}, (cells[`${name} ${k}`] = new Cell(name, { caption: "", edit: false })).root)),
  );
  const head = h("tr", {}, h("td"), columns.map((k) => h("th", { scope: "col" }, `K = ${k}`)));
  $(".shown", form).replaceChildren(h("table", { class: "grid" }, h("thead", {}, head), h("tbody", {}, names.map(row))));
  const pictures = names.flatMap((model) => columns.map((k) => ({ model, class: label, seed, iterations: Number(k) })));
  draw(form, pictures.sort(studentsFirst), (event, wanted) => cells[`${wanted.model} ${wanted.iterations}`].show(event, wanted),
    () => `Done: ${pictures.length} pictures of one seed.`);
}

// The two nested loops of a model, with the calls of its networks.
function loops(name, iterations) {
  const steps = models[name].diffusion_steps, outer = s("text", { x: 16, y: 46 });
  const done = s("rect", { class: "done", x: 16, y: 56, width: 0, height: 6, rx: 3 });
  const block = (x, title) => {
    const count = s("text", { class: "count", x: x + 70, y: 185 }, "0");
    const rect = s("rect", { class: "block", x, y: 128, width: 140, height: 74, rx: 8 });
    return [count, [rect, s("text", { class: "middle", x: x + 70, y: 151 }, title), count]];
  };
  const [context, left] = block(22, "context network"), [head, right] = block(206, "token head");
  const arrow = (d, live) => s("path", { class: live ? "arrow live" : "arrow", d });
  const drawing = s(
    "svg", { viewBox: "-4 16 408 216", role: "img" },
    s("rect", { class: "outer", x: 4, y: 22, width: 392, height: 206, rx: 14 }), done, outer,
    arrow("M 389 120 h 14 l -7 13 z M -3 133 h 14 l -7 -13 z", false),
    s("rect", { class: steps ? "inner" : "inner single", x: 190, y: 78, width: 194, height: 138, rx: 12 }),
    s("text", { class: "small", x: 202, y: 98 }, steps ? `inner loop: ${steps} steps` : "no inner loop: one call"),
    steps ? arrow("M 377 146 h 14 l -7 13 z M 183 159 h 14 l -7 -13 z", true) : [], left, right,
  );
  const tokens = h("strong"), time = h("span"), cell = new Cell(name, { caption: "", edit: false });
  const root = panel(name, "", drawing, h("p", { class: "figures" }, h("span", {}, tokens, " tokens through the head"), time),
    h("div", { class: "pictures" }, cell.root));
  const tell = (k, calls, seconds) => {
    outer.textContent = `outer loop: iteration ${k} of ${iterations}`;
    done.setAttribute("width", (368 * k) / iterations);
    [context.textContent, head.textContent, tokens.textContent] = ["context", "head", "tokens"].map((one) => calls[one].toLocaleString("en"));
    drawing.setAttribute("aria-label", `${name}: ${calls.context} passes of the context network, ${calls.head} calls of the token head`);
    time.textContent = seconds === null ? "–" : duration(seconds);
  };
  tell(0, { context: 0, head: 0, tokens: 0 }, null);
  return { root, cell, tell, head };
}

function count(form) {
  const { models: names, class: label, seed, iterations } = read(form);
  const shown = Object.fromEntries(names.map((name) => [name, loops(name, iterations)]));
  $(".shown", form).replaceChildren(...Object.values(shown).map((one) => one.root));
  return () => draw(form, names.map((model) => ({ model, class: label, seed, iterations })).sort(studentsFirst), async (event, wanted) => {
    shown[wanted.model].tell(event.iteration, event.calls, event.seconds);
    await shown[wanted.model].cell.show(event, wanted);
  }, () => `Done: ${names.map((name) => `${name} ${shown[name].head.textContent} calls of the head`).join(", ")}.`);
}

// ---- The desk: a picture, the ones before it, and what is painted over

const desk = { picture: null, past: [], painted: [] };

function put(picture, painted = []) {
  if (desk.picture) desk.past = [...desk.past, desk.picture].slice(-MOST_UNDO);
  Object.assign(desk, { picture, painted });
  showDesk();
}

function showDesk(canvas = null) {
  const { picture, painted } = desk, [rows, columns] = models[$("#edit [name=model]").value].token_grid;
  if (!picture && !canvas) return;
  const url = picture && pngUrl(picture.png);
  const cells = Array.from({ length: rows * columns }, (_, i) => h("button", {
    type: "button", "data-token": i, "aria-pressed": String(painted.includes(i)), tabindex: i ? -1 : 0,
    "aria-label": `row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}`,
  }));
  const label = "Tokens: paint with the pointer, or move with the arrow keys and press Space";
  const grid = h("div", { class: "cells", role: "group", "aria-label": label }, cells);
  grid.style.setProperty("--columns", columns);
  const tools = ["all", "none", "invert"].map((tool) => h("button", { type: "button", "data-tool": tool }, tool));
  const told = picture?.recipe ? " with its recipe" : " (an upload has no recipe until a part of it is redrawn)";
  const saving = picture ? [h("a", { href: url, download: picture.file }, "Save this picture as PNG"), told] : [];
  $("#edit .canvas").replaceChildren(
    h("div", { class: painted.length ? "painter fresh" : "painter" }, canvas ?? h("img", { src: url, alt: "the picture to edit" }), grid),
    h("div", { class: "tools" }, h("span", { role: "group", "aria-label": "Paint" }, tools), h("output")),
    h("p", { class: "soft" }, saving),
  );
  tellPainted();
}

const tokens = () => $$("#edit [data-token]");
const pressed = (cell) => cell.getAttribute("aria-pressed") === "true";

function tellPainted() {
  desk.painted = tokens().flatMap((cell, i) => (pressed(cell) ? [i] : []));
  $("#edit output").textContent = `${desk.painted.length} of ${tokens().length} tokens painted`;
}

function paint(cells, value) {
  $("#edit .painter").classList.remove("fresh"); // what was redrawn is no longer outlined but painted
  cells.forEach((cell) => cell.setAttribute("aria-pressed", String(value(cell))));
  tellPainted();
}

function makePainter(area) {
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
    if (tool) paint(tokens(), { all: () => true, none: () => false, invert: (one) => !pressed(one) }[tool]);
    else if (cell && event.detail === 0) paint([cell], (one) => !pressed(one)); // by the keyboard
  });
  area.addEventListener("keydown", (event) => {
    const at = tokens().indexOf(event.target), columns = models[$("#edit [name=model]").value].token_grid[1];
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (at < 0 || !step) return;
    event.preventDefault();
    const next = tokens()[at + step];
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

function takeToDesk(picture, wanted) {
  const form = $("#edit");
  form.drawing?.abort();
  form.drawing = null;
  $("[name=model]", form).value = wanted.model;
  fit(form);
  for (const name of ["class", "new_class"]) $(`[name=${name}]`, form).value = wanted.class;
  put(picture);
  open($("#tab-edit"));
  say(form, "This picture is on the desk. Now paint.");
}

function edit(form, action) {
  const { model, class: label, seed, iterations, new_class, new_seed, keep, count } = read(form);
  const { picture, painted } = desk;
  if (action === "start") {
    const cell = new Cell(model);
    desk.painted = [];
    return draw(form, [{ model, class: label, seed, iterations }], async (event, wanted) => {
      await cell.show(event, wanted);
      event.picture ? put(event.picture) : showDesk(cell.canvas);
    }, () => "Drawn. Now paint.");
  }
  if (!picture) return say(form, "Not possible: draw or upload a picture first", "failed");
  const sent = { tokens: picture.tokens, recipe: picture.recipe, upload: picture.upload };
  const wanted = { model, class: new_class, seed: new_seed, iterations, picture: sent };
  if (action === "redraw") {
    if (!painted.length) return say(form, "Not possible: paint over at least one token first", "failed");
    const cell = new Cell(model);
    return draw(form, [{ ...wanted, redrawn: painted }], async (event, one) => {
      await cell.show(event, one);
      event.picture ? put(event.picture, painted) : showDesk(cell.canvas);
    }, () => `Done: ${painted.length} tokens redrawn, the other ${tokens().length - painted.length} are the same.`);
  }
  const cells = Array.from({ length: count }, (_, i) => new Cell(model, { caption: `seed ${new_seed + i}` }));
  $(".shown", form).replaceChildren(...cells.map((cell) => cell.root));
  const pictures = cells.map((_, i) => ({ ...wanted, seed: new_seed + i, keep }));
  draw(form, pictures, (event, one) => cells[event.index].show(event, one), () => `Done: ${count} variations.`);
}

async function upload(form, file) {
  const name = $("[name=model]", form).value;
  say(form, "Uploading…", "busy");
  try {
    put(await (await ask(`upload?model=${encodeURIComponent(name)}`, { body: file })).json());
    say(form, "Uploaded, cropped and encoded once. Now paint.");
  } catch (error) {
    say(form, `Not possible: ${error.message}`, "failed");
  }
}

// ---- What was measured

function plot(curves) {
  const names = Object.keys(curves), points = Object.values(curves).flat();
  const [low, high] = [Math.floor, Math.ceil].map((round, i) =>
    round(Math.log10((i ? Math.max : Math.min)(...points.map((point) => point[0]))) * 2) / 2);
  const [bottom, top] = [Math.floor, Math.ceil].map((round, i) =>
    round((i ? Math.max : Math.min)(...points.map((point) => point[1])) / 50) * 50);
  const x = (time) => 60 + (560 * (Math.log10(time) - low)) / (high - low);
  const y = (distance) => 24 + (256 * (top - distance)) / (top - bottom);
  const parts = [];
  for (let level = bottom; level <= top; level += 50) {
    parts.push(s("path", { class: "line", d: `M 60 ${y(level)} h 560` }), s("text", { class: "end", x: 52, y: y(level) + 4 }, level));
  }
  for (const tick of [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].filter((t) => low <= Math.log10(t) && Math.log10(t) <= high)) {
    parts.push(s("path", { class: "line", d: `M ${x(tick)} 24 v 256` }), s("text", { class: "middle", x: x(tick), y: 299 }, tick));
  }
  names.forEach((name, i) => {
    const path = curves[name].map(([time, distance]) => `${x(time)} ${y(distance)}`).join(" L ");
    const dots = curves[name].flatMap(([time, distance, k]) => [
      s("circle", { cx: x(time), cy: y(distance), r: 5 }, s("title", {}, `${name}, K = ${k}: ${time.toFixed(0)} ms, ${distance.toFixed(1)}`)),
      s("text", { class: "small middle", x: x(time), y: y(distance) + (i === 1 ? 22 : -11) }, k), // close lines: on either side
    ]);
    parts.push(s("g", { class: `tint-${i + 1}` }, s("path", { class: "curve", d: `M ${path}` }), dots));
    $(".plot ul").append(h("li", { class: `tint-${i + 1}` }, name));
  });
  const across = "milliseconds a picture (batch 1, two CPU threads)", up = "FD-EfficientNet, less is better";
  parts.push(s("text", { class: "middle", x: 340, y: 322 }, across));
  parts.push(s("text", { class: "middle", transform: "translate(14 152) rotate(-90)" }, up));
  $(".plot ul").after(s("svg", { viewBox: "0 0 640 330", role: "img", "aria-label": `${up}, against ${across}` }, parts));
}

function figures([header, rows]) {
  $("table.figures").append(
    h("thead", {}, h("tr", {}, header.map((cell) => h("th", { scope: "col" }, cell)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell))))),
  );
}

// ---- The page

function open(tab) {
  for (const one of $$("[role=tab]")) {
    one.setAttribute("aria-selected", String(one === tab));
    one.tabIndex = one === tab ? 0 : -1;
    $(`#${one.getAttribute("aria-controls")}`).hidden = one !== tab;
  }
}

function wire() {
  const tabs = $$("[role=tab]");
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      open(next);
      next.focus();
    });
  });
  const submit = { generate, compare, why: (form) => count(form)(), edit };
  for (const form of $$("form")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      submit[form.id](form, event.submitter?.value);
    });
    form.addEventListener("change", (event) => event.target.name?.startsWith("model") && fit(form));
    $("[data-stop]", form).addEventListener("click", () => form.drawing?.abort());
  }
  const form = $("#edit"), file = $("[type=file]", form);
  $("[data-upload]", form).addEventListener("click", () => file.click());
  file.addEventListener("change", () => file.files[0] && upload(form, file.files[0]).then(() => (file.value = "")));
  $("[data-undo]", form).addEventListener("click", () => {
    if (!desk.past.length) return say(form, "Not possible: nothing to take back", "failed");
    desk.picture = desk.past.pop();
    showDesk();
    say(form, "Taken back.");
  });
  makePainter($(".canvas", form));
}

$$("[data-field]").forEach((place) => place.replaceWith(field(place.dataset.field, place.dataset)));
wire();
count($("#why"));
plot(about.curves);
figures(about.tuning);
document.documentElement.dataset.ready = true;
