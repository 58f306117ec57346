// Lines over the steps of the run, as SVG.

function curveChart(parent, chart, starts) {
  const colour = (n) => `var(--series-${n % 5})`;
  const made = panel(parent, chart.id, chart.title, { unit: chart.unit }, draw);
  if (chart.curves.length > 1) {
    const keys = element(made.box.querySelector(".top"), "div", undefined, { class: "keys" });
    chart.curves.forEach((curve, n) => {
      element(keys, "span", curve.name, { style: `--key: ${colour(n)}` });
    });
  }
  return made;

  function draw(area) {
    const width = area.clientWidth, height = chart.id === "loss" ? 300 : 200;
    const left = 52, right = width - 12, top = 8, bottom = height - 26;
    const all = (name) => chart.curves.flatMap((curve) => curve[name] ?? curve.y);
    const steps = chart.curves.flatMap((curve) => curve.x);
    const last = steps.reduce((a, b) => Math.max(a, b), 1);
    let low = all("low").reduce((a, b) => Math.min(a, b));
    let high = all("high").reduce((a, b) => Math.max(a, b));
    const room = 0.04 * (high - low) || Math.abs(high) * 0.1 || 1;
    low = chart.zero ? Math.min(0, low) : low - room;
    high += room;
    const x = (step) => left + (right - left) * step / last;
    const y = (value) => bottom - (bottom - top) * (value - low) / (high - low);

    const svg = element(area, "svg", undefined, {
      viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": chart.title });
    for (const value of ticks(low, high, height / 38)) {
      element(svg, "line", undefined,
        { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) });
      element(svg, "text", short(value), { x: left - 8, y: y(value) + 4, "text-anchor": "end" });
    }
    for (const step of ticks(0, last, width / 110, true)) {
      element(svg, "text", step ? short(step) : "step 0",
        { x: x(step), y: height - 6, "text-anchor": step ? "middle" : "start" });
    }
    for (const start of starts) {
      const line = element(svg, "line", undefined,
        { class: "resume", x1: x(start.step), x2: x(start.step), y1: top, y2: bottom });
      element(line, "title", `resumed after step ${start.step}`);
    }
    chart.curves.forEach((curve, n) => {
      if (curve.low) {
        const there = curve.x.map((step, i) => `${x(step).toFixed(1)} ${y(curve.high[i]).toFixed(1)}`);
        const back = curve.x.map((step, i) => `${x(step).toFixed(1)} ${y(curve.low[i]).toFixed(1)}`);
        element(svg, "path", undefined, {
          class: "band", fill: colour(n), d: `M${there.concat(back.reverse()).join("L")}Z` });
      }
      const points = curve.x.map((step, i) => `${x(step).toFixed(1)} ${y(curve.y[i]).toFixed(1)}`);
      element(svg, "path", undefined, {
        class: "curve", "data-name": curve.name, fill: "none", stroke: colour(n),
        "stroke-width": 1.8, "stroke-linejoin": "round", "stroke-linecap": "round",
        d: `M${points.join("L")}${points.length === 1 ? "h0.01" : ""}` });
    });

    const mark = element(svg, "line", undefined, { class: "mark", y1: top, y2: bottom });
    mark.style.display = "none";
    svg.addEventListener("pointermove", (event) => {
      const step = (event.clientX - svg.getBoundingClientRect().left - left) / (right - left) * last;
      const near = nearest(steps, step);
      mark.style.display = "";
      for (const end of ["x1", "x2"]) mark.setAttribute(end, x(near));
      const lines = chart.curves.map((curve) => {
        const at = curve.x.indexOf(nearest(curve.x, near));
        const when = curve.x[at] === near ? "" : ` (step ${curve.x[at]})`;
        const range = curve.low ? `, ${short(curve.low[at])} to ${short(curve.high[at])}` : "";
        return `${curve.name}: ${short(curve.y[at])}${range}${when}`;
      });
      tip.show(event, [`step ${near}`, ...lines].join("\n"));
    });
    svg.addEventListener("pointerleave", () => { mark.style.display = "none"; tip.hide(); });
  }
}

function nearest(steps, wanted) {
  return steps.reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
}
