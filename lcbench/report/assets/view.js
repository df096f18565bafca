"use strict";
// What is looked at: facets, words, the figure and its switches. It stands in the address, so that a view can be sent to somebody.

const view = {facets: new Map(), words: "", picks: new Map()};
const listeners = [];

const onChange = listener => listeners.push(listener);

function changed() {
  writeAddress();
  for (const listener of listeners) listener();
}

/** `#mask=causal&scale=2x8&fig=length`; a facet with several values has its name several times. */
function writeAddress() {
  const words = new URLSearchParams();
  for (const [facet, values] of view.facets) for (const value of values) words.append(facet, value);
  if (view.words) words.set("words", view.words);
  for (const [name, value] of view.picks) words.set(`.${name}`, value);
  const hash = words.toString();
  try {
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  } catch {
    /* a frame without an address of its own: the view still works, it just cannot be sent */
  }
}

function readAddress(facets) {
  view.facets.clear();
  view.picks.clear();
  view.words = "";
  const hash = location.hash.slice(1);
  if (!hash.includes("=")) return hash;
  for (const [name, value] of new URLSearchParams(hash)) {
    if (facets.some(facet => facet.name === name)) view.facets.set(name, (view.facets.get(name) ?? new Set()).add(value));
    else if (name === "words") view.words = value;
    else if (name.startsWith(".")) view.picks.set(name.slice(1), value);
  }
  return "";
}

/** The facets that there are to choose from: those with more than one value. `of`: the value of a cell, as text. */
function facetsOf(cells, all) {
  return all.map(facet => ({...facet, values: unique(cells.map(facet.of))})).filter(facet => facet.values.length > 1);
}

const passes = (cell, facet) => !view.facets.has(facet.name) || view.facets.get(facet.name).has(facet.of(cell));
const seen = (cells, facets, but = null) => cells.filter(cell => facets.every(facet => facet === but || passes(cell, facet)));

/** Whether a facet other than these is in use. */
const narrowed = (...but) => [...view.facets.keys()].some(name => !but.includes(name));

function toggle(facet, value) {
  const chosen = view.facets.get(facet.name) ?? new Set();
  chosen.has(value) ? chosen.delete(value) : chosen.add(value);
  chosen.size ? view.facets.set(facet.name, chosen) : view.facets.delete(facet.name);
  changed();
}

/** Chips with how many cells each would leave, given the other facets. */
function drawFacets(place, cells, facets) {
  const focused = document.activeElement?.dataset?.chip;
  place.replaceChildren(
    ...facets.map(facet => {
      const counts = d3.rollup(seen(cells, facets, facet), found => found.length, facet.of);
      return h(
        "fieldset",
        {class: "facet"},
        h("legend", {}, facet.name),
        facet.values.map(value => {
          const on = view.facets.get(facet.name)?.has(value) ?? false,
            count = counts.get(value) ?? 0;
          return h(
            "button",
            {
              type: "button",
              class: "chip",
              "aria-pressed": String(on),
              disabled: !count && !on,
              "data-chip": `${facet.name}=${value}`,
              onclick: () => toggle(facet, value),
            },
            value,
            h("small", {}, String(count)),
          );
        }),
      );
    }),
    view.facets.size ? h("button", {type: "button", onclick: clearFacets}, "show all") : "",
  );
  if (focused) place.querySelector(`[data-chip="${CSS.escape(focused)}"]`)?.focus();
}

function clearFacets() {
  view.facets.clear();
  view.words = "";
  changed();
}

/** One of `values` for a switch of figures: the one in the address, else the first. */
function picked(name, values, first = values[0]) {
  const found = view.picks.get(name);
  return values.find(value => String(value) === found) ?? first;
}

function choose(name, label, values, shown = String, first = values[0]) {
  const now = picked(name, values, first);
  const field = h(
    "select",
    {
      "data-pick": name,
      "aria-label": label,
      onchange: event => {
        view.picks.set(name, event.target.value);
        changed();
        document.querySelector(`[data-pick="${name}"]`)?.focus();
      },
    },
    values.map(value => h("option", {value: String(value), selected: value === now}, shown(value))),
  );
  return [now, values.length > 1 ? h("label", {}, `${label} `, field) : null];
}
