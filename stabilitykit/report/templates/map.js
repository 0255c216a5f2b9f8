// The layer x step map: numbers unpacked, pixels painted, pointer and keyboard.
const RIGHT = 26; // so that half of the last step's label has room
const LEVELS = 64000, ZERO = 65532, MISSING = 65533, INF = 65534, NAN = 65535;
const VIRIDIS = "440154481467482576453781404688 39558c33638d2d718e287d8e238a8d1f968b20a38629af7f3cbb745ec96273d05598d83ecadd29fde725"
  .replace(/ /g, "").match(/.{6}/g).map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

function decodeGrid(grid, rows, buffer) {
  const bytes = new Uint8Array(buffer, grid.data.at, grid.data.n), size = rows * grid.num;
  const codes = new Uint16Array(size);
  for (let row = 0, at = 0; row < rows; row++) {
    for (let column = 0, value = 0; column < grid.num; column++, at++) {
      value = (value + bytes[at] + (bytes[size + at] << 8)) & 0xffff;
      codes[at] = value;
    }
  }
  return { start: grid.start, width: grid.width, num: grid.num, stop: grid.start + grid.width * grid.num, codes };
}

function worst(a, b) {
  if (a >= INF || b >= INF) return a >= INF && b >= INF ? Math.max(a, b) : a >= INF ? a : b;
  if (a <= LEVELS && b <= LEVELS) return Math.max(a, b);
  return a <= LEVELS ? a : b <= LEVELS ? b : Math.min(a, b); // a value before all zeros before nothing recorded
}

function viridis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), low = Math.floor(at);
  const high = Math.min(low + 1, VIRIDIS.length - 1), rest = at - low;
  return VIRIDIS[low].map((value, channel) => Math.round(value + (VIRIDIS[high][channel] - value) * rest));
}

function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function rgb(hex) { return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)); }
function packed([red, green, blue]) { return (255 << 24 | blue << 16 | green << 8 | red) >>> 0; }
function grouped(value) { return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, ","); }
function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) return size >= 1000 ? grouped(value) : String(Number(value.toPrecision(3)));
  const [mantissa, exponent] = value.toExponential(1).split("e");
  return `${mantissa.replace(/\.0$/, "")}e${Number(exponent)}`;
}

/** What a map's cells cover for steps from..to: a window's columns where one holds them all, else the overview's. */
function cellsFor(map, from, to) {
  const window = map.windows.find((grid) => grid.start <= from && to <= grid.stop);
  const grid = window || map.overview;
  const first = Math.floor((from - grid.start) / grid.width), last = Math.ceil((to - grid.start) / grid.width) - 1;
  return { grid, first: Math.max(first, 0), last: Math.min(Math.max(last, first), grid.num - 1) };
}

function codeAt(cells, row) {
  const { grid, first, last } = cells;
  let code = MISSING;
  for (let column = first; column <= last; column++) code = worst(code, grid.codes[row * grid.num + column]);
  return code;
}

class LayerMap {
  constructor(holder, page) {
    this.holder = holder;
    this.page = page;
    this.paint = holder.appendChild(document.createElement("canvas"));
    this.over = holder.appendChild(document.createElement("canvas"));
    this.over.tabIndex = 0;
    this.over.setAttribute("role", "application");
    this.over.setAttribute("aria-roledescription", "layer by step map");
    this.over.setAttribute("aria-describedby", "readout");
    this.mode = "change";
    this.cursor = null; // {row, step}
    this.listen();
  }

  show(map) {
    this.map = map;
    this.cursor = null;
    const values = this.levels();
    this.change = { low: -1, high: Math.min(Math.max(1, this.reach(values.change, 0.999)), 6) };
    this.size = { low: this.reach(values.size, 0.005), high: Math.max(this.reach(values.size, 0.999), this.reach(values.size, 0.005) + 1) };
    this.over.setAttribute("aria-label", `${map.label} of ${map.names.length} tensors over steps; arrow keys move, Enter picks a row`);
    this.draw();
  }

