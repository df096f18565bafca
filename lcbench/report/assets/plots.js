"use strict";
// What figures share: panels with the same axes, a line per choice in its own style, what failed, and names at the end of lines.

const PANEL = {least: 270, most: 420, height: 230}; // pixels

/** A plot with what it shows in words: for who cannot see it, and below it for all. */
function plotted(options, finding) {
  const made = Plot.plot({
    ...options,
    style: {background: "transparent", color: "currentColor", fontSize: "11px", overflow: "visible", ...options.style},
  });
  const svg = made.tagName === "svg" ? made : made.querySelector("svg:last-of-type");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", finding);
  return made;
}

const widthOf = () => Math.max(320, Math.min(1180, document.getElementById("figure")?.clientWidth || 1000));

/** Where panels go: as many beside one another as fit, then below. */
function panelsOf(names) {
  const room = widthOf() - 60,
    across = Math.max(1, Math.min(names.length, Math.floor(room / PANEL.least)));
  return {
    names,
    across,
    width: across * Math.min(PANEL.most, room / across) + 60,
    down: Math.ceil(names.length / across),
    x: name => names.indexOf(name) % across,
    y: name => Math.floor(names.indexOf(name) / across),
  };
}

/**
 * Lines of one figure: a panel per mask, an axis for all of them.
 * spec: points {panel, x, y, low, high, choice, cell}, failed {panel, x, choice, kind}, published {panel, x, y, name},
 * dotted (like points), x/y: scale options of Plot with `label`, rules: marks of every panel,
 * merge: whether lines that lie on one another share a label.
 */
function lines(spec, finding) {
  const panels = panelsOf(spec.panels),
    place = {fx: d => panels.x(d.panel), fy: d => panels.y(d.panel)};
  const choices = unique(spec.points.map(p => p.choice)),
    all = choices.length,
    ends = [...endsOf(spec.points, spec.merge), ...publishedEnds(spec.published ?? [])];
  const insetRight = Math.min(170, 12 + 5.7 * (d3.max(ends, end => end.text.length) ?? 0));
  const dodged = p => (p.published ? p.x : p.x * 2 ** ((choices.indexOf(p.choice) - (all - 1) / 2) * 0.03));
  const marks = [Plot.gridY({stroke: "currentColor", strokeOpacity: 0.12}), ...(spec.rules ?? [])];
  for (const choice of choices) marks.push(...choiceMarks(spec.points, choice, place, dodged));
  marks.push(...besideMarks(spec, place));
  marks.push(
    ...failureMarks(spec.failed ?? [], place),
    endLabels(ends, place, dodged),
    Plot.text(
      panels.names.map(panel => ({panel})),
      {...place, text: "panel", frameAnchor: "top-left", dy: -15, fontWeight: 600, fontSize: 12},
    ),
    Plot.tip(spec.points, Plot.pointer({...place, x: dodged, y: "y", title: spec.tip})),
  );
  return plotted(
    {
      width: panels.width,
      height: panels.down * PANEL.height + 50,
      marginTop: 26,
      marginLeft: 52,
      marginBottom: 38,
      fx: {axis: null, padding: 0.06},
      fy: {axis: null, padding: 0.16},
      x: {...spec.x, labelAnchor: "center", labelArrow: "none", insetRight, insetLeft: 8},
      y: {insetBottom: 14, nice: true, ...spec.y, label: null},
      marks,
    },
    finding,
  );
}

/** The line of a choice with its intervals and markers. */
function choiceMarks(points, choice, place, dodged) {
  const style = styleOf(choice);
  const mine = d3.sort(
    points.filter(p => p.choice === choice),
    p => p.x,
  );
  return [
    Plot.line(mine, {
      ...place,
      x: dodged,
      y: "y",
      z: "panel",
      stroke: style.color,
      strokeWidth: 1.5,
      strokeDasharray: style.dash,
    }),
    Plot.ruleX(
      mine.filter(p => p.low),
      {...place, x: dodged, y1: "low", y2: "high", stroke: style.color},
    ),
    Plot.dot(mine, {
      ...place,
      x: dodged,
      y: "y",
      symbol: style.symbol,
      r: 3.2,
      fill: p => (p.hollow || style.hollow ? "var(--back)" : style.color),
      stroke: style.color,
    }),
  ];
}

/** Published lines in grey, and ours by their way of counting, dotted. */
function besideMarks(spec, place) {
  const line = (mine, look) =>
    Plot.line(
      d3.sort(mine, p => p.x),
      {...place, x: "x", y: "y", z: "panel", ...look},
    );
  const dotted = d3.groups(spec.dotted ?? [], p => p.choice);
  const published = d3.groups(spec.published ?? [], p => p.name);
  return [
    ...dotted.map(([choice, mine]) => line(mine, {stroke: styleOf(choice).color, strokeDasharray: "1,3"})),
    ...published.map(([, mine]) => line(mine, {stroke: "currentColor", strokeOpacity: 0.45, strokeDasharray: "5,3"})),
  ];
}

/** A cross with the class at the foot of the panel, or at `y`, one above the other where several failed. */
function failureMarks(failed, place) {
  const height = new Map();
  const stacked = failed.map(f => {
    const key = `${f.panel}|${f.x}`,
      level = height.get(key) ?? 0;
    height.set(key, level + 1);
    return {...f, level};
  });
  return d3
    .groups(stacked, f => f.level)
    .map(([level, mine]) =>
      Plot.text(mine, {
        ...place,
        x: "x",
        text: f => `✕ ${f.kind}`,
        dy: -3 - 10 * level,
        ...(mine[0].y === undefined ? {frameAnchor: "bottom"} : {y: "y"}),
        fill: "var(--bad)",
        fontSize: 9.5,
        title: f => `${f.choice}: ${f.kind}`,
        ariaLabel: f => `failed: ${f.choice} ${f.kind}`,
      }),
    );
}

