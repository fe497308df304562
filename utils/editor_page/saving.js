// Brings edits to the server, one request at a time, the latest state of an image next; nothing is lost on the way.
//
// What the server has not confirmed lies in localStorage too, so that a reload, or a browser that was closed, brings it back.
// A record is one image: {index, name, revision, values, dirty, sent, confirmed, undo, redo, error, view}. Its `values` (one a
// patch, null where the model's own holds) are never changed in place. `sent` are the states that were sent and not confirmed:
// if the server turns out to hold one of them, its answer was lost on the way, and nobody else has changed anything.

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
      this.records.set(index, {index, name, revision: "", values: new Array(this.rows * this.columns).fill(null), dirty: false,
        sent: [], confirmed: 0, undo: [], redo: [], error: "", view: null});
    }
    return this.records.get(index);
  }

  unsaved() {
    return [...this.records.values()].filter((record) => record.dirty);
  }

  change(record, values) {
    record.values = values;
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
        body: JSON.stringify({image: record.name, revision: record.revision, values: rows})});
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
        record.undo.push(record.values);
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

  // Tabs tell each other apart by a name that a reload keeps; a lock says that a tab is alive.
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
    const {index, name, revision, values, sent} = record;
    const key = `${this.prefix}${this.tab}:${name}`;
    try {
      if (record.dirty) localStorage.setItem(key, JSON.stringify({index, name, revision, values, sent}));
      else localStorage.removeItem(key);
      this.keeps = true;
    } catch {
      this.keeps = false;                             // full or forbidden: the page asks before it is left
    }
  }

  // Takes over what this tab, or one that is gone, has not brought to the server.
  async restore() {
    const held = navigator.locks ? (await navigator.locks.query()).held.map((lock) => lock.name) : [];
    const keys = guarded(() => Object.keys(localStorage)) || [];
    for (const key of keys.filter((one) => one.startsWith(this.prefix))) {
      const owner = key.slice(this.prefix.length).split(":", 1)[0];
      if (owner !== this.tab && held.includes(this.prefix + owner)) continue;
      const kept = guarded(() => JSON.parse(localStorage.getItem(key)));
      if (!kept || !Array.isArray(kept.values) || kept.values.length !== this.rows * this.columns) continue;
      const record = this.record(kept.index, kept.name);
      if (record.dirty || record.name !== kept.name) {
        if (owner !== this.tab && record.name === kept.name) record.undo.push(kept.values);
        continue;
      }
      Object.assign(record, {revision: kept.revision, values: kept.values, sent: kept.sent, dirty: true});
      this.keep(record);
      if (owner !== this.tab) guarded(() => localStorage.removeItem(key));
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
