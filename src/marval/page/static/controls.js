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

export const about = await (await fetch("models")).json();
export const models = Object.fromEntries(about.models.map((one, i) => [one.name, { ...one, tint: (i % 4) + 1 }]));
export const isTeacher = (name) => models[name].diffusion_steps !== null;

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

export function field(kind, { name = kind, label, value }) {
  const names = Object.keys(models), first = models[names[0]], students = names.filter((one) => !isTeacher(one));
  const tokens = Math.min(...names.map((one) => models[one].token_grid[0] * models[one].token_grid[1]));
  const alike = names.filter((one) => String(models[one].classes) === String(first.classes)).slice(0, 3);
  const fashion = ["sneaker", "bag", "dress", "ankle boot"].filter((one) => first.classes.includes(one));
  const some = fashion.length ? fashion : first.classes.slice(0, 4);
  const teacher = names.find(isTeacher);
  switch (kind) {
    case "model": return choice("Model", name, names, students[0]);
    case "models": return checks("Models", name, names, alike);
    case "class": return choice("Class", name, first.classes, some[0]);
    case "classes": return several("Classes, in turn", name, first.classes, some);
    case "seed": return slider("Seed", name, 0, 999999, value ?? 0);
    case "iterations": return slider("Iterations K", name, 1, tokens, Math.min(8, tokens));
    case "count": return slider(label ?? "Pictures of each model", name, 1, 8, value ?? 4);
    case "keep": return slider("Share of tokens to keep", name, 0, 1, 0.5, 0.05);
    case "order": return choice("Unmasking order", name, [OWN_ORDER, ...about.orders]);
    case "guidance": {
      const own = models[teacher]?.guidance ?? 1;
      return slider("Guidance w of a teacher (a student has it baked in)", name, 0, 10, own, 0.1);
    }
    case "columns": {
      const every = [1, 2, 4, 6, 8, 16, 32, 64, 128, 256].filter((k) => k <= tokens);
      return checks("Iterations K", name, every, [1, 2, 4, 8, 16]);
    }
  }
}

// The values of a form: numbers of sliders, lists of boxes and chips, texts of the others.
export function read(form) {
  const data = new FormData(form), values = {};
  for (const name of new Set(data.keys())) values[name] = data.get(name);
  for (const input of $$("input[type=range]", form)) values[input.name] = Number(input.value);
  for (const name of ["models", "classes", "columns"]) values[name] = data.getAll(name);
  return values;
}

// Offer the classes that the chosen models know.
export function fit(form) {
  const chosen = $$("[name=models]:checked, select[name=model]", form).map((input) => input.value);
  if (!chosen.length) return;
  const known = models[chosen[0]].classes.filter((one) => chosen.every((name) => models[name].classes.includes(one)));
  for (const select of $$("select[name$=class]", form)) {
    const now = select.value;
    select.replaceChildren(...known.map((one) => new Option(one, one, one === now, one === now)));
  }
  $$(".field", form).forEach((one) => one.offer?.(known));
  for (const input of $$(".slider:has([name=guidance]) input", form)) input.disabled = !chosen.some(isTeacher);
}

// Show the form of a tab.
export function open(tab) {
  for (const one of $$("[role=tab]")) {
    one.setAttribute("aria-selected", String(one === tab));
    one.tabIndex = one === tab ? 0 : -1;
    $(`#${one.getAttribute("aria-controls")}`).hidden = one !== tab;
  }
}
