// The image to start from: shown, painted on with a mask, or extended by a frame.

const HINTS = {
  change: "The prompt says what the image becomes; strength says how much of it changes.",
  paint: "Paint what is to be made again. Keys: arrows move the brush, Space paints, Backspace erases.",
  extend: "Drag a side of the frame outwards, or type how many pixels to add.",
  vary: "Images like this one. A prompt is not needed.",
};
const SIDES = ["left", "right", "top", "bottom"];
const MOST = 1024; // pixels of a longer side that is edited

export class Editor {
  constructor(canvas, hint) {
    this.canvas = canvas;
    this.hint = hint;
    this.image = null;
    this.mode = "change";
    this.brush = 10; // part of the longer side, in percent
    this.margins = { left: 0, right: 0, top: 0, bottom: 0 };
    this.cursor = null;
    this.undone = [];
    this.onmargins = () => {};
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { this.held = null; });
    canvas.addEventListener("pointerleave", () => { if (!this.held) { this.cursor = null; this.show(); } });
    canvas.addEventListener("keydown", (event) => this.type(event));
  }

  async load(blob) {
    const bitmap = await createImageBitmap(blob);
    const scale = Math.min(1, MOST / Math.max(bitmap.width, bitmap.height));
    this.image = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
    const pen = this.image.getContext("2d");
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, this.image.width, this.image.height);
    pen.drawImage(bitmap, 0, 0, this.image.width, this.image.height);
    this.mask = new OffscreenCanvas(this.image.width, this.image.height);
    this.undone = [];
    this.setMargins({ left: 0, right: 0, top: 0, bottom: 0 });
  }

  remove() {
    this.image = null;
  }

  setMode(mode) {
    this.mode = mode;
    this.hint.textContent = HINTS[mode];
    this.cursor = mode === "paint" && this.image ? { x: this.image.width / 2, y: this.image.height / 2 } : null;
    this.show();
  }

  setMargins(margins) {
    this.margins = { ...this.margins, ...margins };
    this.show();
  }

  get radius() {
    return Math.max(1, this.brush / 200 * Math.max(this.image.width, this.image.height));
  }

  show() {
    if (!this.image) return;
    const extend = this.mode === "extend";
    const around = extend ? Math.round(Math.max(this.image.width, this.image.height) / 2) : 0;
    const grown = SIDES.map((side) => (extend ? Math.max(around, this.margins[side]) : 0));
    this.origin = { x: grown[0], y: grown[2] };
    this.canvas.width = this.image.width + grown[0] + grown[1];
    this.canvas.height = this.image.height + grown[2] + grown[3];
    const wide = this.canvas.width >= this.canvas.height;
    this.canvas.style.width = wide ? "22rem" : "auto";
    this.canvas.style.height = wide ? "auto" : "22rem";
    this.canvas.style.aspectRatio = `${this.canvas.width} / ${this.canvas.height}`;
    const pen = this.canvas.getContext("2d");
    pen.drawImage(this.image, this.origin.x, this.origin.y);
    if (this.mode === "paint") {
      pen.globalAlpha = 0.6;
      pen.drawImage(this.mask, 0, 0);
      pen.globalAlpha = 1;
      if (this.cursor) {
        pen.lineWidth = Math.max(1, this.canvas.width / 200);
        for (const [colour, radius] of [["#000", this.radius], ["#fff", this.radius - pen.lineWidth]]) {
          pen.strokeStyle = colour;
          pen.beginPath();
          pen.arc(this.cursor.x, this.cursor.y, Math.max(1, radius), 0, 7);
          pen.stroke();
        }
      }
    }
    if (extend) this.showFrame(pen);
  }

  get frame() {
    const { left, right, top, bottom } = this.margins;
    return {
      x: this.origin.x - left, y: this.origin.y - top,
      w: this.image.width + left + right, h: this.image.height + top + bottom,
    };
  }

  showFrame(pen) {
    const { x, y, w, h } = this.frame;
    const line = Math.max(2, this.canvas.width / 120);
    pen.lineWidth = line;
    pen.strokeStyle = "#2450c4";
    pen.strokeRect(x + line / 2, y + line / 2, w - line, h - line);
    pen.fillStyle = "#2450c4";
    const size = 3 * line;
    for (const [cx, cy] of [[x, y + h / 2], [x + w, y + h / 2], [x + w / 2, y], [x + w / 2, y + h]]) {
      pen.fillRect(cx - size, cy - size, 2 * size, 2 * size);
    }
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: (event.clientX - box.left) / box.width * this.canvas.width,
      y: (event.clientY - box.top) / box.height * this.canvas.height,
    };
  }

  press(event) {
    if (!this.image || event.button) return;
    const point = this.at(event);
    if (this.mode === "paint") {
      this.keep();
      this.held = point;
      this.paint(point, point);
    } else if (this.mode === "extend") {
      const { x, y, w, h } = this.frame;
      const far = { left: Math.abs(point.x - x), right: Math.abs(point.x - x - w), top: Math.abs(point.y - y), bottom: Math.abs(point.y - y - h) };
      this.held = SIDES.reduce((a, b) => (far[a] <= far[b] ? a : b));
    }
    if (this.held) {
      this.canvas.setPointerCapture(event.pointerId);
      event.preventDefault();
      this.canvas.focus();
    }
  }

  move(event) {
    if (!this.image) return;
    const point = this.at(event);
    if (this.mode === "paint") {
      this.cursor = point;
      if (this.held) {
        this.paint(this.held, point);
        this.held = point;
      }
      this.show();
    } else if (this.mode === "extend" && this.held) {
      const { x, y } = this.origin;
      const value = { left: x - point.x, right: point.x - x - this.image.width, top: y - point.y, bottom: point.y - y - this.image.height }[this.held];
      this.setMargins({ [this.held]: Math.min(MOST, Math.max(0, 8 * Math.round(value / 8))) });
      this.onmargins(this.margins);
    }
  }

  type(event) {
    if (!this.image || this.mode !== "paint" || !this.cursor) return;
    const step = Math.max(1, this.radius / 2);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key in moves) {
      const [x, y] = moves[event.key];
      this.cursor = {
        x: Math.min(this.image.width, Math.max(0, this.cursor.x + x)),
        y: Math.min(this.image.height, Math.max(0, this.cursor.y + y)),
      };
    } else if (event.key === " " || event.key === "Backspace") {
      this.keep();
      this.paint(this.cursor, this.cursor, event.key === "Backspace");
    } else {
      return;
    }
    event.preventDefault();
    this.show();
  }

  paint(from, to, erase = false) {
    const pen = this.mask.getContext("2d");
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = "#e0218a";
    pen.lineCap = "round";
    pen.lineWidth = 2 * this.radius;
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(to.x + 0.01, to.y);
    pen.stroke();
    this.show();
  }

  keep() {
    const copy = new OffscreenCanvas(this.mask.width, this.mask.height);
    copy.getContext("2d").drawImage(this.mask, 0, 0);
    this.undone = [...this.undone.slice(-19), copy];
  }

  undo() {
    if (!this.undone.length) return;
    this.mask = this.undone.pop();
    this.show();
  }

  clear() {
    this.keep();
    this.mask = new OffscreenCanvas(this.image.width, this.image.height);
    this.show();
  }

  get painted() {
    const { data } = this.mask.getContext("2d").getImageData(0, 0, this.mask.width, this.mask.height);
    for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return true;
    return false;
  }

  // The files of a request, by the names of their fields.
  async files() {
    if (this.mode === "extend") {
      const { left, right, top, bottom } = this.margins;
      if (left + right + top + bottom === 0) throw new Error("Drag a side of the frame outwards, or type how many pixels to add.");
      const canvas = new OffscreenCanvas(this.image.width + left + right, this.image.height + top + bottom);
      canvas.getContext("2d").drawImage(this.image, left, top);
      return { image: await canvas.convertToBlob() };
    }
    if (this.mode !== "paint") return { image: await this.image.convertToBlob() };
    if (!this.painted) throw new Error("Paint over the part of the image that is to be made again.");
    const mask = new OffscreenCanvas(this.image.width, this.image.height);
    const pen = mask.getContext("2d");
    pen.fillRect(0, 0, mask.width, mask.height);
    pen.globalCompositeOperation = "destination-out";
    pen.drawImage(this.mask, 0, 0);
    return { image: await this.image.convertToBlob(), mask: await mask.convertToBlob() };
  }
}
