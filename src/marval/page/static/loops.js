// The two nested loops of a model, drawn.

import { h, models, s } from "./controls.js";
import { Cell, duration } from "./drawing.js";

const arrow = (d, live) => s("path", { class: live ? "arrow live" : "arrow", d });

export function panel(name, note, ...children) {
  const head = h("header", {}, h("h3", {}, name), h("p", {}, note));
  return h("article", { class: `panel tint-${models[name].tint}`, "aria-label": name }, head, ...children);
}

// A network with the number of its calls.
function block(x, title) {
  const count = s("text", { class: "count", x: x + 70, y: 185 }, "0");
  const rect = s("rect", { class: "block", x, y: 128, width: 140, height: 74, rx: 8 });
  return [count, rect, s("text", { class: "title", x: x + 70, y: 151 }, title), count];
}

// A model's loops; `tell` says how far they are.
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
