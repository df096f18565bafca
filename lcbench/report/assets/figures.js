"use strict";
// The figures, one per question; each is asked only if the cells can answer it.

const PHASES = ["total", "forward", "backward"];
const isGood = cell => cell.status === "ok" && cell.total !== null;
const lengthAxis = (values, label = "sequence length") => ({type: "log", base: 2, label, ticks: values, tickFormat: tokens, domain: d3.extent(values)});
const gpuAxis = values => ({type: "log", base: 2, label: "GPUs", ticks: values, tickFormat: String, domain: d3.extent(values)});
const tipOf = cell => `${cell.choice}\n${cell.mask} ${tokens(cell.seqlen)} ${cell.scale}\n${seconds(cell.total)} · ${digits(cell.total_rate)} TFLOP/s per GPU\n±${digits(100 * cell.total_reach)} % (95 %) · ${cell.id}`;
const inOrderOfScale = cells => d3.sort(unique(cells.map(cell => cell.scale)), scale => cells.find(cell => cell.scale === scale).order);
const lengthsOf = cells => d3.sort(unique(cells.map(cell => cell.seqlen)));

/** Of cells that differ in their seed only the median one. */
function overSeeds(cells) {
  const key = cell => [cell.choice, cell.mask, cell.seqlen, cell.scale, cell.setting ?? cell.where].join("|");
  return d3.groups(cells, key).flatMap(([, same]) => {
    const good = d3.sort(same.filter(isGood), cell => cell.total);
    return [good.length ? good[good.length >> 1] : same[0]];
  });
}

/** What lines are drawn of: a value of each good cell, and those that failed. `show`: rate, or 100 % for the best of each problem. */
function linePoints(cells, x, phase, relative) {
  const good = cells.filter(cell => isGood(cell) && cell[`${phase}_rate`] !== null);
  const best = d3.rollup(good, found => d3.max(found, cell => cell[`${phase}_rate`]), cell => cell.problem);
  return good.map(cell => {
    const value = cell[`${phase}_rate`], reach = cell[`${phase}_reach`] ?? 0, unit = relative ? 100 / best.get(cell.problem) : 1;
    return {panel: cell.mask, x: cell[x], y: value * unit, low: value * unit * Math.exp(-reach), high: value * unit * Math.exp(reach), choice: cell.choice, cell, value};
  });
}

const failedPoints = (cells, x) => cells.filter(cell => cell.status === "failed").map(cell => ({panel: cell.mask, x: cell[x], choice: cell.choice, kind: cell.kind}));

function phaseAndView() {
  const [phase, phaseField] = choose("phase", "phase", PHASES.filter(p => BLOCK.phases.includes(p)));
  const [show, showField] = choose("show", "show", ["TFLOP/s per GPU", "relative to the best"]);
  return {phase, relative: show === "relative to the best", fields: [phaseField, showField]};
}

function rateLines(cells, x, axis, published) {
  const {phase, relative, fields} = phaseAndView();
  const points = linePoints(cells, x, phase, relative);
  const [first, last] = axis.domain;
  const beside = relative ? [] : published.filter(p => p.phase === phase && p.x >= first && p.x <= last && cells.some(cell => cell.mask.split("(")[0] === p.mask)).map(p => ({...p, y: p.rate,
    panel: cells.find(cell => cell.mask.split("(")[0] === p.mask).mask}));
  const dotted = beside.length ? points.filter(p => p.cell[`${phase}_bymean`]).map(p => ({...p, y: p.cell[`${phase}_bymean`]})) : [];
  const finding = leadersSaid(points);
  return {fields, finding, choices: unique(points.map(p => p.choice)), caption: beside.length ? `Grey: ${BLOCK.published.label}. Dotted: the same cells, time as mean over ranks.`
      : published.length && phase === "total" ? "Published figures of the same problem are drawn beside forward and backward." : "",
    node: lines({panels: unique(cells.map(cell => cell.mask)), points, failed: failedPoints(cells, x), published: beside, dotted, x: axis, tip: p => tipOf(p.cell),
      y: relative ? {type: "log", label: "% of the best", tickFormat: digits} : {label: "TFLOP/s per GPU", zero: true}}, finding)};
}

