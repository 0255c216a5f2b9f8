// The curves under the map: uPlot with the map's gutter, zoom, task boundaries and fault line.
const STRIDES = Array.from({ length: 30 }, (_, index) => [1, 2, 5][index % 3] * 10 ** Math.floor(index / 3));
const Y_STRIDES = Array.from({ length: 3 * 600 }, (_, index) => [1, 2, 5][index % 3] * 10 ** (Math.floor(index / 3) - 300)); // uPlot's own end at 1e16
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];

function curveValues(array, log) {
  return Array.from(array, (value) => (Number.isFinite(value) && (!log || value > 0) ? value : null));
}

function legendNumber(_, value) { return value === null || value === undefined ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? short(value) : String(Number(value.toPrecision(4))); }

/** Powers of ten alone on a logarithmic axis that spans several, so that lines and labels keep their distance. */
function logSplits(low, high) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high)), every = Math.max(1, Math.ceil((to - from) / 6));
  const within = to - from > 2 ? [1] : to - from > 1 ? [1, 3] : [1, 2, 5], found = [];
  for (let power = from; power <= to; power += every) for (const factor of within) found.push(factor * 10 ** power);
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

class Curve {
  constructor(figure, page, spec) {
    this.figure = figure;
    this.page = page;
    this.holder = figure.querySelector(".canvas");
    this.values = figure.querySelector(".values");
    this.set(spec);
  }

  set(spec) { // {title, log, steps, curves: [{label, values, gaps}]}
    this.spec = spec;
    this.data = [Array.from(spec.steps), ...spec.curves.map((curve) => curveValues(curve.values, spec.log))];
    this.build();
  }

  build() {
    this.plot?.destroy();
    this.values.replaceChildren();
    const width = this.holder.clientWidth, log = this.spec.log, page = this.page;
    if (!width) return;
    const axis = { stroke: () => css("--muted"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { stroke: () => css("--line"), width: 1, size: 5 }, font: "12px system-ui, sans-serif" };
    const points = this.data[0].length < 40;
    this.plot = new uPlot({
      width, height: width < 640 ? 150 : 170, padding: [8, RIGHT, 0, 0],
      legend: { mount: (_, element) => this.values.append(element), markers: { fill: (_, index) => css(`--c${(index - 1) % 8}`) } },
      scales: { x: { time: false, min: page.view.low, max: page.view.high, range: () => [page.view.low, page.view.high] }, y: { distr: log ? 3 : 1 } },
      axes: [
        { ...axis, size: 28, space: width < 640 ? 60 : 80, incrs: STRIDES, values: (_, values) => values.map((value) => (Number.isInteger(value) ? grouped(value) : "")) },
        { ...axis, size: page.gutter(width), incrs: Y_STRIDES, values: (_, values) => values.map((value) => (value === null ? "" : short(value))), ...(log ? { splits: (_, __, low, high) => logSplits(low, high), filter: (_, splits) => splits } : {}) },
      ],
      cursor: { drag: { x: true, y: false, setScale: false }, y: false, points: { size: 6 } },
      series: [
        { label: "step", value: (_, value) => (value === null ? "–" : grouped(value)) },
        ...this.spec.curves.map((curve, index) => ({ label: curve.label, stroke: () => css(`--c${index % 8}`), width: 1.4, dash: DASHES[Math.floor(index / 2) % 4], value: legendNumber, points: { show: points, size: 5 }, spanGaps: Boolean(curve.sparse) })),
      ],
      hooks: {
        drawClear: [(plot) => this.back(plot)],
        draw: [(plot) => this.front(plot)],
        setSelect: [(plot) => { if (plot.select.width > 6) { page.zoom(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")); plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false); } }],
        setCursor: [(plot) => { if (!page.pointing) page.pointed(plot.cursor.left >= 0 ? Math.round(plot.posToVal(plot.cursor.left, "x")) : null, ""); }],
      },
    }, this.data, this.holder);
    this.plot.over.addEventListener("dblclick", () => page.zoom(0, Infinity));
    this.plot.root.setAttribute("role", "img");
    this.plot.root.setAttribute("aria-label", `${this.spec.title}: ${this.spec.curves.map((curve) => curve.label).join(", ")} over steps`);
  }

  back(plot) {
    const { ctx, bbox } = plot, { data } = this.page, ratio = devicePixelRatio;
    const x = (step) => Math.round(plot.valToPos(step, "x", true));
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    if (data.stopped) {
      ctx.strokeStyle = css("--hatch");
      ctx.lineWidth = ratio;
      const left = Math.max(x(data.last + 1), bbox.left), right = bbox.left + bbox.width;
      for (let at = left - bbox.height; at < right; at += 8 * ratio) line(ctx, Math.max(at, left), bbox.top + bbox.height - Math.max(left - at, 0), at + bbox.height, bbox.top);
    }
    ctx.setLineDash([2 * ratio, 3 * ratio]);
    ctx.strokeStyle = css("--muted");
    for (const [, step] of data.tasks.slice(1)) line(ctx, x(step), bbox.top, x(step), bbox.top + bbox.height);
    ctx.restore();
  }

  front(plot) {
    const { ctx, bbox } = plot, { data } = this.page, ratio = devicePixelRatio;
    const x = (step) => Math.round(plot.valToPos(step, "x", true));
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    let free = -Infinity; // marks may touch, their words may not
    for (const curve of this.spec.curves) {
      for (const [first, last, kind] of curve.gaps) {
        const left = x(first), wide = Math.max(x(last + 1) - left, 4 * ratio);
        ctx.fillStyle = css(kind === "nan" ? "--nan" : "--inf");
        ctx.fillRect(left, bbox.top, wide, 6 * ratio);
        ctx.font = `bold ${12 * ratio}px system-ui, sans-serif`;
        ctx.textBaseline = "top";
        const text = kind === "nan" ? "NaN" : "Inf", room = ctx.measureText(text).width;
        const beside = left - room - 6 * ratio > bbox.left ? left - room - 6 * ratio : left + 4 * ratio;
        if (beside < free) continue;
        ctx.fillText(text, beside, bbox.top + 9 * ratio);
        free = beside + room + 8 * ratio;
      }
    }
    if (data.fault) {
      ctx.strokeStyle = css("--nan");
      ctx.lineWidth = 2 * ratio;
      ctx.setLineDash([5 * ratio, 4 * ratio]);
      line(ctx, x(data.fault.step + 0.5), bbox.top, x(data.fault.step + 0.5), bbox.top + bbox.height);
    }
    ctx.restore();
  }

  rescale() { this.plot?.setScale("x", { min: this.page.view.low, max: this.page.view.high }); }
  point(step) { this.plot?.setCursor(step === null ? { left: -10, top: -10 } : { left: this.plot.valToPos(step, "x"), top: 10 }); }
}

function line(context, fromX, fromY, toX, toY) {
  context.beginPath();
  context.moveTo(fromX, fromY);
  context.lineTo(toX, toY);
  context.stroke();
}
