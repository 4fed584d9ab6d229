// The page to explore plans. A method's peak is the highest of a few polynomials in batch and sequence, and so are its
// parts; what the allocator reserves is found by serving the plan's trace, which takes a moment.
const data = JSON.parse(document.getElementById('data').textContent), GIB = 2 ** 30;
const at = id => document.getElementById(id), gib = size => decimal(size / GIB), decimal = number => number.toLocaleString('en', {minimumFractionDigits: 2, maximumFractionDigits: 2});
const count = number => number.toLocaleString('en'), modelOf = name => data.models.find(m => m.name === name);
let choice = {...data.start, own: ''}, unknown = '', unit = null; // of the sizes shown: MiB if all peaks are below a GiB
const shown = size => decimal(size / unit.bytes);
// what is left or missing: what would be 0.00 in the page's unit has a smaller one, and names it
const apart = size => [shown(size), `${decimal(size / 2 ** 20)} MiB`, `${size.toLocaleString('en')} bytes`].find(text => !/^0\.00\b/.test(text));

// ---- what a method needs

const sum = numbers => numbers.reduce((x, y) => x + y, 0);

function value(coefficients, b, s) {
  const terms = [1, s, s * s, b, b * s, b * s * s];
  return sum(coefficients.map((c, i) => c * terms[i]));
}

function peak(row, b, s) {
  let highest = null;
  for (const one of b === 1 ? row.single : row.several) {
    const parts = data.parts.map((_, i) => value(one.parts[i], b, s)), size = sum(parts);
    if (!highest || size > highest.size) highest = {phase: one.phase, parts, size};
  }
  return highest;
}

const unpacks = 'DecompressionStream' in window, unpacked = new Map(), served = new Map(); // traces by table, results by row

async function open(setting) {
  if (!unpacked.has(setting)) unpacked.set(setting, await unpack(setting.traces));
}

const named = (b, s, room) => `${b} ${s} ${room}`, known = (row, b, s) => served.get(row)?.get(named(b, s, Infinity));

function reserved(setting, row, b, s, room = Infinity) { // of a table that is open; null if it needs more than the room
  if (!served.has(row)) served.set(row, new Map());
  const results = served.get(row), name = named(b, s, room);
  if (!results.has(name)) {
    const several = +(b > 1), {kinds, traces} = unpacked.get(setting);
    results.set(name, serve(traces[row.traces[several]], kinds.map(kind => kind[several] && value(kind[several], b, s)), room));
  }
  return results.get(name);
}

function need(setting, row, b, s) { // without a total until it is computed
  const found = peak(row, b, s), least = found.size + data.context_bytes, held = known(row, b, s);
  return {...found, setting, row, b, s, least, total: held === undefined ? null : held + data.context_bytes};
}

// Does it run on a card, perhaps only since the allocator gives back what it holds unused?
const fits = (setting, row, b, s, bytes) => peak(row, b, s).size + data.context_bytes <= bytes && reserved(setting, row, b, s, bytes - data.context_bytes) !== null;

function verdict(one, bytes) {
  const missing = size => ({fits: 'no', text: `no, ${one.total === null ? 'more than ' : ''}${apart(size - bytes)} missing`});
  if (one.least > bytes) return missing(one.total ?? one.least);
  if (one.total === null) return {fits: 'perhaps', text: 'perhaps'};
  if (one.total <= bytes) return {fits: 'yes', text: `yes, ${apart(bytes - one.total)} left`};
  return fits(one.setting, one.row, one.b, one.s, bytes) ? {fits: 'yes', text: 'yes, tightly'} : missing(one.total);
}

function largestBatch(setting, row, s, bytes) { // 0 if none fits
  let b = data.largest_batch;
  while (b && !fits(setting, row, b, s, bytes)) b--;
  return b;
}

// ---- what would make a method fit: other tables and sizes that are offered, the nearest first

const settingOf = (model, dtype, checkpointing) => data.settings.find(one =>
  one.model === model.planned_as && one.dtype === dtype && one.checkpointing === checkpointing);

function fitting(setting, method, b, s, bytes) {
  const row = setting?.rows.find(one => one.method === method);
  return row !== undefined && fits(setting, row, b, s, bytes);
}

