"use strict";
// Which choice to take: the same as report/regret.py and report/winners.py say, of those cells that a filter leaves.

/** Of cells that differ only in how they were measured one per choice and problem: the median one. */
function oneEach(good) {
  return d3
    .groups(
      good,
      cell => cell.problem,
      cell => cell.choice,
    )
    .flatMap(([, choices]) => choices.map(([, same]) => d3.sort(same, cell => cell.total)[same.length >> 1]));
}

/**
 * Per choice: its time over the best exact one of each problem. Those that ran in nearly all problems first, by their mean; those
 * that approximate last, the closest of them first.
 */
function regretsOf(good) {
  const every = d3.groups(oneEach(good), cell => cell.problem),
    problems = every.filter(([, mine]) => mine.some(isExact)),
    cells = problems.flatMap(([, mine]) => mine),
    ran = d3.rollup(
      cells,
      mine => mine.length,
      cell => cell.choice,
    );
  const ratios = problems
    .filter(([, mine]) => mine.length > 1)
    .flatMap(([, mine]) => {
      const best = d3.min(mine.filter(isExact), cell => cell.total);
      return mine.map(cell => ({cell, ratio: cell.total / best}));
    });
  const found = d3
    .groups(ratios, r => r.cell.choice)
    .map(([choice, mine]) => {
      const worst = d3.greatest(mine, r => r.ratio),
        approximate = !mine.every(r => isExact(r.cell)),
        furthest = d3.max(mine, r => r.cell.distance);
      return {
        choice,
        approximate,
        furthest,
        named: approximate && furthest !== undefined ? `${choice}, distance up to ${digits(furthest)}` : choice,
        mean: geometric(mine.map(r => r.ratio)),
        worst: worst.ratio,
        worstCell: worst.cell,
        fastest: approximate ? 0 : mine.filter(r => r.ratio === 1).length,
        ran: ran.get(choice),
        compared: mine.length,
        problems: problems.length,
      };
    });
  const most = d3.max(d3.rollup(cells.filter(isExact), mine => mine.length, cell => cell.choice).values());
  return d3.sort(
    found,
    r => r.approximate,
    r => farOff(!r.approximate, r.furthest),
    r => ran.get(r.choice) < BLOCK.nearlyAll * most,
    r => r.mean,
  );
}

/** The fastest exact cell of every problem, and how far the next is behind; less than 2 %, or than the two intervals, is close. */
function winnersOf(good) {
  return d3
    .groups(good.filter(isExact), cell => cell.problem)
    .map(([, cells]) => {
      const [best, next] = d3.sort(cells, cell => cell.total);
      const margin = next ? next.total / best.total : null;
      const least = BLOCK.known ? BLOCK.close : BLOCK.unmeasured;
      const close = next ? margin < 1 + least || Math.log(margin) < Math.hypot(best.total_reach, next.total_reach) : false;
      return {best, next, margin, close};
    });
}

const cellLink = (cell, text) => h("a", {href: `#c-${cell.id}`}, text);

function regretRow(r, widest) {
  return h(
    "tr",
    {style: `--c: ${styleOf(r.choice).color}`},
    h("th", {scope: "row", class: "mine"}, r.named),
    h("td", {class: "number"}, times(r.mean)),
    h(
      "td",
      {class: "bar"},
      h("i", {style: `width: ${Math.max(2, (100 * (r.mean - 1)) / Math.max(widest - 1, 1e-9)).toFixed(0)}%`}),
    ),
    h("td", {class: "number"}, times(r.worst)),
    h("td", {}, cellLink(r.worstCell, r.worstCell.place)),
    h("td", {class: "number"}, `${r.fastest} of ${r.compared}`),
    h("td", {class: "number"}, `${r.ran} of ${r.problems}`),
  );
}

