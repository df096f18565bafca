"use strict";
// Figures of bars, squares and dots, and the table of rates: a problem at a time, or cells of all.

/** One problem of those that have so many choices. A section of its own has its own switches, whose names begin with `of`, and
 * begins with most GPUs, and with the longest of the lengths that most choices ran. */
function chooseProblem(cells, least = 2, of = "") {
  const most = (values, ran) => (of ? d3.greatest(values, value => ran(value) + values.indexOf(value) / 1e3) : values[0]);
  const counts = d3.rollup(
      cells,
      mine => mine.length,
      cell => cell.problem,
    ),
    fit = cells.filter(cell => counts.get(cell.problem) >= least);
  const [mask, maskField] = choose(`${of}mask`, "mask", unique(fit.map(cell => cell.mask)));
  const ofMask = fit.filter(cell => cell.mask === mask);
  const scales = inOrderOfScale(ofMask),
    [scale, scaleField] = choose(`${of}scale`, "scale", scales, String, most(scales, () => 0));
  const ofScale = ofMask.filter(cell => cell.scale === scale);
  const lengths = lengthsOf(ofScale),
    [length, lengthField] = choose(
      `${of}seqlen`,
      "length",
      lengths,
      tokens,
      most(lengths, length => ofScale.filter(cell => cell.seqlen === length && isDrawn(cell)).length),
    );
  const ofLength = ofScale.filter(cell => cell.seqlen === length);
  const [where, whereField] = choose(`${of}where`, "setting", unique(ofLength.map(cell => cell.where)));
  return {
    cells: ofLength.filter(cell => cell.where === where),
    said: `${mask} ${tokens(length)} ${scale}`,
    fields: [maskField, scaleField, lengthField, whereField],
  };
}

const ranking = {
  id: "ranking",
  name: "ranking",
  asks: cells =>
    d3.some(
      d3
        .rollup(
          cells.filter(isGood),
          mine => mine.length,
          c => c.problem,
        )
        .values(),
      count => count > 1,
    ),
  draw(cells) {
    const problem = chooseProblem(cells);
    const good = ranked(problem.cells.filter(isGood)),
      bad = problem.cells.filter(cell => !isGood(cell));
    const finding = rankingSaid(good, bad);
    const node = rankingBars(good, bad, finding);
    return {
      title: `Ranking: ${problem.said}`,
      fields: problem.fields,
      finding,
      node,
      caption:
        `Bars: median iteration; whiskers: 95 % interval; dashed: the best.${good.every(isExact) ? "" : ` ${BLOCK.byDistance}`}`,
    };
  },
};

function rankingSaid(good, bad) {
  if (!good.length) return "Nothing ran.";
  const exact = good.filter(isExact),
    [best, next] = exact,
    last = exact.at(-1);
  if (!best) return `Nothing exact ran; ${good[0].choice} is the closest and takes ${seconds(good[0].total)}.`;
  const others = next
    ? `; next ${next.choice}, ${more(next.total / best.total)}; last ${last.choice}, ${times(last.total / best.total)}`
    : "";
  return `${best.choice} is fastest with ${seconds(best.total)}${others}.${bad.length ? ` ${bad.length} did not run.` : ""}`;
}