  levels() {
    const { overview, early, names } = this.map, change = [], size = [];
    for (let row = 0; row < names.length; row++) {
      for (let column = 0; column < overview.num; column++) {
        const code = overview.codes[row * overview.num + column];
        if (code > LEVELS) continue;
        size.push(this.log10(code));
        if (early[row] !== null) change.push(this.log10(code) - early[row]);
      }
    }
    return { change: Float64Array.from(change).sort(), size: Float64Array.from(size).sort() };
  }

  reach(sorted, share) { return sorted.length ? sorted[Math.floor(share * (sorted.length - 1))] : 0; }
  log10(code) { return this.map.low + code / LEVELS * (this.map.high - this.map.low); }

  layout() {
    const width = this.holder.clientWidth, rows = this.map.names.length, small = width < 640;
    const gutter = this.page.gutter(width);
    const height = Math.max(2, Math.min(small ? 18 : 22, Math.round((small ? 400 : 460) / rows)));
    return { width, gutter, right: RIGHT, top: this.page.data.tasks.length ? 22 : 6, row: height, rows, plot: width - gutter - RIGHT, tall: height * rows, bottom: 26 };
  }

  draw() {
    if (!this.map || !this.holder.clientWidth) return;
    const box = this.box = this.layout(), scale = Math.min(window.devicePixelRatio || 1, 2);
    for (const canvas of [this.paint, this.over]) {
      canvas.width = Math.round(box.width * scale);
      canvas.height = Math.round((box.top + box.tall + box.bottom) * scale);
      canvas.style.width = `${box.width}px`;
      canvas.style.height = `${box.top + box.tall + box.bottom}px`;
    }
    const context = this.paint.getContext("2d");
    context.putImageData(this.pixels(box, scale), Math.round(box.gutter * scale), Math.round(box.top * scale));
    context.scale(scale, scale);
    this.drawAxis(context, box);
    this.drawNames(context, box);
    this.drawLegend();
    this.drawOver();
  }

  pixels(box, scale) {
    const wide = Math.round(box.plot * scale), tall = Math.round(box.tall * scale), { low, high } = this.page.view;
    const image = new ImageData(wide, tall), out = new Uint32Array(image.data.buffer), colours = this.colours();
    const rowOf = new Int32Array(tall).map((_, y) => Math.min(Math.floor(y / (box.row * scale)), box.rows - 1));
    const page = packed(rgb(css("--page"))), hatch = packed(rgb(css("--hatch")));
    const black = packed([20, 12, 0]), period = Math.round(4 * scale);
    for (let x = 0; x < wide; x++) {
      const from = low + x / wide * (high - low), to = low + (x + 1) / wide * (high - low);
      const first = Math.floor(from), past = Math.max(Math.ceil(to), first + 1);
      const beyond = first > this.page.data.last, cells = beyond ? null : cellsFor(this.map, first, Math.min(past, this.page.data.last + 1));
      for (let y = 0, row = -1, colour = 0, code = 0; y < tall; y++) {
        if (beyond) {
          out[y * wide + x] = this.page.data.stopped && (x + y) % (2 * period) < scale ? hatch : page;
          continue;
        }
        if (rowOf[y] !== row) {
          row = rowOf[y];
          code = codeAt(cells, row);
          colour = colours(code, row);
        }
        // Inf is striped as well as orange, so that it is not taken for the yellow end of the scale
        out[y * wide + x] = code === INF && (x + y) % period < scale ? black : colour;
      }
    }
    return image;
  }

  colours() {
    const change = this.mode === "change", { low, high } = change ? this.change : this.size;
    const table = Array.from({ length: 256 }, (_, index) => packed(viridis(index / 255)));
    const nan = packed(rgb(css("--nan"))), inf = packed(rgb(css("--inf"))), missing = packed(rgb(css("--missing")));
    return (code, row) => {
      if (code === NAN) return nan;
      if (code === INF) return inf;
      if (code === MISSING) return missing;
      if (code === ZERO) return table[0];
      const value = this.log10(code) - (change ? this.map.early[row] ?? 0 : 0);
      return table[Math.min(Math.max(Math.round((value - low) / (high - low) * 255), 0), 255)];
    };
  }

