// The page: one view of steps that the map and all curves share, buttons, theme.
const data = JSON.parse(document.getElementById("report-data").textContent);
const element = (name) => document.getElementById(name);

class Page {
  constructor() {
    this.data = data;
    this.end = data.last + 1 + (data.stopped ? Math.max(1, Math.ceil((data.last + 1) * 0.04)) : 0);
    this.view = { low: 0, high: this.end };
    this.curves = [];
    this.selected = null;
    this.pointing = false;
  }

  gutter(width) { return width < 640 ? 92 : 190; }

  start(buffer) {
    const types = { u4: Uint32Array, f4: Float32Array };
    const array = (reference) => new types[reference.type](buffer, reference.at, reference.n);
    for (const map of data.maps) {
      map.overview = decodeGrid(map.overview, map.names.length, buffer);
      map.windows = map.windows.map((grid) => decodeGrid(grid, map.names.length, buffer));
      map.prefix = sharedPrefix(map.names);
    }
    for (const panel of data.panels) {
      panel.steps = array(panel.steps);
      for (const curve of panel.curves) curve.values = array(curve.values);
    }
    if (data.maps.length) this.startMap();
    document.querySelectorAll("[data-panel]").forEach((figure) => this.curves.push(new Curve(figure, this, data.panels[figure.dataset.panel])));
    this.buttons();
    this.say();
    const resized = new ResizeObserver(() => this.resize());
    resized.observe(document.querySelector(".figures"));
  }

  startMap() {
    const role = element("role");
    for (const map of data.maps) role.add(new Option(map.label, map.role, false, map.role === data.role));
    this.map = new LayerMap(element("map"), this);
    role.addEventListener("change", () => this.role(role.value));
    element("mode").addEventListener("change", (event) => { this.map.mode = event.target.value; this.map.draw(); });
    this.role(data.role);
  }

  role(name) {
    const map = data.maps.find((candidate) => candidate.role === name);
    this.selected = map.selected;
    element("omitted").textContent = map.omitted;
    element("omitted").hidden = !map.omitted;
    this.map.show(map);
    this.series();
  }

  select(row) {
    this.selected = row;
    this.map.draw();
    this.series();
  }

  /** The selected row as a curve: the overview's columns, and every step where a window has it. */
  series() {
    const map = this.map.map, row = this.selected, points = new Map(), gaps = [];
    const read = (grid) => {
      for (let column = 0; column < grid.num; column++) {
        const step = grid.start + column * grid.width, code = grid.codes[row * grid.num + column];
        if (code <= LEVELS) points.set(step, 10 ** this.map.log10(code));
        else if (code === ZERO || code === MISSING) points.delete(step);
        else gaps.push([step, Math.min(step + grid.width - 1, data.last), code === NAN ? "nan" : "inf"]);
      }
    };
    const inside = (step) => map.windows.some((grid) => grid.start <= step && step < grid.stop);
    read({ ...map.overview });
    if (map.overview.width > 1) {
      for (const step of [...points.keys()]) if (inside(step)) points.delete(step);
      const coarse = gaps.splice(0).filter(([first]) => !inside(first) && !inside(first + map.overview.width - 1));
      gaps.push(...coarse);
    } else gaps.length = 0, points.clear(), read(map.overview);
    if (map.overview.width > 1) map.windows.forEach(read);
    const steps = [...points.keys()].sort((a, b) => a - b);
    element("selected-title").textContent = `Selected: ${map.names[row]} · ${map.label}, max |value|`;
    const values = steps.map((step) => points.get(step)), figure = element("selected");
    figure.hidden = !steps.length && !gaps.length;
    const spec = { title: map.names[row], log: steps.length > 0 && Math.max(...values) / Math.min(...values) > 20, steps, curves: [{ label: "max |value|", values, gaps: merged(gaps) }] };
    if (this.selectedCurve) this.selectedCurve.set(spec);
    else this.curves.push(this.selectedCurve = new Curve(figure, this, spec));
  }

