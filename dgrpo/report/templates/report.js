"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
function make(tag, parent, className = "", text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}
function draw(tag, parent, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}
function numeral(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(1);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}
const withUnit = (value, unit) => (unit.startsWith("%") ? `${Number((100 * value).toPrecision(3))} %` : numeral(value));
const colour = (number) => `var(--s${number % 8})`;

// ---- charts
const HEIGHT = 180, TOP = 8, BOTTOM = 22, RIGHT = 8;
const cursors = [];

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const marks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) marks.push(k * step);
  return marks;
}

function movingMean(points) {
  const half = Math.floor(points.length / 50);
  if (half < 1) return null;
  return points.map(([step], index) => {
    const near = points.slice(Math.max(0, index - half), index + half + 1);
    return [step, near.reduce((sum, point) => sum + point[1], 0) / near.length];
  });
}

function frame(parent, chart, series, last) {
  const card = make("article", parent, "chart card");
  const title = make("h3", card);
  make("span", title, "", chart.title);
  make("span", title, "last", last);
  const line = make("div", card, "unit");
  if (chart.unit) make("span", line, "", chart.unit);
  if (series.length > 1 || chart.legend) {
    series.forEach((one, number) => make("span", line, "key", one.legend ?? one.name).style.setProperty("--colour", colour(number)));
  }
  return card;
}

function axes(svg, width, low, high, steps, unit, second = false) {
  const edge = width - (second ? 48 : RIGHT);
  const marks = ticks(low, high, 4), labels = marks.map((mark) => withUnit(mark, unit));
  const left = 10 + 6.7 * Math.max(...labels.map((label) => label.length));
  const [first, final] = steps;
  const x = (step) => left + ((step - first) / (final - first || 1)) * (edge - left);
  const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  marks.forEach((mark, number) => {
    draw("line", svg, { class: mark === 0 ? "base" : "grid", x1: left, x2: edge, y1: y(mark), y2: y(mark) });
    draw("text", svg, { x: left - 7, y: y(mark) + 4, "text-anchor": "end" }, labels[number]);
  });
  ticks(first, final === first ? first + 1 : final, Math.max(2, width / 90)).filter(Number.isInteger).forEach((step) => {
    const anchor = x(step) > width - 20 ? "end" : "middle";
    draw("text", svg, { x: Math.min(x(step), edge + 4), y: HEIGHT - 5, "text-anchor": anchor }, step);
  });
  return { x, y, left, edge };
}

