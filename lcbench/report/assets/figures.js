"use strict";
// The figures, one per question in a tab; each is there only if the cells can answer it.

const FIGURES = [byLength, byGpus, efficiency, ranking, heatMap, memory, front, timeSplit, roofline, pivot];

/** The tabs of figures that these cells call for, and the one that is looked at. */
function drawFigures(place, cells) {
  const settings = unique(cells.map(cell => cell.setting));
  const [setting, settingField] = choose("setting", "setting", settings);
  const mine = overSeeds(cells.filter(cell => cell.setting === setting));
  const answers = mine.filter(cell => cell.status !== "predicted" || isGood(cell)),
    cellsOf = figure => (figure.foretold ? mine : answers);
  const figures = FIGURES.filter(figure => figure.asks(cellsOf(figure)));
  if (!figures.length) return place.replaceChildren(h("p", {class: "dim"}, "Nothing of this view has a good result to draw."));
  const first =
    unique(mine.map(cell => cell.problem)).length === 1 ? (figures.find(f => f === ranking) ?? figures[0]) : figures[0];
  const now = picked(
      "fig",
      figures.map(f => f.id),
      first.id,
    ),
    chosen = figures.find(f => f.id === now),
    drawn = chosen.draw(cellsOf(chosen));
  const tabs = h(
    "div",
    {class: "tabs", role: "tablist", "aria-label": "figures", onkeydown: moveTab},
    figures.map(f =>
      h(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${f.id}`,
          "aria-selected": String(f.id === now),
          tabindex: f.id === now ? "0" : "-1",
          onclick: () => pickTab(f.id),
        },
        f.name,
      ),
    ),
  );
  place.replaceChildren(
    tabs,
    h(
      "div",
      {role: "tabpanel", "aria-labelledby": `tab-${now}`},
      h("div", {class: "controls"}, settingField, drawn.fields),
      h(
        "figure",
        {id: `figure-${now}`},
        h("h3", {}, drawn.title),
        drawn.choices?.length > 1 ? legend(drawn.choices) : null,
        drawn.node,
        h("figcaption", {}, h("b", {}, drawn.finding), " ", drawn.caption ?? ""),
      ),
    ),
  );
}

function pickTab(id) {
  view.picks.set("fig", id);
  changed();
  document.getElementById(`tab-${id}`)?.focus({preventScroll: true});
}

/** Arrow keys move between tabs. */
function moveTab(event) {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  const tabs = [...event.currentTarget.querySelectorAll("[role=tab]")],
    at = tabs.findIndex(tab => tab.getAttribute("aria-selected") === "true");
  pickTab(tabs[(at + step + tabs.length) % tabs.length].id.replace("tab-", ""));
}