function winnerEntry(w) {
  if (!w) return h("td");
  const said = w.margin === null ? "only one ran" : w.close ? "the order is not known" : "clear";
  return h(
    "td",
    {
      class: w.close ? "mine close" : "mine",
      style: `--c: ${styleOf(w.best.choice).color}`,
      title: w.next ? `${seconds(w.best.total)}; next: ${w.next.choice}, ${more(w.margin)}; ${said}` : said,
    },
    h("a", {href: `#c-${w.best.id}`}, `${w.close ? "≈ " : ""}${w.best.choice}`),
    " ",
    h("small", {}, [digits(w.best.total_rate), w.margin === null ? "" : ` · ${more(w.margin)}`].join("")),
  );
}

/** Rows mask x scale, a column per length, or per tokens per GPU where that has fewer values (weak scaling). */
function matrixOf(winners) {
  const by = BLOCK.matrixBy,
    columns = d3.sort(unique(winners.map(w => w.best[by])));
  const masks = d3.groups(winners, w => w.best.mask);
  const head = h(
    "thead",
    {},
    h(
      "tr",
      {},
      h("th", {}, "mask"),
      h("th", {}, "scale"),
      BLOCK.settings ? h("th", {}, "setting") : null,
      columns.map(c => h("th", {}, by === "share" ? `${tokens(c)} per GPU` : tokens(c))),
    ),
  );
  const bodies = masks.map(([mask, mine]) => {
    const rows = d3
      .groups(
        mine,
        w => w.best.scale,
        w => w.best.where,
      )
      .flatMap(([scale, inner]) => inner.map(([where, ws]) => ({scale, where, ws})));
    return h(
      "tbody",
      {},
      d3
        .sort(rows, row => row.ws[0].best.ranks)
        .map((row, i) =>
          h(
            "tr",
            {},
            i ? null : h("th", {scope: "rowgroup", rowspan: rows.length}, mask),
            h("th", {scope: "row"}, row.scale),
            BLOCK.settings ? h("td", {}, row.where) : null,
            columns.map(c => winnerEntry(row.ws.find(w => w.best[by] === c))),
          ),
        ),
    );
  });
  return [head, ...bodies];
}

/** What to use of what the filter leaves; nothing for fewer problems or choices than report/regret.py asks for. */
function verdictOf(regrets) {
  const exact = regrets.filter(r => !r.approximate),
    [best] = exact;
  if (exact.length < BLOCK.fewestChoices || best.compared < BLOCK.fewestProblems) return [];
  const over = `Over these ${best.compared} problems it takes on average ${times(best.mean)} the time of the best`;
  return [h("b", {}, `Use ${best.choice}.`), ` ${over}, at worst ${times(best.worst)} (${best.worstCell.place}).`];
}

/** Verdict, regret and winners of what the filter leaves; unfiltered they are as Python wrote them. A verdict for each workload. */
const written = new Map();
function drawAnswers(good) {
  const now = narrowed("status");
  for (const [place, workload] of BLOCK.workloads.entries()) {
    const end = place ? `-${workload}` : "",
      found = now ? regretsOf(good.filter(cell => cell.workload === workload)) : [],
      said = verdictOf(found),
      widest = d3.max(found, r => r.mean) ?? 1;
    const name = said.length && BLOCK.workloads.length > 1 ? [`${workload}: `] : [];
    const verdict = document.getElementById(`verdict${end}`),
      regret = document.getElementById(`regret${end}`)?.tBodies[0];
    if (verdict) rewrite(`verdict${end}`, verdict, now ? [...name, ...said] : null);
    if (verdict) verdict.hidden = !verdict.hasChildNodes();
    if (regret) rewrite(`regret${end}`, regret, now ? found.map(r => regretRow(r, widest)) : null);
  }
  const matrix = document.getElementById("matrix");
  if (matrix) rewrite("matrix", matrix, now ? matrixOf(winnersOf(good)) : null);
}

/** Put these into an element, or, of null, what Python wrote there. */
function rewrite(name, element, children) {
  if (!written.has(name)) written.set(name, [...element.childNodes]);
  element.replaceChildren(...(children ?? written.get(name)));
}
