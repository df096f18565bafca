"use strict";
// Two sweeps on one page: every cell that both have, B against A.

const CELLS = unpacked(BLOCK.cells, BLOCK.repeated);
for (const cell of CELLS)
  cell.order = cell.scale.split("x").reduce((all, part) => all * Number(part), 1) + Number(cell.scale.split("x")[0]) / 1e6;
const FACETS = facetsOf(CELLS, [
  {name: "verdict", of: cell => cell.verdict},
  {name: "mask", of: cell => cell.mask},
  {name: "scale", of: cell => cell.scale},
  {name: "length", of: cell => tokens(cell.seqlen)},
  {name: "strategy", of: cell => cell.choice},
  {name: "kernel", of: cell => cell.kernel},
]);
const BAND = 0.05;
const ratioText = cell => `${cell.ratio.toFixed(3)} (${cell.low.toFixed(3)} to ${cell.high.toFixed(3)})`;
const tip = cell => `${cell.label}\nA ${seconds(cell.a)}, B ${seconds(cell.b)}\nB / A ${ratioText(cell)}: ${cell.verdict}`;
const linkTo = (report, id) => (report ? h("a", {href: `${report}#c-${id}`}, id) : id);

function drawRows() {
  const varies = key => unique(CELLS.map(cell => cell[key])).length > 1;
  const columns = [
    {name: "verdict", of: cell => entry(cell.verdict, cell.verdict, {slower: "failed", faster: "ok"}[cell.verdict] ?? "")},
    {
      name: "cell in A",
      of: cell => entry(h("span", {}, linkTo(BLOCK.reports[0], cell.id), copyButton(cell.id, "cell id")), cell.id, "id"),
    },
    varies("choice") && {name: "strategy", of: cell => entry(cell.choice)},
    varies("kernel") && {name: "kernel", of: cell => entry(cell.kernel)},
    varies("mask") && {name: "mask", of: cell => entry(cell.mask, cell.mask, "name")},
    varies("seqlen") && {name: "length", kind: "number", of: cell => number(cell.seqlen, tokens(cell.seqlen))},
    varies("scale") && {name: "scale", kind: "number", of: cell => number(cell.order, cell.scale)},
    {name: "A", kind: "number", of: cell => number(cell.a, seconds(cell.a))},
    {name: "B", kind: "number", of: cell => number(cell.b, seconds(cell.b))},
    {
      name: "B / A",
      kind: "number",
      about: "time of B over that of A, with the 95 % interval",
      of: cell => number(cell.ratio, ratioText(cell)),
    },
    {
      name: "p, Holm",
      kind: "number",
      about: "after a correction for the number of cells",
      of: cell => number(cell.p, digits(cell.p)),
    },
    {name: "cell in B", of: cell => entry(linkTo(BLOCK.reports[1], cell.other), cell.other, "id")},
  ].filter(Boolean);
  const rows = CELLS.map(cell =>
    Object.assign(
      rowOf(
        columns.map(column => column.of(cell)),
        {id: `c-${cell.id}`, class: "row"},
      ),
      {cell},
    ),
  );
  document.getElementById("rows").replaceChildren(sortableHead(columns), h("tbody", {}, rows));
  return rows;
}

function scatter(cells) {
  const [low, high] = d3.extent(cells.flatMap(cell => [cell.a, cell.b])),
    ends = [low / 1.2, high * 1.2];
  const outside = cells.filter(cell => Math.abs(Math.log(cell.ratio)) > Math.log(1 + BAND));
  const finding = `${cells.length} cells, time of B against A; ${outside.length} outside of the band of 5 %.`;
  return plotted(
    {
      width: 500,
      height: 420,
      marginLeft: 58,
      x: {type: "log", label: "time in A", domain: ends, tickFormat: seconds, ticks: 4},
      y: {type: "log", label: "time in B", domain: ends, tickFormat: seconds, ticks: 4},
      marks: [
        Plot.areaY(ends, {
          x: d => d,
          y1: d => d / (1 + BAND),
          y2: d => d * (1 + BAND),
          fill: "currentColor",
          fillOpacity: 0.14,
          clip: true,
        }),
        Plot.line(ends, {x: d => d, y: d => d, stroke: "currentColor", strokeOpacity: 0.5}),
        ...dots(cells, {x: "a", y: "b"}),
        Plot.tip(cells, Plot.pointer({x: "a", y: "b", title: tip})),
      ],
    },
    finding,
  );
}