function* changes(model, setting, method) {
  const {batch: b, sequence: s, dtype} = choice, checkpointed = settingOf(model, dtype, true), other = settingOf(model, 'bfloat16', setting.checkpointing);
  const variants = setting.rows.map(row => row.method).filter(name => name.startsWith(method + ' '));
  const fewer = data.batches.filter(x => x < b).reverse(), shorter = setting.sequences.filter(y => y < s).reverse();
  if (!setting.checkpointing) yield ['gradient checkpointing', checkpointed, method, b, s];
  for (const name of variants) yield [name.slice(method.length + 1), setting, name, b, s];
  for (const x of fewer) yield [`batch ${x}`, setting, method, x, s];
  for (const y of shorter) yield [`${count(y)} tokens`, setting, method, b, y];
  if (dtype !== 'bfloat16') yield ['bfloat16', other, method, b, s];
  const best = checkpointed || setting, also = setting.checkpointing ? '' : 'gradient checkpointing and ';
  for (const name of variants) yield [also + name.slice(method.length + 1), best, name, b, s];
  for (const x of fewer) for (const y of [s, ...shorter]) yield [`${also}batch ${x}${y === s ? '' : ` and ${count(y)} tokens`}`, best, method, x, y];
  for (const y of shorter) yield [`${also}${count(y)} tokens`, best, method, b, y];
  for (const name of variants) for (const y of [s, ...shorter]) yield [`${also}${name.slice(method.length + 1)}${y === s ? ' and batch 1' : `, batch 1 and ${count(y)} tokens`}`, best, name, 1, y];
}

function reason(model, one, bytes) { // of tables that are open
  const too = most(one);
  if (one.parts[0] + data.context_bytes > bytes) return 'the weights alone are too big';
  for (const [words, ...how] of changes(model, one.setting, one.row.method)) if (fitting(...how, bytes)) return `${too}; fits with ${words}`;
  return `${too}; nothing on this page makes it fit; “membench plan” tries more`;
}

const most = one => `${data.parts[one.parts.indexOf(Math.max(...one.parts))].word} take most`;

// ---- what is shown

function cards() {
  const own = parseFloat(choice.own), chosen = data.cards.filter(card => choice.cards.includes(card.name));
  return [...chosen, ...(own > 0 ? [{name: `${own} GiB`, bytes: Math.round(own * GIB)}] : [])].sort((x, y) => x.bytes - y.bytes);
}

let turn = 0; // of choices: what an older one computes is no longer needed

async function show() { // the peaks, then the totals, then what depends on many of them
  const mine = ++turn, model = modelOf(choice.model), setting = settingOf(model, choice.dtype, choice.checkpointing), {batch, sequence} = choice;
  const last = cards().at(-1), told = new Map(), steps = [];
  for (const row of setting.rows) steps.push(() => reserved(setting, row, batch, sequence));
  steps.push(() => draw(model, setting, told, true));
  if (last) for (const row of setting.rows) steps.push(() => told.set(row, {
    largest: largestBatch(setting, row, sequence, last.bytes),
    why: fits(setting, row, batch, sequence, last.bytes) ? '' : reason(model, need(setting, row, batch, sequence), last.bytes),
  }));
  draw(model, setting, told, unpacks);
  if (!unpacks) return;
  await Promise.all(data.settings.filter(one => one.model === model.planned_as).map(open));
  let since = performance.now();
  for (const step of steps) {
    if (performance.now() - since > 50) {
      await new Promise(done => setTimeout(done)); // the page stays usable
      since = performance.now();
    }
    if (mine !== turn) return;
    step();
  }
  draw(model, setting, told, false);
}

function draw(model, setting, told, busy) {
  const chosen = cards(), needs = setting.rows.map(row => need(setting, row, choice.batch, choice.sequence)).sort((x, y) => (x.total ?? x.least) - (y.total ?? y.least));
  at('said').textContent = unknown + [
    `${model.name}, ${model.parameters < 1e8 ? count(model.parameters) : (model.parameters / 1e9).toPrecision(3) + ' billion'} weights in ${choice.dtype}`,
    `${choice.batch} x ${count(choice.sequence)} tokens`, choice.checkpointing ? 'gradient checkpointing' : 'no checkpointing',
    `${model.attention} attention`].join(', ') + '; ' +
    (chosen.map(card => `${card.name}: ${gib(card.bytes)} GiB`).join(', ') || 'no card chosen') + '.';
  at('sure').textContent = needs.every(one => one.total !== null) ? 'All figures are those of “membench plan”, to the byte.'
    : busy ? 'Peak and parts are those of “membench plan”, to the byte. What PyTorch’s allocator reserves is being computed.'
    : 'Peak and parts are those of “membench plan”, to the byte. The total isn’t known: this browser can’t unpack what computes it (it lacks DecompressionStream).';
  unit = needs.every(one => one.size < GIB) ? {bytes: GIB / 1024, name: 'MiB'} : {bytes: GIB, name: 'GiB'};
  at('refused').replaceChildren(...Object.entries(setting.refused).map(([method, said]) => make('li', {}, `${method}: ${said}`)));
  bars(needs, chosen);
  table(needs, chosen, told, busy);
  at('link').href = '#' + kept();
}

