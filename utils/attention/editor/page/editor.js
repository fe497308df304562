// The page: what it shows, and what a person does with it. saving.js saves, drawing.js draws the canvas.

import {Board, drawScale} from "./drawing.js";
import {Saver, ask, flat, same} from "./saving.js";

const MAPS = ["sigmoid", "weights", "none"];
const TITLES = {sigmoid: "sigmoid value", weights: "softmax weight", none: "no map"};
const UNDO_STEPS = 300;
const at = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const choose = (name, value) => { document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true; };
const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const whole = (number) => number.toLocaleString("en");
const percent = (ratio) => `${(100 * ratio).toFixed(1)}%`;
const small = (number) => number === 0 || number === 1 ? `${number}` : number.toPrecision(3);

let facts, board, saver, shown = null, image = null, showing = 0, stroke = null, hover = null, cursor = null, waiting = "";

// ------------------------------------------------------------------------------------------------------------ beginning

async function begin() {
  facts = (await askUntilAnswered("api/state", "the page")).body;
  const [rows, columns] = facts.grid;
  at("title").textContent = facts.title;
  document.title = `${facts.title}: attention editor`;
  at("facts").replaceChildren(...facts.facts.map((text) => element("li", text)));
  at("jump").max = facts.counts.images;
  at("total").textContent = `of ${whole(facts.counts.images)}`;
  at("board").setAttribute("aria-label", `attention over the image, ${rows} rows of ${columns} patches`);
  at("filter").querySelector("[value=misclassified]").disabled = !facts.counts.labelled;
  board = new Board(at("board"), rows, columns);
  saver = new Saver({identity: facts.identity, rows, columns, first: () => shown, changed: showSaved, answered: takeAnswer,
    conflict: takeConflict});
  await saver.begin();
  listen();
  showCounts(facts.counts);
  await follow();
  poll();
}

// Asks again until the server answers. Returns null if another image is wanted meanwhile.
async function askUntilAnswered(address, what, wanted = () => true) {
  for (let delay = 300; wanted(); delay = Math.min(2 * delay, 3000)) {
    try {
      const answer = await ask(address);
      if (answer.status === 200) {
        if (saver) saver.reached();
        return answer;
      }
      showMessage(`Cannot load ${what}: ${answer.body.error}`);
      if (answer.status < 500) return null;
    } catch {
      showMessage(`Cannot load ${what}: the server does not answer. Trying again.`);
    }
    await wait(delay);
  }
  return null;
}

async function poll() {
  for (;;) {
    await wait(facts.counts.looked_at < facts.counts.images ? 1000 : 4000);
    if (document.hidden) continue;
    let answer;
    try { answer = await ask("api/state"); } catch { answer = null; }
    if (!answer || answer.status !== 200) {
      saver.away = saver.away || "the server does not answer";
      showSaved();
      continue;
    }
    saver.reached();
    const now = answer.body;
    if (["identity", "grid", "facts"].some((key) => JSON.stringify(now[key]) !== JSON.stringify(facts[key]))) {
      showMessage("The server now shows another model or other images. Reload the page.");
    }
    showCounts(now.counts);
    showSaved();
  }
}

// --------------------------------------------------------------------------------------------------- going to an image

// The address holds the image and filter: #18 or #18/edited.
async function follow() {
  const [number, kind = "all"] = location.hash.slice(1).split("/");
  at("filter").value = kind;
  if (at("filter").selectedIndex < 0 || at("filter").selectedOptions[0].disabled) at("filter").value = "all";
  const index = /^[0-9]+$/.test(number) ? Number(number) - 1 : 0;
  await show(Math.min(Math.max(index, 0), facts.counts.images - 1));
}

function address(index) {
  const kind = at("filter").value;
  return `#${index + 1}${kind === "all" ? "" : `/${kind}`}`;
}

