// Brings edits to the server, one request at a time, the latest state of an image next; nothing is lost on the way.
//
// What the server has not confirmed is in localStorage too, so that a reload, or a browser that was closed, brings it back.
// A record is one image: {index, name, checksum, revision, values, dirty, sent, confirmed, lost, seen, undo, redo, error, view}.
// `checksum` is that of the picture that the person has seen. `values` (one a patch, null where the model's own holds) are never
// changed in place. `sent` are the states that were sent and not confirmed: if the server turns out to hold one of them, its
// answer was lost on the way, and nobody else has changed anything. `lost` are states that gave way to an edit made elsewhere:
// they stay until the person has chosen; `seen`: the person has been at the image since.

const DELAYS = [300, 700, 1500, 3000];
const PATIENCE = 60000;
const SEVERAL = 20;

export const same = (a, b) => a.length === b.length && a.every((value, i) => value === b[i]);
export const flat = (rows, count) => rows ? rows.flat() : new Array(count).fill(null);

export async function ask(address, options = {}) {
  const answer = await fetch(address, {signal: AbortSignal.timeout(PATIENCE), ...options});
  let body;
  try {
    body = await answer.json();
  } catch (error) {
    if (answer.ok) throw error;
    body = {error: `${answer.status} ${answer.statusText}`};
  }
  return {status: answer.status, body};
}

export class Saver {
  // changed(): the state of saving is another; answered(record, body): the model's word; conflict(record): others' edit is shown
  constructor({identity, rows, columns, first, changed, answered, conflict}) {
    Object.assign(this, {rows, columns, first, changed, answered, conflict});
    this.prefix = `attention-edit:${identity}:`;
    this.records = new Map();
    this.flying = null;
    this.away = "";
    this.failures = 0;
    this.keeps = true;
  }

  record(index, name) {
    if (!this.records.has(index)) {
      const values = new Array(this.rows * this.columns).fill(null);
      this.records.set(index, {index, name, checksum: "", revision: "", values, dirty: false, sent: [], confirmed: 0, lost: [],
        seen: false, undo: [], redo: [], error: "", view: null});
    }
    return this.records.get(index);
  }

  unsaved() {
    return [...this.records.values()].filter((record) => record.dirty);
  }

  // With states that lost against an edit made elsewhere.
  conflicts() {
    return [...this.records.values()].filter((record) => record.lost.length);
  }

  see(record) {
    if (record.seen || !record.lost.length) return;
    record.seen = true;
    this.keep(record);
  }

  // Of the states that lost these, or all: the person has chosen.
  giveUp(record, values = null) {
    record.lost = values ? record.lost.filter((one) => !same(one, values)) : [];
    this.keep(record);
  }

  change(record, values) {
    record.values = values;
    record.lost = record.lost.filter((one) => !same(one, values));
    record.dirty = true;
    record.error = "";
    this.keep(record);
    this.send();
  }

  async send() {
    if (this.flying) { this.changed(); return; }
    const waiting = this.unsaved().filter((record) => !record.error);
    const record = waiting.find((one) => one === this.first()) || waiting[0];
    if (!record) { this.changed(); return; }
    const values = record.values;
    this.flying = record;
    record.sent = [...record.sent.filter((one) => !same(one, values)), values].slice(-SEVERAL);
    this.keep(record);
    this.changed();
    const rows = Array.from({length: this.rows}, (_, y) => values.slice(y * this.columns, (y + 1) * this.columns));
    let answer;
    try {
      answer = await ask(`api/images/${record.index}/edit`, {method: "PUT", headers: {"Content-Type": "application/json"},
        body: JSON.stringify({image: record.name, checksum: record.checksum, revision: record.revision, values: rows})});
    } catch (error) {
      answer = {status: 0, body: {error: "the server is away"}};
    }
    this.flying = null;
    this.take(record, values, answer);
  }

