"use strict";
// Training steps: what time and memory of a step are made of, one against the other, what a whole model comes to, the longest
// length.

const stepOf = cell => BLOCK.steps[cell.id];
const MIDST = ["layers that were run", `whole model (${BLOCK.scaled})`];

/** The section of the training steps among these cells. */
function drawSteps(place, cells) {
  const mine = overSeeds(cells.filter(stepOf));
  if (!mine.length) return place.replaceChildren(h("p", {class: "dim"}, "Nothing of this view is a training step."));
  const problem = chooseProblem(mine, 1, "step-");
  const drawn = d3.sort(problem.cells.filter(isDrawn), cell => cell.total),
    failed = problem.cells.filter(cell => cell.status === "failed");
  const steps = problem.cells.map(stepOf),
    partial = steps.some(step => step.layers < step.of && step.wholeTime !== null);
  const [what, whatField] = choose("step-of", "a step of", partial ? MIDST : MIDST.slice(0, 1));
  const finding = stepsSaid(drawn.filter(isGood), failed);
  const parts = [
    stepFigure("step-time", "Time of a step", drawn.length ? timeOfSteps(drawn, failed, what === MIDST[1]) : null),
    stepFigure("step-memory", "Peak memory of a GPU", drawn.some(cell => cell.peak) ? memoryOfSteps(drawn, failed) : null),
    stepFigure("step-trade", "Time against memory", drawn.filter(cell => cell.peak).length > 1 ? tradeOff(drawn) : null),
  ];
  place.replaceChildren(
    h("div", {class: "controls"}, problem.fields, whatField),
    h("h3", {}, `${ofModel(steps)}, ${problem.said}`),
    h("p", {id: "step-finding"}, h("b", {}, finding)),
    h("div", {class: "side-by-side"}, parts.filter(Boolean)),
    stepTable(drawn, failed, partial),
  );
}

/** `tiny, 2 of 4 layers`. */
const ofModel = steps =>
  unique(steps.map(s => `${s.model}, ${s.layers === s.of ? `all ${s.of}` : `${s.layers} of ${s.of}`} layers`)).join(" and ");

/** Which is fastest, and which needs least memory, in words. */
function stepsSaid(good, failed) {
  const bad = failed.length ? ` ${failed.length} failed.` : "";
  if (!good.length) return `No step has a good result.${bad}`;
  const [best] = good,
    step = stepOf(best);
  const rates = [
    step.tokens === null ? "" : `${digits(step.tokens)} tokens/s per GPU`,
    best.mfu === null ? "" : `MFU ${percent(best.mfu)}`,
    best.peak === null ? "" : `peak ${bytes(best.peak)}`,
  ];
  const least = d3.least(good.filter(cell => cell.peak), cell => cell.peak);
  const other =
    least && least !== best
      ? ` Least memory: ${least.choice}, ${bytes(least.peak)}, time ${more(least.total / best.total)}.`
      : "";
  const whole =
    step.layers < step.of && step.wholeTime !== null ? ` The whole model: ${seconds(step.wholeTime)} a step, ${BLOCK.scaled}.` : "";
  const alone = good.length > 1 ? "takes least time" : "ran alone";
  return `${best.choice} ${alone}: ${[seconds(best.total), ...rates].filter(Boolean).join(", ")}.${whole}${other}${bad}`;
}

/** A figure with what it shows, and how to read it; null of nothing. */
function stepFigure(id, title, made) {
  if (!made) return null;
  return h(
    "figure",
    {id, style: `width: ${stepWidth()}px`},
    h("h4", {}, title, made.note ? h("span", {class: "scaled"}, made.note) : null),
    made.key,
    made.node,
    h("figcaption", {}, made.caption),
  );
}

const keyOf = (colors, names) =>
  h(
    "div",
    {class: "legend"},
    colors
      .filter(([name]) => names.has(name))
      .map(([name, color]) => h("span", {}, h("i", {style: `background: ${color}; width: 12px; height: 10px`}), name)),
  );

/** Parts of a bar, one behind the other: {cell, name, from, to}. `amounts`: of a cell, by name; in the order of `colors`. */
function stacked(cells, amounts, colors) {
  return cells.flatMap(cell => {
    let end = 0;
    const of = amounts(cell);
    return colors
      .filter(([name]) => of[name] > 0)
      .map(([name]) => ({cell, choice: cell.choice, name, from: end, to: (end += of[name])}));
  });
}

