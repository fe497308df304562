// Draws the image with its map, the edited region, and the cursor. It knows patches, but neither edits nor servers.

// Viridis (Smith and van der Walt, CC0) at nine equal steps.
const COLOURS = [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128], [94, 201, 98],
  [173, 220, 48], [253, 231, 37]];

const FAINTEST = 0.15;                  // of the opacity, at the value 0: the picture stays visible where the map is low
const SMOOTH = 24;                      // pixels of a side from which an enlarged picture is smoothed; digits stay squares

const within = (ratio) => Math.min(Math.max(ratio, 0), 1);

export function colour(ratio) {
  const place = within(ratio) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(place), COLOURS.length - 2);
  const mixed = COLOURS[low].map((part, i) => Math.round(part + (COLOURS[low + 1][i] - part) * (place - low)));
  return `rgb(${mixed.join(" ")})`;
}

const alphaOf = (ratio, opacity) => opacity * (FAINTEST + (1 - FAINTEST) * within(ratio));

// The scale has the map's opacity, over black and white.
export function drawScale(canvas, opacity) {
  const pen = canvas.getContext("2d");
  const [width, height] = [canvas.width, canvas.height];
  pen.globalAlpha = 1;
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height / 2);
  pen.fillStyle = "#000";
  pen.fillRect(0, height / 2, width, height / 2);
  for (let x = 0; x < width; x++) {
    const ratio = x / (width - 1);
    pen.globalAlpha = alphaOf(ratio, opacity);
    pen.fillStyle = colour(ratio);
    pen.fillRect(x, 0, 1, height);
  }
}

export class Board {
  constructor(canvas, rows, columns) {
    Object.assign(this, {canvas, rows, columns, cell: 1});
    this.pen = canvas.getContext("2d");
  }

  // As large as fits, with whole pixels for each patch.
  fit(width, height) {
    this.cell = Math.max(Math.floor(Math.min(width / this.columns, height / this.rows)), 3);
    const sharp = window.devicePixelRatio || 1;
    const [across, down] = [this.cell * this.columns, this.cell * this.rows];
    this.canvas.style.width = `${across}px`;
    this.canvas.style.height = `${down}px`;
    this.canvas.width = Math.round(across * sharp);
    this.canvas.height = Math.round(down * sharp);
    this.pen.setTransform(this.canvas.width / across, 0, 0, this.canvas.height / down, 0, 0);
  }

  // The pointer's position in patches from the top left corner: [row, column], not rounded.
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientY - box.top) / box.height * this.rows, (event.clientX - box.left) / box.width * this.columns];
  }

  // The patches under a brush: size x size around a position.
  under([row, column], size) {
    const [top, left] = [Math.floor(row - (size - 1) / 2), Math.floor(column - (size - 1) / 2)];
    const found = [];
    for (let y = Math.max(top, 0); y < Math.min(top + size, this.rows); y++) {
      for (let x = Math.max(left, 0); x < Math.min(left + size, this.columns); x++) found.push(y * this.columns + x);
    }
    return found;
  }

  // image: or null; map: values by patch or null, and the value at the end of its scale; values: the edit by patch, null where there
  // is none; brush: the patches to outline.
  draw({image, map, end, opacity, values, brush}) {
    const {pen, cell, rows, columns} = this;
    const [width, height] = [cell * columns, cell * rows];
    pen.clearRect(0, 0, width, height);
    pen.imageSmoothingEnabled = Boolean(image) && Math.max(image.naturalWidth, image.naturalHeight) >= SMOOTH;
    pen.imageSmoothingQuality = "high";
    if (image) pen.drawImage(image, 0, 0, width, height);
    if (map) {
      map.forEach((value, patch) => {
        const ratio = end > 0 ? value / end : 0;
        pen.globalAlpha = alphaOf(ratio, opacity);
        pen.fillStyle = colour(ratio);
        pen.fillRect(patch % columns * cell, Math.floor(patch / columns) * cell, cell, cell);
      });
      pen.globalAlpha = 1;
    }
    this.lines();
    if (values) {
      this.outline(new Set(values.flatMap((value, patch) => value === null ? [] : [patch])), "#000", "#fff", []);
      if (cell >= 34) this.numbers(values);
    }
    if (brush) this.outline(new Set(brush), "#000", "#ffd33d", [6, 4]);
  }

  lines() {
    const {pen, cell, rows, columns} = this;
    pen.beginPath();
    for (let x = 1; x < columns; x++) { pen.moveTo(x * cell, 0); pen.lineTo(x * cell, cell * rows); }
    for (let y = 1; y < rows; y++) { pen.moveTo(0, y * cell); pen.lineTo(cell * columns, y * cell); }
    pen.strokeStyle = "rgb(128 128 128 / 55%)";
    pen.lineWidth = 1;
    pen.stroke();
  }

  // The border of a set of patches.
  outline(patches, under, over, dashes) {
    const {pen, cell, rows, columns} = this;
    const inside = (y, x) => y >= 0 && x >= 0 && y < rows && x < columns && patches.has(y * columns + x);
    pen.beginPath();
    for (const patch of patches) {
      const [y, x] = [Math.floor(patch / columns), patch % columns];
      const [top, left, bottom, right] = [y * cell, x * cell, (y + 1) * cell, (x + 1) * cell];
      // At the border of the picture the line is drawn inside it.
      const [low, high] = [(at) => Math.max(at, 1.5), (at, most) => Math.min(at, most - 1.5)];
      const [t, l, b, r] = [low(top), low(left), high(bottom, cell * rows), high(right, cell * columns)];
      if (!inside(y - 1, x)) { pen.moveTo(l, t); pen.lineTo(r, t); }
      if (!inside(y + 1, x)) { pen.moveTo(l, b); pen.lineTo(r, b); }
      if (!inside(y, x - 1)) { pen.moveTo(l, t); pen.lineTo(l, b); }
      if (!inside(y, x + 1)) { pen.moveTo(r, t); pen.lineTo(r, b); }
    }
    pen.lineCap = "square";
    pen.strokeStyle = under;
    pen.lineWidth = 4;
    pen.stroke();
    pen.setLineDash(dashes);
    pen.strokeStyle = over;
    pen.lineWidth = 2;
    pen.stroke();
    pen.setLineDash([]);
  }

  numbers(values) {
    const {pen, cell, columns} = this;
    pen.font = `600 ${Math.min(Math.round(cell / 3.2), 16)}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.lineWidth = 3;
    pen.lineJoin = "round";
    pen.strokeStyle = "#000";
    pen.fillStyle = "#fff";
    values.forEach((value, patch) => {
      if (value === null) return;
      const [x, y] = [(patch % columns + 0.5) * cell, (Math.floor(patch / columns) + 0.5) * cell];
      pen.strokeText(`${value}`, x, y);
      pen.fillText(`${value}`, x, y);
    });
  }
}
