// The page of jlt explain: sliders for space, network and time; eq. 9-13 and the measured experiments as curves.
(function () {
  "use strict";
  const { mixture, targetVariance, bestCoefficient, explainedPower } = gaussian;
  const { capacityCurve, floorCurve, unavoidableRisk, requiredRank, outcome, STATED_SHARE } = forecast;
  const { spaces, experiments } = JSON.parse(document.querySelector(".explorer").dataset.measured);
  const byId = id => document.getElementById(id);
  const control = Object.fromEntries(["space", "spread", "width", "line", "point", "time"].map(id => [id, byId(id)]));
  const SYMBOL = { x: "x", eps: "ε", v: "v" }, TARGETS = ["x", "eps", "v"];
  const SPREADS = Array.from({ length: 26 }, (_, index) => 2 * (index / 25) ** 1.5);
  const MARGIN = { left: 44, right: 38, top: 12, bottom: 40 };

  const sum = values => values.reduce((total, value) => total + value, 0);
  // The standard deviation of the decimal logarithm of the variances; infinite where one is 0.
  function spreadOf(lam) {
    const logs = Array.from(lam, Math.log10), mean = sum(logs) / logs.length;
    const spread = Math.sqrt(sum(logs.map(value => (value - mean) ** 2)) / logs.length);
    return Number.isFinite(spread) ? spread : Infinity;
  }
  // Variances raised to a power that keep their sum, as `jlt ablate --anisotropy` makes them.
  function raised(lam, power) {
    const powers = lam.map(l => l ** power), scale = sum(lam) / sum(powers);
    return powers.map(value => value * scale);
  }
  const steps = Array.from({ length: 64 }, (_, index) => 10 ** ((31.5 - index) / 16));
  const EVEN = { name: "", spectrum: steps.map(step => step * 64 / sum(steps)) };
  const space = name => spaces.find(found => found.name === name) || EVEN;
  for (const found of [EVEN, ...spaces]) {
    found.spectrum = Float64Array.from(found.spectrum);
    found.spread = spreadOf(found.spectrum);
  }
  const atSpread = (found, spread) => raised(found.spectrum, spread / found.spread);
  const required = (name, lam) => requiredRank(capacityCurve(name, lam), STATED_SHARE * unavoidableRisk(lam));

  // Curves over all spreads, of one space and target, are computed once.
  const known = {};
  function requiredBySpread(found, name) {
    const key = `${found.name} ${name}`;
    known[key] = known[key] || SPREADS.map(spread => required(name, atSpread(found, spread)) / found.spectrum.length);
    return known[key];
  }

  const measured = experiments.map(found => {
    const { spectrum, dimension } = space(found.space), lam = raised(spectrum, found.power);
    const needed = Object.fromEntries(TARGETS.map(name => [name, required(name, lam)]));
    const beyond = value => value > 1 ? "x" : "v";
    return {
      ...found, spread: spreadOf(lam), share: found.width / dimension, gap: (needed.v - needed.x) / lam.length,
      expected: outcome(needed, lam),
      winner: found.low && found.low <= 1 && found.high >= 1 ? "even" : beyond(found.ratio),
    };
  });

  // Text.
  const signs = text => String(text).replace("-", "−");
  const percent = share => signs(`${Math.round(100 * share)}%`);
  const short = value => signs(Number(value.toPrecision(value < 10 ? 2 : 3)));
  const times = value => `${value < 10 ? value.toFixed(2) : short(value)}×`;
  const listed = names => [names.slice(0, -1).join(", "), names[names.length - 1]].filter(Boolean).join(" and ");
  const read = (readings, text) => readings.map(reading => `${reading.text} ${text(reading)}`).join(", ");

  // Drawing. A scale maps values to 0..1.
  const linear = (low, high) => value => (value - low) / (high - low);
  const logarithm = (low, high) => value => Math.log(Math.max(value, 1e-30) / low) / Math.log(high / low);
  const symlog = value => Math.sign(value) * Math.log10(1 + Math.abs(value));
  const signed = reach => value => (symlog(value) / symlog(reach) + 1) / 2;

  // Draws axes x and y, and the marks that a function returns for the places of values.
  function chart(id, [least, most], x, y, label, marks) {
    const holder = byId(id), width = holder.clientWidth;
    const height = Math.round(Math.min(most, Math.max(least, width * 0.66)));
    const box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    const px = value => box.left + (box.right - box.left) * x.scale(value);
    const py = value => box.bottom - (box.bottom - box.top) * y.scale(value);
    const point = ([a, b], index) => `${index ? "L" : "M"}${px(a).toFixed(1)} ${py(b).toFixed(1)}`;
    const path = points => points.map(point).join("");
    const rows = y.ticks.map(value => `
      <line class="grid" x1="${box.left}" x2="${box.right}" y1="${py(value)}" y2="${py(value)}"/>
      <text x="${box.left - 6}" y="${py(value) + 4}" text-anchor="end">${y.text(value)}</text>`);
    const columns = x.ticks.map(value => `
      <text x="${px(value)}" y="${box.bottom + 17}" text-anchor="middle">${x.text(value)}</text>`);
    const inside = `clip-path="url(#inside-${id})"`;
    holder.innerHTML = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${label}">
      <clipPath id="inside-${id}">
        <rect x="${box.left}" y="${box.top - 2}" width="${box.right - box.left}" height="${box.bottom - box.top + 4}"/>
      </clipPath>${rows.join("")}${columns.join("")}
      <text x="${(box.left + box.right) / 2}" y="${height - 4}" text-anchor="middle">${x.title}</text>
      ${marks({ px, py, path, box, inside })}</svg>`;
  }

  // Curves with their names at the right end, moved apart where they meet.
  function curves({ path, py, box, inside }, lines) {
    const end = points => Math.min(box.bottom, Math.max(box.top, py(points[points.length - 1][1])));
    const ends = lines.map(({ css, text, points }) => ({ css, text, y: end(points) })).sort((a, b) => a.y - b.y);
    for (let index = 1; index < ends.length; index++) ends[index].y = Math.max(ends[index].y, ends[index - 1].y + 14);
    const over = Math.max(0, ends[ends.length - 1].y - box.bottom - 4);
    const drawn = lines.map(({ css, points, floor }) => `
      <path class="curve ${css}" d="${path(points)}"/>
      ${floor ? `<path class="curve floor ${css}" d="${path(floor)}"/>` : ""}`);
    const names = ends.map(({ css, text, y }) => `
      <text class="name ${css}" x="${box.right + 5}" y="${y - over + 4}">${text}</text>`);
    return `<g ${inside}>${drawn.join("")}</g>${names.join("")}`;
  }
  function dot({ published }, x, y, text, left) {
    return `<circle class="dot ${published ? "hollow" : ""}" cx="${x}" cy="${y}" r="5"/>
      <text class="strong" x="${x + (left ? -9 : 9)}" y="${y + 4}" text-anchor="${left ? "end" : "start"}">${text}</text>`;
  }
  const vertical = ({ box }, x) => `<line class="here" x1="${x}" x2="${x}" y1="${box.top}" y2="${box.bottom}"/>`;

  function drawMap({ space: found, targets, readings, spread, share }) {
    const points = name => requiredBySpread(found, name).map((value, index) => [SPREADS[index], value]);
    const lines = targets.map(({ name, css, text }) => ({ css, text, points: points(name) }));
    const x = lines[0].points, v = lines[2].points;
    const axes = [
      { scale: linear(0, 2), ticks: [0, 0.5, 1, 1.5, 2], text: String, title: "spread of the variances, in decades" },
      { scale: logarithm(1 / 8, 8), ticks: [0.125, 0.25, 0.5, 1, 2, 4, 8], text: value => `${100 * value}%` },
    ];
    const label = `Share of directions required, by spread. Here ${read(readings, ({ need }) => percent(need))}.`;
    chart("map", [330, 460], ...axes, label, place => {
      const { px, py, path, box, inside } = place;
      const between = (upper, lower, css) => `<path class="region ${css}" d="${path([...upper, ...[...lower].reverse()])}Z"/>`;
      const pick = best => x.map(([at, value], index) => [at, best(value, v[index][1])]);
      const dots = measured.filter(one => Number.isFinite(one.spread)).map(one => {
        const faint = found.name && one.space !== found.name, left = one.space.startsWith("photographs");
        return `<g class="${faint ? "faint" : ""}">${dot(one, px(one.spread), py(one.share), one.ratio, left)}</g>`;
      });
      return `<g ${inside}>${between(pick(Math.max), x, "x")}${between(x, pick(Math.min), "v")}</g>
        ${curves(place, lines)}${vertical(place, px(spread))}
        <line class="here" x1="${box.left}" x2="${box.right}" y1="${py(share)}" y2="${py(share)}"/>
        <text class="strong" x="${box.left + 4}" y="${py(share) + (share < 1 ? 15 : -6)}">width</text>${dots.join("")}`;
    });
  }

  function drawLoss({ unavoidable, targets, readings, share }) {
    const line = (curve, least) => Array.from(curve, (value, rank) => (
      [rank / (curve.length - 1), value / unavoidable + least]
    ));
    const lines = targets.map(({ css, text, curve, floor }) => (
      { css, text, points: line(curve, 1), floor: line(floor, 0) }
    ));
    const axes = [
      { scale: linear(0, 1), ticks: [0, 0.25, 0.5, 0.75, 1], text: percent, title: "directions that the network outputs" },
      { scale: linear(0, 3), ticks: [0, 1, 2, 3], text: value => `${value}×` },
    ];
    const label = `Error by capacity. Here, over the smallest possible one: ${read(readings, ({ error }) => times(error))}.`;
    chart("loss", [240, 400], ...axes, label, place => {
      const { px, py, box } = place, x = px(Math.min(share, 1)), right = share < 0.5;
      const dots = readings.map(({ css, need }) => `
        <circle class="${css}" fill="currentColor" cx="${px(need)}" cy="${py(1 + STATED_SHARE)}" r="4.5"/>`);
      return `${curves(place, lines)}${dots.join("")}${vertical(place, x)}
        <text class="strong" x="${x + (right ? 6 : -6)}" y="${box.top + 10}" text-anchor="${right ? "start" : "end"}">
          width</text>`;
    });
  }

  function drawTargets({ lam, targets, t }) {
    const directions = { scale: linear(0, 1), ticks: [0, 0.5, 1], text: percent, title: "directions, largest first" };
    const ticks = [1e-3, 0.01, 0.1, 1, 10, 100];
    const variances = { scale: logarithm(3e-4, 100), ticks, text: value => short(value) };
    const lines = of => targets.map(({ name, css, text }) => ({ css, text, points: of(name) }));
    const byDirection = (id, label, of) => chart(id, [220, 300], directions, variances, label, place => (
      curves(place, lines(name => Array.from(lam, (l, index) => [index / (lam.length - 1), of(mixture(name, t), l)])))
    ));
    byDirection("variance", `Variance of the targets by direction, at t = ${t}`, targetVariance);
    byDirection("power", `Power of the best output by direction, at t = ${t}`, (mix, l) => explainedPower(mix, l, t));
    const grid = Array.from({ length: 99 }, (_, index) => (index + 1) / 100);
    const time = { scale: linear(0, 1), ticks: [0, 0.5, 1], text: String, title: "time t, from noise to data" };
    const coefficient = { scale: signed(100), ticks: [-100, -10, 0, 10, 100], text: value => short(value) };
    for (const [id, l] of [["smallest", lam[lam.length - 1]], ["largest", lam[0]]]) {
      const label = `Best coefficients over time in the direction of variance ${short(l)}`;
      const overTime = name => grid.map(at => [at, bestCoefficient(mixture(name, at), l, at)]);
      chart(id, [220, 300], time, coefficient, label, place => (
        curves(place, lines(overTime)) + vertical(place, place.px(t))
      ));
    }
  }

  function drawScatter({ gap }) {
    const title = "the model: directions that v requires more than x";
    const axes = [
      { scale: linear(-0.4, 1), ticks: [-0.4, 0, 0.4, 0.8], text: percent, title },
      { scale: logarithm(0.8, 16), ticks: [1, 2, 4, 8, 16], text: String },
    ];
    const label = "Measured ratios of Fréchet distances against the gap of the model; the table has the numbers";
    chart("scatter", [300, 400], ...axes, label, place => {
      const { px, py } = place;
      const dots = measured.map((one, index) => {
        const x = px(one.gap);
        const range = one.low ? `<line class="here" x1="${x}" x2="${x}" y1="${py(one.low)}" y2="${py(one.high)}"/>` : "";
        return range + dot(one, x, py(one.ratio), index + 1);
      });
      return vertical(place, px(gap)) + dots.join("");
    });
  }

  const EQUIVALENT = "The network is wide enough for every direction, so the model calls the targets equivalent. "
    + "Trained ones still differ where the spread is large.";

  function verdict({ readings, call, share }) {
    const order = [...readings].sort((a, b) => a.need - b.need), [x, , v] = readings;
    const names = found => found.map(({ text }) => text);
    const first = call === "even" ? "The forecast is even between x and v." : `Forecast: ${names(order).join(" before ")}.`;
    if (share >= 1) return `${first} ${EQUIVALENT}`;
    const fits = names(order.filter(({ need }) => need <= share));
    const fit = fits.length ? `${listed(fits)} ${fits.length > 1 ? "fit" : "fits"}` : "no target fits";
    const ratio = v.error / x.error, factor = Math.max(ratio, 1 / ratio), [worse, better] = ratio > 1 ? "vx" : "xv";
    const errors = `${worse} leaves ${short(factor)} times the error of ${better}`;
    return `${first} At this width ${fit}, and ${factor < 1.05 ? "x and v leave about the same error" : errors}.`;
  }

  function readState() {
    const found = space(control.space.value), spread = Number(control.spread.value), lam = atSpread(found, spread);
    const share = 2 ** Number(control.width.value), t = Number(control.time.value), line = control.line.value;
    const unavoidable = unavoidableRisk(lam);
    const rank = Math.min(share, 1) * lam.length, below = Math.min(Math.floor(rank), lam.length - 1);
    const targets = [...TARGETS, `${line}=${control.point.value}`].map(name => {
      const curve = capacityCurve(name, lam), needed = requiredRank(curve, STATED_SHARE * unavoidable);
      const css = SYMBOL[name] ? name : line, text = SYMBOL[name] || line;
      return { name, css, text, curve, needed, floor: floorCurve(name, lam) };
    });
    const readings = targets.map(({ name, css, curve, needed }) => {
      const kept = curve[below] + (rank - below) * (curve[below + 1] - curve[below]);
      return { css, text: SYMBOL[name] || name, need: needed / lam.length, error: 1 + kept / unavoidable };
    });
    const needs = Object.fromEntries(targets.map(({ name, needed }) => [name, needed]));
    const gap = readings[2].need - readings[0].need, call = outcome(needs, lam);
    return { space: found, spread, lam, share, t, unavoidable, targets, readings, gap, call };
  }

  function show() {
    const state = readState();
    const { spread, share, t, readings } = state, member = readings[readings.length - 1].text;
    const written = { spread: spread.toFixed(2), width: percent(share), point: member, time: t.toFixed(2) };
    for (const [id, text] of Object.entries(written)) {
      document.querySelector(`output[for=${id}]`).textContent = text;
      control[id].setAttribute("aria-valuetext", text);
    }
    byId("verdict").textContent = verdict(state);
    document.querySelector("#readout tbody").innerHTML = readings.map(({ css, text, need, error }) => `
      <tr><th scope="row"><span class="key" style="color:var(--${css})"></span>${text}</th>
      <td class="number">${percent(need)}</td><td class="number">${times(error)}</td></tr>`).join("");
    drawMap(state);
    drawLoss(state);
    drawTargets(state);
    drawScatter(state);
  }

  // However fast a slider moves, the page is drawn once for each frame of the screen.
  let waiting = false;
  function draw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; show(); });
  }
  control.space.addEventListener("change", () => {
    const found = space(control.space.value);
    control.spread.value = Math.min(found.spread, 2);
    if (found.dimension) control.width.value = Math.log2(found.width / found.dimension);
  });
  document.querySelector(".controls").addEventListener("input", draw);
  document.querySelector(".controls").addEventListener("change", draw);
  window.addEventListener("resize", draw);
  // A click on the map moves both of its sliders there.
  byId("map").addEventListener("click", event => {
    const box = event.currentTarget.firstElementChild.getBoundingClientRect();
    control.spread.value = 2 * (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    control.width.value = 3 - 6 * (event.clientY - box.top - MARGIN.top) / (box.height - MARGIN.top - MARGIN.bottom);
    draw();
  });
  document.querySelectorAll(".gap").forEach((cell, index) => { cell.textContent = percent(measured[index].gap); });
  document.querySelectorAll(".winner").forEach((cell, index) => {
    const { winner, expected } = measured[index];
    cell.textContent = winner === expected ? `${winner}, as forecast` : `${winner}, forecast ${expected}`;
  });
  show();
})();