  take(record, values, {status, body}) {
    if (status === 0 || status >= 500) {
      this.away = body.error;
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.send(), DELAYS[Math.min(this.failures++, DELAYS.length - 1)]);
      this.changed();
      return;
    }
    this.away = "";
    this.failures = 0;
    if (status === 200) {
      this.confirm(record, body.revision, values);
      this.answered(record, body);
    } else if (status === 409) {
      const theirs = flat(body.values, values.length);
      if (record.sent.some((one) => same(one, theirs))) {
        this.confirm(record, body.revision, theirs);
      } else {
        if (!same(record.values, theirs)) {
          record.undo.push(record.values);
          record.lost = [...record.lost.filter((one) => !same(one, record.values)), record.values].slice(-SEVERAL);
          record.seen = false;
        }
        record.values = theirs;
        this.confirm(record, body.revision, theirs);
        this.conflict(record);
      }
      this.answered(record, body);
    } else {
      record.error = body.error;
    }
    this.send();
  }

  // The server holds `values`.
  confirm(record, revision, values) {
    record.revision = revision;
    record.sent = [];
    record.confirmed += 1;
    record.dirty = !same(record.values, values);
    this.keep(record);
  }

  // The server has answered something else: no need to wait.
  reached() {
    if (!this.away) return;
    this.away = "";
    this.failures = 0;
    clearTimeout(this.timer);
    this.send();
  }

  // ------------------------------------------------------------------------------------------- what is kept in the browser

  // A name that a reload keeps distinguishes a tab; a lock shows that it is alive.
  async begin() {
    const storage = guarded(() => window.sessionStorage);
    let tab = storage && guarded(() => storage.getItem("tab"));
    for (;;) {
      tab = tab || Math.random().toString(36).slice(2);
      if (!navigator.locks || await hold(this.prefix + tab)) break;
      tab = "";                                       // a tab that was made by duplicating another
    }
    if (storage) guarded(() => storage.setItem("tab", tab));
    this.tab = tab;
    await this.restore();
  }

  keep(record) {
    const {index, name, checksum, revision, values, dirty, sent, lost, seen} = record;
    const key = `${this.prefix}${this.tab}:${name}`;
    try {
      const kept = {index, name, checksum, revision, values, dirty, sent, lost, seen};
      if (dirty || lost.length) localStorage.setItem(key, JSON.stringify(kept));
      else localStorage.removeItem(key);
      this.keeps = true;
    } catch {
      this.keeps = false;                             // full or forbidden: the page asks before it is left
    }
  }

  // Takes over what this tab, or one that is gone, has not brought to the server.
  async restore() {
    const alive = navigator.locks ? (await navigator.locks.query()).held.map((lock) => lock.name) : [];
    const keys = guarded(() => Object.keys(localStorage)) || [];
    const ownerOf = (key) => key.slice(this.prefix.length).split(":", 1)[0];
    const ours = keys.filter((one) => one.startsWith(this.prefix));
    ours.sort((a, b) => (ownerOf(b) === this.tab) - (ownerOf(a) === this.tab));       // its own first: `keep` writes over them
    for (const key of ours) {
      const owner = ownerOf(key);
      if (owner !== this.tab && alive.includes(this.prefix + owner)) continue;
      const kept = guarded(() => JSON.parse(localStorage.getItem(key)));
      if (!kept || !Array.isArray(kept.values) || kept.values.length !== this.rows * this.columns) continue;
      const record = this.record(kept.index, kept.name);
      const [dirty, lost] = [kept.dirty !== false, kept.lost || []];
      if ((record.dirty && dirty) || record.name !== kept.name) {
        if (owner !== this.tab && record.name === kept.name) record.undo.push(kept.values);
        continue;
      }
      const {checksum, revision, values, sent} = kept;
      if (dirty) Object.assign(record, {checksum, revision, values, sent, dirty});
      const unseen = (record.lost.length && !record.seen) || (lost.length && !kept.seen);
      Object.assign(record, {lost: [...record.lost, ...lost], seen: !unseen});
      record.undo.push(...lost);
      this.keep(record);
      if (owner !== this.tab && this.keeps) guarded(() => localStorage.removeItem(key));
    }
    this.send();
  }
}

function guarded(action) {
  try { return action(); } catch { return null; }
}

function hold(name) {
  return new Promise((resolve) => {
    navigator.locks.request(name, {ifAvailable: true}, (lock) => {
      resolve(Boolean(lock));
      return lock ? new Promise(() => {}) : null;     // until the tab is closed
    });
  });
}
