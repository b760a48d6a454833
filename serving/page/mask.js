// Painting where a picture is to change: strokes over it, kept as lists of points, so that each can be taken back.

const $ = (id) => document.getElementById(id);
const SHOWN = 0.75; // how much of the picture the paint hides
const SQUARE = 0.012; // of the longer side: chequers are seen on any colour
const STRIDE = 0.02; // of the longer side, that an arrow key goes

export class MaskEditor {
  constructor() {
    this.strokes = [];
    this.source = null;
    this.cursor = null;
    this.layer = document.createElement("canvas");
    this.canvas = $("canvas");
    this.canvas.addEventListener("pointerdown", (event) => this._down(event));
    this.canvas.addEventListener("pointermove", (event) => this._move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => this._up());
    this.canvas.addEventListener("pointerleave", () => this._point(null));
    this.canvas.addEventListener("keydown", (event) => this._key(event));
    this.canvas.addEventListener("blur", () => this._point(null));
    $("undo").addEventListener("click", () => this.undo());
    $("clear").addEventListener("click", () => this.clear());
    $("brush").addEventListener("input", () => this._paint());
    $("mask-done").addEventListener("click", () => $("mask").close());
    $("mask").addEventListener("close", () => this.closed?.());
    $("mask").addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
        event.preventDefault();
        this.undo();
      }
    });
  }

  /** Begin with another picture, an ImageBitmap; null is none. */
  begin(source) {
    this.source = source;
    this.strokes = [];
  }

  get empty() {
    return !this.strokes.some((stroke) => !stroke.erases);
  }

  open(closed) {
    this.closed = closed;
    const { width, height } = this.source;
    for (const canvas of [this.canvas, this.layer]) Object.assign(canvas, { width, height });
    this._fit();
    $("mask").showModal();
    this.canvas.focus();
    this.cursor = null;
    this._paint();
  }

  undo() {
    this.strokes.pop();
    this._paint();
  }

  clear() {
    this.strokes = [];
    this._paint();
  }

  /** The mask as the API has it: a PNG of the picture's size that is transparent where it is to change. */
  async blob() {
    const { width, height } = this.source;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, width, height);
    for (const stroke of this.strokes) draw(context, stroke, !stroke.erases, "#000");
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  _fit() {
    const { width, height } = this.source;
    const most = Math.min(window.innerWidth - 60, 850);
    const scale = Math.min(most / width, (window.innerHeight - 260) / height);
    this.canvas.style.width = `${Math.max(120, width * scale)}px`;
  }

  get _size() {
    return (Number($("brush").value) / 100) * Math.max(this.source.width, this.source.height);
  }

  _at(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  _stroke(point) {
    const erases = document.querySelector("[name=tool]:checked").value === "eraser";
    this.strokes.push({ erases, size: this._size, points: [point] });
  }

  _down(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.drawing = true;
    this._stroke(this._at(event));
    this._point(this._at(event));
  }

  _move(event) {
    if (this.drawing) {
      for (const one of event.getCoalescedEvents?.() ?? [event]) this.strokes.at(-1).points.push(this._at(one));
    }
    this._point(this._at(event));
  }

  _up() {
    this.drawing = false;
  }

  _point(point) {
    if (this.source === null) return;
    this.cursor = point;
    this._paint();
  }

  _key(event) {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const [width, height] = [this.canvas.width, this.canvas.height];
    const point = this.cursor ?? [width / 2, height / 2];
    const key = event.key;
    if (key in ways) {
      const stride = STRIDE * Math.max(width, height) * (event.shiftKey ? 4 : 1);
      const [x, y] = ways[key];
      this._point([clamp(point[0] + x * stride, width), clamp(point[1] + y * stride, height)]);
    } else if (key === " " || key === "Enter") {
      this._stroke(point);
      this._point(point);
    } else if (key === "z" && !event.ctrlKey && !event.metaKey) {
      this.undo();
    } else if (key === "[" || key === "]") {
      $("brush").value = Number($("brush").value) + (key === "]" ? 2 : -2);
      this._paint();
    } else {
      return;
    }
    event.preventDefault();
  }

  _paint() {
    const layer = this.layer.getContext("2d");
    const colour = chequers(layer, Math.max(1, Math.round(SQUARE * Math.max(this.layer.width, this.layer.height))));
    layer.clearRect(0, 0, this.layer.width, this.layer.height);
    for (const stroke of this.strokes) draw(layer, stroke, stroke.erases, colour);
    const context = this.canvas.getContext("2d");
    context.drawImage(this.source, 0, 0);
    context.globalAlpha = SHOWN;
    context.drawImage(this.layer, 0, 0);
    context.globalAlpha = 1;
    if (this.cursor !== null) ring(context, this.cursor, this._size / 2);
    $("undo").disabled = $("clear").disabled = this.strokes.length === 0;
  }
}

/** Lay a stroke on, or take it away. */
function draw(context, { size, points }, away, colour) {
  context.globalCompositeOperation = away ? "destination-out" : "source-over";
  context.strokeStyle = colour;
  context.lineWidth = size;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...points[0]);
  for (const [x, y] of points) context.lineTo(x + 0.01, y); // so that a dot is a line, too
  context.stroke();
  context.globalCompositeOperation = "source-over";
}

/** A chequered pattern of the accent and white. */
function chequers(context, width) {
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
  const tile = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * width });
  const own = tile.getContext("2d");
  for (const [fill, x, y] of [["#fff", 0, 0], [colour, width, 0], [colour, 0, width], ["#fff", width, width]]) {
    own.fillStyle = fill;
    own.fillRect(x, y, width, width);
  }
  return context.createPattern(tile, "repeat");
}

/** The brush's outline: dark on light, and light on dark. */
function ring(context, [x, y], radius) {
  const width = Math.max(1, context.canvas.width / 500);
  for (const [colour, grown] of [["#000", 0], ["#fff", width]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.beginPath();
    context.arc(x, y, Math.max(radius - grown, 1), 0, 2 * Math.PI);
    context.stroke();
  }
}

function clamp(value, most) {
  return Math.min(Math.max(value, 0), most);
}
