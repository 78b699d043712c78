// The two small drawings: what each chunk cost, and where the prompt changed.

const LOW = 0.005, HIGH = 20;  // seconds that the graph spans, on a logarithmic scale
const BARS = 60;

export const COLORS = {red: '#ff4040', green: '#40dc40', blue: '#5070ff', yellow: '#fadc32', purple: '#be50f0', cyan: '#32dce6'};

/** A prompt's own colour, if it names one. */
export function colorOf(prompt, index) {
  const word = prompt.toLowerCase().split(/\W+/).find(word => word in COLORS);
  return word ? COLORS[word] : `hsl(${(index * 137) % 360} 45% 60%)`;
}

function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio))
    Object.assign(canvas, {width: Math.round(width * ratio), height: Math.round(height * ratio)});
  const context = canvas.getContext('2d'), style = getComputedStyle(document.documentElement);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = '11px system-ui, "DejaVu Sans", sans-serif';
  return {context, width, height, ink: name => style.getPropertyValue(`--${name}`).trim()};
}

/** Bars of [seconds to make, seconds to play], newest at the right; the line is real time. */
export function drawGraph(canvas, chunks) {
  const {context, width, height, ink} = prepare(canvas);
  const left = 56, y = seconds => height - 4 - (height - 12) * Math.log(Math.max(seconds, LOW) / LOW) / Math.log(HIGH / LOW);
  context.textBaseline = 'middle';
  for (const [seconds, label] of [[0.01, '10 ms'], [0.1, '100 ms'], [1, '1 s'], [10, '10 s']]) {
    context.fillStyle = ink('soft');
    context.textAlign = 'right';
    context.fillText(label, left - 8, y(seconds));
    context.fillStyle = ink('line');
    context.fillRect(left, Math.round(y(seconds)), width - left, 1);
  }
  const step = (width - left) / BARS, last = chunks.slice(-BARS);
  last.forEach(([made, plays], i) => {
    context.fillStyle = ink(made <= plays ? 'accent' : 'bad');
    context.fillRect(width - (last.length - i) * step + 1, y(made), Math.max(step - 2, 1), height - 4 - y(made));
  });
  if (last.length) {
    const line = Math.round(y(last.at(-1)[1])) + 0.5;
    context.strokeStyle = context.fillStyle = ink('good');
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(left, line);
    context.lineTo(width, line);
    context.stroke();
    context.setLineDash([]);
    context.textAlign = 'left';
    context.fillText('real time', left + 4, line - 8);
  }
}

/** The stream so far: a stretch for each of `marks` [{frame, prompt}], and how much of it was shown. */
export function drawTimeline(canvas, marks, made, shown, fps) {
  const {context, width, height, ink} = prepare(canvas);
  const total = Math.max(made, 20 * fps), x = frame => width * frame / total, top = 4, thick = 14;
  context.fillStyle = ink('line');
  context.beginPath();
  context.roundRect(0, top, width, thick, 5);
  context.fill();
  context.save();
  context.clip();
  marks.forEach((mark, i) => {
    const end = marks[i + 1]?.frame ?? made;
    context.globalAlpha = 0.4;
    context.fillStyle = colorOf(mark.prompt, i);
    context.fillRect(x(mark.frame), top, x(end) - x(mark.frame), thick);
    context.globalAlpha = 1;
    context.fillRect(x(mark.frame), top, Math.max(x(Math.min(shown, end)) - x(mark.frame), 0), thick);
    if (i) {
      context.fillStyle = ink('card');
      context.fillRect(x(mark.frame) - 1, top, 2, thick);
    }
  });
  context.restore();
  context.fillStyle = ink('soft');
  context.textBaseline = 'bottom';
  const every = [5, 10, 30, 60, 300, 600, 1800].find(seconds => total / fps / seconds <= 8) ?? 3600;
  for (let seconds = 0; seconds * fps <= total; seconds += every) {
    context.textAlign = seconds ? x(seconds * fps) > width - 20 ? 'right' : 'center' : 'left';
    context.fillText(clock(seconds), x(seconds * fps), height);
  }
}

export const clock = seconds => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, '0')}`;