/** Bars of the times, the best on top, with their intervals; what did not run below, with its class. */
function rankingBars(good, bad, finding) {
  const names = [...good, ...bad].map(cell => cell.choice),
    best = good.find(isExact),
    bars = {x: cell => cell.total * unit, y: "choice", fill: cell => styleOf(cell.choice).color, insetTop: 3, insetBottom: 3},
    foretold = cell => styleOf(cell.choice).hollow,
    most = d3.max(good, cell => cell.total);
  const unit = most < 1e-3 ? 1e6 : most < 1 ? 1e3 : 1;
  return plotted(
    {
      width: Math.min(widthOf(), 900),
      height: 50 + 22 * names.length,
      marginLeft: 20 + 6.4 * d3.max(names, name => name.length),
      marginRight: 120,
      x: {label: `time, ${unit === 1e6 ? "µs" : unit === 1e3 ? "ms" : "s"}`, grid: true},
      y: {domain: names, label: null},
      marks: [
        // Of a mark with a stroke Plot leaves out what has none, so that those with and without are two.
        Plot.barX(
          good.filter(cell => !foretold(cell)),
          bars,
        ),
        Plot.barX(good.filter(foretold), {...bars, fillOpacity: 0.25, stroke: bars.fill, strokeDasharray: "2,2"}),
        Plot.ruleY(good, {
          x1: cell => cell.total * unit * Math.exp(-cell.total_reach),
          x2: cell => cell.total * unit * Math.exp(cell.total_reach),
          y: "choice",
          stroke: "currentColor",
          marker: "tick",
        }),
        Plot.text(good, {
          x: cell => cell.total * unit * Math.exp(cell.total_reach),
          y: "choice",
          text: cell => ` ${seconds(cell.total)}${cell === best || !best ? "" : ` · ${more(cell.total / best.total)}`}`,
          textAnchor: "start",
          dx: 6,
        }),
        Plot.text(bad, {
          x: 0,
          y: "choice",
          text: cell => `✕ ${cell.kind || cell.status}`,
          textAnchor: "start",
          dx: 4,
          fill: "var(--bad)",
        }),
        best ? Plot.ruleX([best.total * unit], {stroke: "currentColor", strokeDasharray: "3,3"}) : null,
        Plot.tip(good, Plot.pointerY({x: cell => cell.total * unit, y: "choice", title: tipOf})),
      ],
    },
    finding,
  );
}

const AXES = {
  mask: "mask", kernel: "kernel", strategy: "strategy",
  ...Object.fromEntries(BLOCK.ofWorkload.map(axis => [axis, axis])),
};
const severalOf = cells => Object.keys(AXES).filter(axis => unique(cells.map(cell => cell[axis])).length > 1);

const heatMap = {
  id: "heat",
  name: "heat map",
  asks: cells => severalOf(cells).length > 1,
  draw(cells) {
    const several = severalOf(cells),
      pairs = d3
        .cross(several, several)
        .filter(([a, b]) => several.indexOf(a) < several.indexOf(b))
        .map(pair => pair.join(" × "));
    const [pair, pairField] = choose("axes", "axes", pairs, String, pairs.at(-1));
    const [down, across] = pair.split(" × "),
      other = several.filter(axis => axis !== down && axis !== across && axis === "mask");
    const [scale, scaleField] = choose("scale", "scale", inOrderOfScale(cells));
    const ofScale = cells.filter(cell => cell.scale === scale);
    const [length, lengthField] = choose("seqlen", "length", lengthsOf(ofScale), tokens);
    const [mask, maskField] = other.length ? choose("mask", "mask", unique(cells.map(cell => cell.mask))) : [null, null];
    const mine = ofScale.filter(cell => cell.seqlen === length && (mask === null || cell.mask === mask));
    const squares = squaresOf(mine, down, across);
    const finding = squaresSaid(squares);
    const node = heatSquares(squares, unique(mine.map(cell => cell[across])), unique(mine.map(cell => cell[down])), finding);
    return {
      title: `${BLOCK.rate.name} per GPU, ${pair}, ${mask ? `${mask} ` : ""}${tokens(length)} ${scale}`,
      fields: [pairField, maskField, scaleField, lengthField],
      finding,
      node,
      caption:
        `The best of what else was varied for each pair${mine.every(isExact) ? "" : ", of what is closest to exact results"}.`,
    };
  },
};

/** The best of each pair of values, of the closest to exact ones, and why there is none. */
function squaresOf(cells, down, across) {
  const groups = d3.groups(
    cells,
    cell => cell[down],
    cell => cell[across],
  );
  return groups.flatMap(([a, inner]) =>
    inner.map(([b, found]) => {
      const good = found.filter(isGood),
        closest = d3.min(good, farOffOf),
        best = d3.greatest(
          good.filter(cell => farOffOf(cell) === closest),
          cell => cell.total_rate,
        );
      return {a, b, best, why: best ? "" : found[0].kind || found[0].status};
    }),
  );
}