const path = (points, x, y) => points.map(([step, value], k) => `${k ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");

function lineChart(parent, chart, steps, withZero) {
  const right = chart.series.filter((one) => one.right), left_series = chart.series.filter((one) => !one.right);
  const values = left_series.flatMap((one) => one.points.map((point) => point[1]));
  let low = Math.min(...values), high = Math.max(...values);
  if (withZero) [low, high] = [Math.min(0, low), Math.max(0, high)];
  if (high === low) [low, high] = withZero ? [0, 1] : [low - Math.abs(low || 1) / 10, high + Math.abs(high || 1) / 10];
  high += (high - low) * 0.06;
  if (chart.unit.startsWith("%") && high > 0.9 && high < 1.1) high = 1;
  const last = chart.series.length > 1 ? "" : withUnit(chart.series[0].points.at(-1)[1], chart.unit);
  const card = frame(parent, chart, chart.series, last);
  const width = Math.max(200, card.clientWidth - 28);
  const svg = draw("svg", card, { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": chart.title });
  const { x, y: yLeft, left, edge } = axes(svg, width, low, high, steps, chart.unit, right.length > 0);
  // The axis on the right is in per cent, from 0 to 100.
  const yRight = (share) => TOP + (1 - share) * (HEIGHT - TOP - BOTTOM);
  if (right.length) for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    draw("text", svg, { x: width - 2, y: yRight(share) + 4, "text-anchor": "end" }, `${100 * share} %`);
  }
  chart.series.forEach((one, number) => {
    const y = one.right ? yRight : yLeft;
    const smooth = movingMean(one.points), stroke = `stroke:${colour(number)}`;
    if (smooth) draw("path", svg, { class: "raw", d: path(one.points, x, y), style: stroke });
    draw("path", svg, { class: "curve", d: path(smooth ?? one.points, x, y), style: stroke });
    if (one.points.length > 30) return;
    one.points.forEach(([step, value]) => draw("circle", svg, { cx: x(step), cy: y(value), r: 3, style: `fill:${colour(number)}` }));
  });
  const tell = (step) => chart.series.map((one) => {
    const near = one.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    return [one.name, withUnit(near[1], one.right ? "%" : chart.unit), near[0]];
  });
  follow(svg, width, x, left, edge, steps, tell);
}

function follow(svg, width, x, left, edge, steps, tell) {
  const cursor = draw("line", svg, { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  cursors.push((step) => {
    cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(step));
  });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) * (width / box.width) - left) / (edge - left);
    const step = Math.round(steps[0] + Math.min(1, Math.max(0, share)) * (steps[1] - steps[0]));
    const lines = tell(step), tip = find("tip");
    cursors.forEach((move) => move(step));
    tip.replaceChildren();
    make("div", tip, "soft", `step ${lines[0][2] ?? step}`);
    lines.forEach(([name, value]) => { const entry = make("div", tip); make("span", entry, "", name); make("b", entry, "", value); });
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
  svg.addEventListener("pointerleave", () => { find("tip").hidden = true; cursors.forEach((move) => move(null)); });
}

function timeChart(parent, time, steps) {
  if (!time.phases.length) return;
  const totals = time.phases.map((phase) => phase.values.reduce((sum, value) => sum + value, 0));
  const all = totals.reduce((sum, value) => sum + value, 0) || 1;
  const phases = time.phases.map((phase, k) => ({ ...phase, legend: `${phase.name} ${Math.round((100 * totals[k]) / all)} %` }));
  const heights = time.from.map((_, k) => phases.reduce((sum, phase) => sum + phase.values[k], 0));
  const card = frame(parent, { title: "Seconds per step", unit: "mean of each stretch", legend: true }, phases, numeral(all / time.from.length));
  const width = Math.max(200, card.clientWidth - 28);
  const svg = draw("svg", card, { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": "Seconds per step" });
  const { x, y, left, edge } = axes(svg, width, 0, (Math.max(...heights) || 1) * 1.06, steps, "s");
  const room = (edge - left) / time.from.length;
  time.from.forEach((_, k) => {
    let sum = 0;
    phases.forEach((phase, number) => {
      const from = y(sum), to = y(sum += phase.values[k]);
      draw("rect", svg, { x: left + room * k + 0.5, y: to, width: Math.max(1, room - 1), height: Math.max(0, from - to), style: `fill:${colour(number)}` });
    });
  });
  const barOf = (step) => Math.max(0, Math.min(time.from.length - 1, Math.floor(((x(step) - left) / (edge - left)) * time.from.length)));
  follow(svg, width, x, left, edge, steps, (step) => {
    const k = barOf(step), span = time.from[k] === time.to[k] ? time.to[k] : `${time.from[k]} to ${time.to[k]}`;
    return phases.map((phase) => [phase.name, `${numeral(phase.values[k])} s`, span]);
  });
}

function drawCharts() {
  const points = [...data.charts, ...data.more].flatMap((chart) => chart.series.flatMap((one) => one.points.map((point) => point[0])));
  const steps = [Math.min(...points, ...data.time.from), Math.max(...points, ...data.time.to)];
  cursors.length = 0;
  find("charts").replaceChildren();
  find("more").replaceChildren();
  data.charts.forEach((chart) => lineChart(find("charts"), chart, steps, true));
  timeChart(find("charts"), data.time, steps);
  if (!find("charts").childElementCount) make("p", find("charts"), "soft", "No metrics yet.");
  find("more-metrics").hidden = !data.more.length && !data.constants;
  if (find("more-metrics").open) data.more.forEach((chart) => lineChart(find("more"), chart, steps, false));
}
let redraw;
let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === drawnWidth) return;
  drawnWidth = innerWidth;
  clearTimeout(redraw);
  redraw = setTimeout(drawCharts, 120);
});
find("more-metrics").addEventListener("toggle", drawCharts);

// ---- page
find("subtitle").textContent = data.subtitle;
data.warnings.forEach((text) => make("li", find("notes"), "warning", text));
data.notes.forEach((note) => make("li", find("notes"), "", note));
data.tiles.forEach((tile) => {
  const card = make("div", find("tiles"), "tile card");
  make("span", card, "", tile.label);
  make("b", card, "", tile.value);
  make("span", card, "", tile.remark);
});
drawCharts();
find("constants").textContent = data.constants && `Constant: ${data.constants}.`;
find("constants").hidden = !data.constants;
find("flips").textContent = data.flips;
find("flips").hidden = !data.flips;
find("samples-part").hidden = !data.samples.length;
data.samples.forEach((sample) => {
  const card = make("article", find("samples"), "sample card");
  make("p", card, "", sample.prompt);
  make("p", card, "soft", `Reference: ${sample.gold}`);
  const pair = make("div", card, "pair");
  for (const when of ["before", "after"]) {
    const part = make("div", pair);
    const mark = sample[`${when}_right`];
    make("span", part, "soft", when);
    if (mark !== undefined) make("b", part, `mark ${mark ? "up" : "down"}`, mark ? "\u2713 right" : "\u2717 wrong");
    make("pre", part, "", sample[when] || "(nothing)");
  }
});
find("config").textContent = data.config || "No config.yaml yet.";
data.versions.forEach((pair) => { const row = make("tr", find("versions")); pair.forEach((cell) => make("td", row, "", cell)); });
if (!data.versions.length) make("td", make("tr", find("versions")), "soft", "No summary.json yet.");