async function show(index) {
  const turn = ++showing;
  const wanted = () => turn === showing;
  endStroke();
  history.replaceState(null, "", address(index));
  at("jump").value = index + 1;
  const before = saver.records.get(index);
  const untouched = before ? [before.confirmed, before.dirty] : [0, false];
  const what = `image ${index + 1}`;
  const answer = await askUntilAnswered(`api/images/${index}`, what, wanted);
  if (!answer || !wanted()) return;
  const body = answer.body;
  const picture = body.unreadable ? null : await load(`api/images/${index}/pixels.png?${turn}`, what, wanted);
  if (!wanted()) return;
  const record = saver.record(index, body.name);
  if (record.name !== body.name) {
    showMessage(`Image ${index + 1} is now ${body.name}; it was ${record.name}. The server shows other images. Reload the page.`);
    return;
  }
  // A change that is on its way to the server, or has arrived there meanwhile, is newer than this answer.
  if (!record.dirty && record.confirmed === untouched[0] && !untouched[1]) {
    const theirs = flat(body.values, record.values.length);
    if (record.view && !same(record.values, theirs)) record.undo.push(record.values);
    Object.assign(record, {values: theirs, revision: body.revision, view: body});
  }
  record.view = record.view || body;
  record.checksum = body.checksum;
  [shown, image, hover] = [record, picture, null];
  cursor = cursor || [0, 0];
  saver.see(record);
  showConflicts();
  showMessage([body.unreadable && `This image cannot be shown: ${body.unreadable}`,
    body.problem && `Its edit on the disk cannot be used: ${body.problem}. A new edit replaces it; the file is kept as `
      + "….damaged.", body.note && `Note: ${body.note}.`].filter(Boolean).join(" "));
  at("name").textContent = body.name;
  fit();
  showView();
  showCounts(body.counts);
  await showPlace();
}

// Returns the picture, or null if another image is wanted meanwhile.
async function load(source, what, wanted) {
  for (let attempt = 0; wanted(); attempt++) {
    const picture = new Image();
    picture.src = `${source}.${attempt}`;                   // never the same address twice: the file may have changed
    try {
      await picture.decode();
      return picture;
    } catch {
      showMessage(`Cannot load ${what}. Trying again.`);
    }
    await wait(1000);
  }
  return null;
}

async function find(step) {
  const kind = at("filter").value;
  const start = Number(at("jump").value) - 1;
  const answer = await askUntilAnswered(`api/find?filter=${kind}&start=${start}&step=${step}`, "the next image");
  return answer ? answer.body : {index: null};
}

async function go(step) {
  const found = await find(step);
  const kind = at("filter").selectedOptions[0].text;
  if (found.index !== null) await show(found.index);
  else showMessage(`No ${step > 0 ? "later" : "earlier"} image${kind === "all" ? "" : ` is ${kind}`}.`);
}

async function showPlace() {
  const kind = at("filter").value;
  if (kind === "all") { at("place").textContent = ""; return; }
  const found = await find(0);
  if (kind !== at("filter").value || !shown) return;
  const total = whole(found.total || 0);
  at("place").textContent = found.index === shown.index ? `${whole(found.position + 1)} of ${total}`
    : found.total ? `this image is not among the ${total}` : "0";
}

async function filterChanged() {
  const found = await find(0);
  if (found.index !== null) { await show(found.index); return; }
  const {looked_at: looked, images} = facts.counts;
  const yet = at("filter").value === "misclassified" && looked < images ? ` so far: ${whole(looked)} of ${whole(images)} were predicted` : "";
  showMessage(`No image is ${at("filter").selectedOptions[0].text}${yet}.`);
  if (shown) history.replaceState(null, "", address(shown.index));
  await showPlace();
}

// -------------------------------------------------------------------------------------------------------------- showing

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function showMessage(text) {
  if (at("message").textContent !== text) at("message").textContent = text;
  at("message").hidden = !text;
  if (shown) fit();
}

function showSaved() {
  const unsaved = saver.unsaved();
  const refused = unsaved.find((record) => record.error);
  const many = unsaved.length > 1 ? ` (${unsaved.length} images)` : "";
  let [state, text] = ["saved", "saved"];
  if (refused) [state, text] = ["failed", `not saved: image ${refused.index + 1}: ${refused.error}`];
  else if (saver.away) [state, text] = ["failed", `${unsaved.length ? "not saved" : "no connection"}${many}: ${saver.away}; trying again`];
  else if (unsaved.length) [state, text] = ["saving", `saving${many}`];
  at("saved").dataset.state = state;
  if (at("saved").textContent !== text) at("saved").textContent = text;
  showConflicts();
  if (shown && shown.view && waiting !== lateness()) showView();
}

// Whether the model's answer to what is shown is missing: "late", or "stuck" while the server cannot be reached.
function lateness() {
  if (!shown.dirty) return "";
  return saver.away || shown.error ? "stuck" : "late";
}