const rateOf = square => square.best?.total_rate;

function squaresSaid(squares) {
  const rated = squares.filter(square => square.best),
    closest = d3.min(rated, square => farOffOf(square.best)),
    equal = rated.filter(square => farOffOf(square.best) === closest),
    top = d3.greatest(equal, rateOf);
  if (!top) return "Nothing ran.";
  const [low, high] = [d3.min(equal, rateOf), rateOf(top)].map(digits);
  return `Best: ${top.a} with ${top.b}, ${high} ${BLOCK.rate.name} per GPU; lowest ${low}.`;
}

function heatSquares(squares, names, rows, finding) {
  const rated = squares.filter(s => s.best),
    top = d3.greatest(rated, rateOf),
    high = rateOf(top ?? {}) ?? 1;
  return plotted(
    {
      width: Math.min(widthOf(), 180 + 92 * names.length),
      height: 70 + 30 * rows.length,
      marginLeft: 20 + 6.4 * d3.max(rows, r => r.length),
      marginTop: 34,
      x: {domain: names, label: null, axis: "top"},
      y: {domain: rows, label: null},
      color: {scheme: "viridis", domain: [0, high]},
      marks: [
        Plot.cell(rated, {x: "b", y: "a", fill: s => s.best.total_rate, inset: 1, title: s => tipOf(s.best)}),
        Plot.text(rated, {
          x: "b",
          y: "a",
          text: s => digits(s.best.total_rate),
          fill: s => (s.best.total_rate < 0.6 * high ? "white" : "black"),
          fontWeight: s => (s === top ? 700 : 400),
        }),
        Plot.text(
          squares.filter(s => !s.best),
          {x: "b", y: "a", text: s => `✕ ${s.why}`, fill: "var(--bad)"},
        ),
      ],
    },
    finding,
  );
}

const PARTS = [
  ["even", "computing", "#0072B2"],
  ["imbalance", "imbalance", "#F0E442"],
  ["exposed", "exposed communication", "#D55E00"],
  ["rest", "rest", "#999999"],
];

const timeSplit = {
  id: "time",
  name: "where the time goes",
  asks: cells => cells.some(cell => cell.even !== null),
  draw(cells) {
    const known = cells.filter(cell => isGood(cell) && cell.even !== null);
    const [scale, scaleField] = choose("scale", "scale", inOrderOfScale(known));
    const ofScale = known.filter(cell => cell.scale === scale);
    const [length, lengthField] = choose("seqlen", "length", lengthsOf(ofScale), tokens, lengthsOf(ofScale).at(-1));
    const mine = ofScale.filter(cell => cell.seqlen === length),
      names = d3.max(mine, cell => cell.choice.length);
    const plots = d3.groups(mine, cell => cell.mask).map(([mask, ofMask]) => splitBars(mask, ofMask, names));
    const key = h(
      "div",
      {class: "legend"},
      PARTS.map(([, what, color]) => h("span", {}, h("i", {style: `background: ${color}; width: 12px; height: 10px`}), what)),
    );
    return {
      title: `Where the time goes, ${tokens(length)} ${scale}`,
      fields: [scaleField, lengthField],
      finding: leastExposed(mine),
      node: h("div", {}, key, h("div", {class: "side-by-side"}, plots)),
      caption:
        "Computing: the schedule without its messages, as if the work were spread evenly. " +
        "Imbalance: what the busiest rank has more; another cp.layout may help, faster links will not. " +
        "Exposed communication: the whole minus the schedule without its messages, per phase. " +
        "Rest: what lies between the phases.",
    };
  },
};

