// Elements and the controls of the forms.

const SVG = "http://www.w3.org/2000/svg";
export const OWN_ORDER = "the model's own";
export const $ = (query, root = document) => root.querySelector(query);
export const $$ = (query, root = document) => [...root.querySelectorAll(query)];

// An element with attributes (true: without a value; false: not set) and children.
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat());
  return node;
}
export const h = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
export const s = (tag, attributes = {}, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

const about = await (await fetch("models")).json();
export const models = Object.fromEntries(about.models.map((one, i) => [one.name, { ...one, tint: (i % 4) + 1 }]));
export const isTeacher = (name) => models[name].diffusion_steps !== null;
export const guided = (name) => models[name].guidance !== null;

export const tokensOf = (name) => models[name].token_grid[0] * models[name].token_grid[1];
// The K that a model draws with: its own where none is chosen.
export const iterationsOf = (name, k) => Math.min(k ?? models[name].iterations, tokensOf(name));

// The w that a model draws with: its own where none is chosen, else the nearest that it can; null where it is baked in.
export function within(name, w) {
  const [low, high] = models[name].guidance_range ?? [0, Infinity];
  return guided(name) && w !== null ? Math.min(Math.max(w, low), high) : models[name].guidance;
}

// The chosen options first.
const sorted = (options, chosen) => [...options].sort((a, b) => chosen.includes(b) - chosen.includes(a));
const offer = (options, chosen) => options.map((one) => new Option(one, one, false, chosen.includes(one)));
const chips = (name, options, chosen) => options.map((one) =>
  h("label", {}, h("input", { type: "checkbox", name, value: one, checked: chosen.includes(one) }), String(one)));

function choice(label, name, options, chosen) {
  const select = h("select", { name }, offer(sorted(options, chosen), chosen));
  return h("label", { class: "field" }, h("span", {}, label), select);
}

function checks(label, name, options, chosen) {
  const boxes = h("div", { class: "chips", "data-of": name }, chips(name, options, chosen));
  return h("fieldset", { class: "field" }, h("legend", {}, label), boxes);
}

// The prompts to suggest to visitors, of those that models of text know.
function suggested(known) {
  const some = about.suggested.filter((one) => known.includes(one));
  return some.length ? some : known.slice(0, 8);
}

// The control of a class: a list (`many`: boxes) or, for models of text, a box with suggestions, and their styles.
function asking(name, text, known, styles, chosen, style, many) {
  if (!text && many) return [checks("Classes, in turn (none: all)", name, sorted(known, chosen), chosen)];
  if (!text) return [choice("Class", name, sorted(known, chosen), chosen)];
  const list = h("datalist", { id: `known-${Math.random()}` }, known.map((one) => h("option", { value: one })));
  const value = chosen[0] ?? "";
  const box = h("input", { name, value, list: list.id, required: true, maxlength: 200, autocomplete: "off" });
  const some = suggested(known).map((one) => h("button", { type: "button" }, one));
  for (const button of some) button.addEventListener("click", () => (box.value = button.textContent));
  const prompt = h("label", { class: "field" }, h("span", {}, "Prompt"), box, list);
  const tries = many ? [h("div", { class: "chips", role: "group", "aria-label": "Suggestions" }, some)] : [];
  return [prompt, ...tries, ...(styles.length ? [choice("Style", `${name}_style`, styles, [style])] : [])];
}

function slider(label, name, min, max, value, step = 1) {
  const range = h("input", { type: "range", name, min, max, step, value, "aria-label": label });
  const number = h("input", { type: "number", min, max, step, value, "aria-label": `${label}, as a number` });
  number.value = range.value; // which keeps to the steps, as a form that is sent must
  for (const input of [range, number]) input.addEventListener("input", () => (range.dataset.moved = true));
  range.addEventListener("input", () => (number.value = range.value));
  number.addEventListener("input", () => (range.value = number.value));
  number.addEventListener("change", () => (number.value = range.value)); // what is out of range is brought back
  return h("div", { class: "field slider" }, h("span", {}, label), number, range);
}

export function field(kind, { name = kind, label, value }) {
  const names = Object.keys(models), { classes } = models[names[0]];
  const tokens = Math.max(...names.map(tokensOf));
  const alike = names.filter((one) => String(models[one].classes) === String(classes)).slice(0, 3);
  const counts = [1, 2, 4, 6, 8, 16, 32, 64, 128, 256].filter((k) => k <= tokens);
  const own = models[names.find(guided)]?.guidance ?? 1;
  switch (kind) {
    case "model": return choice("Model", name, names, names.filter((one) => !isTeacher(one)).slice(0, 1));
    case "models": return checks("Models", name, names, alike);
    case "class": return h("div", { class: "asking", "data-asking": name });
    case "classes": return h("div", { class: "asking", "data-asking": name, "data-many": true });
    case "seed": return slider("Seed", name, 0, 999999, value ?? 0);
    case "iterations": return slider("Iterations K (each model's own until you move it)", name, 1, tokens, 1);
    case "count": return slider(label ?? "Pictures of each model", name, 1, 8, value ?? 4);
    case "keep": return slider("Share of tokens to keep", name, 0, 1, 0.5, 0.05);
    case "order": return choice("Unmasking order", name, [OWN_ORDER, ...about.orders], []);
    case "guidance": return slider("Guidance w (each model's own until you move it)", name, 0, 10, own, 0.05);
    case "temperature": return slider("Temperature (lower: more typical pictures)", name, 0, 1.5, 1, 0.05);
    case "columns": return checks("Iterations K", name, counts, [1, 2, 4, 8, 16]);
  }
}

// The values of a form: numbers of sliders, lists of boxes and classes, texts of the others.
export function read(form) {
  const data = new FormData(form), values = Object.fromEntries(data);
  for (const input of $$("input[type=range]", form)) values[input.name] = Number(input.value);
  for (const dial of ["iterations", "guidance", "temperature"]) {
    if (dial in values && !$(`[name=${dial}]`, form).dataset.moved) values[dial] = null;
  }
  for (const name of ["models", "classes", "columns"]) values[name] = data.getAll(name);
  return values;
}

// Offer the classes, or prompts and styles, that the chosen models know. Models of classes and of text do not mix:
// those of the kind of the one that was chosen `last` stay.
export function fit(form, last = null) {
  const inputs = $$("[name=models]:checked, select[name=model]", form);
  if (!inputs.length) return;
  const { text } = models[inputs.some((input) => input.value === last) ? last : inputs[0].value];
  for (const input of inputs) if (input.type === "checkbox") input.checked = models[input.value].text === text;
  const chosen = inputs.map((input) => input.value).filter((name) => models[name].text === text);
  const shared = (what) =>
    models[chosen[0]][what].filter((one) => chosen.every((name) => models[name][what].includes(one)));
  const known = shared("classes"), styles = shared("styles");
  for (const place of $$("[data-asking]", form)) {
    const name = place.dataset.asking, many = "many" in place.dataset, same = place.dataset.text === String(text);
    const before = $$(`[name=${name}]${many && !text ? ":checked" : ""}`, place).map((input) => input.value);
    const first = same ? before : text ? suggested(known).slice(0, 1) : known.slice(-3);
    const style = $(`[name=${name}_style]`, place)?.value;
    place.dataset.text = text;
    place.replaceChildren(...asking(name, text, known, styles, many ? first : first.slice(0, 1), style, many));
  }
  const own = chosen.find((name) => !isTeacher(name)) ?? chosen[0];
  for (const place of $$(".slider:has([name=iterations])", form)) {
    const [number, range] = $$("input", place);
    number.max = range.max = Math.max(...chosen.map(tokensOf));
    if (!range.dataset.moved) range.value = models[own].iterations;
    number.value = range.value;
  }
  for (const input of $$(".slider:has([name=guidance]) input", form)) input.disabled = !chosen.some(guided);
}

// Show the form of a tab.
export function open(tab) {
  for (const one of $$("[role=tab]")) {
    one.setAttribute("aria-selected", String(one === tab));
    one.tabIndex = one === tab ? 0 : -1;
    $(`#${one.getAttribute("aria-controls")}`).hidden = one !== tab;
  }
}
