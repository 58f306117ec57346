// The page: the data of the run, put into its places.

const run = JSON.parse(document.getElementById("data").textContent);
const place = (id) => document.getElementById(id);

place("name").textContent = run.name;
place("folder").textContent = run.folder;
place("state").textContent = run.state.text;
place("state").className = run.state.kind;
for (const card of run.cards) {
  const box = element(place("cards"), "div", undefined, { class: "card" });
  for (const part of ["label", "value", "note"]) element(box, "div", card[part], { class: part });
}
for (const [name, value] of run.facts) {
  const pair = element(place("facts"), "div");
  element(pair, "dt", name);
  element(pair, "dd", value);
}
for (const chart of run.charts) {
  const { box } = curveChart(place("charts"), chart, run.starts);
  if (chart.id === "loss") box.classList.add("wide");
}
if (run.load) showLoad(run.load);
else {
  place("load").replaceChildren();
  element(place("load"), "p", run.no_load, { class: "lead", id: "no-load" });
}

function showLoad(load) {
  const chosen = { layer: 0, modality: -1, column: load.last.length - 1 };
  const steps = load.first.map((first, n) => [first - 1, load.last[n]]);
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const many = load.modalities.map((_, m) => m);
  const modalities = () => chosen.modality < 0 ? many : [chosen.modality];
  const ofModality = () => chosen.modality < 0 ? "all tokens" : `${load.modalities[chosen.modality]} tokens`;
  const period = (column) => steps[column][1] - steps[column][0] > 1
    ? `steps ${load.first[column]} to ${load.last[column]}` : `step ${load.last[column]}`;

  const rowsOf = (layer, expert, column) =>
    sum(modalities().map((m) => load.rows[layer][m][expert][column]));
  const experts = (layer) => load.rows[layer][0].length;
  const totals = new Map();
  const total = (layer, column) => {
    const key = `${layer} ${column} ${chosen.modality}`;
    if (!totals.has(key)) {
      const all = load.rows[layer][0].map((_, expert) => rowsOf(layer, expert, column));
      totals.set(key, sum(all));
    }
    return totals.get(key);
  };
  const share = (layer, expert, column) => {
    if (expert >= experts(layer) || !total(layer, column)) return null;
    return rowsOf(layer, expert, column) * experts(layer) / total(layer, column) || NaN;
  };
  const tellShare = (layer, expert, column) => {
    const rows = rowsOf(layer, expert, column), ratio = share(layer, expert, column);
    return `layer ${load.layers[layer]}, expert ${expert}, ${period(column)}\n`
      + (rows ? `${ratio.toFixed(2)} × the mean` : "no rows")
      + `\n${rows.toLocaleString("en")} of ${total(layer, column).toLocaleString("en")} rows, ${ofModality()}`;
  };
  const evenly = {
    stops: EVEN, part: evenPart, legend: { low: "¼", high: "4 × the mean", none: "no rows" } };

  place("load-lead").textContent = "Rows that each expert had, over the mean of its layer: a balanced"
    + " router is pale everywhere. Point at a cell for its numbers; pick a layer in the lower map.";
  controls();
  const overTime = heatMap(place("maps"), "experts", {
    ...evenly, title: "Experts of one layer over time", axis: "step",
    about: "Experts down, steps across.",
    rows: () => load.rows[chosen.layer][0].map((_, expert) => String(expert)),
    spans: () => steps,
    value: (expert, column) => share(chosen.layer, expert, column),
    tell: (expert, column) => tellShare(chosen.layer, expert, column),
    pick: (_, column) => choose({ column }),
  });
  const widest = Math.max(...load.rows.map((_, layer) => experts(layer)));
  const allLayers = heatMap(place("maps"), "layers", {
    ...evenly, title: "All layers at one time", axis: "expert", counts: true,
    about: "Layers down, experts across.",
    rows: () => load.layers.map(String),
    spans: () => Array.from({ length: widest }, (_, expert) => [expert, expert + 1]),
    value: (layer, expert) => share(layer, expert, chosen.column),
    tell: (layer, expert) => tellShare(layer, expert, chosen.column),
    picked: () => chosen.layer,
    pick: (layer) => choose({ layer }),
  });
  const unrouted = figures();
  titles();

  function choose(change) {
    Object.assign(chosen, change);
    titles();
    for (const map of [overTime, allLayers]) map.again();
    if ("modality" in change) unrouted();
  }

  function titles() {
    const heading = (map, text) => { map.box.querySelector("h3").textContent = text; };
    heading(overTime, `Experts of layer ${load.layers[chosen.layer]} over time, ${ofModality()}`);
    heading(allLayers, `All layers, ${period(chosen.column)}, ${ofModality()}`);
    place("layer").value = String(chosen.layer);
    place("column").value = String(chosen.column);
    place("when").textContent = period(chosen.column);
    for (const button of document.querySelectorAll("#modality button")) {
      button.setAttribute("aria-pressed", String(+button.value === chosen.modality));
    }
  }

  function controls() {
    const named = (text) => element(place("controls"), "label", text);
    const layer = element(named("layer"), "select", undefined, { id: "layer" });
    load.layers.forEach((name, n) => element(layer, "option", String(name), { value: n }));
    layer.addEventListener("change", () => choose({ layer: +layer.value }));
    const choice = element(place("controls"), "div", undefined, { class: "choice", id: "modality" });
    ["all tokens", ...load.modalities].forEach((name, n) => {
      const button = element(choice, "button", name, { type: "button", value: n - 1 });
      button.addEventListener("click", () => choose({ modality: n - 1 }));
    });
    const slider = element(named("time"), "input", undefined, {
      id: "column", type: "range", min: 0, max: load.last.length - 1, step: 1 });
    slider.addEventListener("input", () => choose({ column: +slider.value }));
    element(place("controls"), "output", "", { id: "when", for: "column" });
  }

  // One map for each figure, layers down and steps across; returns how to draw the unrouted anew.
  function figures() {
    const byLayer = (id, title, about, values, most, tell, least = 0) => {
      const highest = () => Math.max(most, ...load.layers.flatMap((_, layer) =>
        steps.map((_, column) => values(layer, column))));
      if (highest() === least) {
        const { box } = panel(place("figures"), id, title, { text: about }, (area) => {
          element(area, "p", "None in the whole run.", { class: "none" });
        });
        return () => box;
      }
      const top = highest();
      return heatMap(place("figures"), id, {
        title, about, stops: AMOUNT, axis: "step",
        part: (value) => (value - least) / (top - least),
        legend: { low: tell(least), high: tell(top) },
        rows: () => load.layers.map(String),
        spans: () => steps,
        value: values,
        tell: (layer, column) => `layer ${load.layers[layer]}, ${period(column)}\n`
          + tell(values(layer, column)),
      }).again;
    };
    const of = (name) => (layer, column) => load[name][layer][column];
    const times = (value) => `${value.toFixed(2)} × the mean`;
    byLayer("skew", "Skew of experts", "Rows of the busiest expert over the mean; 1 is balanced.",
      of("skew"), 2, times, 1);
    if (load.ranks > 1) {
      byLayer("rank_skew", "Skew of ranks",
        "Rows of the busiest rank over the mean: the others wait for it.",
        of("rank_skew"), 1.5, times, 1);
    }
    byLayer("entropy", "Router entropy", "Mean over tokens; 100% is an even choice of all experts.",
      of("entropy"), 1, percent, Math.floor(10 * Math.min(...load.entropy.flat())) / 10);
    byLayer("dropped", "Rows dropped", "Over an expert's capacity, of all rows wanted.",
      of("dropped"), 0, percent);
    const missing = (layer, column) => sum(modalities().map((m) => load.unrouted[layer][m][column]))
      / (sum(modalities().map((m) => load.tokens[layer][m][column])) || 1);
    const again = byLayer("unrouted", "Tokens unrouted",
      "Tokens that no expert had, of the modality chosen above.", missing, 0, percent);
    byLayer("dead", "Dead experts", "Experts without a row in a column's steps.", of("dead"), 0,
      (value) => `${value} expert${value === 1 ? "" : "s"}`);
    return again;
  }
}
