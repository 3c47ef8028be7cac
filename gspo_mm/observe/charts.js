// Draws what curves.py writes, as SVG: lines with gaps, areas on top of each other, or a map of colours. A click on the legend
// hides and shows a curve, the pointer reads values. Names come from runs: they are only ever set as text.
const HEAT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // dark is low

const node = (name, attributes = {}, ...inside) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
};

const element = (name, className, text) =>
  Object.assign(document.createElement(name), { className, textContent: text ?? "" });

// round numbers from low to high, and how they are written
const ticksOf = (low, high, count) => {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find(times => times * unit >= rough * 0.999);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), largest = Math.max(Math.abs(low), Math.abs(high));
  const write = value => largest >= 1e5 || largest < 1e-3 ? (value ? value.toExponential(1) : "0") : value.toFixed(places);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + 1e-6 * step; i++) found.push([i * step, write(i * step)]);
  return found;
};

const exact = value => value == null ? "none" : String(+value.toPrecision(5));

const heatColor = share => {
  const place = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1), below = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[below].map((value, i) => Math.round(value + (place - below) * (HEAT[below + 1][i] - value)));
};

// [low, high] of numbers, apart even where all are equal
const spanOf = values => {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value != null) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  const more = high > low ? 0.04 * (high - low) : Math.abs(low) * 0.05 || 1;
  return [low - more, high + more];
};

// each stacked area between what lies below it and that with itself
const stacked = traces => {
  let below = traces[0].x.map(() => 0);
  return traces.map(trace => {
    const base = below;
    below = base.map((value, i) => value + (trace.y[i] ?? 0));
    return { ...trace, base, top: below };
  });
};