const byLength = {
  id: "length", name: "by length", asks: cells => d3.some(d3.group(cells.filter(isGood), c => c.scale).values(), mine => lengthsOf(mine).length > 1),
  draw(cells) {
    const scales = inOrderOfScale(cells).filter(scale => lengthsOf(cells.filter(cell => cell.scale === scale)).length > 1);
    const [scale, scaleField] = choose("scale", "scale", scales);
    const mine = cells.filter(cell => cell.scale === scale);
    const made = rateLines(mine, "seqlen", lengthAxis(lengthsOf(mine)), mine[0].ranks === 1 ? BLOCK.published.rows.filter(p => p.seqlen).map(p => ({...p, x: p.seqlen})) : []);
    return {...made, title: `TFLOP/s per GPU by sequence length, ${scale}`, fields: [scaleField, ...made.fields]};
  },
};

/** Ways in which cells scale: with the same tokens per GPU (weak), or in all (strong). */
function scalings(cells) {
  return [["share", "per GPU"], ["seqlen", "in all"]].flatMap(([key, said]) => d3.sort(d3.groups(cells, cell => cell[key]), ([count]) => count)
    .filter(([, mine]) => unique(mine.filter(isGood).map(cell => cell.ranks)).length > 1)
    .map(([count, mine]) => ({name: `${tokens(count)} tokens ${said}`, key, count, cells: mine, most: unique(mine.map(c => c.ranks)).length})));
}

function chooseScaling(cells) {
  const ways = scalings(cells), fullest = d3.greatest(ways, way => way.most);
  const [name, field] = choose("tokens", "tokens", ways.map(way => way.name), String, fullest.name);
  return [ways.find(way => way.name === name), field];
}

const byGpus = {
  id: "gpus", name: "by GPUs", asks: cells => scalings(cells).length > 0,
  draw(cells) {
    const [way, field] = chooseScaling(cells);
    const weak = way.key === "share" && way.count === BLOCK.published.share;
    const made = rateLines(way.cells, "ranks", gpuAxis(d3.sort(unique(way.cells.map(c => c.ranks)))), weak ? BLOCK.published.rows.filter(p => p.ranks).map(p => ({...p, x: p.ranks})) : []);
    return {...made, title: `TFLOP/s per GPU by number of GPUs, ${way.name}`, fields: [field, ...made.fields]};
  },
};

const efficiency = {
  id: "efficiency", name: "efficiency", asks: byGpus.asks,
  draw(cells) {
    const [way, field] = chooseScaling(cells);
    const good = way.cells.filter(isGood);
    const points = d3.groups(good, cell => cell.mask).flatMap(([mask, mine]) => {
      const least = d3.min(way.cells.filter(cell => cell.mask === mask), cell => cell.ranks);
      return d3.groups(mine, cell => cell.choice).flatMap(([choice, line]) => {
        const first = d3.least(line, cell => cell.ranks), hollow = first.ranks !== least;
        return line.map(cell => ({panel: mask, x: cell.ranks, y: 100 * cell.total_rate / first.total_rate, value: cell.total_rate / first.total_rate, choice, cell, hollow,
          text: hollow ? `${choice} (from ${first.ranks})` : choice}));
      }).filter((p, _, all) => all.filter(o => o.choice === p.choice).length > 1);
    });
    const finding = leadersSaid(points.filter(p => !p.hollow && p.x > d3.min(way.cells, c => c.ranks)));
    return {title: `Scaling efficiency, ${way.name}`, fields: [field], finding, choices: unique(points.map(p => p.choice)),
      caption: "TFLOP/s per GPU as a share of the same choice's on the fewest GPUs of the panel; 100 % is perfect. A choice can be efficient because it is slow on few GPUs. Hollow, “from n”: it has no result on the fewest, so its own first stands for 100 %, and its line is not comparable.",
      node: lines({panels: unique(way.cells.map(cell => cell.mask)), points, failed: failedPoints(way.cells, "ranks"), x: gpuAxis(d3.sort(unique(way.cells.map(c => c.ranks)))),
        y: {label: "% of the fewest GPUs", zero: true}, rules: [Plot.ruleY([100], {stroke: "currentColor", strokeOpacity: 0.5})], tip: p => `${tipOf(p.cell)}\n${digits(p.y)} %`}, finding)};
  },
};