/** Lines across, of the text's colour: they are seen on every colour and in the dark. */
const hatching = () => {
  const defs = d3.create("svg:defs");
  const pattern = defs
    .append("pattern")
    .attr("id", "hatch")
    .attr("width", 5)
    .attr("height", 5)
    .attr("patternUnits", "userSpaceOnUse")
    .attr("patternTransform", "rotate(45)");
  pattern.append("rect").attr("width", 5).attr("height", 5).attr("fill", "var(--back)");
  pattern.append("line").attr("y2", 5).attr("stroke", "currentColor").attr("stroke-width", 3);
  return defs.node();
};

/**
 * Bars of parts, a row per choice with its mark, in the order of the cells; failed ones below, with their class.
 * spec: parts (`stacked`), colors, unit {name, size}, label, end: where a bar's text stands, text: of a cell, hollow: of a cell,
 * marks: more of them, domain.
 */
function stepBars(cells, failed, spec, finding) {
  const names = [...cells, ...failed].map(cell => cell.choice),
    size = spec.unit.size;
  const look = {insetTop: 3, insetBottom: 3};
  return plotted(
    {
      width: stepWidth(),
      height: 52 + 26 * names.length,
      marginLeft: 36 + 6.4 * d3.max(names, name => name.length),
      marginRight: 120,
      x: {label: `${spec.label}, ${spec.unit.name}`, grid: true, ticks: 4, domain: spec.domain, tickFormat: String},
      y: {domain: names, label: null},
      color: {domain: spec.colors.map(c => c[0]), range: spec.colors.map(c => c[1])},
      marks: [
        Plot.axisY({tickSize: 0, tickPadding: 22, label: null}),
        ...[true, false].map(hollow =>
          Plot.barX(
            spec.parts.filter(part => spec.hollow(part.cell) === hollow),
            {
              x1: part => part.from / size,
              x2: part => part.to / size,
              y: "choice",
              fill: "name",
              ...(hollow ? {fillOpacity: 0.35, stroke: "name", strokeDasharray: "3,2", strokeWidth: 1.5} : {}),
              title: part => `${part.choice}\n${part.name}: ${spec.said(part.to - part.from)}`,
              ...look,
            },
          ),
        ),
        ...(spec.marks ?? []),
        Plot.ruleX([0]),
        ...[...cells, ...failed].map(cell => {
          const style = styleOf(cell.choice);
          return Plot.dot([cell], {
            x: 0,
            y: "choice",
            dx: -12,
            r: 4,
            symbol: style.symbol,
            fill: style.hollow ? "var(--back)" : style.color,
            stroke: style.color,
          });
        }),
        Plot.text(cells, {x: cell => spec.end(cell) / size, y: "choice", text: spec.text, textAnchor: "start", dx: 7}),
        Plot.text(failed, {
          x: 0,
          y: "choice",
          text: cell => `✕ ${cell.kind}`,
          textAnchor: "start",
          dx: 6,
          fill: "var(--bad)",
          ariaLabel: cell => `failed: ${cell.choice} ${cell.kind}`,
        }),
      ],
    },
    finding,
  );
}

/** Two figures beside one another where there is room. */
const stepWidth = () => (widthOf() < 1080 ? Math.min(widthOf(), 720) : Math.floor((widthOf() - 30) / 2));
const unitOf = (value, units) => units.findLast(([, size]) => value / size >= 1) ?? units[0];

function timeOfSteps(cells, failed, whole) {
  const known = cells.filter(cell => !whole || stepOf(cell).wholeTime !== null);
  const time = cell => (whole ? stepOf(cell).wholeTime : cell.total),
    phases = cell => (whole ? stepOf(cell).whole : stepOf(cell).phases);
  const sorted = d3.sort(known, time),
    best = sorted[0],
    parts = stacked(sorted, phases, BLOCK.stepPhases);
  const ends = d3.rollup(
    parts,
    mine => d3.max(mine, part => part.to),
    part => part.cell,
  );
  const [name, size] = unitOf(d3.max(sorted, time) ?? 1, [
    ["µs", 1e-6],
    ["ms", 1e-3],
    ["s", 1],
  ]);
  const attending = whole ? [] : sorted.filter(cell => stepOf(cell).attention !== null);
  const share = cell => stepOf(cell).attention * cell.total;
  const finding = sorted.length
    ? `Least time: ${best.choice}, ${seconds(time(best))}${whole ? `, ${BLOCK.scaled}` : ""}.`
    : "No step has a time.";
  const key = keyOf(BLOCK.stepPhases, new Set(parts.map(part => part.name)));
  if (attending.length) key.append(h("span", {}, h("i", {class: "hatched"}), "attention's share"));
  return {
    note: whole ? BLOCK.scaled : null,
    key,
    node: stepBars(
      sorted,
      failed,
      {
        parts,
        colors: BLOCK.stepPhases,
        unit: {name, size},
        label: "time of a step",
        said: seconds,
        hollow: cell => whole || !isGood(cell),
        end: cell => Math.max(ends.get(cell) ?? 0, time(cell)),
        text: cell => `${seconds(time(cell))}${cell === best ? "" : ` · ${more(time(cell) / time(best))}`}`,
        marks: attending.length
          ? [
              hatching,
              Plot.barX(attending, {
                x1: 0,
                x2: cell => share(cell) / size,
                y: "choice",
                fill: "url(#hatch)",
                insetTop: 15,
                insetBottom: 4,
                title: cell => `${cell.choice}\nattention and its messages: ${percent(stepOf(cell).attention)} of the step`,
              }),
            ]
          : [],
      },
      finding,
    ),
    caption: whole
      ? `${firstUpper(BLOCK.scaled)}: forward and backward by layers, the head once, sums over ranks and the optimizer ` +
        "by weights; " +
        "without the embedding. Attention's share is that of the layers that were run."
      : "Medians of the phases, of the slowest rank. Hatched: how much of the whole step attention and its messages take, " +
        "forward, " +
        "backward and computed again (from a pass of its own; it says how much, not where).",
  };
}

