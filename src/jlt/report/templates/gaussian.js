// The closed forms of jlt.prediction and jlt.geometry.gaussian: eq. 2, 3 and 9-12 of docs/notation.md.
// A mixture is [alpha, beta] of a target at one time; l is the variance of a direction, t the time.
const gaussian = (() => {
  "use strict";
  const NAMED = { x: ["mix", 0], eps: ["eps", 0], v: ["mix", 1], edm: ["skip", 1] };

  // Eq. 2, of x, eps, v, edm, skip=s and mix=r.
  function mixture(name, t) {
    const [line, value] = NAMED[name] || [name.split("=")[0], Number(name.split("=")[1])];
    if (line === "eps") return [0, 1];
    if (line === "mix") return [1, -value];
    const length = Math.hypot(1 - t, value * t);
    return [(1 - t) / length, -value * value * t / length];
  }
  // Eq. 3: m, the change of the target by that of the velocity.
  const slope = ([alpha, beta], t) => alpha - t * (alpha + beta);
  const noisyVariance = (l, t) => t * t * l + (1 - t) * (1 - t);
  // Eq. 9-12.
  const targetVariance = ([alpha, beta], l) => alpha * alpha * l + beta * beta;
  const bestCoefficient = ([alpha, beta], l, t) => (alpha * t * l + beta * (1 - t)) / noisyVariance(l, t);
  const conditionalVariance = (mix, l, t) => slope(mix, t) ** 2 * l / noisyVariance(l, t);
  const explainedPower = (mix, l, t) => bestCoefficient(mix, l, t) ** 2 * noisyVariance(l, t);

  return { mixture, slope, targetVariance, bestCoefficient, conditionalVariance, explainedPower };
})();
