// What the page of a report can do with a script; without one, everything is there as it was made. Nothing is loaded.
const SVG = 'http://www.w3.org/2000/svg', COLOURS = ['ink', 'blue', 'vermilion', 'green', 'pink', 'orange', 'sky'];

for (const table of document.querySelectorAll('table')) sortable(table);

// ---- a plot of lines or points: [{name, style, points: [[x, y], ...]}]

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) for (const m of [1, 2, 5])
      if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
    return found.length > 7 ? found.filter(t => Number.isInteger(Math.round(1e6 * Math.log10(t)) / 1e6)) : found;
  }
  const raw = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map(m => m * unit).find(s => s >= raw);
  return Array.from({length: 8}, (_, i) => (Math.ceil(low / step) + i) * step).filter(t => t <= high);
}

function axis(values, log) {
  const known = values.filter(v => isFinite(v) && (!log || v > 0));
  if (!known.length) return null;
  let low = Math.min(...known), high = Math.max(...known);
  const room = log ? Math.pow(high / low || 1, .08) : (high - low || Math.abs(high) || 1) * .08;
  [low, high] = log ? [low / Math.max(room, 1.05), high * Math.max(room, 1.05)] : [low - room, high + room];
  const at = log ? Math.log : v => v;
  return {low, high, log, place: v => (at(v) - at(low)) / (at(high) - at(low))};
}

function draw(svg, hidden, series, x, y) {
  const W = Math.round(Math.min(640, Math.max(280, svg.parentNode.clientWidth))), H = 380, L = 64, R = 16, T = 12, B = 48, shown = series.filter(s => !hidden.has(s.name));
  const write = (text, place) => make('text', {style: 'fill:var(--muted)', ...place}, text, SVG);
  svg.replaceChildren();
  svg.setAttribute('viewBox', `0 0 ${W} ${H}`);
  const [across, up] = [[0, x], [1, y]].map(([i, a]) => axis(shown.flatMap(s => s.points.map(p => p[i])), a.log));
  if (!across || !up) return void svg.append(write('Nothing to draw on these axes.', {x: L, y: H / 2}));
  const px = v => L + across.place(v) * (W - L - R), py = v => H - B - up.place(v) * (H - T - B);
  const said = v => Math.abs(v) >= 1e4 || v && Math.abs(v) < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(4));
  for (const t of ticks(across.low, across.high, x.log)) svg.append(make('path', {d: `M${px(t)} ${T}V${H - B}`, class: 'line'}, undefined, SVG),
    write(said(t), {x: px(t), y: H - B + 18, 'text-anchor': 'middle'}));
  for (const t of ticks(up.low, up.high, y.log)) svg.append(make('path', {d: `M${L} ${py(t)}H${W - R}`, class: 'line'}, undefined, SVG),
    write(said(t), {x: L - 6, y: py(t) + 4, 'text-anchor': 'end'}));
  svg.append(write(x.name.slice(0, 40), {x: (L + W - R) / 2, y: H - 8, 'text-anchor': 'middle'}),
    write(y.name.slice(0, 40), {transform: `translate(13 ${(T + H - B) / 2}) rotate(-90)`, 'text-anchor': 'middle'}));
  const taken = [];
  for (const one of shown) {
    const points = one.points.filter(p => p.every(isFinite) && (!x.log || p[0] > 0) && (!y.log || p[1] > 0));
    if (!points.length) continue;
    const colour = `var(--${COLOURS[one.style % COLOURS.length]})`, dash = ['', '6 3', '2 2'][Math.floor(one.style / COLOURS.length) % 3];
    if (points.length > 1) svg.append(make('path', {d: 'M' + points.map(p => `${px(p[0])} ${py(p[1])}`).join('L'), style: `stroke:${colour};fill:none;stroke-width:1.8`, 'stroke-dasharray': dash}, undefined, SVG));
    for (const p of points) {
      const dot = make('circle', {cx: px(p[0]), cy: py(p[1]), r: points.length > 1 ? 2.5 : 5, style: `fill:${colour}`, 'data-x': p[0], 'data-y': p[1], 'data-name': one.name}, undefined, SVG);
      dot.append(make('title', {}, `${one.name}: ${said(p[0])}, ${said(p[1])}`, SVG));
      svg.append(dot);
    }
    const [x0, y0] = [px(points.at(-1)[0]), py(points.at(-1)[1])], name = one.name.length > 20 ? one.name.slice(0, 19) + '…' : one.name, wide = 9 * name.length;
    const spots = [[8, -6], [8, 14], [-8 - wide, -6], [-8 - wide, 14]].map(([dx, dy]) => ({left: x0 + dx, right: x0 + dx + wide, top: y0 + dy - 13, bottom: y0 + dy + 4}));
    const spot = spots.find(s => s.left > L && s.right < W && s.top > 0 && s.bottom < H - B
      && !taken.some(o => o.left < s.right && s.left < o.right && o.top < s.bottom && s.top < o.bottom));
    if (!spot) continue; // there is no room: its points say who they are
    taken.push(spot);
    svg.append(write(name, {x: spot.left, y: spot.bottom - 4, style: `fill:${colour}`}));
  }
}

