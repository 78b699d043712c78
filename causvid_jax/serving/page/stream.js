// The socket and the player: asks for chunks just in time, plays them at a steady pace, comes back after a lost connection.

const FINAL_CODES = [1000, 1008, 4000, 4001];  // said on purpose: no coming back by itself
const RETRY_SECONDS = 60;

/** A binary message: big-endian length of a JSON header, the header, the parts whose `sizes` it gives. */
export function pack(header, parts) {
  const text = new TextEncoder().encode(JSON.stringify({...header, sizes: parts.map(part => part.size)}));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, text.length);
  return new Blob([length, text, ...parts]);
}

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let end = 4 + length;
  const parts = header.sizes.map(size => new Blob([new Uint8Array(buffer, (end += size) - size, size)], {type: 'image/jpeg'}));
  return {header, parts};
}

/** The server's side, as events: hello, ready, started, state, busy, error, image, chunk, lost, closed. */
export class Socket extends EventTarget {
  session = null;
  received = 0;
  #socket = null;
  #retryUntil = 0;
  #work = Promise.resolve();

  constructor(token) {
    super();
    this.query = token ? `?token=${encodeURIComponent(token)}` : '';
  }

  /** Resolves once connected; rejects if that fails. */
  open() {
    if (this.#socket?.readyState === WebSocket.OPEN) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const socket = this.#socket = new WebSocket(`${location.origin.replace(/^http/, 'ws')}/ws${this.query}`);
      socket.binaryType = 'arraybuffer';
      socket.onopen = () => {
        if (this.session) this.send({type: 'reconnect', session: this.session, chunk: this.received});
        resolve();
      };
      // In order: pictures are decoded before the next message counts.
      const later = work => { this.#work = this.#work.then(work).catch(console.error); };
      socket.onmessage = ({data}) => later(() => this.#receive(socket, data));
      socket.onclose = event => { later(() => this.#closed(socket, event)); reject(event); };
    });
  }

  send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN)
      this.#socket.send(message instanceof Blob ? message : JSON.stringify(message));
  }

  #emit(type, detail) { this.dispatchEvent(new CustomEvent(type, {detail})); }

  async #receive(socket, data) {
    if (socket !== this.#socket) return;
    if (typeof data === 'string') {
      const message = JSON.parse(data);
      if (message.type === 'started') {
        if (!message.resumed) this.received = 0;
        this.session = message.session;
        this.#retryUntil = 0;
      }
      if (message.type === 'state' && message.state === 'ended' || message.code === 'unknown_session') this.session = null;
      this.#emit(message.type, message);
    } else {
      const {header, parts} = unpack(data);
      const frames = await Promise.all(parts.map(part => createImageBitmap(part)));
      this.received = header.chunk;
      this.#emit('chunk', {...header, bitmaps: frames});
    }
  }

  #closed(socket, event) {
    if (socket !== this.#socket) return;
    this.#socket = null;
    const now = performance.now() / 1000;
    if (!this.session || FINAL_CODES.includes(event.code)) {
      this.session = null;
      this.#emit('closed', event);
      return;
    }
    this.#retryUntil ||= now + RETRY_SECONDS;
    if (now > this.#retryUntil) {
      this.session = null;
      this.#emit('closed', event);
    } else {
      this.#emit('lost', event);
      setTimeout(() => this.open().catch(() => {}), 700);
    }
  }
}

/** Shows frames at `fps` and acknowledges chunks so that the next one comes just before it is needed. */
export class Player {
  playing = false;
  shown = 0;
  stalls = 0;
  response = 0.1;  // seconds from asking for a chunk to having it
  #queue = [];
  #next = 0;
  #margin = 0.15;
  #asked = null;
  #acknowledged = 0;
  #received = 0;
  #chunkSeconds = 1;
  #times = [];

  constructor(canvas, {acknowledge, onframe}) {
    this.context = canvas.getContext('2d');
    Object.assign(this, {canvas, acknowledge, onframe, ahead: 2, fps: 8});
    requestAnimationFrame(now => this.#tick(now / 1000));
  }

  get buffered() { return this.#queue.length / this.fps; }

  /** Frames shown a second, over the last two. */
  rate(now) {
    this.#times = this.#times.filter(time => time > now - 2);
    return this.#times.length / 2;
  }

  reset() {
    this.#queue.splice(0).forEach(({bitmap}) => bitmap.close());
    this.playing = true;
    this.shown = this.#next = this.#acknowledged = this.#received = 0;
    this.#asked = performance.now() / 1000;
    this.#times = [];
  }

  push(chunk) {
    const now = performance.now() / 1000;
    if (this.#asked !== null) {
      const took = now - this.#asked;
      this.response = took > this.response ? took : 0.8 * this.response + 0.2 * took;
      this.#asked = null;
    }
    this.#received = chunk.chunk;
    this.#chunkSeconds = chunk.frames / this.fps;
    chunk.bitmaps.forEach((bitmap, i) => this.#queue.push({bitmap, number: chunk.frame + i, prompt: chunk.prompt}));
  }

  #tick(now) {
    requestAnimationFrame(later => this.#tick(later / 1000));
    if (!this.playing) { this.#next = 0; return; }
    if (now >= this.#next && this.#queue.length) {
      const late = now - this.#next > 2 / this.fps;
      this.#next = (late ? now : this.#next) + 1 / this.fps;
      this.#show(this.#queue.shift(), now);
      if (!this.#queue.length) { this.stalls++; this.#margin = Math.min(this.#margin + 0.05, 1); }
    }
    this.#ask(now);
  }

  #show(frame, now) {
    this.context.drawImage(frame.bitmap, 0, 0, this.canvas.width, this.canvas.height);
    frame.bitmap.close();
    this.shown = frame.number + 1;
    this.canvas.dataset.frame = frame.number;
    this.#times.push(now);
    this.onframe(frame, now);
  }

  #ask(now) {
    const lead = this.#margin + 1.5 * Math.min(this.response, 4);
    const want = Math.min(Math.ceil((lead - this.buffered) / this.#chunkSeconds), this.ahead);
    const number = Math.min(this.#received + want - this.ahead, this.#received);
    if (want > 0 && number > this.#acknowledged) {
      this.#acknowledged = number;
      this.#asked ??= now;
      this.acknowledge(number);
    }
  }
}
