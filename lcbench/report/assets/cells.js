"use strict";
// The table of cells: a row with an address each, what is known of it behind the row, and a file of what is filtered.

const ABOUT = {
  "vs best": "its time over that of the fastest exact choice for the same problem",
  band: "of a prediction: the time lies within this factor of it with 95 %",
  noise: "half-width of the 95 % interval of the median of the total",
  peak: "memory of the worst rank in an iteration, above what was in use before",
  sent: "by the rank that sends most, in an iteration",
  MFU: "rate over the peak of the device",
  time: "median iteration, forward and backward, of the slowest rank",
  [BLOCK.rate.name]: "per GPU, of the unmasked pairs",
  reduce_dtype: "type in which partial sums travel between ranks",
};

/** Columns of the table; those that are the same in all cells are in the first lines of the page, and left out here. */
function cellColumns(cells) {
  const varies = key => unique(cells.map(cell => cell[key])).length > 1;
  const best = d3.rollup(
    cells.filter(isGood),
    found => d3.min(found.filter(isExact), cell => cell.total),
    cell => cell.problem,
  );
  for (const cell of cells) cell.behind = isGood(cell) && best.get(cell.problem) ? cell.total / best.get(cell.problem) : null;
  return [
    {name: "cell", of: cell => entry(idOf(cell), cell.id, "id")},
    {name: "status", of: cell => entry(cell.status, cell.status, cell.status)},
    {name: "choice", of: cell => entry(cell.choice)},
    varies("mask") && {name: "mask", of: cell => entry(cell.mask, cell.mask, "name")},
    varies("seqlen") && {name: "length", kind: "number", of: cell => number(cell.seqlen, tokens(cell.seqlen))},
    varies("scale") && {name: "scale", kind: "number", of: cell => number(cell.order, cell.scale)},
    cells.some(cell => cell.attempt > 1) && {
      name: "attempt",
      kind: "number",
      of: cell => number(cell.attempt, String(cell.attempt)),
    },
    varies("where") && {name: "setting", of: cell => entry(cell.where)},
    {name: "time", kind: "number", of: cell => number(cell.total, seconds(cell.total))},
    cells.some(cell => cell.behind !== null) && {
      name: "vs best", kind: "number", of: cell => number(cell.behind, cell.behind ? times(cell.behind) : ""),
    },
    {name: BLOCK.rate.name, kind: "number", of: cell => number(cell.total_rate, digits(cell.total_rate))},
    {name: "MFU", kind: "number", of: cell => number(cell.mfu, percent(cell.mfu))},
    {name: "noise", kind: "number", of: cell => number(cell.noise, percent(cell.noise))},
    cells.some(cell => cell.band !== null) && {
      name: "band",
      kind: "number",
      of: cell => number(cell.band, cell.band === null ? "" : `within ${times(1 + cell.band)}`),
    },
    {name: "peak", kind: "number", of: cell => number(cell.peak, bytes(cell.peak))},
    {name: "sent", kind: "number", of: cell => number(cell.sent, bytes(cell.sent))},
  ]
    .filter(Boolean)
    .map(column => ({...column, about: ABOUT[column.name]}));
}

/** Why a cell has no speed: class and cause, or what was shared. */
const whyNot = cell => [cell.kind, cell.cause].filter(Boolean).join(": ") || cell.slow;

const idOf = cell =>
  h(
    "span",
    {},
    h("button", {type: "button", class: "twist", "aria-expanded": "false", "aria-label": `what is known of ${cell.id}`}, "▸"),
    h("a", {href: `#c-${cell.id}`}, cell.id),
    copyButton(cell.id, "cell id"),
  );

function drawCells(table, cells) {
  const columns = cellColumns(cells);
  const rows = cells.map(cell => {
    const instead = isDrawn(cell) ? null : {from: columns.findIndex(column => column.name === "time"), text: whyNot(cell)};
    const row = rowOf(
      columns.map(column => column.of(cell)),
      {id: `c-${cell.id}`, class: "row"},
      instead,
    );
    row.cell = cell;
    row.addEventListener("click", event => {
      if (!event.target.closest("a") && !getSelection().toString()) unfold(row);
    });
    return row;
  });
  table.replaceChildren(sortableHead(columns), h("tbody", {}, rows));
  return rows;
}

/** Open or close what is known of a row's cell. */
function unfold(row, open = row.detail === undefined) {
  const twist = row.querySelector(".twist");
  if (open && !row.detail) {
    row.detail = h("tr", {class: "detail"}, h("td", {colspan: row.entries.length}, detailOf(row.cell)));
    row.after(row.detail);
  } else if (!open && row.detail) {
    row.detail.remove();
    delete row.detail;
  }
  row.classList.toggle("open", open);
  twist.setAttribute("aria-expanded", String(open));
}

function showCells(rows, shownCells) {
  const wanted = new Set(shownCells),
    words = wordsOf(view.words);
  for (const row of rows) {
    row.hidden = !wanted.has(row.cell) || !hasWords(row, words);
    if (row.detail) row.detail.hidden = row.hidden;
  }
  const left = rows.filter(row => !row.hidden).length;
  document.getElementById("shown").textContent = left === rows.length ? String(left) : `${left} of ${rows.length}`;
}
