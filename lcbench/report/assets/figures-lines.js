"use strict";
// Figures of lines: rate and memory by length, rate and efficiency by GPUs.

const PHASES = ["total", "forward", "backward"];
const isGood = cell => cell.status === BLOCK.good && cell.total !== null;
/** What lines show: good results, and predictions beside them, hollow and dotted, which win nothing. */
const isDrawn = cell => isGood(cell) || (cell.status === "predicted" && cell.total !== null);
const lengthAxis = (values, label = "sequence length") => ({
  type: "log",
  base: 2,
  label,
  ticks: values,
  tickFormat: tokens,
  domain: d3.extent(values),
});
/** Whether it is an answer that may win: what approximates is none. */
const isExact = cell => !cell.approximate;
/** Those that are exact; all, where none is. */
const rivals = cells => (cells.some(isExact) ? cells.filter(isExact) : cells);
/** How far off what approximates is, to the two digits that are shown; 0: it is exact, infinite: nobody knows. */
const farOff = (exact, distance) => (exact ? 0 : Number((distance ?? Infinity).toPrecision(2)));
const farOffOf = cell => farOff(isExact(cell), cell.distance);
/** Answers to one problem in the order of report/frame.py: exact ones by time, then the others, the closest first. */
const ranked = cells =>
  d3.sort(
    cells,
    cell => !isExact(cell),
    farOffOf,
    cell => cell.total,
  );
const gpuAxis = values => ({type: "log", base: 2, label: "GPUs", ticks: values, tickFormat: String, domain: d3.extent(values)});
const tipOf = cell =>
  [
    cell.choice,
    `${cell.mask} ${tokens(cell.seqlen)} ${cell.scale}`,
    `${seconds(cell.total)} · ${digits(cell.total_rate)} ${BLOCK.rate.name} per GPU`,
    cell.status === "predicted" ? `predicted, ${band(cell)} · ${cell.id}` : `±${percent(cell.total_reach)} (95 %) · ${cell.id}`,
  ].join("\n");
const inOrderOfScale = cells =>
  d3.sort(unique(cells.map(cell => cell.scale)), scale => cells.find(cell => cell.scale === scale).order);
const lengthsOf = cells => d3.sort(unique(cells.map(cell => cell.seqlen)));

/** Of cells that differ in their seed only the median one. */
function overSeeds(cells) {
  const key = cell => [cell.choice, cell.mask, cell.seqlen, cell.scale, cell.setting ?? cell.where].join("|");
  return d3.groups(cells, key).flatMap(([, same]) => {
    const good = d3.sort(same.filter(isGood), cell => cell.total);
    return [good.length ? good[good.length >> 1] : same[0]];
  });
}

/** A value of each good cell: its rate, or, if `relative`, that in percent of the best of its problem. */
function linePoints(cells, x, phase, relative) {
  const drawn = cells.filter(cell => isDrawn(cell) && cell[`${phase}_rate`] !== null);
  const best = d3.rollup(
    drawn.filter(isGood),
    found => d3.max(rivals(found), cell => cell[`${phase}_rate`]),
    cell => cell.problem,
  );
  const shown = drawn.filter(cell => !relative || best.has(cell.problem));
  return shown.map(cell => {
    const value = cell[`${phase}_rate`],
      reach = cell[`${phase}_reach`] ?? 0,
      unit = relative ? 100 / best.get(cell.problem) : 1;
    return {
      panel: cell.mask,
      x: cell[x],
      y: value * unit,
      low: value * unit * Math.exp(-reach),
      high: value * unit * Math.exp(reach),
      choice: cell.choice,
      cell,
      value,
    };
  });
}

const failedPoints = (cells, x) =>
  cells
    .filter(cell => cell.status === "failed")
    .map(cell => ({panel: cell.mask, x: cell[x], choice: cell.choice, kind: cell.kind}));

const band = cell => `within ${times(1 + cell.band)} (95 %)`;

function phaseAndView() {
  const [phase, phaseField] = choose(
    "phase",
    "phase",
    PHASES.filter(p => BLOCK.phases.includes(p)),
  );
  const [show, showField] = choose("show", "show", ["rate", "relative to the best"]);
  return {phase, relative: show === "relative to the best", fields: [phaseField, showField]};
}

