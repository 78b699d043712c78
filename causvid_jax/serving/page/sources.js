// What a stream begins with, made small in the browser: an image, a video file, the camera.

import {pack} from './stream.js';

/** Draws a picture over the whole canvas, cut evenly where the shapes differ. */
export function cover(canvas, picture, width, height) {
  const scale = Math.max(canvas.width / width, canvas.height / height);
  const context = canvas.getContext('2d');
  context.imageSmoothingQuality = 'high';
  context.drawImage(picture, (canvas.width - width * scale) / 2, (canvas.height - height * scale) / 2,
                    width * scale, height * scale);
}

const blob = (canvas, type) => new Promise(resolve => canvas.toBlob(resolve, type, 0.95));

/** Sends an image, as the model sees it, from a canvas that holds it. */
export async function sendImage(socket, canvas) {
  socket.send(pack({type: 'image'}, [await blob(canvas, 'image/png')]));
}

/** Feeds the frames of a video element to a stream, never more than it has room for. */
export class Feed {
  #stopped = false;
  #sent = 0;
  #consumed = 0;
  #wake = () => {};

  constructor(socket, video, {width, height, fps}) {
    Object.assign(this, {socket, video, fps});
    this.canvas = Object.assign(document.createElement('canvas'), {width, height});
  }

  /** Frames that the stream has used so far. */
  consume(frames) {
    this.#consumed = Math.max(this.#consumed, frames);
    this.#wake();
  }

  stop() {
    this.#stopped = true;
    this.#wake();
    this.video.srcObject?.getTracks().forEach(track => track.stop());
    this.video.srcObject = null;
  }

  async file(file, room) {
    const video = this.video;
    video.src = URL.createObjectURL(file);
    try {
      await event(video, 'loadeddata');
      for (let i = 0; !this.#stopped && i / this.fps < video.duration; i++) {
        while (!this.#stopped && this.#sent - this.#consumed >= room) await new Promise(resolve => { this.#wake = resolve; });
        if (i) {
          video.currentTime = i / this.fps;
          await event(video, 'seeked');
        }
        await this.#send();
      }
      if (!this.#stopped) this.socket.send({type: 'source_end'});
    } finally {
      URL.revokeObjectURL(video.src);
      video.removeAttribute('src');
    }
  }

  async camera(stream, room) {
    this.video.srcObject = stream;
    await this.video.play();
    for (let next = performance.now(); !this.#stopped;) {
      next += 1000 / this.fps;
      await new Promise(resolve => setTimeout(resolve, Math.max(next - performance.now(), 0)));
      next = Math.max(next, performance.now() - 1000 / this.fps);
      if (this.#sent - this.#consumed < room) await this.#send();  // else the frame is lost: what is live must not lag
    }
  }

  async #send() {
    cover(this.canvas, this.video, this.video.videoWidth, this.video.videoHeight);
    const picture = await blob(this.canvas, 'image/jpeg');
    if (this.#stopped) return;
    this.socket.send(pack({type: 'frames'}, [picture]));
    this.#sent++;
  }
}

function event(video, name) {
  return new Promise((resolve, reject) => {
    video.addEventListener(name, resolve, {once: true});
    video.addEventListener('error', () => reject(new Error('This browser cannot read that video.')), {once: true});
  });
}