/** The last point of each line with its name; of lines that end on one another one name if `merge`: `ring = usp = … (7)`. */
function endsOf(points, merge) {
  return d3
    .groups(
      points,
      p => p.panel,
      p => p.choice,
    )
    .flatMap(([, choices]) => {
      const lasts = choices
        .map(([, mine]) => d3.greatest(mine, p => p.x))
        .map(last => ({...last, text: last.text ?? last.choice}));
      if (!merge) return lasts;
      const groups = d3.groups(lasts, last => `${last.x} ${Math.round(Math.log(last.y) * 100)}`);
      return groups.map(([, same]) => ({
        ...same[0],
        text: same.length < 3 ? same.map(s => s.text).join(" = ") : `${same[0].text} = … (${same.length})`,
      }));
    });
}

const publishedEnds = points =>
  d3
    .groups(
      points,
      p => p.panel,
      p => p.name,
    )
    .flatMap(([, lines]) =>
      lines.map(([name, mine]) => ({...d3.greatest(mine, p => p.x), published: true, text: `publ. ${name}`})),
    );

/** The color of a choice for words: yellow is too pale for them on white. */
function wordsColor(choice) {
  const {color} = styleOf(choice);
  return d3.lab(color).l > 85 ? "var(--pale)" : color;
}

/** Names at the right end of lines, moved apart. */
function endLabels(ends, place, x) {
  return Plot.text(
    ends,
    Plot.initializer(
      {
        ...place,
        x,
        y: "y",
        text: "text",
        fill: e => (e.published ? "var(--dim)" : wordsColor(e.choice)),
        textAnchor: "start",
        dx: 8,
        fontSize: 10,
        stroke: "var(--back)",
        strokeWidth: 3,
      },
      (data, facets, channels, scales, dimensions) => {
        const xs = Array.from(channels.x.value, scales.x),
          ys = Array.from(channels.y.value, scales.y);
        for (const facet of facets) {
          apart(facet, ys, 10.5);
          // They stay between the panel's title and its foot.
          const above = 4 - d3.min(facet, i => ys[i]),
            below = d3.max(facet, i => ys[i]) - (dimensions.height - dimensions.marginBottom - 4);
          const shift = above > 0 ? above : below > 0 ? Math.max(-below, above) : 0;
          for (const i of facet) ys[i] += shift;
        }
        return {data, facets, channels: {x: {value: xs.map((_, i) => d3.max(xs))}, y: {value: ys}}};
      },
    ),
  );
}

/** Move values of these places apart by at least `gap`, each as little as its neighbours let it. */
function apart(places, values, gap) {
  const order = d3.sort(places, i => values[i]);
  for (let round = 0; round < 60; round++) {
    let moved = false;
    for (let k = 1; k < order.length; k++) {
      const overlap = gap - (values[order[k]] - values[order[k - 1]]);
      if (overlap > 0.1) {
        values[order[k - 1]] -= overlap / 2;
        values[order[k]] += overlap / 2;
        moved = true;
      }
    }
    if (!moved) return;
  }
}

/** Swatches: colour, marker and dash of each choice that is drawn. */
function legend(choices) {
  return h(
    "div",
    {class: "legend"},
    choices.map(choice => {
      const style = styleOf(choice);
      const swatch = Plot.plot({
        width: 34,
        height: 14,
        margin: 0,
        axis: null,
        x: {domain: [0, 2]},
        y: {domain: [0, 2]},
        style: {background: "transparent"},
        marks: [
          Plot.line(
            [
              [0, 1],
              [2, 1],
            ],
            {stroke: style.color, strokeWidth: 1.5, strokeDasharray: style.dash},
          ),
          Plot.dot([[1, 1]], {symbol: style.symbol, fill: style.hollow ? "var(--back)" : style.color, stroke: style.color, r: 3.2}),
        ],
      });
      swatch.setAttribute("aria-hidden", "true");
      return h("span", {"data-choice": choice, "data-color": style.color, "data-symbol": style.symbol}, swatch, choice);
    }),
  );
}

/** In words: who leads how often, and who is how far behind. `points`: {panel, x, choice, value}; the higher the better. */
function leadersSaid(points, more = true) {
  const contests = d3
    .groups(
      points.filter(p => isExact(p.cell)),
      p => `${p.panel} ${p.x}`,
    )
    .map(([, mine]) => d3.sort(mine, p => (more ? -p.value : p.value)))
    .filter(mine => mine.length > 1);
  if (!contests.length) return "Nothing to compare: one choice at each point.";
  const wins = d3
    .rollups(
      contests,
      found => found.length,
      mine => mine[0].choice,
    )
    .sort((a, b) => b[1] - a[1]);
  const behind = d3
    .rollups(
      contests.flatMap(mine =>
        mine.map(p => ({choice: p.choice, ratio: more ? mine[0].value / p.value : p.value / mine[0].value})),
      ),
      found => geometric(found.map(f => f.ratio)),
      p => p.choice,
    )
    .sort((a, b) => b[1] - a[1]);
  const [last, ratio] = behind[0];
  if (ratio < 1.01) return "All choices are within 1 % of one another.";
  const leads = wins
    .slice(0, 3)
    .map(([choice, count]) => `${choice} in ${count}`)
    .join(", ");
  const leaders = `Best of ${contests.length} points: ${leads}${wins.length > 3 ? " …" : ""}.`;
  return `${leaders} ${last} is furthest behind, ${times(ratio)} on average.`;
}