const firstUpper = text => text[0].toUpperCase() + text.slice(1);

function memoryOfSteps(cells, failed) {
  const known = d3.sort(
    cells.filter(cell => cell.peak),
    cell => cell.peak,
  );
  const parts = stacked(known, cell => stepOf(cell).memory, BLOCK.stepMemory);
  const ends = d3.rollup(
    parts,
    mine => d3.max(mine, part => part.to),
    part => part.cell,
  );
  const end = cell => Math.max(ends.get(cell) ?? 0, cell.peak),
    most = d3.max(known, end);
  const device = BLOCK.devices[known[0].device]?.memory,
    near = device && most > 0.15 * device;
  const [name, size] = unitOf(most, [
    ["KiB", 2 ** 10],
    ["MiB", 2 ** 20],
    ["GiB", 2 ** 30],
  ]);
  const least = known[0],
    finding = `Least memory: ${least.choice}, ${bytes(least.peak)}; most: ${known.at(-1).choice}, ${bytes(known.at(-1).peak)}.`;
  const share = near ? " (dashed)" : `, of which these take at most ${percent(most / device)}`;
  const of = device ? ` The device has ${bytes(device)}${share}.` : "";
  const key = keyOf(BLOCK.stepMemory, new Set(parts.map(part => part.name)));
  key.append(h("span", {}, h("i", {class: "peak"}), "peak"));
  return {
    key,
    node: stepBars(
      known,
      failed,
      {
        parts,
        colors: BLOCK.stepMemory,
        unit: {name, size},
        label: "memory of the worst rank",
        said: bytes,
        hollow: cell => !isGood(cell),
        end,
        text: cell => `${bytes(cell.peak)}${device ? ` · ${percent(cell.peak / device)}` : ""}`,
        domain: near ? [0, Math.max(device, most) / size] : undefined,
        marks: [
          Plot.tickX(known, {
            x: cell => cell.peak / size,
            y: "choice",
            stroke: "currentColor",
            strokeWidth: 3,
            insetTop: 1,
            insetBottom: 1,
          }),
          near ? Plot.ruleX([device / size], {stroke: "var(--bad)", strokeDasharray: "6,3"}) : null,
        ],
      },
      finding,
    ),
    caption:
      "Of the layers that were run. Each class when it is largest, which is not at one time: together they may be more " +
      "than the peak (mark). Transient: what the " +
      `peak has beyond them, such as gathered weights, logits, what is computed again. Buffers kept for backward count twice.${of}`,
  };
}