// Edits that gave way to an edit made elsewhere are announced at every image, until their own image has been opened.
function showConflicts() {
  const notices = saver.conflicts().filter((record) => record === shown || !record.seen);
  const state = notices.map((record) => `${record.index}${record === shown ? " here" : ""}`).join();
  if (at("conflicts").dataset.state === state) return;
  at("conflicts").dataset.state = state;
  at("conflicts").replaceChildren(...notices.map((record) => {
    const [here, number] = [record === shown, record.index + 1];
    const notice = element("p", `Image ${number} was edited elsewhere, perhaps in another tab. `
      + (here ? "That edit is shown; yours is kept. " : "That edit is saved; yours is kept. "));
    const buttons = here ? [["Take mine", takeMine], ["Keep that edit", (one) => { saver.giveUp(one); showConflicts(); }]]
      : [[`Open image ${number}`, (one) => show(one.index)], ["Dismiss", (one) => { saver.see(one); showConflicts(); }]];
    for (const [text, action] of buttons) {
      const button = element("button", text, {type: "button"});
      button.addEventListener("click", () => action(record));
      notice.append(button, " ");
    }
    return notice;
  }));
  at("conflicts").hidden = !notices.length;
  if (shown) fit();
}

function showCounts(counts) {
  facts.counts = counts;
  const {images, edited, looked_at: looked, misclassified, unreadable, labelled} = counts;
  const parts = [`${whole(edited)} edited`];
  if (labelled) parts.push(`${whole(misclassified)} misclassified${looked < images ? ` (${whole(looked)} predicted so far)` : ""}`);
  if (unreadable) parts.push(`${whole(unreadable)} unreadable`);
  at("counts").textContent = parts.join(", ");
  at("bar").value = looked / images;
  at("bar").hidden = !labelled || looked >= images;
}

// Takes the model's answer to an edit; if the image is not shown any more, the answer is kept for later.
function takeAnswer(record, body) {
  showCounts(body.counts);
  if (record.view) Object.assign(record.view, {problem: ""}, body);
  if (record === shown) {
    showView();
    if (!body.unreadable && at("message").textContent.startsWith("Its edit on the disk")) showMessage("");
  }
  showPlace();
}

function takeConflict(record) {
  if (stroke && stroke.record === record) stroke = null;          // its picture has been replaced
  showConflicts();
}

function takeMine() {
  if (!image) return;
  endStroke();
  const mine = shown.lost[shown.lost.length - 1];
  step(mine);
  saver.giveUp(shown, mine);
  showConflicts();
}

function mapOf(kind, which = "now") {
  const view = shown && shown.view;
  if (!view || !view[which] || kind === "none") return null;
  const map = view[which][kind].flat();
  return kind === "sigmoid" && which === "now" ? map.map((value, patch) => shown.values[patch] ?? value) : map;
}

function showView() {
  const {label, predicted, right, top = [], now = null} = shown.view;
  waiting = lateness();
  const [stuck, late] = [waiting === "stuck", waiting ? {class: "late"} : {}];
  at("label").textContent = label ?? "none";
  const line = (which) => {
    if (!now) return [""];
    const [, before, after] = top.find(([name]) => name === predicted[which]);
    const verdict = right[which] === null ? [] : [" ", element("span", right[which] ? "✓ right" : "✗ wrong",
      {class: right[which] ? "right" : "wrong"})];
    return [`${predicted[which]} (${percent(which ? after : before)})`, ...verdict];
  };
  at("before").replaceChildren(...line(0));
  at("now").replaceChildren(...(shown.values.every((value) => value === null) ? ["no edit yet"] : stuck ? ["…"] : line(1)));
  at("now").className = late.class || "";
  at("top").tBodies[0].replaceChildren(...top.map(([name, before, after]) => {
    const row = element("tr", "", name === label ? {class: "true"} : {});
    const bars = element("td", "", {class: "bars"});
    bars.append(bar(before, stuck ? 0 : after));
    row.append(element("td", name === label ? `${name} (true)` : name), bars, element("td", percent(before)),
      element("td", stuck ? "…" : percent(after), late));
    return row;
  }));
  at("top").hidden = !now;
  redraw();
}

