"use strict";
// Elements, numbers for people, and the cells of the block. Whatever comes from results becomes text nodes, never markup.

const BLOCK = JSON.parse(document.getElementById("data").textContent);

/** An element: `h("td", {class: "number", onclick: f}, "text", child)`. Attributes that are null or false are left out. */
function h(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter(child => child !== null && child !== undefined));
  return made;
}

const LARGE = [
  ["M", 1e6],
  ["G", 1e9],
  ["T", 1e12],
];

/**
 * Three significant digits without an exponent from 1e-3 to 1e15, as `report/amounts.py` writes them; empty where there is none.
 */
function digits(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  if (value === 0) return "0";
  const rounded = Number(value.toExponential(2)),
    size = Math.abs(rounded);
  if (size >= 1e6 && size < 1e15) return scaled(value, LARGE).replace(" ", "");
  if (size < 1e-3 || size >= 1e15) return value.toExponential(2).replace(/e([+-])(\d)$/, "e$10$2");
  return rounded.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
}

/** In the largest of these units, [name, size] from small to large, of which it is at least one. */
function scaled(value, units) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(Number(value.toExponential(2)));
  const [unit, of] = units.findLast(([, of]) => Number((size / of).toExponential(2)) >= 1) ?? units[0];
  return `${digits(value / of)} ${unit}`;
}

const seconds = value =>
  scaled(value, [
    ["ns", 1e-9],
    ["µs", 1e-6],
    ["ms", 1e-3],
    ["s", 1],
  ]);
const bytes = value =>
  scaled(value, [
    ["B", 1],
    ["KiB", 2 ** 10],
    ["MiB", 2 ** 20],
    ["GiB", 2 ** 30],
    ["TiB", 2 ** 40],
  ]);
const percent = value => (value === null || value === undefined ? "" : `${(value * 100).toFixed(1)} %`);
const times = value => (value >= 0.005 && value < 9.995 ? `${value.toFixed(2)}x` : `${digits(value)}x`);
const more = ratio => (ratio >= 2 ? times(ratio) : `${ratio >= 1 ? "+" : ""}${(100 * (ratio - 1)).toFixed(1)} %`);

/** 65536 -> 64k, as on the command line. */
function tokens(count) {
  for (const [suffix, unit] of [
    ["m", 2 ** 20],
    ["k", 2 ** 10],
  ])
    if (count && count % unit === 0) return `${count / unit}${suffix}`;
  return String(count);
}

/** Rows of a block of columns; a column of words is its values and, per row, the place among them. */
function unpacked(columns, repeated) {
  const whole = Object.fromEntries(
    Object.entries(columns).map(([name, column]) => [
      name,
      repeated.includes(name) ? column[1].map(place => column[0][place]) : column,
    ]),
  );
  const names = Object.keys(whole);
  return whole[names[0]].map((_, i) => Object.fromEntries(names.map(name => [name, whole[name][i]])));
}

const unique = values => [...new Set(values)];
const geometric = values => Math.exp(d3.mean(values, Math.log));

/** The style of a choice: the same in every figure, chip and bar of the report. */
const styleOf = choice => BLOCK.styles[choice] ?? {color: "currentColor", symbol: "circle", dash: null};

function copyButton(text, what) {
  return h(
    "button",
    {
      type: "button",
      title: `copy ${what}`,
      "aria-label": `copy ${what}`,
      onclick: event => {
        event.stopPropagation();
        copy(text);
        event.currentTarget.replaceChildren("✓");
      },
    },
    copyIcon(),
  );
}

/** Two sheets of paper: a letter for them is missing in many fonts. */
function copyIcon() {
  const icon = d3
    .create("svg")
    .attr("width", 11)
    .attr("height", 12)
    .attr("fill", "none")
    .attr("stroke", "currentColor")
    .attr("aria-hidden", "true");
  icon.append("path").attr("d", "M3.5 3.5h6v7h-6zM7.5 3.5v-3h-6v7h2");
  return icon.node();
}

/** Into the clipboard; a page from disk, or in a frame, may have none but the old way. */
function copy(text) {
  const old = () => {
    const field = h("textarea", {style: "position: fixed; opacity: 0"});
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  };
  navigator.clipboard ? navigator.clipboard.writeText(text).catch(old) : old();
}
