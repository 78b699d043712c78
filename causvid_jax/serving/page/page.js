// The page: what the controls do, and what the reader is told.

import {COLORS, clock, colorOf, drawGraph, drawTimeline} from './charts.js';
import {Feed, cover, sendImage} from './sources.js';
import {Player, Socket} from './stream.js';

const EXAMPLES = ['a red seven moving left', 'a blue two moving up', 'a green five moving right', 'a yellow zero moving down',
                  'a purple three moving left and a cyan eight moving right'];
const WORDS = {colors: Object.keys(COLORS), directions: ['left', 'right', 'up', 'down'],
               digits: ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']};

const $ = id => document.getElementById(id);
const view = $('view'), prompt = $('prompt');
const token = new URLSearchParams(location.search).get('token') ?? '';

let model = null;  // what the server said about itself
let state = 'idle';  // idle, starting, running, paused, ended
let marks = [], chunks = [], made = 0;
let steered = null;  // {prompt, at}: until its first frame is on the screen
let image = null, file = null, feed = null;

const socket = new Socket(token);
const player = new Player(view, {
  acknowledge: chunk => socket.send({type: 'ack', chunk}),
  onframe(frame, now) {
    if (frame.prompt !== marks.at(-1)?.prompt) mark(frame);
    if (steered?.prompt === frame.prompt) {
      $('latency').textContent = `${(now - steered.at).toFixed(2)} s`;
      steered = null;
      if (state === 'running') tell('Live', 'good');
    }
    if (state === 'starting') become('running');
    if (state === 'ended' && !player.buffered) player.playing = false;
  },
});

function tell(text, tone = '') {
  $('status').textContent = text;
  $('status').dataset.tone = tone;
}

const live = () => ['starting', 'running', 'paused'].includes(state);

function become(next) {
  state = next;
  $('send').textContent = live() ? 'Steer' : 'Start';
  for (const id of ['restart', 'pause', 'stop']) $(id).disabled = !live();
  $('pause').textContent = state === 'paused' ? 'Resume' : 'Pause';
  $('veil').hidden = state !== 'idle';
  if (state === 'starting') tell(model?.ready ? 'Starting…' : 'The model is being compiled; this takes a moment…', 'wait');
  if (state === 'running') tell('Live', 'good');
  if (state === 'paused') tell('Paused');
  if (state === 'ended') feed?.stop();
}

function mark(frame) {
  if (!marks.length) $('marks').replaceChildren();
  marks.push({frame: frame.number, prompt: frame.prompt});
  const item = document.createElement('li'), dot = document.createElement('b'), time = document.createElement('time');
  dot.style.background = colorOf(frame.prompt, marks.length - 1);
  time.textContent = clock(frame.number / model.fps);
  item.append(dot, time, frame.prompt || '(nothing)');
  $('marks').prepend(item);
}

const wishes = () => ({prompt: prompt.value.trim(), policy: $('policy').value, strength: Number($('strength').value),
                       blend: Math.trunc(Number($('blend').value)) || 0});
const chosen = () => document.querySelector('[name="source"]:checked').value;

async function start() {
  const source = chosen();
  if (source === 'image' && !image) return tell('Choose an image first.', 'bad');
  if (source === 'video' && !file) return tell('Choose a video first.', 'bad');
  feed?.stop();
  feed = null;
  let camera = null;
  try {
    if (source === 'webcam') camera = await navigator.mediaDevices.getUserMedia({video: {width: 640}, audio: false});
    await socket.open();
  } catch {
    camera?.getTracks().forEach(track => track.stop());
    return tell(source === 'webcam' && !camera ? 'The camera is not available.' : 'The server cannot be reached.', 'bad');
  }
  if (source === 'image') await sendImage(socket, $('image-view'));
  if (source === 'video' || camera) {
    feed = new Feed(socket, $('capture'), model);
    feed.begin = room => camera ? feed.camera(camera, room / 2) : feed.file(file, room);
  }
  steered = {prompt: wishes().prompt, at: performance.now() / 1000};
  socket.send({type: 'start', ...wishes(), seed: Math.trunc(Number($('seed').value)) || 0,
               source: camera ? 'video' : source});
  become('starting');
}

function steer() {
  if (!live()) return start();
  steered = {prompt: wishes().prompt, at: performance.now() / 1000};
  socket.send({type: 'steer', ...wishes()});
  if (state === 'paused') return pause();
  tell('Steering…', 'good');
}

function pause() {
  if (!['running', 'paused'].includes(state)) return;
  socket.send({type: state === 'paused' ? 'resume' : 'pause'});
  player.playing = state === 'paused';
  become(state === 'paused' ? 'running' : 'paused');
}

function stop() {
  socket.send({type: 'stop'});
  player.playing = false;
  become('ended');
  tell('Stopped. The video can be downloaded.');
}

// The server.

const on = (type, handle) => socket.addEventListener(type, ({detail}) => handle(detail));
on('hello', hello => {
  model = hello;
  if (view.width !== model.width || view.height !== model.height)
    for (const canvas of [view, $('image-view')]) Object.assign(canvas, {width: model.width, height: model.height});
  for (const canvas of [view, $('image-view')]) canvas.classList.toggle('pixels', model.width <= 128);
  Object.assign(player, {fps: model.fps, ahead: model.ahead});
  prompt.maxLength = model.prompt;
  $('grammar').hidden = $('chips').hidden = !model.digit_world;
  if (state === 'idle') tell(model.ready ? 'Ready' : 'The model is being compiled…', model.ready ? 'good' : 'wait');
});
on('ready', () => {
  model.ready = true;
  if (state === 'idle') tell('Ready', 'good');
  if (state === 'starting') tell('Starting…', 'wait');
});
on('started', ({session, source_frames: room, resumed}) => {
  $('download').href = `stream/${session}.mp4${socket.query}`;
  $('download').setAttribute('aria-disabled', 'false');
  if (resumed) return tell(state === 'paused' ? 'Paused' : 'Live again', 'good');
  marks = [];
  chunks = [];
  made = 0;
  player.reset();
  feed?.begin(room).catch(error => { tell(error.message, 'bad'); socket.send({type: 'stop'}); });
});
on('chunk', chunk => {
  player.push(chunk);
  made = chunk.frame + chunk.frames;
  chunks.push([chunk.seconds, chunk.frames / model.fps]);
  chunks.splice(0, chunks.length - 200);
  feed?.consume(made);
  $('chunk').textContent = chunk.seconds < 1 ? `${Math.round(1000 * chunk.seconds)} ms` : `${chunk.seconds.toFixed(1)} s`;
});
on('state', message => {
  if (message.state !== 'ended' || state === 'ended') return;
  become('ended');
  tell(`Ended: ${message.reason}.`);
});
on('busy', ({message}) => { become('idle'); tell(`The server is ${message}`, 'bad'); });
on('error', ({code, message}) => {
  if (code === 'unknown_session' || state === 'starting') become('ended');
  tell(message, 'bad');
});
on('lost', () => tell('Connection lost; coming back…', 'bad'));
on('closed', ({code}) => {
  become(marks.length ? 'ended' : 'idle');
  tell(code === 4000 ? 'Closed after a long silence; start again when you like.'
       : code === 4001 ? 'This stream goes on in another window.'
       : token || code !== 1006 ? 'The server closed the connection.' : 'The server cannot be reached.', 'bad');
});

// The controls.

$('steer').addEventListener('submit', event => { event.preventDefault(); steer(); });
prompt.addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  steer();
});
$('restart').addEventListener('click', start);
$('pause').addEventListener('click', pause);
$('stop').addEventListener('click', stop);
for (const id of ['policy', 'strength', 'blend'])
  $(id).addEventListener('change', () => { if (live()) socket.send({type: 'steer', ...wishes()}); });