/** One problem of those that have several choices. */
function chooseProblem(cells, least = 2) {
  const counts = d3.rollup(cells, mine => mine.length, cell => cell.problem), fit = cells.filter(cell => counts.get(cell.problem) >= least);
  const [mask, maskField] = choose("mask", "mask", unique(fit.map(cell => cell.mask)));
  const ofMask = fit.filter(cell => cell.mask === mask);
  const [scale, scaleField] = choose("scale", "scale", inOrderOfScale(ofMask));
  const ofScale = ofMask.filter(cell => cell.scale === scale);
  const [length, lengthField] = choose("seqlen", "length", lengthsOf(ofScale), tokens);
  const ofLength = ofScale.filter(cell => cell.seqlen === length);
  const [where, whereField] = choose("where", "setting", unique(ofLength.map(cell => cell.where)));
  return {cells: ofLength.filter(cell => cell.where === where), said: `${mask} ${tokens(length)} ${scale}`, fields: [maskField, scaleField, lengthField, whereField]};
}

const ranking = {
  id: "ranking", name: "ranking", asks: cells => d3.some(d3.rollup(cells.filter(isGood), mine => mine.length, c => c.problem).values(), count => count > 1),
  draw(cells) {
    const problem = chooseProblem(cells);
    const good = d3.sort(problem.cells.filter(isGood), cell => cell.total), bad = problem.cells.filter(cell => !isGood(cell));
    const names = [...good, ...bad].map(cell => cell.choice), best = good[0], most = d3.max(good, cell => cell.total);
    const unit = most < 1e-3 ? 1e6 : most < 1 ? 1e3 : 1;
    const finding = best ? `${best.choice} is fastest with ${seconds(best.total)}${good[1] ? `; next ${good[1].choice}, ${more(good[1].total / best.total)}; last ${good.at(-1).choice}, ${times(good.at(-1).total / best.total)}` : ""}.${bad.length ? ` ${bad.length} did not run.` : ""}` : "Nothing ran.";
    const node = plotted({width: Math.min(widthOf(), 900), height: 50 + 22 * names.length, marginLeft: 20 + 6.4 * d3.max(names, name => name.length), marginRight: 120,
      x: {label: `time, ${unit === 1e6 ? "µs" : unit === 1e3 ? "ms" : "s"}`, grid: true}, y: {domain: names, label: null}, marks: [
        Plot.barX(good, {x: cell => cell.total * unit, y: "choice", fill: cell => styleOf(cell.choice).color, insetTop: 3, insetBottom: 3}),
        Plot.ruleY(good, {x1: cell => cell.total * unit * Math.exp(-cell.total_reach), x2: cell => cell.total * unit * Math.exp(cell.total_reach), y: "choice", stroke: "currentColor", marker: "tick"}),
        Plot.text(good, {x: cell => cell.total * unit * Math.exp(cell.total_reach), y: "choice", text: cell => ` ${seconds(cell.total)}${cell === best ? "" : ` · ${more(cell.total / best.total)}`}`, textAnchor: "start", dx: 6}),
        Plot.text(bad, {x: 0, y: "choice", text: cell => `✕ ${cell.kind || cell.status}`, textAnchor: "start", dx: 4, fill: "var(--bad)"}),
        best ? Plot.ruleX([best.total * unit], {stroke: "currentColor", strokeDasharray: "3,3"}) : null,
        Plot.tip(good, Plot.pointerY({x: cell => cell.total * unit, y: "choice", title: tipOf}))]}, finding);
    return {title: `Ranking: ${problem.said}`, fields: problem.fields, finding, node, caption: "Bars: median iteration; whiskers: 95 % interval; dashed: the best."};
  },
};

