"use strict";
// What all charts share: elements, numbers, ticks, the tip that follows the pointer.

function element(parent, tag, text, attributes = {}) {
  const svg = parent.namespaceURI.endsWith("svg") || tag === "svg";
  const made = document.createElementNS(
    svg ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)} k`;
  if (size < 1e-4) return value.toExponential().replace(/(\.\d\d?)\d*e/, "$1e");
  return String(+value.toPrecision(4));
}

function percent(part) {
  return `${(100 * part).toFixed(part && part < 0.1 ? 2 : 1)}%`;
}

// Round numbers between low and high, about `count` of them.
function ticks(low, high, count, whole = false) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) {
    found.push(+(n * step).toPrecision(12));
  }
  return found;
}

const tip = {
  show(event, text) {
    const box = document.getElementById("tip");
    box.textContent = text;
    box.hidden = false;
    const left = event.clientX + 14, top = event.clientY + 14;
    box.style.left = `${Math.max(4, Math.min(left, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${top + box.offsetHeight > innerHeight ? top - box.offsetHeight - 28 : top}px`;
  },
  hide() {
    document.getElementById("tip").hidden = true;
  },
};

// A titled box for one chart; `draw(box)` fills it, again whenever its width or the colours change.
function panel(parent, id, title, about, draw) {
  const box = element(parent, "article", undefined, { class: "chart", id });
  const top = element(box, "div", undefined, { class: "top" });
  element(top, "h3", title);
  if (about.unit) element(top, "span", about.unit, { class: "unit" });
  if (about.text) element(box, "p", about.text, { class: "about" });
  const area = element(box, "div", undefined, { class: "area" });
  const again = () => { area.replaceChildren(); draw(area, top); };
  again();
  let width = area.clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(area.clientWidth - width) > 1) { width = area.clientWidth; again(); }
  }).observe(area);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  return { box, again };
}
