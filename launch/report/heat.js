// Heat maps, on canvases: rows down, experts or steps across.

const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const EVEN = {
  light: ["#1f5fa8", "#8fb8dd", "#f1f0ec", "#f0a878", "#b5361c"],
  dark: ["#5aa2ee", "#2f5f94", "#2d3138", "#a25a2c", "#ff8a4c"],
};
const AMOUNT = {
  light: ["#f1f0ec", "#c3cbe6", "#7f8fcf", "#4a4fa8", "#2c2270"],
  dark: ["#25282e", "#3d4673", "#6470b8", "#98a0e8", "#dcdcff"],
};

function shades(stops) {
  return stops[dark() ? "dark" : "light"].map(
    (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
}

// The colour at `part` (0 to 1) of evenly spaced stops.
function mix(stops, part) {
  const place = Math.max(0, Math.min(1, part)) * (stops.length - 1);
  const n = Math.min(stops.length - 2, Math.floor(place));
  const [a, b] = [stops[n], stops[n + 1]];
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * (place - n))).join(",")})`;
}

function gradient(stops) {
  return `linear-gradient(90deg, ${shades(stops).map((_, n, all) =>
    mix(all, n / (all.length - 1))).join(", ")})`;
}

// Rows over their even share, in doublings: a quarter, even, four times.
function evenPart(share) {
  return 0.5 + Math.log2(share) / 4;
}

// `map`: title, about, stops, part(value) → 0 to 1, legend: {low, high, none?}; axis: what is across;
// counts: whether its columns are things with numbers, and not spans of steps. And, asked for at
// each drawing: rows() → labels, spans() → [from, to] of each column, value(row, column) → number,
// null (no cell) or NaN (a cell without rows), tell(row, column) → text; if wanted picked() → a row
// to mark and pick(row, column).
function heatMap(parent, id, map) {
  return panel(parent, id, map.title, { text: map.about }, draw);

  function legend(top) {
    top.querySelector(".scale")?.remove();
    const scale = element(top, "div", undefined, { class: "scale" });
    if (map.legend.none) { element(scale, "b"); element(scale, "span", map.legend.none); }
    element(scale, "span", map.legend.low);
    element(scale, "i").style.background = gradient(map.stops);
    element(scale, "span", map.legend.high);
  }

  function draw(area, top) {
    legend(top);
    const rows = map.rows(), spans = map.spans(), stops = shades(map.stops);
    const width = area.clientWidth, left = 52, right = width - 8;
    const each = Math.max(4, Math.min(26, Math.floor(400 / rows.length)));
    const bottom = rows.length * each, height = bottom + 24;
    const from = spans[0][0], to = spans[spans.length - 1][1];
    const x = (place) => left + (right - left) * (place - from) / (to - from);
    const canvas = element(area, "canvas", undefined, { role: "img", "aria-label": map.title });
    const density = devicePixelRatio || 1;
    canvas.width = width * density;
    canvas.height = height * density;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(density, density);
    pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    pen.textBaseline = "middle";
    let cells = 0;
    const gap = each > 8 ? 1 : 0;
    rows.forEach((label, row) => {
      spans.forEach(([first, end], column) => {
        const value = map.value(row, column);
        if (value === null) return;
        const start = x(first), wide = x(end) - start;
        pen.fillStyle = Number.isNaN(value) ? style("--none") : mix(stops, map.part(value));
        pen.fillRect(start, row * each, Math.max(1, wide - (wide > 6 ? 1 : -0.4)), each - gap);
        cells += 1;
      });
      const every = Math.ceil(15 / each);
      if (row % every === 0) {
        pen.fillStyle = style(map.picked?.() === row ? "--accent" : "--soft");
        pen.textAlign = "right";
        pen.fillText(label, left - 8, row * each + each / 2);
      }
      if (map.picked?.() === row) {
        pen.strokeStyle = style("--accent");
        pen.lineWidth = 2;
        pen.strokeRect(left - 1, row * each, right - left + 1, each - gap);
      }
    });
    pen.fillStyle = style("--soft");
    const middle = map.counts ? 0.5 : 0;
    ticks(from, to - 2 * middle, Math.min(width / 90, spans.length), true).forEach((place, n) => {
      pen.textAlign = n ? "center" : "left";
      const at = n ? Math.min(x(place + middle), right - 14) : x(place);
      pen.fillText(n ? short(place) : `${map.axis} ${place}`, at, bottom + 14);
    });
    canvas.dataset.cells = cells;
    canvas.dataset.rows = rows.length;
    canvas.dataset.columns = spans.length;

    const under = (event) => {
      const box = canvas.getBoundingClientRect();
      const place = from + (event.clientX - box.left - left) / (right - left) * (to - from);
      const row = Math.floor((event.clientY - box.top) / each);
      const column = spans.findIndex(([first, end]) => place >= first && place < end);
      const there = row >= 0 && row < rows.length && column >= 0;
      return there && map.value(row, column) !== null ? [row, column] : null;
    };
    canvas.addEventListener("pointermove", (event) => {
      const cell = under(event);
      if (cell) tip.show(event, map.tell(...cell)); else tip.hide();
    });
    canvas.addEventListener("pointerleave", () => tip.hide());
    if (map.pick) canvas.addEventListener("click", (event) => {
      const cell = under(event);
      if (cell) map.pick(...cell);
    });
  }
}