const AXES = {mask: "mask", kernel: "kernel", strategy: "strategy"};
const severalOf = cells => Object.keys(AXES).filter(axis => unique(cells.map(cell => cell[axis])).length > 1);

const heatMap = {
  id: "heat", name: "heat map", asks: cells => severalOf(cells).length > 1,
  draw(cells) {
    const several = severalOf(cells), pairs = d3.cross(several, several).filter(([a, b]) => several.indexOf(a) < several.indexOf(b)).map(pair => pair.join(" × "));
    const [pair, pairField] = choose("axes", "axes", pairs, String, pairs.at(-1));
    const [down, across] = pair.split(" × "), other = several.filter(axis => axis !== down && axis !== across && axis === "mask");
    const [scale, scaleField] = choose("scale", "scale", inOrderOfScale(cells));
    const ofScale = cells.filter(cell => cell.scale === scale);
    const [length, lengthField] = choose("seqlen", "length", lengthsOf(ofScale), tokens);
    const [mask, maskField] = other.length ? choose("mask", "mask", unique(cells.map(cell => cell.mask))) : [null, null];
    const mine = ofScale.filter(cell => cell.seqlen === length && (mask === null || cell.mask === mask));
    const squares = d3.groups(mine, cell => cell[down], cell => cell[across]).flatMap(([a, inner]) => inner.map(([b, found]) => {
      const best = d3.greatest(found.filter(isGood), cell => cell.total_rate);
      return {a, b, best, why: best ? "" : found[0].kind || found[0].status};
    }));
    const rated = squares.filter(s => s.best), top = d3.greatest(rated, s => s.best.total_rate), high = top?.best.total_rate ?? 1, low = d3.min(rated, s => s.best.total_rate) ?? 0;
    const finding = top ? `Best: ${top.a} with ${top.b}, ${digits(high)} TFLOP/s per GPU; lowest ${digits(low)}.` : "Nothing ran.";
    const names = unique(mine.map(cell => cell[across])), rows = unique(mine.map(cell => cell[down]));
    const node = plotted({width: Math.min(widthOf(), 180 + 92 * names.length), height: 70 + 30 * rows.length, marginLeft: 20 + 6.4 * d3.max(rows, r => r.length), marginTop: 34,
      x: {domain: names, label: null, axis: "top"}, y: {domain: rows, label: null}, color: {scheme: "viridis", domain: [0, high]}, marks: [
        Plot.cell(rated, {x: "b", y: "a", fill: s => s.best.total_rate, inset: 1, title: s => tipOf(s.best)}),
        Plot.text(rated, {x: "b", y: "a", text: s => digits(s.best.total_rate), fill: s => s.best.total_rate < 0.6 * high ? "white" : "black", fontWeight: s => s === top ? 700 : 400}),
        Plot.text(squares.filter(s => !s.best), {x: "b", y: "a", text: s => `✕ ${s.why}`, fill: "var(--bad)"})]}, finding);
    return {title: `TFLOP/s per GPU, ${pair}, ${mask ? `${mask} ` : ""}${tokens(length)} ${scale}`, fields: [pairField, maskField, scaleField, lengthField], finding, node,
      caption: "The best of what else was varied for each pair."};
  },
};

