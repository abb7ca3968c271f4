// Pictures that are drawn: the server sends what changes, line by line.

import { $, h, models } from "./controls.js";

export const pngUrl = (text) => `data:image/png;base64,${text}`;
export const duration = (seconds) =>
  seconds < 0.9995 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`;

export function say(form, text, kind = "") {
  const line = $(".status", form);
  line.className = `status ${kind}`;
  line.textContent = text;
}

export const refuse = (form, reason) => say(form, `Not possible: ${reason}`, "failed");

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const whole = (rest + part.value).split("\n");
    rest = whole.pop();
    yield* whole.map((line) => JSON.parse(line));
  }
}

export async function ask(path, options) {
  const answer = await fetch(path, { method: "POST", ...options });
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({ error: answer.statusText }))).error);
  return answer;
}

// Draw pictures, and `show` each event with the picture that it is of. A form draws one list at a time; `form.drawing`
// stops it.
export async function draw(form, pictures, show, done) {
  if (!pictures.length) return refuse(form, "choose at least one of every list");
  form.drawing?.abort();
  const control = (form.drawing = new AbortController());
  say(form, "Waiting for a turn…", "busy");
  let left = pictures.length;
  try {
    const body = JSON.stringify({ pictures });
    const headers = { "content-type": "application/json" };
    for await (const event of lines((await ask("draw", { body, headers, signal: control.signal })).body)) {
      if (event.error) throw new Error(event.error);
      if (event.picture) left -= 1;
      const wanted = pictures[event.index];
      await show(event, wanted);
      const which = pictures.length > 1 ? ` · picture ${event.index + 1} of ${pictures.length}` : "";
      say(form, `${wanted.model}${which} · iteration ${event.iteration} · ${duration(event.seconds)}`, "busy");
    }
    if (left) throw new Error("the server ended");
    if (form.drawing === control) say(form, done());
  } catch (error) {
    if (form.drawing !== control) return; // another list is drawn now
    if (control.signal.aborted) say(form, "Stopped.");
    else refuse(form, error.message);
  }
}

const bitmap = (text) => createImageBitmap(new Blob([Uint8Array.from(atob(text), (mark) => mark.charCodeAt(0))]));

// The place of one picture: empty, then a canvas that grows, then the picture with its caption (which `tell` gives), a
// link that saves it and, where there is something to `take` it, a button for that.
export class Cell {
  tell = (event, wanted) => `${wanted.class}${wanted.style ? `, ${wanted.style}` : ""} · seed ${wanted.seed}`;

  constructor(model, options) {
    Object.assign(this, { size: models[model].image_size, ...options });
    this.root = h("figure", { class: "picture waiting" }, h("div"), h("figcaption", {}, "\u00a0"));
  }

  async show(event, wanted) {
    const [height, width] = this.size;
    if (event.picture) {
      this.finish(event, wanted);
      this.strip?.add(event, await bitmap(event.picture.png), width, height);
      return;
    }
    if (!this.canvas) {
      this.canvas = h("canvas", { width, height, role: "img" });
      this.root.className = "picture growing";
      this.root.firstChild.replaceWith(this.canvas);
    }
    const text = `iteration ${event.iteration} of ${wanted.iterations}`;
    this.canvas.setAttribute("aria-label", `${wanted.class}, ${text}`);
    this.root.lastChild.replaceChildren(h("span", {}, text), h("span", {}, duration(event.seconds)));
    if (!event.patches) return;
    this.canvas.getContext("2d").drawImage(await bitmap(event.patches), 0, 0);
    this.strip?.add(event, this.canvas, width, height);
  }

  finish(event, wanted) {
    const { picture } = event, url = pngUrl(picture.png), text = this.tell(event, wanted);
    const actions = h("span", { class: "actions" });
    if (this.take) {
      actions.append(h("button", { type: "button", "aria-label": `Edit ${text}` }, "Edit"));
      actions.lastChild.addEventListener("click", () => this.take(picture, wanted));
    }
    actions.append(h("a", { href: url, download: picture.file, "aria-label": `Save ${text} as PNG` }, "Save"));
    const near = event.nearest ? h("span", {}, `nearest known: ${event.nearest.join(", ")}`) : "";
    this.root.className = "picture";
    this.root.replaceChildren(
      h("img", { src: url, alt: text }), h("figcaption", {}, h("span", {}, text), near, actions),
    );
  }
}

// The partial picture after each iteration that was shown, with the time at which it was there.
export class Strip {
  root = h("div", { class: "strip", tabindex: 0, role: "group", "aria-label": "After each iteration" });

  add(event, source, width, height) {
    if (event.iteration === 1) this.root.replaceChildren();
    const scale = Math.min(1, 92 / width), label = `after iteration ${event.iteration}`;
    const small = h("canvas", { width: width * scale, height: height * scale, role: "img", "aria-label": label });
    small.getContext("2d").drawImage(source, 0, 0, small.width, small.height);
    const caption = h("figcaption", {}, String(event.iteration), h("br"), duration(event.seconds));
    this.root.append(h("figure", {}, small, caption));
  }
}
