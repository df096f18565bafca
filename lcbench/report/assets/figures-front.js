"use strict";
// What no other choice beats in time, memory and GPUs at once: the Pareto front.

const MOST_SAID = 4; // choices of the front that are named for a mask

/** Of each row of measures, the less the better: whether no other is at most as large in all of them and smaller in one. */
function unbeaten(rows) {
  const beats = (other, mine) => other.every((v, i) => v <= mine[i]) && other.some((v, i) => v < mine[i]);
  return rows.map(mine => !rows.some(other => beats(other, mine)));
}

/** Cells of one length as points, of masks with good results on several numbers of GPUs; `front`: no other of its mask beats it. */
function frontOf(cells) {
  return d3
    .groups(
      cells.filter(cell => isGood(cell) && cell.peak > 0),
      cell => cell.mask,
    )
    .filter(([, mine]) => unique(mine.map(cell => cell.ranks)).length > 1)
    .flatMap(([, mine]) => {
      const exact = mine.filter(isExact),
        best = unbeaten(exact.map(cell => [cell.ranks, cell.total, cell.peak]));
      return mine.map(cell => ({cell, choice: cell.choice, front: best[exact.indexOf(cell)] ?? false}));
    });
}

/** What nothing beats, in words, mask by mask, fewer GPUs first. */
function frontSaid(points) {
  const said = d3.groups(points, p => p.cell.mask).map(([mask, mine]) => {
    const front = d3.sort(
      mine.filter(p => p.front).map(p => p.cell),
      cell => cell.ranks,
      cell => cell.total,
    );
    const first = front.slice(0, MOST_SAID).map(c => `${c.choice} on ${c.ranks} GPUs (${seconds(c.total)}, ${bytes(c.peak)})`);
    const others = front.length > MOST_SAID ? ` and ${front.length - MOST_SAID} more` : "";
    const beaten = `${mine.length - front.length} of ${mine.length} are beaten`;
    return `${mask}: nothing beats ${first.join(", ")}${others}; ${beaten}`;
  });
  return `${said.join(". ")}.`;
}

const frontLengths = cells => lengthsOf(cells).filter(length => frontOf(cells.filter(cell => cell.seqlen === length)).length);

const front = {
  id: "pareto",
  name: "time, memory, GPUs",
  foretold: true,
  asks: cells => frontLengths(cells).length > 0,
  draw(cells) {
    const [length, lengthField] = choose("seqlen", "length", frontLengths(cells), tokens);
    const ofLength = cells.filter(cell => cell.seqlen === length),
      points = frontOf(ofLength),
      masks = unique(points.map(p => p.cell.mask));
    const drawn = ofLength.filter(cell => masks.includes(cell.mask));
    const foretold = drawn
      .filter(cell => cell.status === "predicted" && !isGood(cell) && cell.total !== null && cell.peak > 0)
      .map(cell => ({cell, choice: cell.choice, front: true}));
    const plots = masks.flatMap(mask => {
      const mine = points.filter(p => p.cell.mask === mask),
        beside = foretold.filter(p => p.cell.mask === mask);
      return [gpusByTime(mask, mine, beside), memoryByTime(mask, mine, beside)];
    });
    return {
      title: `Time, memory and GPUs, ${tokens(length)} tokens`,
      fields: [lengthField],
      finding: frontSaid(points),
      choices: unique([...points, ...foretold].map(p => p.choice)),
      node: h("div", {class: "side-by-side"}, plots),
      caption: frontCaption(drawn, points, foretold),
    };
  },
};

function frontCaption(drawn, points, foretold) {
  const failed = drawn.filter(cell => cell.status === "failed").length,
    without = drawn.filter(isGood).length - points.length,
    hollow = foretold.length || BLOCK.good === "predicted";
  return (
    "Further left and further down is better. Full marks, with the 95 % interval of their time: no other choice is at least as " +
    "good in time, memory and GPUs and better in one; faint ones are beaten, some of them within the noise. Line: the fastest " +
    "with at most so many GPUs. GiB a GPU: the peak of the worst rank; a number there: how many GPUs it takes." +
    (failed ? ` Left out: ${failed} failed cell${failed > 1 ? "s" : ""}.` : "") +
    (without ? ` Left out: ${without} without a peak of memory.` : "") +
    (hollow ? " Hollow: predicted, not measured." : "") +
    (foretold.length ? " Beside measurements they beat nothing." : "")
  );
}