const linePath = (x, y, trace) => {
  let path = "", drawn = false;
  trace.y.forEach((value, i) => {
    if (value != null) path += `${drawn ? "L" : "M"}${x(trace.x[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    drawn = value != null;
  });
  return path;
};

class Chart {
  constructor(place) {
    this.place = place;
    this.traces = JSON.parse(place.dataset.traces);
    this.heat = this.traces[0].mode === "heat map" ? this.traces[0] : null;
    this.hidden = new Set(this.traces.filter(trace => trace.visible === "legendonly").map(trace => trace.name));
    this.svg = node("svg");
    this.readout = element("div", "readout");
    this.legend = element("div", "curves");
    place.append(this.svg, this.legend, this.readout);
    this.svg.onpointermove = event => this.read(event);
    this.svg.onpointerleave = () => { this.readout.hidden = true; this.hair?.setAttribute("visibility", "hidden"); };
    this.readout.hidden = true;
    this.drawLegend();
    this.draw();
    new ResizeObserver(() => this.draw()).observe(place);
  }

  drawLegend() {
    if (this.heat) {
      this.highest = Math.max(this.heat.zmin + 1e-9, ...this.heat.z.flat().filter(value => value != null));
      const scale = element("span", "scale");
      scale.style.background = `linear-gradient(90deg, ${HEAT.map(color => `rgb(${color})`)})`;
      this.legend.append(element("span", "", exact(this.heat.zmin)), scale, element("span", "", exact(this.highest)));
    }
    for (const trace of this.traces.filter(trace => trace.name && trace.showlegend !== false)) {
      const button = element("button", "", trace.name);
      button.style.setProperty("--curve", trace.color);
      button.onclick = () => { this.hidden.has(trace.name) ? this.hidden.delete(trace.name) : this.hidden.add(trace.name); this.draw(); };
      button.dataset.name = trace.name;
      this.legend.append(button);
    }
  }

  draw() {
    for (const button of this.legend.querySelectorAll("button")) button.setAttribute("aria-pressed", !this.hidden.has(button.dataset.name));
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!width || !height) return;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    let shown = this.traces.filter(trace => !this.hidden.has(trace.name));
    if (shown[0]?.mode === "stacked") shown = stacked(shown);
    this.shown = shown;
    const rows = this.heat ? this.heat.y.length : 0;
    const [low, high] = this.heat ? [0, rows] : spanOf(shown.flatMap(trace => trace.top ? [0, ...trace.top] : trace.y));
    const every = Math.ceil(rows / 12);
    const marks = this.heat ? this.heat.y.map((name, i) => [i + 0.5, name]).filter((_, i) => i % every === 0) : ticksOf(low, high, 4);
    const left = 10 + 6.2 * Math.max(1, ...marks.map(([, text]) => text.length)), bottom = height - 18;
    const steps = shown.flatMap(trace => trace.x);
    const [first, last] = steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 1];
    const half = this.heat ? (last - first) / Math.max(1, this.heat.x.length - 1) / 2 || 0.5 : first === last ? 0.5 : 0;
    this.x = value => left + (value - first + half) / (last - first + 2 * half) * (width - left - 10);
    this.y = value => bottom - (value - low) / (high - low) * (bottom - 6);
    for (const [value, text] of marks) {
      if (!this.heat) this.svg.append(node("line", { class: "grid", x1: left, x2: width - 10, y1: this.y(value), y2: this.y(value) }));
      this.svg.append(node("text", { x: left - 5, y: this.y(value) + 4, "text-anchor": "end" }, text));
    }
    for (const [value, text] of ticksOf(first - half, last + half, Math.max(2, width / 90)).filter(([value]) => Number.isInteger(value)))
      this.svg.append(node("text", { x: this.x(value), y: height - 3, "text-anchor": "middle" }, text));
    if (this.heat) this.svg.append(this.heatImage(left, width - 10, bottom));
    for (const trace of this.heat ? [] : shown) this.svg.append(...this.curve(trace));
    this.hair = node("line", { class: "hair", y1: 6, y2: bottom, visibility: "hidden" });
    this.svg.append(this.hair);
  }

  curve(trace) {
    const color = trace.color;
    if (trace.top) {
      const top = trace.top.map((value, i) => `${this.x(trace.x[i]).toFixed(1)} ${this.y(value).toFixed(1)}`);
      const base = trace.base.map((value, i) => `${this.x(trace.x[i]).toFixed(1)} ${this.y(value).toFixed(1)}`).reverse();
      return [node("path", { class: "area", d: `M${[...top, ...base].join("L")}Z`, fill: color })];
    }
    const line = node("path", { class: "line", d: linePath(this.x, this.y, trace), stroke: color, opacity: trace.opacity ?? 1 });
    const dots = trace.mode === "lines+markers" || trace.y.length === 1 ? trace.y.map((value, i) => [trace.x[i], value]) : [];
    return [line, ...dots.filter(([, value]) => value != null).map(([x, value]) => node("circle", { cx: this.x(x), cy: this.y(value), r: 3, fill: color }))];
  }

  heatImage(left, right, bottom) {
    const { x, z, zmin } = this.heat, canvas = Object.assign(document.createElement("canvas"), { width: x.length, height: z.length });
    const pen = canvas.getContext("2d");
    z.forEach((row, i) => row.forEach((value, j) => {
      if (value == null) return;
      pen.fillStyle = `rgb(${heatColor((value - zmin) / (this.highest - zmin))})`;
      pen.fillRect(j, z.length - 1 - i, 1, 1);
    }));
    return node("image", { class: "heat", href: canvas.toDataURL(), x: left, y: 6, width: right - left, height: bottom - 6, preserveAspectRatio: "none" });
  }

  read(event) {
    const at = event.clientX - this.svg.getBoundingClientRect().left;
    const near = this.shown.flatMap(trace => trace.x).reduce((best, x) => Math.abs(this.x(x) - at) < Math.abs(this.x(best) - at) ? x : best, Infinity);
    if (near === Infinity) return;
    const lines = this.heat ? this.heatLine(near, event) : this.shown.filter(trace => trace.showlegend !== false)
      .map(trace => [trace.name, trace.y[trace.x.indexOf(near)]]).filter(([, value]) => value !== undefined)
      .map(([name, value]) => `${name}: ${exact(value)}`);
    this.readout.textContent = [`step ${near}`, ...lines].join("\n");
    this.readout.hidden = false;
    this.readout.classList.toggle("left", at > this.svg.clientWidth / 2);
    for (const end of ["x1", "x2"]) this.hair.setAttribute(end, this.x(near));
    this.hair.setAttribute("visibility", "visible");
  }

  heatLine(step, event) {
    const { x, y, z } = this.heat, up = this.svg.getBoundingClientRect().bottom - 18 - event.clientY;
    const row = Math.min(Math.max(Math.floor(up / (this.svg.clientHeight - 24) * y.length), 0), y.length - 1);
    return [`${y[row]}: ${exact(z[row][x.indexOf(step)])}`];
  }
}