function rateLines(cells, x, axis, published) {
  const {phase, relative, fields} = phaseAndView();
  const points = linePoints(cells, x, phase, relative);
  const [first, last] = axis.domain;
  const beside = relative
    ? []
    : published
        .filter(p => p.phase === phase && p.x >= first && p.x <= last && cells.some(cell => cell.mask.split("(")[0] === p.mask))
        .map(p => ({...p, y: p.rate, panel: cells.find(cell => cell.mask.split("(")[0] === p.mask).mask}));
  const dotted = beside.length
    ? points.filter(p => p.cell[`${phase}_bymean`]).map(p => ({...p, y: p.cell[`${phase}_bymean`]}))
    : [];
  const finding = leadersSaid(points.filter(p => isGood(p.cell)));
  return {
    fields,
    finding,
    choices: unique(points.map(p => p.choice)),
    caption: beside.length
      ? `Grey: ${BLOCK.published.label}. Dotted: the same cells, time as mean over ranks.`
      : published.length && phase === "total"
        ? "Published figures of the same problem are drawn beside forward and backward."
        : "",
    node: lines(
      {
        panels: unique(cells.map(cell => cell.mask)),
        points,
        failed: failedPoints(cells, x),
        published: beside,
        dotted,
        x: axis,
        tip: p => tipOf(p.cell),
        y: relative ? {type: "log", label: "% of the best", tickFormat: digits} : {label: "rate", zero: true},
      },
      finding,
    ),
  };
}

const byLength = {
  id: "length",
  name: "by length",
  foretold: true,
  asks: cells => d3.some(d3.group(cells.filter(isDrawn), c => c.scale).values(), mine => lengthsOf(mine).length > 1),
  draw(cells) {
    const scales = inOrderOfScale(cells).filter(scale => lengthsOf(cells.filter(cell => cell.scale === scale)).length > 1);
    const [scale, scaleField] = choose("scale", "scale", scales);
    const mine = cells.filter(cell => cell.scale === scale);
    const made = rateLines(
      mine,
      "seqlen",
      lengthAxis(lengthsOf(mine)),
      mine[0].ranks === 1 ? BLOCK.published.rows.filter(p => p.seqlen).map(p => ({...p, x: p.seqlen})) : [],
    );
    return {...made, title: `${BLOCK.rate.name} per GPU by sequence length, ${scale}`, fields: [scaleField, ...made.fields]};
  },
};

/** Ways in which cells scale: with the same tokens per GPU (weak), or in all (strong). */
function scalings(cells) {
  return [
    ["share", "per GPU"],
    ["seqlen", "in all"],
  ].flatMap(([key, said]) =>
    d3
      .sort(
        d3.groups(cells, cell => cell[key]),
        ([count]) => count,
      )
      .filter(([, mine]) => unique(mine.filter(isDrawn).map(cell => cell.ranks)).length > 1)
      .map(([count, mine]) => ({
        name: `${tokens(count)} tokens ${said}`,
        key,
        count,
        cells: mine,
        most: unique(mine.map(c => c.ranks)).length,
      })),
  );
}

function chooseScaling(cells) {
  const ways = scalings(cells),
    fullest = d3.greatest(ways, way => way.most);
  const [name, field] = choose(
    "tokens",
    "tokens",
    ways.map(way => way.name),
    String,
    fullest.name,
  );
  return [ways.find(way => way.name === name), field];
}

const byGpus = {
  id: "gpus",
  name: "by GPUs",
  foretold: true,
  asks: cells => scalings(cells).length > 0,
  draw(cells) {
    const [way, field] = chooseScaling(cells);
    const weak = way.key === "share" && way.count === BLOCK.published.share;
    const made = rateLines(
      way.cells,
      "ranks",
      gpuAxis(d3.sort(unique(way.cells.map(c => c.ranks)))),
      weak ? BLOCK.published.rows.filter(p => p.ranks).map(p => ({...p, x: p.ranks})) : [],
    );
    return {...made, title: `${BLOCK.rate.name} per GPU by number of GPUs, ${way.name}`, fields: [field, ...made.fields]};
  },
};