/** Where the time of each choice goes for one mask, in ms, the fastest on top. */
function splitBars(mask, ofMask, names) {
  const bars = ofMask.flatMap(cell => PARTS.map(([key, what]) => ({choice: cell.choice, what, ms: 1e3 * cell[key], cell})));
  return plotted(
    {
      width: Math.min(widthOf(), 560),
      height: 56 + 19 * ofMask.length,
      marginLeft: 20 + 6.4 * names,
      marginTop: 22,
      x: {label: "ms", grid: true},
      y: {label: null, domain: d3.sort(ofMask, cell => cell.total).map(cell => cell.choice)},
      color: {domain: PARTS.map(p => p[1]), range: PARTS.map(p => p[2])},
      marks: [
        Plot.barX(bars, {
          x: "ms",
          y: "choice",
          fill: "what",
          insetTop: 2,
          insetBottom: 2,
          title: b => `${b.choice} ${b.what}: ${digits(b.ms)} ms of ${digits(1e3 * b.cell.total)}`,
        }),
        Plot.text([mask], {frameAnchor: "top-left", dy: -16, text: [mask], fontWeight: 600, fontSize: 12}),
      ],
    },
    `${mask}: ${leastExposed(ofMask)}`,
  );
}

function leastExposed(cells) {
  const share = cell => cell.exposed / cell.total,
    sorted = d3.sort(cells, share);
  if (share(sorted.at(-1)) - share(sorted[0]) < 0.01)
    return `All wait for messages for ${percent(d3.mean(cells, share))} of their time.`;
  const [least, most] = [sorted[0], sorted.at(-1)].map(cell => `${cell.choice} (${percent(share(cell))})`);
  return `Waiting for messages takes the smallest share of the time of ${least}, the largest of ${most}.`;
}

const roofline = {
  id: "roofline",
  name: "roofline",
  asks: cells => cells.some(cell => isGood(cell) && cell.least && cell.top),
  draw(cells) {
    const good = cells.filter(cell => isGood(cell) && cell.least && cell.top);
    const [which, field] = choose("device", "device", unique(good.map(cell => `${cell.device} ${cell.dtype}`)));
    const mine = good.filter(cell => `${cell.device} ${cell.dtype}` === which),
      peak = d3.median(mine, cell => cell.top);
    const work = cell => cell.total_rate * BLOCK.rate.flops * cell.total,
      gbytes = BLOCK.devices[mine[0].device]?.gbytes;
    const sent = mine.filter(cell => cell.sent > 0);
    const reached = percent(d3.max(mine, cell => cell.total_rate) / peak);
    const finding = `The best cell reaches ${reached} of the peak of ${digits(peak)} ${BLOCK.rate.name}.`;
    const panels = [
      roofPanel(
        mine,
        cell => work(cell) / cell.least,
        gbytes ? {memory: gbytes} : {},
        peak,
        "FLOP per byte of inputs, outputs and gradients",
      ),
      sent.length ? roofPanel(sent, cell => work(cell) / cell.sent, BLOCK.links, peak, "FLOP per byte sent") : null,
    ];
    return {
      title: `Roofline, ${which}`,
      fields: [field],
      finding,
      choices: unique(mine.map(cell => cell.choice)),
      node: h("div", {class: "side-by-side"}, panels.filter(Boolean)),
      caption:
        "A point on a slope is limited by that memory or link; a point near the flat roof by computing. " +
        "Left: bytes of a rank's inputs, outputs and gradients, each touched once. " +
        "Right: bytes of the rank that sends most; slopes are what the check of the nodes measured.",
    };
  },
};

function roofPanel(cells, intensity, roofs, peak, label) {
  const bends = Object.values(roofs).map(gbytes => (peak * BLOCK.rate.flops) / (gbytes * 1e9)),
    [least, most] = d3.extent(cells, intensity);
  const from = d3.min([least, ...bends]) / 4,
    until = most * 4,
    low = d3.min(cells, cell => cell.total_rate) / 3;
  const slopes = Object.entries(roofs).flatMap(([name, gbytes]) =>
    [from, (peak * BLOCK.rate.flops) / (gbytes * 1e9), until].map(x => ({
      name: `${name}: ${digits(gbytes)} GB/s`,
      x,
      y: Math.min(peak, (x * gbytes * 1e9) / BLOCK.rate.flops),
    })),
  );
  return plotted(
    {
      width: 520,
      height: 330,
      marginLeft: 48,
      x: {type: "log", label, domain: [from, until], ticks: 5, tickFormat: "~s"},
      y: {type: "log", label: `${BLOCK.rate.name} per GPU`, domain: [low, peak * 1.6], ticks: 5, tickFormat: "~g"},
      marks: [
        Plot.line(slopes, {x: "x", y: "y", z: "name", stroke: "currentColor", strokeOpacity: 0.6, clip: true}),
        ...d3
          .groups(slopes, s => s.name)
          .map(([name, line], i) =>
            Plot.text([line[1]], {x: "x", y: "y", text: [name], dy: 12 + 13 * i, dx: 6, textAnchor: "start", fillOpacity: 0.8}),
          ),
        Plot.ruleY([peak], {stroke: "currentColor"}),
        Plot.text([peak], {
          y: d => d,
          frameAnchor: "left",
          dy: -7,
          dx: 4,
          textAnchor: "start",
          text: d => `peak: ${digits(d)} ${BLOCK.rate.name}`,
        }),
        ...roofDots(cells, intensity),
        Plot.tip(cells, Plot.pointer({x: intensity, y: "total_rate", title: tipOf})),
      ],
    },
    `${cells.length} cells under ${label}`,
  );
}

