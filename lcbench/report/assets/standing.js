"use strict";
// Sections that stand in the page already, of which a filter leaves what its cells are in.

/** Hides what is about none of these cells. */
function showStanding(section, cells) {
  if (!section) return;
  const left = new Set(cells.map(cell => cell.id));
  const parts = [...section.querySelectorAll("[data-cells]")];
  for (const part of parts) part.hidden = !part.dataset.cells.split(" ").some(id => left.has(id));
  for (const table of section.querySelectorAll("table")) {
    const empty = [...table.tBodies[0].rows].every(row => row.hidden);
    table.closest(".scroll").hidden = empty;
  }
  section.querySelector(".nothing").hidden = parts.some(part => !part.hidden);
}