/** The same as a ratio: what changed by a few percent shows here. */
function ratios(cells) {
  const reach = Math.max(0.08, d3.max(cells, cell => Math.abs(cell.ratio - 1)) * 1.15);
  return plotted(
    {
      width: 560,
      height: 420,
      marginLeft: 50,
      x: {type: "log", label: "time in A", tickFormat: seconds, ticks: 4},
      y: {label: "B / A", domain: [Math.max(0.01, 1 - reach), 1 + reach], grid: true},
      marks: [
        Plot.rectY([0], {y1: 1 - BAND, y2: 1 + BAND, fill: "currentColor", fillOpacity: 0.1}),
        Plot.ruleY([1], {stroke: "currentColor"}),
        Plot.ruleX(cells, {
          x: "a",
          y1: "low",
          y2: "high",
          stroke: cell => styleOf(cell.choice).color,
          strokeOpacity: 0.4,
          clip: true,
        }),
        ...dots(cells, {x: "a", y: "ratio"}),
        Plot.tip(cells, Plot.pointer({x: "a", y: "ratio", title: tip})),
      ],
    },
    `B over A by time of A, from ${d3
      .extent(cells, cell => cell.ratio)
      .map(digits)
      .join(" to ")}`,
  );
}

/** Filled where the change is beyond the noise. */
const dots = (cells, place) =>
  d3
    .groups(cells, cell => cell.choice)
    .map(([choice, mine]) =>
      Plot.dot(mine, {
        ...place,
        symbol: styleOf(choice).symbol,
        r: 3.2,
        stroke: styleOf(choice).color,
        fill: cell => (cell.verdict === "same" ? "var(--back)" : styleOf(choice).color),
      }),
    );

function draw() {
  const left = seen(CELLS, FACETS),
    place = document.getElementById("figure");
  drawFacets(document.getElementById("facets"), CELLS, FACETS);
  place.replaceChildren(
    ...(left.length
      ? [
          legend(unique(left.map(cell => cell.choice))),
          h(
            "figure",
            {},
            h("div", {class: "side-by-side"}, scatter(left), ratios(left)),
            h(
              "figcaption",
              {},
              "Grey: within 5 %. Filled: beyond the noise, after the correction for the number of cells; hollow: the same.",
            ),
          ),
        ]
      : [h("p", {class: "dim"}, "No cells.")]),
  );
  document.getElementById("text").value = view.words;
  show(left);
  const said = document.getElementById("narrowed");
  said.hidden = !view.facets.size;
  const ratio = left.length ? ` B takes ${times(geometric(left.map(cell => cell.ratio)))} the time of A on average. ` : " ";
  said.replaceChildren(
    `${left.length} of ${CELLS.length} cells.${ratio}`,
    h("button", {type: "button", onclick: clearFacets}, "show all"),
  );
}

const ROWS = drawRows();

function show(left) {
  const wanted = new Set(left),
    words = wordsOf(view.words);
  for (const row of ROWS) row.hidden = !wanted.has(row.cell) || !hasWords(row, words);
  const count = ROWS.filter(row => !row.hidden).length;
  document.getElementById("shown").textContent = count === ROWS.length ? String(count) : `${count} of ${ROWS.length}`;
}

function arrive() {
  const place = readAddress(FACETS);
  draw();
  if (place) document.getElementById(place)?.scrollIntoView({block: place.startsWith("c-") ? "center" : "start"});
}

onChange(draw);
window.addEventListener("hashchange", arrive);
document.getElementById("text").addEventListener("input", event => {
  view.words = event.target.value;
  writeAddress();
  show(seen(CELLS, FACETS));
});
document
  .getElementById("csv")
  .addEventListener("click", () => download(`${BLOCK.name}.csv`, csvOf(ROWS.filter(row => !row.hidden).map(row => row.cell))));
if (matchMedia("(max-width: 1000px)").matches) document.getElementById("filter").open = false;
arrive();