/** Step time against peak memory: what a policy of recompute costs, and saves. A line joins what differs in it only. */
function tradeOff(cells) {
  const measured = cells.filter(cell => cell.peak),
    best = unbeaten(measured.map(cell => [cell.total, cell.peak]));
  const points = measured.map((cell, i) => ({cell, choice: cell.choice, step: stepOf(cell), front: best[i]}));
  const [timeName, time] = unitOf(d3.max(points, p => p.cell.total), [
    ["µs", 1e-6],
    ["ms", 1e-3],
    ["s", 1],
  ]);
  const [memoryName, memory] = unitOf(d3.max(points, p => p.cell.peak), [
    ["KiB", 2 ** 10],
    ["MiB", 2 ** 20],
    ["GiB", 2 ** 30],
  ]);
  const x = p => p.cell.total / time,
    y = p => p.cell.peak / memory,
    policies = unique(points.map(p => p.cell.recompute)).length > 1;
  const ordered = d3.sort(points, y);
  const kept = points.filter(p => p.front).map(p => p.choice);
  const finding = `Nothing is both faster and smaller than ${unique(kept).join(", ")}.`;
  return {
    key: points.length ? legend(unique(points.map(p => p.choice))) : null,
    node: plotted(
      {
        width: stepWidth(),
        height: 300,
        marginLeft: 58,
        marginRight: 90,
        x: {label: `time of a step, ${timeName}`, labelAnchor: "center", grid: true, nice: true, ticks: 6},
        y: {label: `peak, ${memoryName} a GPU`, grid: true, nice: true, ticks: 6},
        marks: [
          Plot.line(ordered, {x, y, z: p => p.step.rest, stroke: "currentColor", strokeOpacity: 0.35}),
          ...points.map(p => {
            const style = styleOf(p.choice);
            return Plot.dot([p], {
              x,
              y,
              symbol: style.symbol,
              r: 4,
              fill: style.hollow ? "var(--back)" : style.color,
              stroke: style.color,
              opacity: p.front ? 1 : 0.35,
            });
          }),
          Plot.text(points.filter(p => p.front), {
            x,
            y,
            text: p => (policies ? p.cell.recompute : p.choice),
            textAnchor: "start",
            dx: 8,
            dy: -6,
            fontSize: 10,
          }),
          Plot.tip(points, Plot.pointer({x, y, title: p => `${tipOf(p.cell)}\n${bytes(p.cell.peak)} a GPU`})),
        ],
      },
      finding,
    ),
    caption:
      `Further left and further down is better. ${finding} What is beaten in both is faint, some of it within the noise.` +
      (policies ? " A line joins what differs in recompute only." : ""),
  };
}

/** Numbers of each choice, the fastest first; those of the whole model apart, and marked. */
function stepTable(drawn, failed, partial) {
  const best = drawn.find(isGood),
    planned = drawn.some(cell => stepOf(cell).planned),
    host = drawn.some(cell => stepOf(cell).host);
  const heads = [
    ["step", "median of a step, of the slowest rank"],
    ["tokens/s per GPU", "tokens of a step over its time and all GPUs, of the layers that were run"],
    ["MFU", "model FLOPs over time and peak: what is computed again is not counted"],
    ["HFU", "the same with what is computed again"],
    ["attention", "share of the step's time"],
    ["peak", "memory of the worst rank"],
    planned && ["planned", "the peak of a plan that gives each tensor its place (MEMO); the allocator's stands before it"],
    host && ["host", "memory of the host that a rank takes for saved tensors"],
  ].filter(Boolean);
  const scaled = partial ? ["step", "tokens/s per GPU", "MFU"] : [];
  const row = cell => {
    const s = stepOf(cell),
      own = [seconds(cell.total), digits(s.tokens), percent(cell.mfu), percent(s.hfu), percent(s.attention), bytes(cell.peak)]
        .concat(planned ? [bytes(s.planned)] : [])
        .concat(host ? [bytes(s.host)] : []),
      whole = [s.wholeTime === null ? "" : `≈ ${seconds(s.wholeTime)}`, digits(s.wholeTokens), percent(s.wholeMfu)];
    return h(
      "tr",
      {style: `--c: ${styleOf(cell.choice).color}`},
      h("th", {scope: "row", class: "mine"}, cellLink(cell, cell.choice)),
      own.map((text, i) => h("td", {class: i || cell !== best ? "number" : "number best"}, text)),
      scaled.map((_, i) => h("td", {class: "number scaled"}, whole[i])),
    );
  };
  const bad = cell =>
    h(
      "tr",
      {style: `--c: ${styleOf(cell.choice).color}`},
      h("th", {scope: "row", class: "mine"}, cellLink(cell, cell.choice)),
      h("td", {class: "words failed", colspan: heads.length + scaled.length}, `✕ ${whyNot(cell)}`),
    );
  const above = h(
    "tr",
    {},
    h("th", {}),
    h("th", {colspan: heads.length}, "measured"),
    h("th", {colspan: 3, class: "scaled"}, `whole model: ${BLOCK.scaled}`),
  );
  return h(
    "div",
    {class: "scroll", tabindex: "0", role: "region", "aria-label": "numbers of a training step"},
    h(
      "table",
      {id: "step-table"},
      h(
        "thead",
        {},
        partial ? above : null,
        h(
          "tr",
          {},
          h("th", {}, "choice"),
          heads.map(([name, about]) => h("th", {class: "number"}, h("abbr", {title: about}, name))),
          scaled.map(name => h("th", {class: "number scaled"}, name)),
        ),
      ),
      h("tbody", {}, drawn.map(row), failed.map(bad)),
    ),
  );
}

