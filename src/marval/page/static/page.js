// The page: a form becomes a list of pictures to draw.

import {
  $, $$, field, fit, guided, h, isTeacher, iterationsOf, models, open, OWN_ORDER, read, tokensOf, within,
} from "./controls.js";
import { edit, takeToDesk, wireDesk } from "./desk.js";
import { Cell, draw, duration, Strip } from "./drawing.js";
import { loops, panel } from "./loops.js";

const mean = (numbers) => numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
const studentsFirst = (a, b) => isTeacher(a.model) - isTeacher(b.model);

// A model's pictures, with their mean time and how much faster than the teacher's that is.
class Column {
  seconds = [];
  time = h("strong", {}, "–");
  faster = h("span");

  constructor(name, count, note) {
    const strip = new Strip();
    this.cells = Array.from({ length: count }, () => new Cell(name, { take: takeToDesk, strip }));
    this.bar = h("progress", { max: count, value: 0, "aria-label": `${name}: pictures drawn` });
    this.root = panel(
      name, note, h("p", { class: "figures" }, h("span", {}, this.time, " a picture"), this.faster), this.bar,
      h("div", { class: "pictures" }, this.cells.map((cell) => cell.root)), strip.root,
    );
  }

  async show(i, event, wanted) {
    await this.cells[i].show(event, wanted);
    if (event.picture) this.seconds.push(event.seconds);
    this.time.textContent = duration(this.seconds.length ? mean(this.seconds) : event.seconds);
    this.bar.value = this.seconds.length + (event.picture ? 0 : event.iteration / wanted.iterations);
  }

  compare(teacher) {
    if (teacher === this || !teacher?.seconds.length || !this.seconds.length) return;
    this.faster.className = "speed";
    this.faster.textContent = `${Math.round(mean(teacher.seconds) / mean(this.seconds))}× faster`;
  }
}

function generate(form) {
  const values = read(form), { models: names, classes: chosen, classes_style: style, seed } = values;
  const { iterations: k, count, guidance, temperature, order } = values;
  const classes = chosen.length ? chosen : models[names[0]]?.classes;
  const own = order === OWN_ORDER ? null : order, columns = {}, pictures = [];
  for (const model of names) {
    const steps = models[model].diffusion_steps, iterations = iterationsOf(model, k);
    const dials = [...(guided(model) ? [`w = ${within(model, guidance)}`] : []), ...(temperature === null ? [] : [`temperature ${temperature}`])];
    const inner = [steps ? `${steps} steps` : "one call per iteration", ...dials].join(" · ");
    columns[model] = new Column(model, count, `K = ${iterations} · ${inner} · ${own ?? models[model].order}`);
    const given = { model, style, iterations, order: own, guidance: within(model, guidance), temperature };
    for (let i = 0; i < count; i++) pictures.push({ ...given, class: classes[i % classes.length], seed: seed + i });
  }
  $(".shown", form).replaceChildren(...Object.values(columns).map((column) => column.root));
  const teacher = columns[names.find(isTeacher)];
  const show = async (event, wanted) => {
    await columns[wanted.model].show(wanted.seed - seed, event, wanted);
    Object.values(columns).forEach((column) => column.compare(teacher));
  };
  const times = () => names.map((name) => `${name} ${duration(mean(columns[name].seconds))}`).join(", ");
  draw(form, pictures.sort(studentsFirst), show, () => `Done. Time of a picture: ${times()}.`);
}

function compare(form) {
  const { models: names, columns, class: label, class_style: style, seed } = read(form);
  const cells = {}, pictures = [];
  const rows = names.map((model) => {
    const row = h("tr", { class: `tint-${models[model].tint}` }, h("th", { scope: "row" }, model));
    for (const k of columns) {
      if (k > tokensOf(model)) {
        row.append(h("td"));
        continue;
      }
      cells[`${model} ${k}`] = new Cell(model, { tell: (event) => duration(event.seconds) });
      row.append(h("td", {}, cells[`${model} ${k}`].root));
      pictures.push({ model, class: label, style, seed, iterations: Number(k) });
    }
    return row;
  });
  const head = h("tr", {}, h("td"), columns.map((k) => h("th", { scope: "col" }, `K = ${k}`)));
  $(".shown", form).replaceChildren(h("table", { class: "grid" }, h("thead", {}, head), h("tbody", {}, rows)));
  const show = (event, wanted) => cells[`${wanted.model} ${wanted.iterations}`].show(event, wanted);
  draw(form, pictures.sort(studentsFirst), show, () => `Done: ${pictures.length} pictures of one seed.`);
}

// Show the loops of the chosen models at rest.
function rest(form) {
  const { models: names, iterations } = read(form);
  const shown = Object.fromEntries(names.map((name) => [name, loops(name, iterationsOf(name, iterations))]));
  $(".shown", form).replaceChildren(...names.map((name) => shown[name].root));
  return shown;
}

function why(form) {
  const { models: names, class: label, class_style: style, seed, iterations: k } = read(form), shown = rest(form);
  const picture = (model) => ({ model, class: label, style, seed, iterations: iterationsOf(model, k) });
  const pictures = names.map(picture).sort(studentsFirst);
  const show = async (event, wanted) => {
    shown[wanted.model].tell(event.iteration, event.calls);
    await shown[wanted.model].cell.show(event, wanted);
  };
  const counts = () => names.map((name) => `${name} ${shown[name].head.textContent} calls of the head`).join(", ");
  draw(form, pictures, show, () => `Done: ${counts()}.`);
}

function wireTabs() {
  for (const tab of $$("[role=tab]")) {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      const next = { ArrowLeft: tab.previousElementSibling, ArrowRight: tab.nextElementSibling }[event.key];
      next?.click();
      next?.focus();
    });
  }
}

function wireForms() {
  const submit = { generate, edit, compare, why };
  for (const form of $$("form")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      submit[form.id](form, event.submitter?.value);
    });
    form.addEventListener("change", (event) => event.target.name?.startsWith("model") && fit(form, event.target.value));
    $("[data-stop]", form).addEventListener("click", () => form.drawing?.abort());
    fit(form);
  }
}

$$("[data-field]").forEach((place) => place.replaceWith(field(place.dataset.field, place.dataset)));
wireTabs();
wireForms();
wireDesk($("#edit"));
rest($("#why"));
document.documentElement.dataset.ready = true;