const memory = {
  id: "memory", name: "memory", asks: cells => cells.some(cell => isGood(cell) && cell.peak !== null),
  draw(cells) {
    const [scale, scaleField] = choose("scale", "scale", inOrderOfScale(cells));
    const mine = cells.filter(cell => cell.scale === scale), GiB = 2 ** 30;
    const points = mine.filter(cell => isGood(cell) && cell.peak).map(cell => ({panel: cell.mask, x: cell.seqlen, y: cell.peak / GiB, value: cell.peak, choice: cell.choice, cell}));
    const device = BLOCK.devices[points[0]?.cell.device]?.memory, full = mine.filter(cell => cell.kind === "oom");
    const low = d3.min(points, p => p.y) ?? 1, high = Math.max(d3.max(points, p => p.y) ?? 1, full.length && device ? device / GiB : 0);
    let from = Math.floor(Math.log2(low)), until = Math.ceil(Math.log2(high * 1.02));
    while (until - from < 2) { until++; if (until - from < 2) from--; }
    const line = device && device / GiB <= 2 ** until ? [Plot.ruleY([device / GiB], {stroke: "var(--bad)", strokeDasharray: "6,3"})] : [];
    const crosses = full.map(cell => ({panel: cell.mask, x: cell.seqlen, choice: cell.choice, kind: "oom", ...(line.length ? {y: device / GiB} : {})}));
    const ticks = d3.range(from, until + 1).map(power => 2 ** power), finding = leadersSaid(points, false).replace("Best", "Least memory").replace("furthest behind", "largest");
    return {title: `Peak memory by sequence length, ${scale}`, fields: [scaleField], finding, choices: unique(points.map(p => p.choice)),
      caption: `Worst rank's peak of one iteration above the level before it, with the engine's buffers. ${device ? `The device has ${bytes(device)}${line.length ? " (dashed)" : ""}.` : ""}`,
      node: lines({panels: unique(mine.map(cell => cell.mask)), points, failed: crosses, x: lengthAxis(lengthsOf(mine)), merge: true, rules: line,
        y: {type: "log", base: 2, label: "GiB", domain: [2 ** from, 2 ** until], ticks, tickFormat: String, nice: false}, tip: p => `${tipOf(p.cell)}\n${bytes(p.cell.peak)}`}, finding)};
  },
};

const PARTS = [["even", "computing", "#0072B2"], ["imbalance", "imbalance", "#F0E442"], ["exposed", "exposed communication", "#D55E00"], ["rest", "rest", "#999999"]];

const timeSplit = {
  id: "time", name: "where the time goes", asks: cells => cells.some(cell => cell.even !== null),
  draw(cells) {
    const known = cells.filter(cell => isGood(cell) && cell.even !== null);
    const [scale, scaleField] = choose("scale", "scale", inOrderOfScale(known));
    const ofScale = known.filter(cell => cell.scale === scale);
    const [length, lengthField] = choose("seqlen", "length", lengthsOf(ofScale), tokens, lengthsOf(ofScale).at(-1));
    const mine = ofScale.filter(cell => cell.seqlen === length), names = d3.max(mine, cell => cell.choice.length);
    const plots = d3.groups(mine, cell => cell.mask).map(([mask, ofMask]) => {
      const bars = ofMask.flatMap(cell => PARTS.map(([key, what]) => ({choice: cell.choice, what, ms: 1e3 * cell[key], cell})));
      return plotted({width: Math.min(widthOf(), 560), height: 56 + 19 * ofMask.length, marginLeft: 20 + 6.4 * names, marginTop: 22, x: {label: "ms", grid: true},
        y: {label: null, domain: d3.sort(ofMask, cell => cell.total).map(cell => cell.choice)}, color: {domain: PARTS.map(p => p[1]), range: PARTS.map(p => p[2])}, marks: [
          Plot.barX(bars, {x: "ms", y: "choice", fill: "what", insetTop: 2, insetBottom: 2, title: b => `${b.choice} ${b.what}: ${digits(b.ms)} ms of ${digits(1e3 * b.cell.total)}`}),
          Plot.text([mask], {frameAnchor: "top-left", dy: -16, text: [mask], fontWeight: 600, fontSize: 12})]}, `${mask}: ${leastExposed(ofMask)}`);
    });
    const key = h("div", {class: "legend"}, PARTS.map(([, what, color]) => h("span", {}, h("i", {style: `background: ${color}; width: 12px; height: 10px`}), what)));
    return {title: `Where the time goes, ${tokens(length)} ${scale}`, fields: [scaleField, lengthField], finding: leastExposed(mine), node: h("div", {}, key, h("div", {class: "side-by-side"}, plots)),
      caption: "Computing: the schedule without its messages, as if the work were spread evenly. Imbalance: what the busiest rank has more; another cp.layout may help, faster links will not. Exposed communication: the whole minus the schedule without its messages, per phase. Rest: what lies between the phases."};
  },
};