function labelled(tag, attributes, method) { // long options break where words do
  const element = make(tag, attributes);
  element.append(...method.split(/(?<=[_=])/).flatMap((part, i) => i ? [make('wbr', {}), part] : [part]));
  return element;
}

function bars(needs, chosen) {
  const largest = chosen.at(-1)?.bytes, top = Math.max(...needs.map(held)), scale = largest ? Math.min(Math.max(top, largest) * 1.03, largest * 2.2) : top;
  const place = size => `${(100 * size / scale).toFixed(3)}%`, home = at('bars');
  const names = make('div', {class: `fit-cards${chosen.length > 1 ? ' two' : ''}`});
  chosen.forEach((card, i) => names.append(make('span', {class: `${card.bytes > .75 * scale ? 'end' : ''} ${i % 2 ? 'low' : ''}`, style: `left:${place(card.bytes)}`}, card.name)));
  const head = make('div', {class: 'fit-row', 'aria-hidden': 'true'});
  head.append(make('span', {}), names, make('span', {}));
  home.replaceChildren(head, ...needs.map(one => {
    const fits = chosen.length ? verdict(one, largest).fits : 'yes', row = make('div', {class: `fit-row fit-${fits}`, 'data-method': one.row.method});
    const track = make('div', {class: 'fit-track', role: 'img', 'aria-label': `${one.row.method}: ` + data.parts.map(({word}, i) => `${word} ${shown(one.parts[i])}`).join(', ')});
    const bar = make('div', {class: 'fit-bar'});
    [...one.parts, held(one) - one.size].forEach((size, i) => bar.append(make('span', {style: `width:${place(size)};background:var(--${data.parts[i]?.colour ?? 'line'})`, title: `${data.parts[i]?.word ?? 'reserved, and context'}: ${shown(size)} ${unit.name}`})));
    track.append(bar, ...chosen.map(card => make('span', {class: 'fit-line', style: `left:${place(card.bytes)}`})));
    row.append(labelled('b', {}, one.row.method), track, make('span', {}, `${total(one)} ${unit.name}${held(one) > scale ? ' »' : ''}`));
    return row;
  }));
}

const held = one => one.total ?? one.least, total = one => (one.total === null ? 'more than ' : '') + shown(held(one));

function table(needs, chosen, told, busy) {
  const whole = at('table'), last = chosen.at(-1), on = last ? [...(unpacks ? [`largest batch on ${last.name}`] : []), `why not on ${last.name}`] : [];
  const words = ['method', ...chosen.map(card => card.name), ...on, 'total', 'peak', ...data.parts.map(part => part.word), 'peak in', 'smallest card'];
  const text = new Set(['method', ...chosen.map(card => card.name), on.at(-1), 'peak in', 'smallest card']);
  const head = make('tr', {});
  for (const word of words) head.append(make('th', {scope: 'col', ...(text.has(word) ? {class: 'words'} : {})}, word));
  whole.caption.textContent = `What each method needs, ${unit.name}`;
  whole.setAttribute('aria-busy', busy);
  whole.tHead.replaceChildren(head);
  whole.tBodies[0].replaceChildren(...needs.map(one => {
    const row = make('tr', {'data-method': one.row.method}), more = told.get(one.row);
    const smallest = data.cards.find(card => (card.bfloat16 || choice.dtype !== 'bfloat16') && one.total <= card.bytes)?.name ?? 'none';
    row.append(labelled('th', {scope: 'row', class: 'words'}, one.row.method));
    for (const card of chosen) row.append(make('td', {class: `words fit-${verdict(one, card.bytes).fits}`}, verdict(one, card.bytes).text));
    if (last && unpacks) row.append(make('td', {}, more ? more.largest + (more.largest === data.largest_batch ? ' or more' : '') : '…'));
    if (last) row.append(make('td', {class: 'words why'}, more?.why ?? (verdict(one, last.bytes).fits === 'no' ? most(one) : '')));
    row.append(make('td', one.total === null ? {} : {'data-bytes': one.total}, total(one)));
    for (const size of [one.size, ...one.parts]) row.append(make('td', {'data-bytes': size}, shown(size)));
    row.append(make('td', {class: 'words'}, one.phase), make('td', {class: 'words'}, one.total === null ? '' : smallest));
    return row;
  }));
  sortable(whole);
  hint();
}

function hint() { // that the table goes on
  const box = at('table').parentElement;
  at('wide').hidden = box.scrollWidth <= box.clientWidth;
}

// ---- the choice: its controls, and the link that keeps it