/** As `reached` of report/step.py: of each choice of a model, mask and scale with several lengths, the longest that ran. */
function reachedBy(cells) {
  const tried = cells.filter(cell => cell.status === "ok" || cell.status === "failed");
  return d3
    .groups(tried, cell => `${cell.mask}|${cell.scale}|${cell.where}`)
    .filter(([, mine]) => lengthsOf(mine).length > 1)
    .flatMap(([, problem]) =>
      d3
        .groups(problem, cell => cell.choice)
        .map(([choice, mine]) => {
          const best = d3.greatest(
            mine.filter(cell => cell.status === "ok"),
            cell => cell.seqlen,
          );
          const beyond = d3.least(
            mine.filter(cell => cell.status === "failed" && cell.seqlen > (best?.seqlen ?? 0)),
            cell => cell.seqlen,
          );
          return {choice, best, beyond, of: mine[0]};
        }),
    );
}

/** The section of the longest lengths: a search's answers for choices of which a cell is in view, or what training steps
 * reached. */
function drawLongest(place, cells) {
  const inView = new Map(cells.map(cell => [cell.id, cell]));
  const rows = BLOCK.searched
    ? BLOCK.searched.rows
        .map(row => ({...row, of: row.cells.map(id => inView.get(id)).find(Boolean)}))
        .filter(row => row.of)
        .map(row => ({...row, choice: row.of.choice}))
    : reachedBy(cells.filter(stepOf)).map(reachedRow);
  if (!rows.length) return place.replaceChildren(h("p", {class: "dim"}, "Nothing of this view was tried at several lengths."));
  const most = d3.max(rows, row => row.tokens ?? 0);
  const keys = [
    ["mask", "mask"],
    ["scale", "scale"],
    ["where", "setting"],
  ].filter(([key]) => unique(rows.map(row => row.of[key])).length > 1);
  const head = h(
    "tr",
    {},
    h("th", {}, "choice"),
    keys.map(([, name]) => h("th", {}, name)),
    h("th", {class: "number"}, BLOCK.searched ? "longest that fits" : "longest that ran"),
    h("th", {}),
    h("th", {class: "number"}, BLOCK.searched ? "needs" : "peak there"),
    h("th", {}, BLOCK.searched ? "does not fit" : "next that did not run"),
  );
  const said = row => (row.tokens === null ? "none" : `${row.open ? "at least " : ""}${tokens(row.tokens)}`);
  const body = rows.map(row =>
    h(
      "tr",
      {style: `--c: ${styleOf(row.choice).color}`},
      h("th", {scope: "row", class: "mine"}, row.choice),
      keys.map(([key]) => h("td", {}, row.of[key])),
      h("td", {class: row.predicted ? "number predicted" : "number"}, row.cell ? cellLink(row.cell, said(row)) : said(row)),
      h("td", {class: "bar"}, h("i", {style: `width: ${((100 * (row.tokens ?? 0)) / Math.max(most, 1)).toFixed(0)}%`})),
      h("td", {class: "number"}, bytes(row.needs)),
      h(
        "td",
        {class: row.beyond || row.why ? "words failed" : "dim"},
        [row.beyond ? tokens(row.beyond) : "", row.why].filter(Boolean).join(": ") || "none was tried",
      ),
    ),
  );
  place.replaceChildren(
    h(
      "div",
      {class: "scroll", tabindex: "0", role: "region", "aria-label": "the longest length of every choice"},
      h("table", {id: "longest-table"}, h("thead", {}, head), h("tbody", {}, body)),
    ),
    h(
      "p",
      {class: "dim"},
      BLOCK.searched
        ? `A search for the longest length that fits ${bytes(BLOCK.searched.cap)} a rank. Needs: the peak of an iteration ` +
            "and its inputs, of the rank that needs most." +
            (rows.some(row => row.predicted) ? " Predicted, not measured." : "")
        : "Of the lengths of this sweep. Where nothing longer was tried, a choice may go further than it says here; " +
            "search=max_seqlen finds how far.",
    ),
  );
}

const reachedRow = f => ({
  choice: f.choice,
  of: f.of,
  cell: f.best,
  tokens: f.best?.seqlen ?? null,
  needs: f.best?.peak ?? null,
  beyond: f.beyond?.seqlen ?? null,
  why: f.beyond?.kind ?? "",
});