function leastExposed(cells) {
  const share = cell => cell.exposed / cell.total, sorted = d3.sort(cells, share);
  if (share(sorted.at(-1)) - share(sorted[0]) < 0.01) return `All wait for messages for ${percent(d3.mean(cells, share))} of their time.`;
  return `Least of its time ${sorted[0].choice} waits for messages (${percent(share(sorted[0]))}), most ${sorted.at(-1).choice} (${percent(share(sorted.at(-1)))}).`;
}

const roofline = {
  id: "roofline", name: "roofline", asks: cells => cells.some(cell => isGood(cell) && cell.least && cell.top),
  draw(cells) {
    const good = cells.filter(cell => isGood(cell) && cell.least && cell.top);
    const [which, field] = choose("device", "device", unique(good.map(cell => `${cell.device} ${cell.dtype}`)));
    const mine = good.filter(cell => `${cell.device} ${cell.dtype}` === which), peak = d3.median(mine, cell => cell.top);
    const work = cell => cell.total_rate * 1e12 * cell.total, gbytes = BLOCK.devices[mine[0].device]?.gbytes;
    const sent = mine.filter(cell => cell.sent > 0);
    const finding = `The best cell reaches ${percent(d3.max(mine, cell => cell.total_rate) / peak)} of the peak of ${digits(peak)} TFLOP/s.`;
    const panels = [roofPanel(mine, cell => work(cell) / cell.least, gbytes ? {memory: gbytes} : {}, peak, "FLOP per byte of inputs, outputs and gradients"),
      sent.length ? roofPanel(sent, cell => work(cell) / cell.sent, BLOCK.links, peak, "FLOP per byte sent") : null];
    return {title: `Roofline, ${which}`, fields: [field], finding, choices: unique(mine.map(cell => cell.choice)), node: h("div", {class: "side-by-side"}, panels.filter(Boolean)),
      caption: "A point on a slope is limited by that memory or link; a point near the flat roof by computing. Left: bytes of a rank's inputs, outputs and gradients, each touched once. Right: bytes of the rank that sends most; slopes are what the check of the nodes measured."};
  },
};

function roofPanel(cells, intensity, roofs, peak, label) {
  const bends = Object.values(roofs).map(gbytes => 1e3 * peak / gbytes), [least, most] = d3.extent(cells, intensity);
  const from = d3.min([least, ...bends]) / 4, until = most * 4, low = d3.min(cells, cell => cell.total_rate) / 3;
  const slopes = Object.entries(roofs).flatMap(([name, gbytes]) => [from, 1e3 * peak / gbytes, until].map(x => ({name: `${name}: ${digits(gbytes)} GB/s`, x, y: Math.min(peak, x * gbytes / 1e3)})));
  return plotted({width: 520, height: 330, marginLeft: 48, x: {type: "log", label, domain: [from, until], ticks: 5, tickFormat: "~s"}, y: {type: "log", label: "TFLOP/s per GPU", domain: [low, peak * 1.6], ticks: 5, tickFormat: "~g"}, marks: [
    Plot.line(slopes, {x: "x", y: "y", z: "name", stroke: "currentColor", strokeOpacity: 0.6, clip: true}),
    ...d3.groups(slopes, s => s.name).map(([name, line], i) => Plot.text([line[1]], {x: "x", y: "y", text: [name], dy: 12 + 13 * i, dx: 6, textAnchor: "start", fillOpacity: 0.8})),
    Plot.ruleY([peak], {stroke: "currentColor"}), Plot.text([peak], {y: d => d, frameAnchor: "left", dy: -7, dx: 4, textAnchor: "start", text: d => `peak: ${digits(d)} TFLOP/s`}),
    ...d3.groups(cells, cell => cell.choice).map(([choice, mine]) => Plot.dot(mine, {x: intensity, y: "total_rate", symbol: styleOf(choice).symbol, r: 3, fill: styleOf(choice).color, stroke: "var(--back)", strokeWidth: 0.5})),
    Plot.tip(cells, Plot.pointer({x: intensity, y: "total_rate", title: tipOf}))]}, `${cells.length} cells under ${label}`);
}