function kept() {
  const {model, dtype, checkpointing, batch, sequence, cards, own} = choice;
  return new URLSearchParams({model, dtype, checkpointing: +checkpointing, batch, sequence, cards: cards.join(' '), ...(own ? {own} : {})}).toString();
}

const whole = text => Math.floor(Number(text)); // also of 1e3, which a field for numbers takes

function given() {
  const read = new URLSearchParams(location.hash.slice(1)), number = name => whole(read.get(name)) || data.start[name];
  unknown = '';
  if (!read.get('model')) return {...data.start, own: ''};
  unknown = modelOf(read.get('model')) ? '' : `${read.get('model')} isn't on this page: another model is shown. `;
  return {model: unknown ? data.start.model : read.get('model'), dtype: read.get('dtype') ?? data.start.dtype, checkpointing: read.get('checkpointing') === '1', batch: number('batch'), sequence: number('sequence'),
    cards: (read.get('cards') ?? '').split(' ').filter(name => data.cards.some(card => card.name === name)), own: read.get('own') || ''};
}

function within() { // what the page has: no dtype that wasn't planned, no more tokens than positions
  const model = modelOf(choice.model), some = data.settings.filter(one => one.model === model.planned_as), asked = {...choice};
  if (!some.some(one => one.dtype === choice.dtype)) choice.dtype = some[0].dtype;
  if (!settingOf(model, choice.dtype, choice.checkpointing)) choice.checkpointing = !choice.checkpointing;
  choice.batch = Math.min(Math.max(choice.batch, 1), data.largest_batch);
  choice.sequence = Math.min(Math.max(choice.sequence, data.least_sequence), model.longest);
  for (const name of ['dtype', 'batch', 'sequence']) {
    if (asked[name] !== choice[name]) unknown += `For ${model.name} this page doesn't have ${name} ${asked[name]}: ${choice[name]} is shown. `;
  }
}

function numberIn(box, label, name, planned) {
  const input = make('input', {type: 'number', min: 1, step: 1, id: name, list: `${name}-planned`}), wrap = make('label', {}, label + ' '), list = make('datalist', {id: `${name}-planned`});
  for (const one of planned) list.append(make('option', {value: one}));
  wrap.append(input, list);
  box.append(wrap);
  return input;
}

const form = at('choice'), model = choice_(form, 'model', data.models.map(one => one.name)), dtype = choice_(form, 'dtype', [...new Set(data.settings.map(one => one.dtype))]);
const batch = numberIn(form, 'batch', 'batch', data.batches), sequence = numberIn(form, 'sequence', 'sequence', [...new Set(data.settings.flatMap(one => one.sequences))].sort((x, y) => x - y));
const checkpointing = tick(form, 'gradient checkpointing'), boxes = make('fieldset', {class: 'choices'}), own = make('input', {type: 'number', min: 1, step: 'any', id: 'own'});
boxes.append(make('legend', {}, 'Cards'));
const ticks = data.cards.map(card => [card.name, tick(boxes, `${card.name} (${gib(card.bytes)})`)]), wrap = make('label', {}, 'own, GiB ');
wrap.append(own);
boxes.append(wrap);
form.append(boxes);

function choice_(box, label, names) {
  const select = chooser(box, label, names, names[0]);
  select.id = label;
  return select;
}

function put() { // the choice into the controls
  const planned = modelOf(choice.model).planned_as, some = data.settings.filter(one => one.model === planned);
  [model.value, dtype.value, batch.value, sequence.value, own.value] = [choice.model, choice.dtype, choice.batch, choice.sequence, choice.own];
  for (const option of dtype.options) option.disabled = !some.some(one => one.dtype === option.value);
  checkpointing.checked = choice.checkpointing;
  checkpointing.disabled = some.filter(one => one.dtype === choice.dtype).length < 2;
  for (const [name, box] of ticks) box.checked = choice.cards.includes(name);
}

function read() {
  unknown = '';
  choice = {model: model.value, dtype: dtype.value, checkpointing: checkpointing.checked, batch: whole(batch.value) || 1, sequence: whole(sequence.value) || data.start.sequence,
    cards: ticks.filter(([, box]) => box.checked).map(([name]) => name), own: parseFloat(own.value) > 0 ? own.value : ''};
  update();
  history.replaceState(null, '', '#' + kept());
}

function update() {
  within();
  put();
  show();
}

form.addEventListener('change', read);
form.addEventListener('submit', event => event.preventDefault());
addEventListener('resize', hint);
addEventListener('hashchange', () => { choice = given(); update(); });
choice = given();
form.hidden = false;
checkpointing.id = 'checkpointing';
update();