  zoom(low, high) {
    const least = Math.min(8, this.end);
    low = Math.max(0, Math.floor(low));
    high = Math.min(this.end, Math.ceil(high));
    if (high - low < least) {
      low = Math.max(0, Math.min(Math.round((low + high - least) / 2), this.end - least));
      high = low + least;
    }
    this.view = { low, high };
    this.map?.draw();
    for (const curve of this.curves) curve.rescale();
    this.say();
  }

  scale(factor, around) {
    const { low, high } = this.view, middle = around ?? (low + high) / 2, half = (high - low) * factor / 2;
    const from = Math.max(0, Math.min(middle - half, this.end - 2 * half));
    this.zoom(from, from + 2 * half);
  }

  say() {
    const { low, high } = this.view, last = Math.min(high - 1, data.last);
    element("range").textContent = `Steps ${grouped(low)} to ${grouped(Math.max(last, low))}`;
  }

  pointed(step, text) {
    this.pointing = true;
    for (const curve of this.curves) curve.point(step);
    this.pointing = false;
    if (this.map && !text) {
      this.map.cursor = step === null ? null : { row: null, step };
      this.map.drawOver();
    }
    if (element("readout")) element("readout").textContent = text;
  }

  buttons() {
    const fault = data.fault, zooms = {
      all: () => this.zoom(0, Infinity),
      tail: () => this.zoom(Math.max(0, data.last - 399), this.end),
      fault: () => this.zoom(fault.step - 60, fault.step + 12),
      in: () => this.scale(0.5, fault && fault.step >= this.view.low && fault.step <= this.view.high ? fault.step : undefined),
      out: () => this.scale(2),
    };
    for (const button of document.querySelectorAll("[data-zoom]")) {
      const name = button.dataset.zoom;
      button.hidden = (name === "fault" && !fault) || (name === "tail" && data.last < 400);
      button.addEventListener("click", zooms[name]);
    }
  }

  resize() {
    if (this.width === document.querySelector(".figures").clientWidth) return;
    this.width = document.querySelector(".figures").clientWidth;
    this.redraw();
  }

  redraw() {
    this.map?.draw();
    for (const curve of this.curves) curve.build();
  }
}

function merged(gaps) {
  const joined = [];
  for (const [first, last, kind] of gaps.sort((a, b) => a[0] - b[0])) {
    const before = joined.at(-1);
    if (before && before[2] === kind && first <= before[1] + 1) before[1] = last;
    else joined.push([first, last, kind]);
  }
  return joined;
}

function sharedPrefix(names) {
  const heads = new Map();
  for (const name of names) heads.set(name.split(".")[0], (heads.get(name.split(".")[0]) ?? 0) + 1);
  const [head, times] = [...heads].sort((a, b) => b[1] - a[1])[0];
  return names.some((name) => name.length > 22) && times >= 0.9 * names.length ? `${head}.` : "";
}

function theme() {
  const system = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  let chosen = null;
  const apply = () => {
    root.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
    page.redraw();
  };
  system.addEventListener("change", apply);
  element("theme").addEventListener("click", () => { chosen = root.dataset.theme === "dark" ? "light" : "dark"; apply(); });
  addEventListener("beforeprint", () => { root.dataset.theme = "light"; page.redraw(); });
  addEventListener("afterprint", apply);
  root.dataset.theme = system.matches ? "dark" : "light";
}

function copyRemedies() {
  const button = element("copy"), list = element("remedies");
  if (!button || !navigator.clipboard) return;
  button.hidden = false;
  button.addEventListener("click", () => {
    const text = [...list.children].map((item, index) => `${index + 1}. ${item.textContent.trim()}`).join("\n");
    navigator.clipboard.writeText(text).then(() => { button.textContent = "Copied"; }, () => { getSelection().selectAllChildren(list); });
  });
}

const page = new Page();
theme();
copyRemedies();
if (document.querySelector(".figures")) {
  unpack(data.numbers).then((buffer) => page.start(buffer)).catch((error) => {
    element("trouble").hidden = false;
    element("trouble").textContent = `The figures could not be drawn: ${error.message}`;
    console.error(error);
  });
}