/** GPUs against time, with a line through what is fastest with at most so many. */
function gpusByTime(mask, points, beside) {
  const ticks = d3.sort(unique([...points, ...beside].map(p => p.cell.ranks)));
  const fastest = unbeaten(points.map(p => [p.cell.ranks, p.cell.total]));
  const line = d3.sort(
    points.filter((_, i) => fastest[i]),
    p => p.cell.ranks,
  );
  return frontPanel(
    mask,
    points,
    beside,
    cell => cell.ranks,
    {type: "log", base: 2, label: "GPUs", ticks, tickFormat: String, domain: [ticks[0] / 1.3, ticks.at(-1) * 1.3]},
    x => [Plot.line(line, {x: p => x(p.cell), y: p => p.cell.ranks, stroke: "currentColor", strokeOpacity: 0.5})],
  );
}

/** Memory against time, with the number of GPUs beside what nothing beats. */
function memoryByTime(mask, points, beside) {
  const GiB = cell => cell.peak / 2 ** 30,
    all = [...points, ...beside].map(p => GiB(p.cell));
  const from = Math.floor(Math.log2(d3.min(all) / 1.05)),
    until = Math.ceil(Math.log2(d3.max(all) * 1.05));
  const step = Math.max(1, Math.ceil((until - from) / 7)),
    ticks = d3.range(from, until + 1, step).map(power => 2 ** power);
  return frontPanel(
    mask,
    points,
    beside,
    GiB,
    {type: "log", base: 2, label: "GiB a GPU", ticks, tickFormat: String, domain: [2 ** from, 2 ** until]},
    x => [
      Plot.text(
        points.filter(p => p.front),
        {
          x: p => x(p.cell),
          y: p => GiB(p.cell),
          text: p => String(p.cell.ranks),
          textAnchor: "start",
          dx: 6,
          dy: -6,
          fontSize: 10,
          fill: "var(--dim)",
        },
      ),
    ],
  );
}

/** A panel of points against time. `y`: of a cell; `axis`: of y; `more`: further marks, given how a cell's time is placed. */
function frontPanel(mask, points, beside, y, axis, more) {
  const most = d3.max([...points, ...beside], p => p.cell.total),
    [unit, name] = most < 1e-3 ? [1e6, "µs"] : most < 1 ? [1e3, "ms"] : [1, "s"];
  const time = cell => cell.total * unit,
    best = points.filter(p => p.front);
  return plotted(
    {
      width: Math.min(widthOf(), 520),
      height: 290,
      marginLeft: 52,
      marginTop: 30,
      x: {type: "log", label: `time of an iteration, ${name}`, labelAnchor: "center", ticks: 5, tickFormat: "~g", inset: 10},
      y: {...axis, grid: true},
      marks: [
        ...more(time),
        Plot.ruleY(best, {
          x1: p => time(p.cell) * Math.exp(-p.cell.total_reach),
          x2: p => time(p.cell) * Math.exp(p.cell.total_reach),
          y: p => y(p.cell),
          stroke: "currentColor",
          strokeOpacity: 0.6,
        }),
        ...frontDots([...points, ...beside], time, y),
        Plot.text([mask], {frameAnchor: "top-left", dx: 44, dy: -24, text: [mask], fontWeight: 600, fontSize: 12}),
        Plot.tip(
          [...points, ...beside],
          Plot.pointer({x: p => time(p.cell), y: p => y(p.cell), title: p => `${tipOf(p.cell)}\n${bytes(p.cell.peak)} a GPU`}),
        ),
      ],
    },
    frontSaid(points),
  );
}

/** A mark per point in the style of its choice; what is beaten is faint, and lies below. */
const frontDots = (points, x, y) =>
  d3
    .groups(
      d3.sort(points, p => p.front),
      p => p.front,
      p => p.choice,
    )
    .flatMap(([kept, choices]) =>
      choices.map(([choice, mine]) => {
        const style = styleOf(choice);
        return Plot.dot(mine, {
          x: p => x(p.cell),
          y: p => y(p.cell),
          symbol: style.symbol,
          r: 3.5,
          fill: style.hollow ? "var(--back)" : style.color,
          stroke: style.color,
          opacity: kept ? 1 : 0.25,
        });
      }),
    );