  drawAxis(context, box) {
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = css("--muted");
    context.strokeStyle = css("--line");
    context.textAlign = "center";
    context.textBaseline = "top";
    const { low, high } = this.page.view, y = box.top + box.tall;
    for (const step of ticks(low, high, Math.max(2, Math.floor(box.plot / (box.plot < 450 ? 65 : 90))))) {
      const x = this.x(step), half = context.measureText(grouped(step)).width / 2;
      context.fillRect(x, y, 1, 5);
      context.fillText(grouped(step), Math.min(Math.max(x, half), box.width - half), y + 8);
    }
    context.textBaseline = "middle";
    let free = box.gutter - 40;
    for (const [task, step] of this.page.data.tasks) {
      const x = this.x(step), text = `task ${task}`, width = context.measureText(text).width;
      if (x < box.gutter - 1 || x > box.width - box.right) continue;
      context.fillRect(x, 12, 1, box.top - 12);
      if (x + 4 > free && x + 4 + width < box.width) {
        context.textAlign = "left";
        context.fillText(text, x + 4, 9);
        free = x + width + 14;
      }
    }
  }

  drawNames(context, box) {
    const every = Math.max(1, Math.ceil(14 / box.row)), marked = [this.map.origin, this.page.selected].filter((row) => row !== null);
    context.textAlign = "right";
    context.textBaseline = "middle";
    const { prefix } = this.map, shown = (name) => (name.startsWith(prefix) ? name.slice(prefix.length) : name);
    const label = (row, bold) => {
      context.font = `${bold ? "bold " : ""}12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace`;
      context.fillStyle = row === this.map.origin ? css("--fault") : bold ? css("--text") : css("--muted");
      context.fillText(fitted(context, shown(this.map.names[row]), box.gutter - 10), box.gutter - 6, box.top + (row + 0.5) * box.row);
    };
    for (let row = 0; row < box.rows; row += every) {
      if (!marked.some((other) => other !== row && Math.abs(other - row) * box.row < 13) && !marked.includes(row)) label(row, false);
    }
    const kept = this.map.origin !== null && marked.length > 1 && Math.abs(marked[0] - marked[1]) * box.row < 13 ? [marked[0]] : marked;
    for (const row of kept) label(row, true);
  }