// ---- choosing what is drawn, and which methods are shown

const redraw = [];

function panel(home, hidden, title, build) { // hidden: names of the methods that its section doesn't show
  const box = make('div', {class: 'choices'}), svg = make('svg', {viewBox: '0 0 640 380', role: 'img', 'aria-label': title}, undefined, SVG);
  home.append(make('h4', {}, title), box, svg);
  const controls = build(box), again = () => draw(svg, hidden, ...controls.read());
  for (const control of controls.all) control.addEventListener('change', again);
  redraw.push(again);
}

function scatter(home, hidden, data) {
  const names = Object.keys(data.figures);
  panel(home, hidden, 'Any two figures', box => {
    const x = chooser(box, 'across', names, names[0]), y = chooser(box, 'up', names, names[1] || names[0]);
    const logs = [tick(box, 'log across'), tick(box, 'log up')];
    return {all: [x, y, ...logs], read: () => [
      data.methods.map((name, i) => ({name, style: i, points: [[data.figures[x.value][i], data.figures[y.value][i]].map(v => v ?? NaN)]})),
      {name: x.value, log: logs[0].checked}, {name: y.value, log: logs[1].checked}]};
  });
}

function curves(home, hidden, data) {
  const tasks = Object.keys(data.curves), measures = [...new Set(tasks.flatMap(task => Object.keys(data.curves[task])))];
  if (!measures.length) return;
  panel(home, hidden, 'Training', box => {
    const task = chooser(box, 'task', tasks), what = chooser(box, 'up', measures), along = chooser(box, 'across', data.along);
    const logs = [tick(box, 'log across'), tick(box, 'log up')];
    return {all: [task, what, along, ...logs], read: () => [
      Object.entries(data.curves[task.value][what.value] || {}).map(([i, rows]) => ({name: data.methods[i], style: +i, points: rows.map(r => [r[data.along.indexOf(along.value)], r.at(-1)])})),
      {name: along.value, log: logs[0].checked}, {name: what.value, log: logs[1].checked}]};
  });
}

function showing(section, home, hidden, data) {
  const box = make('fieldset', {class: 'choices'});
  box.append(make('legend', {}, 'Methods shown'));
  data.methods.forEach((name, i) => {
    const input = tick(box, name);
    input.checked = true;
    input.addEventListener('change', () => {
      input.checked ? hidden.delete(name) : hidden.add(name);
      for (const row of section.querySelectorAll('tbody tr')) if (row.cells[0].textContent.trim() === name) row.hidden = !input.checked;
      for (const part of section.querySelectorAll(`.row-${i}`)) part.style.visibility = input.checked ? '' : 'hidden';
      redraw.forEach(again => again());
    });
  });
  home.append(box);
}

addEventListener('resize', () => redraw.forEach(again => again()));
for (const home of document.querySelectorAll('.explore')) {
  const data = JSON.parse(home.dataset.figures), section = home.closest('section'), hidden = new Set();
  home.hidden = false;
  home.append(make('h3', {}, 'Explore'));
  showing(section, home, hidden, data);
  const plots = make('div', {class: 'pair'}), [left, right] = [make('div', {}), make('div', {})];
  plots.append(left, right);
  home.append(plots);
  scatter(left, hidden, data);
  curves(right, hidden, data);
}
redraw.forEach(again => again());
