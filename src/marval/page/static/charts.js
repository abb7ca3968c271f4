// Drawings of numbers: the two loops of a model, and what was measured.

import { $, h, models, s } from "./controls.js";
import { Cell, duration } from "./drawing.js";

const arrow = (d, live) => s("path", { class: live ? "arrow live" : "arrow", d });

export function panel(name, note, ...children) {
  const head = h("header", {}, h("h3", {}, name), h("p", {}, note));
  return h("article", { class: `panel tint-${models[name].tint}`, "aria-label": name }, head, ...children);
}

// A network in the drawing of the loops, with the number of its calls.
function block(x, title) {
  const count = s("text", { class: "count", x: x + 70, y: 185 }, "0");
  const rect = s("rect", { class: "block", x, y: 128, width: 140, height: 74, rx: 8 });
  return [count, rect, s("text", { class: "middle", x: x + 70, y: 151 }, title), count];
}

// The two nested loops of a model; `tell` says how far they are.
export function loops(name, iterations) {
  const steps = models[name].diffusion_steps, outer = s("text", { x: 16, y: 46 });
  const done = s("rect", { class: "done", x: 16, y: 56, width: 0, height: 6, rx: 3 });
  const [context, ...left] = block(22, "context network"), [head, ...right] = block(206, "token head");
  const drawing = s(
    "svg", { viewBox: "-4 16 408 216", role: "img" },
    s("rect", { class: "outer", x: 4, y: 22, width: 392, height: 206, rx: 14 }), done, outer,
    arrow("M 389 120 h 14 l -7 13 z M -3 133 h 14 l -7 -13 z", false),
    s("rect", { class: steps ? "inner" : "inner single", x: 190, y: 78, width: 194, height: 138, rx: 12 }),
    s("text", { class: "small", x: 202, y: 98 }, steps ? `inner loop: ${steps} steps` : "no inner loop: one call"),
    steps ? arrow("M 377 146 h 14 l -7 13 z M 183 159 h 14 l -7 -13 z", true) : [], left, right,
  );
  const tokens = h("strong"), cell = new Cell(name, { tell: (event) => duration(event.seconds) });
  const root = panel(
    name, "", drawing, h("p", { class: "figures" }, h("span", {}, tokens, " tokens through the head")),
    h("div", { class: "pictures" }, cell.root),
  );
  const tell = (k, calls) => {
    outer.textContent = `outer loop: iteration ${k} of ${iterations}`;
    done.setAttribute("width", (368 * k) / iterations);
    context.textContent = calls.context.toLocaleString("en");
    head.textContent = calls.head.toLocaleString("en");
    tokens.textContent = calls.tokens.toLocaleString("en");
    const text = `${calls.context} passes of the context network, ${calls.head} calls of the token head`;
    drawing.setAttribute("aria-label", `${name}: ${text}`);
  };
  tell(0, { context: 0, head: 0, tokens: 0 });
  return { root, cell, tell, head };
}

// Quality against time: [milliseconds, distance, K] of each model, time on a logarithmic axis.
export function plot(curves) {
  const times = Object.values(curves).flat().map((point) => Math.log10(point[0]) * 2);
  const distances = Object.values(curves).flat().map((point) => point[1] / 50);
  const [low, high] = [Math.floor(Math.min(...times)) / 2, Math.ceil(Math.max(...times)) / 2];
  const [bottom, top] = [Math.floor(Math.min(...distances)) * 50, Math.ceil(Math.max(...distances)) * 50];
  const x = (time) => 60 + (560 * (Math.log10(time) - low)) / (high - low);
  const y = (distance) => 24 + (256 * (top - distance)) / (top - bottom);
  const parts = [];
  for (let level = bottom; level <= top; level += 50) {
    parts.push(s("path", { class: "line", d: `M 60 ${y(level)} h 560` }));
    parts.push(s("text", { class: "end", x: 52, y: y(level) + 4 }, level));
  }
  for (const tick of [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]) {
    if (Math.log10(tick) < low || Math.log10(tick) > high) continue;
    parts.push(s("path", { class: "line", d: `M ${x(tick)} 24 v 256` }));
    parts.push(s("text", { class: "middle", x: x(tick), y: 299 }, tick));
  }
  Object.entries(curves).forEach(([name, points], i) => {
    const beside = i === 1 ? 22 : -11; // lines that run close keep their labels on either side
    const dots = points.flatMap(([time, distance, k]) => [
      s("circle", { cx: x(time), cy: y(distance), r: 5 },
        s("title", {}, `${name}, K = ${k}: ${time.toFixed(0)} ms, ${distance.toFixed(1)}`)),
      s("text", { class: "small middle", x: x(time), y: y(distance) + beside }, k),
    ]);
    const path = points.map(([time, distance]) => `${x(time)} ${y(distance)}`).join(" L ");
    parts.push(s("g", { class: `tint-${i + 1}` }, s("path", { class: "curve", d: `M ${path}` }), dots));
    $(".plot ul").append(h("li", { class: `tint-${i + 1}` }, name));
  });
  const across = "milliseconds a picture (batch 1, two CPU threads)", up = "FD-EfficientNet, less is better";
  parts.push(s("text", { class: "middle", x: 340, y: 322 }, across));
  parts.push(s("text", { class: "middle", transform: "translate(14 152) rotate(-90)" }, up));
  const label = `${up}, against ${across}`;
  $(".plot ul").after(s("svg", { viewBox: "0 0 640 330", role: "img", "aria-label": label }, parts));
}

export function figures([header, rows]) {
  $("table.figures").append(
    h("thead", {}, h("tr", {}, header.map((cell) => h("th", { scope: "col" }, cell)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell))))),
  );
}
