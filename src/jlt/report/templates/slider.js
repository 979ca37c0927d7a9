// Draws eq. 9-12 on a measured spectrum at the time of a slider. All figures have data-shares and data-eigenvalues.
(function () {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 400, HEIGHT = 250, LEFT = 52, RIGHT = 10, TOP = 26, BOTTOM = 38, FLOOR = 1e-4, REACH = 100;
  const PREDICTIONS = ["x", "eps", "v"];
  const QUANTITIES = [
    { title: "Variance of the target (eq. 9)", of: gaussian.targetVariance },
    { title: "Best coefficient (eq. 10)", of: gaussian.bestCoefficient, signed: true },
    { title: "Error that remains (eq. 11)", of: gaussian.conditionalVariance },
    { title: "Power to output (eq. 12)", of: gaussian.explainedPower },
  ];

  function element(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    parent.appendChild(made);
    return made;
  }

  // A logarithm of signed values that is linear about 0.
  const symlog = value => Math.sign(value) * Math.log10(1 + Math.abs(value));

  function scale(quantity, top) {
    const low = quantity.signed ? symlog(-REACH) : Math.log10(FLOOR);
    const high = quantity.signed ? symlog(REACH) : Math.log10(top);
    const map = quantity.signed ? symlog : value => Math.log10(value);
    return value => TOP + (HEIGHT - TOP - BOTTOM) * (high - map(value)) / (high - low);
  }

  function ticks(quantity, top) {
    if (quantity.signed) return [-100, -10, -1, 0, 1, 10, 100];
    const found = [];
    for (let value = FLOOR; value <= top * 1.0001; value *= 10) found.push(Number(value.toPrecision(1)));
    return found;
  }

  function build(figure) {
    const lam = JSON.parse(figure.dataset.eigenvalues), shares = JSON.parse(figure.dataset.shares);
    const input = figure.querySelector("input"), output = figure.querySelector("output");
    const place = share => LEFT + (WIDTH - LEFT - RIGHT) * share;
    const top = Math.pow(10, Math.ceil(Math.log10(Math.max(...lam, 1) + 1)));
    const panels = QUANTITIES.map(quantity => {
      const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" }, figure.querySelector(".panels"));
      const y = scale(quantity, top);
      element("text", { x: LEFT, y: 15, class: "title" }, svg, quantity.title);
      for (const value of ticks(quantity, top)) {
        element("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "grid" }, svg);
        const text = String(value).replace("-", "\u2212");
        element("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, svg, text);
      }
      for (const share of [0, 0.5, 1]) {
        const anchor = share === 1 ? "end" : "middle";
        element("text", { x: place(share), y: HEIGHT - 20, "text-anchor": anchor }, svg, `${100 * share}%`);
      }
      const middle = { x: place(0.5), y: HEIGHT - 4, "text-anchor": "middle" };
      element("text", middle, svg, "directions, largest first");
      const lines = {};
      for (const name of PREDICTIONS) {
        lines[name] = element("path", { class: "curve", style: `stroke: var(--${name})` }, svg);
      }
      return { quantity: quantity, y: y, lines: lines, svg: svg };
    });

    function show() {
      const t = Number(input.value);
      output.textContent = t.toFixed(2);
      for (const { quantity, y, lines, svg } of panels) {
        const of = (name, l) => quantity.of(gaussian.mixture(name, t), l, t);
        for (const name of PREDICTIONS) {
          let path = "", pen = "M";
          lam.forEach((l, index) => {
            const found = of(name, l), limit = quantity.signed ? REACH : top;
            if (!quantity.signed && found < FLOOR) { pen = "M"; return; }
            path += `${pen}${place(shares[index]).toFixed(1)} ${y(Math.max(-limit, Math.min(limit, found))).toFixed(1)}`;
            pen = "L";
          });
          lines[name].setAttribute("d", path);
        }
        const shown = PREDICTIONS.map(name => `${name} ${of(name, lam[lam.length - 1]).toPrecision(2)}`).join(", ");
        svg.setAttribute("aria-label", `${quantity.title} at t = ${t.toFixed(2)}; in the smallest direction: ${shown}.`);
      }
    }
    input.addEventListener("input", show);
    figure.hidden = false;
    show();
  }

  document.querySelectorAll("figure.slider").forEach(build);
})();