const roofDots = (cells, intensity) =>
  d3
    .groups(cells, cell => cell.choice)
    .map(([choice, mine]) =>
      Plot.dot(mine, {
        x: intensity,
        y: "total_rate",
        symbol: styleOf(choice).symbol,
        r: 3,
        fill: styleOf(choice).color,
        stroke: "var(--back)",
        strokeWidth: 0.5,
      }),
    );

const pivot = {
  id: "table",
  name: "table",
  asks: cells => cells.some(isGood),
  draw(cells) {
    const [phase, phaseField] = choose(
      "phase",
      "phase",
      PHASES.filter(p => BLOCK.phases.includes(p)),
    );
    const [scale, scaleField] = choose("scale", "scale", inOrderOfScale(cells));
    const mine = cells.filter(cell => cell.scale === scale),
      columns = d3.groups(mine, cell => cell.mask).map(([mask, found]) => [mask, lengthsOf(found)]);
    const key = `${phase}_rate`,
      best = d3.rollup(
        mine.filter(isGood),
        found => d3.max(found, cell => cell[key]),
        cell => cell.problem,
      ),
      top = d3.max(best.values());
    const value = (choice, mask, length) => {
      const cell = mine.find(c => c.choice === choice && c.mask === mask && c.seqlen === length);
      if (!cell) return h("td", {class: "number"}, "-");
      if (!isGood(cell)) return h("td", {class: "number"}, h("a", {href: `#c-${cell.id}`}, cell.kind || "-"));
      const part = cell[key] / top;
      return h(
        "td",
        {
          class: cell[key] === best.get(cell.problem) ? "number best" : "number",
          style: `background: color-mix(in srgb, #0072B2 ${(part * 38).toFixed(0)}%, transparent)`,
        },
        digits(cell[key]),
      );
    };
    const choices = unique(mine.map(cell => cell.choice));
    const node = h(
      "div",
      {class: "scroll", tabindex: "0", role: "region", "aria-label": "rates"},
      pivotTable(choices, columns, value),
    );
    return {
      title: `${BLOCK.rate.name} per GPU, ${phase}, ${scale}`,
      fields: [phaseField, scaleField],
      finding: "Bold: the best of a column. -: did not run; other words: why it failed.",
      node,
    };
  },
};

/** A row per choice, and under each mask its lengths; `value`: the entry of a choice, a mask and a length. */
function pivotTable(choices, columns, value) {
  return h(
    "table",
    {class: "pivot"},
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        h("th", {rowspan: 2}, "choice"),
        columns.map(([mask, lengths]) => h("th", {colspan: lengths.length}, mask)),
      ),
      h(
        "tr",
        {},
        columns.flatMap(([, lengths]) => lengths.map(length => h("th", {class: "number"}, tokens(length)))),
      ),
    ),
    h(
      "tbody",
      {},
      choices.map(choice =>
        h(
          "tr",
          {},
          h("th", {scope: "row"}, choice),
          columns.flatMap(([mask, lengths]) => lengths.map(length => value(choice, mask, length))),
        ),
      ),
    ),
  );
}
