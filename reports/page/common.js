// What the scripts of all pages share. Text is only ever set as text.
'use strict';

function make(name, attributes, text, space) {
  const element = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// ---- tables: a click on a header sorts, by the first number of a cell, names as texts; a second one turns the order round

const number = text => parseFloat((text.replace(/,/g, '').match(/-?\.?\d[\d.]*(e[-+]?\d+)?/) || [NaN])[0]);

function sort(table, column, down) {
  const key = row => row.cells[column].textContent.trim();
  const value = row => row.cells[column].tagName === 'TH' ? NaN : number(key(row));
  const rows = [...table.tBodies[0].rows];
  rows.sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    const order = isNaN(a) && isNaN(b) ? key(one).localeCompare(key(other)) : isNaN(a) ? 1 : isNaN(b) ? -1 : a - b;
    return down && !(isNaN(a) !== isNaN(b)) ? -order : order;
  });
  table.tBodies[0].append(...rows);
}

function sortable(table) {
  for (const head of table.tHead.rows[0].cells) {
    const button = make('button', {type: 'button', class: 'sort'}, head.textContent);
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      sort(table, head.cellIndex, down);
    });
  }
}

// ---- controls

function chooser(box, label, names, chosen) {
  const select = make('select', {}), wrap = make('label', {}, label + ' ');
  for (const name of names) select.append(make('option', {}, name));
  if (names.includes(chosen)) select.value = chosen;
  wrap.append(select);
  box.append(wrap);
  return select;
}

function tick(box, label) {
  const input = make('input', {type: 'checkbox'}), wrap = make('label', {});
  wrap.append(input, ' ' + label);
  box.append(wrap);
  return input;
}
