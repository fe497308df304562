// Sends edits to the server, one request at a time, always the latest state of an image, and loses none.
//
// localStorage has what the server has not confirmed, so that it survives a reload or a closed browser.
// A record is one image: {index, name, checksum, revision, values, dirty, sent, confirmed, lost, seen, undo, redo, error, view}.
// `checksum` is that of the picture that the person saw. `values` (one for each patch, null where the model's own value counts) are
// never changed in place. `sent` are the states that were sent and not confirmed: if the server has one of them, its answer was lost
// and nobody else has changed anything. `lost` are states that gave way to an edit made elsewhere: they are kept until the person
// has chosen; `seen`: the person has opened the image since.

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
  // changed(): the state of saving has changed; answered(record, body): the model's answer has arrived; conflict(record): an edit
  // made elsewhere has replaced this one
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

  // The records with states that gave way to an edit made elsewhere.
  conflicts() {
    return [...this.records.values()].filter((record) => record.lost.length);
  }

  see(record) {
    if (record.seen || !record.lost.length) return;
    record.seen = true;
    this.keep(record);
  }

  // Drops these `lost` states, or all of them: the person has chosen.
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
      answer = {status: 0, body: {error: "the server does not answer"}};
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

  // Notes that the server has saved `values`.
  confirm(record, revision, values) {
    record.revision = revision;
    record.sent = [];
    record.confirmed += 1;
    record.dirty = !same(record.values, values);
    this.keep(record);
  }

  // Sends at once: the server has answered another request.
  reached() {
    if (!this.away) return;
    this.away = "";
    this.failures = 0;
    clearTimeout(this.timer);
    this.send();
  }

  // ------------------------------------------------------------------------------------------- what is kept in the browser

  // Each tab has a name, which survives a reload, and a lock, which shows that the tab is open.
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
      this.keeps = false;                             // full or forbidden: the page asks before it closes
    }
  }

  // Takes over what this tab, or a closed one, has not sent to the server.
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