  drawOver() {
    const box = this.box, context = this.over.getContext("2d"), scale = this.over.width / box.width;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, box.width, box.top + box.tall + box.bottom);
    this.drawTasks(context, box);
    this.outline(context, this.page.selected, css("--page"), css("--text"));
    this.drawFault(context, box);
    if (this.drag) {
      context.fillStyle = "rgba(120, 170, 255, .35)";
      context.fillRect(Math.min(this.drag.from, this.drag.to), box.top, Math.abs(this.drag.to - this.drag.from), box.tall);
    } else if (this.cursor) {
      const x = this.x(this.cursor.step + 0.5);
      context.fillStyle = "#ffffff";
      if (this.visible(x)) context.fillRect(x - 0.5, box.top, 1, box.tall);
      if (this.cursor.row !== null) this.outline(context, this.cursor.row, "#000000", "#ffffff");
    }
  }

  drawTasks(context, box) {
    context.strokeStyle = "rgba(255, 255, 255, .55)";
    context.setLineDash([2, 3]);
    for (const [, step] of this.page.data.tasks.slice(1)) {
      const x = Math.round(this.x(step)) + 0.5;
      if (!this.visible(x)) continue;
      context.beginPath();
      context.moveTo(x, box.top);
      context.lineTo(x, box.top + box.tall);
      context.stroke();
    }
    context.setLineDash([]);
  }

  outline(context, row, outer, inner) {
    if (row === null || row === undefined) return;
    const { gutter, top, plot } = this.box, height = Math.max(this.box.row, 4), y = top + (row + 0.5) * this.box.row - height / 2;
    context.lineWidth = 1;
    context.strokeStyle = outer;
    context.strokeRect(gutter - 0.5, y - 1.5, plot + 1, height + 3);
    context.strokeStyle = inner;
    context.strokeRect(gutter + 0.5, y - 0.5, plot - 1, height + 1);
  }

  drawFault(context, box) {
    const fault = this.page.data.fault;
    if (!fault) return;
    const x = this.x(fault.step + 0.5), row = this.map.origin;
    if (!this.visible(x)) return;
    const y = box.top + ((row ?? 0) + 0.5) * box.row;
    context.strokeStyle = css("--nan");
    context.lineWidth = 2;
    context.setLineDash([5, 4]);
    context.beginPath();
    context.moveTo(x, box.top);
    context.lineTo(x, box.top + box.tall);
    context.stroke();
    context.setLineDash([]);
    if (row !== null) this.ring(context, x, y);
    this.flag(context, box, fault.label, x, y);
  }

  ring(context, x, y) {
    for (const [width, colour] of [[5, "#ffffff"], [2.5, css("--nan")]]) {
      context.lineWidth = width;
      context.strokeStyle = colour;
      context.beginPath();
      context.arc(x, y, 8, 0, 7);
      context.stroke();
    }
  }

  flag(context, box, text, x, y) {
    context.font = "bold 12.5px system-ui, sans-serif";
    const width = context.measureText(text).width + 14, left = Math.max(box.gutter + 2, Math.min(x - width - 14, box.width - width));
    const top = y - 34 > box.top ? y - 34 : y + 14;
    context.fillStyle = "#b4004e";
    context.fillRect(left, top, width, 21);
    context.fillStyle = "#ffffff";
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillText(text, left + 7, top + 11);
  }

  drawLegend() {
    const legend = document.getElementById("legend"), change = this.mode === "change", { low, high } = change ? this.change : this.size;
    const power = (value) => change ? `×${short(10 ** value)}` : short(10 ** value);
    legend.replaceChildren();
    const scale = entry(legend, `${change ? "against early median " : "max |value| "}${power(low)}`, 130, (context, width, height) => {
      for (let x = 0; x < width; x++) {
        context.fillStyle = `rgb(${viridis(x / width)})`;
        context.fillRect(x, 0, 1, height);
      }
    });
    scale.append(`${power(high)} and more`);
    scale.insertBefore(scale.lastElementChild, scale.childNodes[1]);
    const solid = (colour) => (context, width, height) => { context.fillStyle = colour; context.fillRect(0, 0, width, height); };
    const found = this.found();
    if (found.nan) entry(legend, "NaN", 16, solid(css("--nan")), true);
    if (found.inf) entry(legend, "Inf (striped)", 16, (context, width, height) => { solid(css("--inf"))(context, width, height); stripes(context, width, height, "#140c00", 4); }, true);
    if (found.missing) entry(legend, "not recorded", 16, solid(css("--missing")), true);
    if (this.page.data.stopped) entry(legend, this.page.data.after, 16, (context, width, height) => stripes(context, width, height, css("--hatch"), 6), true);
  }

  found() {
    if (!this.map.found) {
      const all = [this.map.overview, ...this.map.windows].map((grid) => grid.codes);
      this.map.found = { nan: all.some((codes) => codes.includes(NAN)), inf: all.some((codes) => codes.includes(INF)), missing: all.some((codes) => codes.includes(MISSING)) };
    }
    return this.map.found;
  }

  x(step) { const { low, high } = this.page.view; return this.box.gutter + (step - low) / (high - low) * this.box.plot; }
  step(x) { const { low, high } = this.page.view; return low + (x - this.box.gutter) / this.box.plot * (high - low); }
  visible(x) { return x >= this.box.gutter && x <= this.box.gutter + this.box.plot; }

  at(event) {
    const bounds = this.over.getBoundingClientRect(), x = event.clientX - bounds.left, y = event.clientY - bounds.top;
    const row = Math.floor((y - this.box.top) / this.box.row), step = Math.floor(this.step(Math.min(Math.max(x, this.box.gutter), this.box.gutter + this.box.plot - 0.01)));
    return { x: Math.min(Math.max(x, this.box.gutter), this.box.gutter + this.box.plot), row: row >= 0 && row < this.box.rows ? row : null, step };
  }

  listen() {
    this.over.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      const { x, row } = this.at(event);
      this.drag = { from: x, to: x, row };
      this.over.setPointerCapture(event.pointerId);
    });
    this.over.addEventListener("pointermove", (event) => {
      const { x, row, step } = this.at(event);
      if (this.drag) this.drag.to = x;
      this.point(row, step, false);
    });
    this.over.addEventListener("pointerup", () => {
      const drag = this.drag;
      this.drag = null;
      if (!drag) return;
      if (Math.abs(drag.to - drag.from) > 6) this.page.zoom(this.step(Math.min(drag.from, drag.to)), this.step(Math.max(drag.from, drag.to)));
      else if (drag.row !== null) this.page.select(drag.row);
    });
    this.over.addEventListener("pointercancel", () => { this.drag = null; this.drawOver(); });
    this.over.addEventListener("pointerleave", () => { if (!this.drag) this.point(null, null, false); });
    this.over.addEventListener("dblclick", () => this.page.zoom(0, Infinity));
    this.over.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const { low, high } = this.page.view, stride = Math.max(1, Math.round((high - low) / this.box.plot)) * (event.shiftKey ? 10 : 1);
    const now = this.cursor?.step !== undefined && this.cursor?.step !== null ? this.cursor : { row: this.page.selected ?? 0, step: Math.floor(Math.min(high - 1, this.page.data.last)) };
    const moves = { ArrowLeft: [0, -stride], ArrowRight: [0, stride], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [-1e9, 0], End: [1e9, 0] };
    if (event.key in moves) {
      const [down, along] = moves[event.key], row = Math.min(Math.max((now.row ?? 0) + down, 0), this.box.rows - 1);
      this.point(row, Math.min(Math.max(now.step + along, Math.ceil(low)), Math.min(Math.ceil(high) - 1, this.page.data.last)), true);
    } else if (event.key === "Enter" || event.key === " ") this.page.select(now.row);
    else if (event.key === "+" || event.key === "=") this.page.scale(0.5, now.step);
    else if (event.key === "-") this.page.scale(2, now.step);
    else if (event.key === "0" || event.key === "Escape") this.page.zoom(0, Infinity);
    else return;
    event.preventDefault();
  }

  point(row, step) {
    this.cursor = step === null ? null : { row, step };
    this.drawOver();
    this.page.pointed(step, row === null || step === null ? "" : this.describe(row, step));
  }

  describe(row, step) {
    if (step > this.page.data.last) return this.page.data.stopped ? this.page.data.after : "after the last step";
    const { low, high } = this.page.view, span = Math.max(1, Math.round((high - low) / this.box.plot));
    const cells = cellsFor(this.map, step, Math.min(step + span, this.page.data.last + 1)), code = codeAt(cells, row);
    const first = cells.grid.start + cells.first * cells.grid.width, last = Math.min(cells.grid.start + (cells.last + 1) * cells.grid.width - 1, this.page.data.last);
    const steps = first === last ? `step ${grouped(first)}` : `steps ${grouped(first)} to ${grouped(last)}`;
    const early = this.map.early[row];
    const what = { [NAN]: "NaN", [INF]: "Inf", [MISSING]: "not recorded", [ZERO]: "all zeros" }[code]
      ?? `max |value| ${short(10 ** this.log10(code))}` + (early === null ? "" : `, ×${short(10 ** (this.log10(code) - early))} its early median`);
    return `${steps} · ${this.map.names[row]}: ${what}`;
  }
}

function entry(legend, text, width, paint, before) {
  const item = legend.appendChild(document.createElement("span")), canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = 14;
  paint(canvas.getContext("2d"), width, 14);
  item.append(...(before ? [canvas, text] : [text, canvas]));
  return item;
}

function stripes(context, width, height, colour, period) {
  context.fillStyle = colour;
  for (let x = 0; x < width; x++) for (let y = 0; y < height; y++) if ((x + y) % period === 0) context.fillRect(x, y, 1, 1);
}

/** A name cut in the middle: its beginning says which block, its end which layer. */
function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let room = Math.floor(width / context.measureText("x").width) - 1;
  const cut = () => text.slice(0, Math.ceil(room * 0.4)) + "…" + text.slice(text.length - Math.floor(room * 0.6));
  while (room > 2 && context.measureText(cut()).width > width) room--;
  return cut();
}

function ticks(low, high, most) {
  const rough = (high - low) / most, base = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  const stride = [1, 2, 5, 10].map((factor) => factor * base).find((candidate) => candidate >= rough) || base;
  const found = [];
  for (let step = Math.ceil(low / stride) * stride; step <= high; step += stride) found.push(step);
  return found;
}
