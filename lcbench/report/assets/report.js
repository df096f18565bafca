"use strict";
// The report of a sweep: from the address to what is seen.

const CELLS = unpacked(BLOCK.cells, BLOCK.repeated);
for (const cell of CELLS) {
  const [nodes, gpus] = cell.scale.split("x").map(Number);
  cell.order = nodes * gpus + nodes / 1e6; // 12x8 comes after 2x8
}
const FACETS = facetsOf(CELLS, [
  {name: "mask", of: cell => cell.mask},
  {name: "scale", of: cell => cell.scale},
  {name: "length", of: cell => tokens(cell.seqlen)},
  {name: "strategy", of: cell => cell.strategy},
  {name: "kernel", of: cell => cell.kernel},
  {name: "workload", of: cell => cell.workload},
  ...BLOCK.ofWorkload.map(axis => ({name: axis, of: cell => cell[axis]})),
  {name: "setting", of: cell => cell.where},
  {name: "status", of: cell => cell.status},
]);
const ROWS = drawCells(document.getElementById("rows"), CELLS);

function draw() {
  const left = seen(CELLS, FACETS);
  drawFacets(document.getElementById("facets"), CELLS, FACETS);
  drawAnswers(left.filter(isGood));
  drawFigures(document.getElementById("figure"), left);
  const steps = document.getElementById("steps");
  if (steps) drawSteps(steps, left);
  const longest = document.getElementById("lengths");
  if (longest) drawLongest(longest, left);
  for (const id of ["serving", "mixed", "sparse", "linear"]) showStanding(document.getElementById(id), left);
  showCells(ROWS, left);
  document.getElementById("text").value = view.words;
  const said = document.getElementById("narrowed");
  said.hidden = !view.facets.size;
  const chosen = [...view.facets].map(([name, values]) => `${name} ${[...values].join(" or ")}`);
  said.replaceChildren(
    `${left.length} of ${CELLS.length} cells: ${chosen.join(", ")}. `,
    h("button", {type: "button", onclick: clearFacets}, "show all"),
  );
}

/** Go to a section, or to a cell: its row is shown, whatever was filtered, and opened. */
function goTo(id) {
  if (matchMedia("(max-width: 1000px)").matches) document.getElementById("filter").open = false;
  if (id.startsWith("c-")) {
    const row = document.getElementById(id);
    if (!row) return;
    if (row.hidden) {
      clearFacets();
    }
    unfold(row, true);
    row.scrollIntoView({block: "center"});
    row.querySelector(".twist").focus({preventScroll: true});
  } else {
    document.getElementById(id)?.scrollIntoView();
  }
}

/** Links within the page keep the view: they move, and only a cell's stands in the address. */
function follow(event) {
  const link = event.target.closest("a[href^='#']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const id = link.getAttribute("href").slice(1);
  goTo(id);
  if (!view.facets.size && !view.picks.size && !view.words)
    try {
      history.replaceState(null, "", `#${id}`);
    } catch {
      /* a frame without an address */
    }
}

function arrive() {
  const place = readAddress(FACETS);
  draw();
  if (place) goTo(place);
}

onChange(draw);
document.addEventListener("click", follow);
window.addEventListener("hashchange", arrive);
document.getElementById("text").addEventListener("input", event => {
  view.words = event.target.value;
  writeAddress();
  showCells(ROWS, seen(CELLS, FACETS));
});
document
  .getElementById("csv")
  .addEventListener("click", () =>
    download(`${BLOCK.name}-cells.csv`, csvOf(ROWS.filter(row => !row.hidden).map(row => row.cell))),
  );
if (matchMedia("(max-width: 1000px)").matches) document.getElementById("filter").open = false;
let width = innerWidth;
window.addEventListener("resize", () => {
  if (Math.abs(innerWidth - width) > 40) {
    width = innerWidth;
    draw();
  }
});
arrive();