const pivot = {
  id: "table", name: "table", asks: cells => cells.some(isGood),
  draw(cells) {
    const [phase, phaseField] = choose("phase", "phase", PHASES.filter(p => BLOCK.phases.includes(p)));
    const [scale, scaleField] = choose("scale", "scale", inOrderOfScale(cells));
    const mine = cells.filter(cell => cell.scale === scale), columns = d3.groups(mine, cell => cell.mask).map(([mask, found]) => [mask, lengthsOf(found)]);
    const key = `${phase}_rate`, best = d3.rollup(mine.filter(isGood), found => d3.max(found, cell => cell[key]), cell => cell.problem), top = d3.max(best.values());
    const value = (choice, mask, length) => {
      const cell = mine.find(c => c.choice === choice && c.mask === mask && c.seqlen === length);
      if (!cell) return h("td", {class: "number"}, "-");
      if (!isGood(cell)) return h("td", {class: "number"}, h("a", {href: `#c-${cell.id}`}, cell.kind || "-"));
      const part = cell[key] / top;
      return h("td", {class: cell[key] === best.get(cell.problem) ? "number best" : "number", style: `background: color-mix(in srgb, #0072B2 ${(part * 38).toFixed(0)}%, transparent)`}, digits(cell[key]));
    };
    const node = h("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "rates"}, h("table", {class: "pivot"}, h("thead", {},
      h("tr", {}, h("th", {rowspan: 2}, "choice"), columns.map(([mask, lengths]) => h("th", {colspan: lengths.length}, mask))),
      h("tr", {}, columns.flatMap(([, lengths]) => lengths.map(length => h("th", {class: "number"}, tokens(length)))))),
      h("tbody", {}, unique(mine.map(cell => cell.choice)).map(choice => h("tr", {}, h("th", {scope: "row"}, choice), columns.flatMap(([mask, lengths]) => lengths.map(length => value(choice, mask, length))))))));
    return {title: `TFLOP/s per GPU, ${phase}, ${scale}`, fields: [phaseField, scaleField], finding: "Bold: the best of a column. -: did not run; other words: why it failed.", node};
  },
};

const FIGURES = [byLength, byGpus, efficiency, ranking, heatMap, memory, timeSplit, roofline, pivot];

/** The tabs of figures that these cells call for, and the one that is looked at. */
function drawFigures(place, cells) {
  const settings = unique(cells.map(cell => cell.setting));
  const [setting, settingField] = choose("setting", "setting", settings);
  const mine = overSeeds(cells.filter(cell => cell.setting === setting));
  const figures = FIGURES.filter(figure => figure.asks(mine));
  if (!figures.length) return place.replaceChildren(h("p", {class: "dim"}, "Nothing of this view has a good result to draw."));
  const first = unique(mine.map(cell => cell.problem)).length === 1 ? figures.find(f => f === ranking) ?? figures[0] : figures[0];
  const now = picked("fig", figures.map(f => f.id), first.id), drawn = figures.find(f => f.id === now).draw(mine);
  const tabs = h("div", {class: "tabs", role: "tablist", "aria-label": "figures", onkeydown: moveTab}, figures.map(f => h("button", {type: "button", role: "tab", id: `tab-${f.id}`,
    "aria-selected": String(f.id === now), tabindex: f.id === now ? "0" : "-1", onclick: () => pickTab(f.id)}, f.name)));
  place.replaceChildren(tabs, h("div", {role: "tabpanel", "aria-labelledby": `tab-${now}`}, h("div", {class: "controls"}, settingField, drawn.fields), h("figure", {id: `figure-${now}`},
    h("h3", {}, drawn.title), drawn.choices?.length > 1 ? legend(drawn.choices) : null, drawn.node, h("figcaption", {}, h("b", {}, drawn.finding), " ", drawn.caption ?? ""))));
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
  const tabs = [...event.currentTarget.querySelectorAll("[role=tab]")], at = tabs.findIndex(tab => tab.getAttribute("aria-selected") === "true");
  pickTab(tabs[(at + step + tabs.length) % tabs.length].id.replace("tab-", ""));
}