$('strength').addEventListener('input', () => { $('strength-value').textContent = Number($('strength').value).toFixed(2); });
document.addEventListener('keydown', event => {
  if (event.code !== 'Space' || event.target.closest('input, textarea, select, button, a, summary')) return;
  event.preventDefault();
  pause();
});
for (const radio of document.querySelectorAll('[name="source"]'))
  radio.addEventListener('change', () => {
    for (const panel of document.querySelectorAll('[data-source]')) panel.hidden = panel.dataset.source !== chosen();
  });

function button(text, act) {
  const made = Object.assign(document.createElement('button'), {type: 'button', textContent: text});
  made.addEventListener('click', act);
  return made;
}

$('chips').append(...EXAMPLES.map(text => button(text, () => { prompt.value = text; steer(); })));
for (const [kind, words] of Object.entries(WORDS))
  $(kind).append(...words.map(word => {
    const made = button(word, () => {
      prompt.value = prompt.value.replace(new RegExp(`\\b(${words.join('|')})\\b`), word);
      steer();
    });
    if (kind === 'colors') {
      const dot = document.createElement('i');
      dot.style.background = COLORS[word];
      made.prepend(dot);
    }
    return made;
  }));

async function takeImage(chosenFile) {
  try {
    const picture = await createImageBitmap(chosenFile);
    $('image-view').getContext('2d').clearRect(0, 0, model.width, model.height);
    cover($('image-view'), picture, picture.width, picture.height);
    image = chosenFile;
    $('image-name').textContent = `${chosenFile.name}: (re)start to set it in motion`;
  } catch {
    tell('This browser cannot read that image.', 'bad');
  }
}

function takeVideo(chosenFile) {
  file = chosenFile;
  $('video-name').textContent = `${chosenFile.name}: (re)start to make it anew`;
}

for (const [name, take] of [['image', takeImage], ['video', takeVideo]]) {
  const drop = $(`${name}-drop`), input = $(`${name}-file`);
  input.addEventListener('change', () => { if (input.files[0]) take(input.files[0]); });
  drop.addEventListener('dragover', event => { event.preventDefault(); drop.classList.add('over'); });
  drop.addEventListener('dragleave', () => drop.classList.remove('over'));
  drop.addEventListener('drop', event => {
    event.preventDefault();
    drop.classList.remove('over');
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}

setInterval(() => {
  const now = performance.now() / 1000, running = state === 'running';
  $('fps').textContent = running ? player.rate(now).toFixed(1) : '–';
  $('buffer').textContent = made ? `${player.buffered.toFixed(1)} s` : '–';
  $('clock').textContent = clock(player.shown / (model?.fps ?? 8));
  drawGraph($('graph'), chunks);
  drawTimeline($('timeline'), marks, made, player.shown, model?.fps ?? 8);
}, 250);

window.causvid = {socket, player};  // for curious consoles
become('idle');
socket.open().catch(() => {});