const efficiency = {
  id: "efficiency",
  name: "efficiency",
  asks: byGpus.asks,
  draw(cells) {
    const [way, field] = chooseScaling(cells);
    const good = way.cells.filter(isGood);
    const points = d3
      .groups(good, cell => cell.mask)
      .flatMap(([mask, mine]) => {
        const least = d3.min(
          way.cells.filter(cell => cell.mask === mask),
          cell => cell.ranks,
        );
        return d3
          .groups(mine, cell => cell.choice)
          .flatMap(([choice, line]) => {
            const first = d3.least(line, cell => cell.ranks),
              hollow = first.ranks !== least;
            return line.map(cell => ({
              panel: mask,
              x: cell.ranks,
              y: (100 * cell.total_rate) / first.total_rate,
              value: cell.total_rate / first.total_rate,
              choice,
              cell,
              hollow,
              text: hollow ? `${choice} (from ${first.ranks})` : choice,
            }));
          })
          .filter((p, _, all) => all.filter(o => o.choice === p.choice).length > 1);
      });
    const finding = leadersSaid(points.filter(p => !p.hollow && p.x > d3.min(way.cells, c => c.ranks)));
    return {
      title: `Scaling efficiency, ${way.name}`,
      fields: [field],
      finding,
      choices: unique(points.map(p => p.choice)),
      caption:
        "Rate per GPU as a share of the same choice's on the fewest GPUs of the panel; 100 % is perfect. " +
        "A choice can be efficient because it is slow on few GPUs. Hollow, “from n”: it has no result on the fewest, " +
        "so its own first stands for 100 %, and its line is not comparable.",
      node: lines(
        {
          panels: unique(way.cells.map(cell => cell.mask)),
          points,
          failed: failedPoints(way.cells, "ranks"),
          x: gpuAxis(d3.sort(unique(way.cells.map(c => c.ranks)))),
          y: {label: "% of the fewest GPUs", zero: true},
          rules: [Plot.ruleY([100], {stroke: "currentColor", strokeOpacity: 0.5})],
          tip: p => `${tipOf(p.cell)}\n${digits(p.y)} %`,
        },
        finding,
      ),
    };
  },
};

const memory = {
  id: "memory",
  name: "memory",
  asks: cells => cells.some(cell => isGood(cell) && cell.peak !== null),
  draw(cells) {
    const [scale, scaleField] = choose("scale", "scale", inOrderOfScale(cells));
    const mine = cells.filter(cell => cell.scale === scale),
      GiB = 2 ** 30;
    const points = mine
      .filter(cell => isGood(cell) && cell.peak)
      .map(cell => ({panel: cell.mask, x: cell.seqlen, y: cell.peak / GiB, value: cell.peak, choice: cell.choice, cell}));
    const device = BLOCK.devices[points[0]?.cell.device]?.memory,
      full = mine.filter(cell => cell.kind === "oom");
    const low = d3.min(points, p => p.y) ?? 1,
      high = Math.max(d3.max(points, p => p.y) ?? 1, full.length && device ? device / GiB : 0);
    let from = Math.floor(Math.log2(low)),
      until = Math.ceil(Math.log2(high * 1.02));
    while (until - from < 2) {
      until++;
      if (until - from < 2) from--;
    }
    const line =
      device && device / GiB <= 2 ** until ? [Plot.ruleY([device / GiB], {stroke: "var(--bad)", strokeDasharray: "6,3"})] : [];
    const crosses = full.map(cell => ({
      panel: cell.mask,
      x: cell.seqlen,
      choice: cell.choice,
      kind: "oom",
      ...(line.length ? {y: device / GiB} : {}),
    }));
    const ticks = d3.range(from, until + 1).map(power => 2 ** power),
      finding = leadersSaid(points, false).replace("Best", "Least memory").replace("furthest behind", "largest");
    return {
      title: `Peak memory by sequence length, ${scale}`,
      fields: [scaleField],
      finding,
      choices: unique(points.map(p => p.choice)),
      caption:
        "Worst rank's peak of one iteration above the level before it, with the engine's buffers." +
        (device ? ` The device has ${bytes(device)}${line.length ? " (dashed)" : ""}.` : ""),
      node: lines(
        {
          panels: unique(mine.map(cell => cell.mask)),
          points,
          failed: crosses,
          x: lengthAxis(lengthsOf(mine)),
          merge: true,
          rules: line,
          y: {type: "log", base: 2, label: "GiB", domain: [2 ** from, 2 ** until], ticks, tickFormat: String, nice: false},
          tip: p => `${tipOf(p.cell)}\n${bytes(p.cell.peak)}`,
        },
        finding,
      ),
    };
  },
};
