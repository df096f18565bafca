"use strict";
// Tables that sort by the raw value of an entry, and words that filter their rows.

/** An entry: what is shown, and what it is sorted by. */
const entry = (shown, value = shown, kind = "") => ({shown, value, kind});
const number = (value, shown) => entry(shown, value, "number");

/** A head with a button per column; `columns`: {name, about, kind}. */
function sortableHead(columns) {
  return h(
    "thead",
    {},
    h(
      "tr",
      {},
      columns.map((column, place) =>
        h(
          "th",
          {"aria-sort": "none", scope: "col", class: column.kind || null},
          h(
            "button",
            {type: "button", title: column.about ?? null, onclick: event => sortBy(event.currentTarget.closest("table"), place)},
            column.name,
          ),
        ),
      ),
    ),
  );
}

function sortBy(table, place) {
  const heads = [...table.tHead.rows[0].cells],
    down = heads[place].getAttribute("aria-sort") === "ascending";
  heads.forEach((head, i) => head.setAttribute("aria-sort", i !== place ? "none" : down ? "descending" : "ascending"));
  const rows = [...table.tBodies[0].rows].filter(row => !row.classList.contains("detail"));
  const value = row => row.entries[place].value;
  rows.sort((a, b) => (down ? -1 : 1) * inOrder(value(a), value(b)) || a.rowIndex - b.rowIndex);
  table.tBodies[0].append(...rows.flatMap(row => (row.detail ? [row, row.detail] : [row])));
}

/** Numbers by size, words by the alphabet, what is missing first. */
function inOrder(a, b) {
  const missing = v => v === null || v === undefined || v === "";
  if (missing(a) || missing(b)) return missing(b) - missing(a);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

/** A row of entries; `instead`: words that stand where entries from this place on have nothing to show. */
function rowOf(entries, attributes = {}, instead = null) {
  const shown = instead ? entries.slice(0, instead.from) : entries;
  const row = h(
    "tr",
    attributes,
    shown.map((e, i) =>
      h(
        i ? "td" : "th",
        {
          class: e.kind || null,
          scope: i ? null : "row",
          "data-v": e.value === null || e.value === undefined ? "" : String(e.value),
        },
        e.shown,
      ),
    ),
    instead ? h("td", {class: "words", colspan: entries.length - instead.from}, instead.text) : null,
  );
  row.entries = entries;
  row.words = [...row.cells].map(cell => cell.textContent.trim().toLowerCase());
  return row;
}

/** Words of a filter: a quoted one may be anywhere in an entry, another is an entry or its beginning. */
function wordsOf(text) {
  return [...text.toLowerCase().matchAll(/"([^"]*)"?|(\S+)/g)].map(([, quoted, word]) => ({
    text: quoted ?? word,
    anywhere: quoted !== undefined,
  }));
}

const hasWords = (row, words) =>
  words.every(word => row.words.some(text => (word.anywhere ? text.includes(word.text) : text.startsWith(word.text))));

/** Text that a spreadsheet takes for no formula, as `report/inert.py` writes it. */
function csvEntry(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^\s*[=+\-@＝＋－＠]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csvOf(cells) {
  const names = Object.keys(BLOCK.cells).filter(name => name !== "problem");
  const heads = names.map(name => (/(rate|bymean|^top)$/.test(name) ? `${name} ${BLOCK.rate.name}` : name));
  return [heads, ...cells.map(cell => names.map(name => cell[name]))].map(line => line.map(csvEntry).join(",") + "\r\n").join("");
}

function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  h("a", {href: address, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
