// Painting over tokens: press and drag with a pointer, or arrow keys and Space. `element` is the component's root.
const cells = () => [...element.querySelectorAll("[data-token]")];
const pressed = (cell) => cell.getAttribute("aria-pressed") === "true";
let brush = null; // what the pointer paints while it is down: true, false, or nothing

function tell() {
  const all = cells();
  const output = element.querySelector("output");
  if (output) output.textContent = `${all.filter(pressed).length} of ${all.length} tokens painted`;
}
function paint(cell, value) {
  cell.closest(".mv-painter").classList.remove("mv-fresh"); // what was redrawn is no longer outlined but painted
  cell.setAttribute("aria-pressed", String(value));
  tell();
}
function under(event) {
  const found = document.elementFromPoint(event.clientX, event.clientY);
  const cell = found && found.closest("[data-token]");
  return cell && element.contains(cell) ? cell : null;
}

element.addEventListener("pointerdown", (event) => {
  const cell = under(event);
  if (!cell || event.button !== 0) return;
  brush = !pressed(cell);
  paint(cell, brush);
});
element.addEventListener("pointermove", (event) => {
  const cell = brush === null ? null : under(event);
  if (cell && pressed(cell) !== brush) paint(cell, brush);
});
for (const name of ["pointerup", "pointercancel"]) window.addEventListener(name, () => (brush = null));

element.addEventListener("click", (event) => {
  const tool = event.target.closest("[data-tool]");
  const cell = event.target.closest("[data-token]");
  if (tool) {
    element.querySelector(".mv-painter").classList.remove("mv-fresh");
    const value = { all: () => true, none: () => false, invert: (cell) => !pressed(cell) }[tool.dataset.tool];
    cells().forEach((cell) => cell.setAttribute("aria-pressed", String(value(cell))));
    tell();
  } else if (cell && event.detail === 0) {
    paint(cell, !pressed(cell)); // from the keyboard: the pointer has painted already
  }
});
element.addEventListener("keydown", (event) => {
  const cell = event.target.closest("[data-token]");
  if (!cell) return;
  const all = cells();
  const columns = Number(getComputedStyle(cell.closest(".mv-painter")).getPropertyValue("--columns"));
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const next = step && all[all.indexOf(cell) + step];
  if (!step) return;
  event.preventDefault();
  if (!next) return;
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
