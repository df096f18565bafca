"use strict";
// What is known of one cell, behind its row.

function detailOf(cell) {
  const known = BLOCK.details[cell.id] ?? {attempts: []};
  return h("div", {class: "parts"}, [
    part("Phases", phasesOf(cell)),
    part("Iterations by block", samplesOf(cell, known)),
    part("Ranks", ranksOf(cell, known)),
    part("Overlap", overlapOf(known)),
    part("Check against the reference", checksOf(known)),
    part("Timeline", timelineOf(known)),
    part("Attempts", attemptsOf(known)),
    part("Commands", commandsOf(cell)),
  ]);
}

const part = (title, content) => (content ? h("div", {}, h("h4", {}, title), content) : null);
const table = (heads, rows) =>
  h(
    "table",
    {},
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        heads.map((name, i) => h("th", {class: i ? "number" : null}, name)),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map(row =>
        h(
          "tr",
          {},
          row.map((text, i) => h("td", {class: i ? "number" : null}, text)),
        ),
      ),
    ),
  );

function phasesOf(cell) {
  const phases = ["forward", "backward", "total"].filter(phase => cell[phase] !== null);
  if (!phases.length) return whyNot(cell) ? h("p", {}, whyNot(cell)) : null;
  return table(
    ["phase", "time", "95 %", BLOCK.rate.name, "by mean"],
    phases.map(phase => [
      phase,
      seconds(cell[phase]),
      `±${percent(cell[`${phase}_reach`])}`,
      digits(cell[`${phase}_rate`]),
      digits(cell[`${phase}_bymean`]),
    ]),
  );
}

/** A strip per block: drift, outliers and two modes show at once. */
function samplesOf(cell, known) {
  const points = (known.samples ?? []).flatMap((block, number) =>
    block.map((part, i) => ({block: number + 1, place: i, time: (part / BLOCK.part) * cell.total})),
  );
  if (points.length < 2) return null;
  return plotted(
    {
      width: 330,
      height: 120,
      marginLeft: 52,
      x: {label: null, axis: null},
      fx: {label: "block"},
      y: {label: null, tickFormat: seconds, ticks: 4, grid: true},
      marks: [
        Plot.ruleY([cell.total], {stroke: "currentColor", strokeDasharray: "3,2"}),
        Plot.dot(points, {fx: "block", x: "place", y: "time", r: 2, fill: styleOf(cell.choice).color}),
      ],
    },
    `${points.length} iterations of ${known.samples.length} blocks, ${d3
      .extent(points, p => p.time)
      .map(seconds)
      .join(" to ")}`,
  );
}

function ranksOf(cell, known) {
  const points = Object.entries(known.ranks ?? {}).flatMap(([phase, parts]) =>
    parts.map((part, rank) => ({phase, rank, time: (part / BLOCK.part) * cell[phase]})),
  );
  if (new Set(points.map(p => p.rank)).size < 2) return null;
  const slowest = d3.greatest(points, p => p.time / cell[p.phase]);
  return plotted(
    {
      width: 330,
      height: 120,
      marginLeft: 52,
      x: {label: "rank", tickFormat: "d"},
      y: {label: null, tickFormat: time => (time ? seconds(time) : "0"), ticks: 4, grid: true, zero: true},
      symbol: {legend: false},
      marks: [
        Plot.dot(points, {
          x: "rank",
          y: "time",
          symbol: "phase",
          r: 2.5,
          stroke: styleOf(cell.choice).color,
          title: p => `rank ${p.rank} ${p.phase}: ${seconds(p.time)}`,
        }),
      ],
    },
    `medians of ${known.ranks.forward?.length ?? 0} ranks; slowest for its phase: rank ${slowest.rank}, ${slowest.phase}`,
  );
}

function overlapOf(known) {
  const rows = Object.entries(known.overlap ?? {});
  return rows.length
    ? table(
        ["", ""],
        rows.map(([name, value]) => [
          name.replace(/_s$/, "").replace("/", " "),
          name.endsWith("_s") ? seconds(value) : percent(value),
        ]),
      )
    : null;
}

function checksOf(known) {
  const rows = known.checks ?? [];
  return rows.length
    ? table(
        ["tensor", "error", "bound", "of bound"],
        rows.map(([name, error, bound]) => [name, digits(error), digits(bound), bound ? percent(error / bound) : ""]),
      )
    : null;
}

function timelineOf(known) {
  if (known.recorded)
    return h("p", {class: "dim"}, "Recorded, but left out of this page for its size: the last command draws it with --out.");
  if (!known.timeline) return null;
  const bars = known.timeline.flatMap((steps, rank) =>
    steps.flatMap(([step, ...marks]) =>
      ["begins messages", "computes", "waits and merges"].map((what, i) => ({
        rank,
        step,
        what,
        from: marks[i],
        to: marks[i + 1],
      })),
    ),
  );
  return plotted(
    {
      width: 420,
      height: 40 + 12 * known.timeline.length,
      marginLeft: 30,
      x: {label: "% of an iteration", transform: v => (v / BLOCK.part) * 100},
      y: {label: "rank", type: "band"},
      color: {
        domain: ["begins messages", "computes", "waits and merges"],
        range: ["#E69F00", "#0072B2", "#D55E00"],
        legend: true,
      },
      marks: [
        Plot.barX(bars, {x1: "from", x2: "to", y: "rank", fill: "what", title: b => `rank ${b.rank} step ${b.step}: ${b.what}`}),
      ],
    },
    "what each rank did when",
  );
}

function attemptsOf(known) {
  if (!known.attempts.length) return null;
  return h(
    "table",
    {},
    h(
      "tbody",
      {},
      known.attempts.map(a =>
        h(
          "tr",
          {},
          h("td", {}, String(a.n)),
          h("td", {class: a.status}, a.status),
          h("td", {}, a.kind),
          h("td", {class: "words"}, a.cause),
          h("td", {}, a.nodes),
          h("td", {}, a.job ? `job ${a.job}` : ""),
          h("td", {}, new Date(a.at * 1000).toISOString().slice(0, 16).replace("T", " ")),
        ),
      ),
    ),
  );
}

function commandsOf(cell) {
  const names = {skipped: ["explain"], predicted: ["measure", "explain"]}[cell.status] ?? ["logs", "rerun", "explain"];
  return h(
    "div",
    {},
    names.map(name => {
      const text = BLOCK.commands[name].replace("CELL", cell.id);
      return h("div", {class: "command"}, copyButton(text, "command"), h("code", {}, text));
    }),
  );
}