function bar(before, after) {
  const made = (name, attributes) => {
    const part = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
    return part;
  };
  const drawing = made("svg", {viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true"});
  drawing.append(made("rect", {class: "track", width: 100, height: 12}),
    made("rect", {class: "after", width: 100 * after, height: 12}), made("rect", {class: "earlier", y: 9, width: 100 * before, height: 3}));
  return drawing;
}

function fit() {
  const stacked = window.matchMedia("(max-width: 820px)").matches;
  const top = at("picture").getBoundingClientRect().top + window.scrollY;
  const below = stacked ? 0.35 * window.innerHeight : top + 90;
  board.fit(at("picture").clientWidth, Math.max(window.innerHeight - below, 240));
  redraw();
}

function redraw() {
  if (!shown) return;
  const kind = chosen("map");
  const map = mapOf(kind);
  const end = kind === "weights" && map ? Math.max(...map) : 1;
  const under = hover || (document.activeElement === at("board") ? cursor.map((part) => part + 0.5) : null);
  board.draw({image, map, end, opacity: Number(at("opacity").value), values: shown.values,
    brush: under && board.under(under, Number(chosen("size")))});
  at("board").classList.toggle("idle", !image);
  drawScale(at("scale"), Number(at("opacity").value));
  at("legend-title").textContent = TITLES[kind] + (kind === "weights" && waiting === "stuck" ? " of the last saved edit" : "");
  document.querySelector(".scale").hidden = !map;
  at("scale-low").textContent = "0";
  at("scale-high").textContent = map ? small(end) : "";
  at("readout").textContent = !image ? "There is no picture to paint on." : under ? describe(under)
    : "Point at a patch to read its values; drag to paint.";
  at("undo").disabled = !shown.undo.length;
  at("redo").disabled = !shown.redo.length;
  for (const id of ["clear", "reset"]) at(id).disabled = !image;
  at("reset").disabled ||= shown.values.every((value) => value === null);
}

function describe([y, x]) {
  const [row, column] = [Math.floor(y), Math.floor(x)];
  const patch = row * board.columns + column;
  if (!shown.view.now || row < 0 || column < 0 || row >= board.rows || column >= board.columns) return "";
  const value = (kind, which) => mapOf(kind, which)[patch];
  const edit = shown.values[patch];
  const changed = shown.values.some((one) => one !== null);
  return `row ${row + 1}, column ${column + 1}: sigmoid value ${value("sigmoid", "own").toFixed(3)}`
    + `${edit === null ? "" : ` → ${edit} (edited)`}, softmax weight ${small(value("weights", "own"))}`
    + `${changed ? ` → ${waiting === "stuck" ? "…" : small(value("weights", "now"))}` : ""}`;
}

// -------------------------------------------------------------------------------------------------------------- editing

function setValue(value) {
  at("value").value = Math.min(Math.max(value, 0), 1);
  at("value-shown").textContent = Number(at("value").value).toFixed(2);
}

// Makes one change, which undo takes back.
function step(values) {
  if (!shown || !image || same(values, shown.values)) return;
  remember(shown.values);
  apply(values);
}

function remember(values) {
  shown.undo.push(values);
  if (shown.undo.length > UNDO_STEPS) shown.undo.shift();
  shown.redo = [];
}

function apply(values) {
  saver.change(shown, values);
  showView();
}

function painted(values, patches, value) {
  const changed = [...values];
  for (const patch of patches) changed[patch] = value;
  return changed;
}

const brushValue = () => Math.round(100 * Number(at("value").value)) / 100;

function turnBack(from, to) {
  if (!shown || !shown[from].length) return;
  endStroke();
  shown[to].push(shown.values);
  apply(shown[from].pop());
}

function beginStroke(event) {
  if (!shown || !image || event.button > 0 || !event.isPrimary) return;
  event.preventDefault();
  at("board").focus({preventScroll: true});
  at("board").setPointerCapture(event.pointerId);
  // The other end of a pen erases.
  stroke = {record: shown, before: shown.values, value: chosen("tool") === "erase" || event.buttons & 32 ? null : brushValue(),
    last: board.place(event)};
  extendStroke(event);
}

// Paints every patch between the last position and this one, however fast the pointer moved.
function extendStroke(event) {
  const size = Number(chosen("size"));
  const patches = new Set();
  const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  for (const one of events.length ? events : [event]) {
    const here = board.place(one);
    const steps = Math.max(1, Math.ceil(2 * Math.hypot(here[0] - stroke.last[0], here[1] - stroke.last[1])));
    for (let i = 0; i <= steps; i++) {
      const between = stroke.last.map((part, axis) => part + (here[axis] - part) * i / steps);
      for (const patch of board.under(between, size)) patches.add(patch);
    }
    stroke.last = here;
  }
  cursor = [Math.floor(stroke.last[0]), Math.floor(stroke.last[1])].map((part, axis) => Math.min(Math.max(part, 0),
    facts.grid[axis] - 1));
  const values = painted(shown.values, patches, stroke.value);
  if (!same(values, shown.values)) apply(values);
}

function endStroke() {
  if (!stroke) return;
  const {record, before} = stroke;
  stroke = null;
  if (record === shown && !same(before, shown.values)) remember(before);
  redraw();
}

// ----------------------------------------------------------------------------------------------------------------- input

function listen() {
  const canvas = at("board");
  canvas.addEventListener("pointerdown", beginStroke);
  canvas.addEventListener("pointermove", (event) => {
    hover = board.place(event);
    if (stroke) extendStroke(event);
    else redraw();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => { if (event.pointerType === "touch") hover = null; endStroke(); });
  }
  canvas.addEventListener("pointerleave", () => { hover = null; redraw(); });
  for (const change of ["focus", "blur"]) canvas.addEventListener(change, redraw);
  canvas.addEventListener("keydown", canvasKey);
  document.addEventListener("keydown", pageKey);
  window.addEventListener("resize", () => { if (shown) fit(); });
  window.addEventListener("hashchange", follow);
  window.addEventListener("beforeunload", (event) => {
    if (!saver.keeps && [...saver.unsaved(), ...saver.conflicts()].length) event.preventDefault();
  });
  window.addEventListener("unhandledrejection", (event) => showMessage(`The page has failed: ${event.reason}. Reload it.`));
  document.addEventListener("visibilitychange", () => {            // another tab may have changed the edit
    if (!document.hidden && shown && !shown.dirty && !stroke) show(shown.index);
  });
  at("previous").addEventListener("click", () => go(-1));
  at("next").addEventListener("click", () => go(1));
  at("jump").addEventListener("change", () => {
    const number = Math.round(Number(at("jump").value));
    if (number >= 1 && number <= facts.counts.images) show(number - 1);
    else showMessage(`There is no image ${at("jump").value}: 1 to ${whole(facts.counts.images)}.`);
  });
  at("filter").addEventListener("change", filterChanged);
  at("value").addEventListener("input", () => { setValue(at("value").value); choose("tool", "paint"); });
  at("opacity").addEventListener("input", () => { at("opacity-shown").textContent = `${Math.round(100 * at("opacity").value)}%`; redraw(); });
  for (const input of document.querySelectorAll("input[type=radio]")) input.addEventListener("change", redraw);
  at("undo").addEventListener("click", () => turnBack("undo", "redo"));
  at("redo").addEventListener("click", () => turnBack("redo", "undo"));
  at("clear").addEventListener("click", () => step(shown.values.map(() => 0)));
  at("reset").addEventListener("click", () => step(shown.values.map(() => null)));
  at("help-open").addEventListener("click", () => at("help").showModal());
}

function canvasKey(event) {
  const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  if (event.ctrlKey || event.metaKey || event.altKey || !shown) return;
  const patches = () => board.under(cursor.map((part) => part + 0.5), Number(chosen("size")));
  if (event.key in moves) {
    cursor = cursor.map((part, axis) => Math.min(Math.max(part + moves[event.key][axis], 0), facts.grid[axis] - 1));
  } else if (event.key === " " || event.key === "Enter") {
    step(painted(shown.values, patches(), chosen("tool") === "erase" ? null : brushValue()));
  } else if (event.key === "Delete" || event.key === "Backspace") {
    step(painted(shown.values, patches(), null));
  } else return;
  event.preventDefault();
  hover = null;
  redraw();
  at("announcement").textContent = describe(cursor.map((part) => part + 0.5));
}

function pageKey(event) {
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const typing = event.target.closest("input[type=number], select, dialog");
  if (event.altKey || typing || !shown) return;
  const sliding = event.target.closest("input");
  if (control) {
    if (key === "z") event.shiftKey ? turnBack("redo", "undo") : turnBack("undo", "redo");
    else if (key === "y") turnBack("redo", "undo");
    else return;
  } else if (/^[0-9]$/.test(key)) { setValue(Number(key) / 10); choose("tool", "paint"); }
  else if (key === "+" || key === "=") setValue(brushValue() + 0.05);
  else if (key === "-") setValue(brushValue() - 0.05);
  else if (key === "n" || (key === "PageDown" && !sliding)) go(1);
  else if (key === "p" || (key === "PageUp" && !sliding)) go(-1);
  else if (key === "[" || key === "]") choose("size", Math.min(Math.max(Number(chosen("size")) + (key === "]" ? 1 : -1), 1), 3));
  else if (key === "b" || key === "e") choose("tool", key === "b" ? "paint" : "erase");
  else if (key === "m") choose("map", MAPS[(MAPS.indexOf(chosen("map")) + 1) % MAPS.length]);
  else if (key === "?") at("help").showModal();
  else return;
  event.preventDefault();
  redraw();
}

begin().catch((error) => {
  showMessage(`The page has failed: ${error.message}. Reload it; what was not saved is kept.`);
  throw error;
});
