// The capacity of jlt.geometry.forecast: eq. 13 and the loss floor, for the published times and the matched loss.
const forecast = (() => {
  "use strict";
  const { mixture, slope, targetVariance, conditionalVariance, explainedPower } = gaussian;
  const P_MEAN = -0.8, P_STD = 0.8, T_EPS = 0.05, NODES = 48, NORMAL_REACH = 9;
  const STATED_SHARE = 0.05, EVEN_MARGIN = 0.1, ISOTROPIC = 0.9, LIKE_NOISE = 1.5;
  const times = trainingTimes();

  // Points and weights of Gauss and Legendre's rule on [-1, 1], by Newton's method.
  function legendre(count) {
    return Array.from({ length: count }, (_, index) => {
      let point = Math.cos(Math.PI * (index + 0.75) / (count + 0.5)), derivative = 0;
      for (let step = 0; step < 8; step++) {
        let value = point, before = 1;
        for (let degree = 2; degree <= count; degree++) {
          [value, before] = [((2 * degree - 1) * point * value - (degree - 1) * before) / degree, value];
        }
        derivative = count * (point * value - before) / (point * point - 1);
        point -= value / derivative;
      }
      return [point, 2 / ((1 - point * point) * derivative * derivative)];
    });
  }

  // The same quadrature of p(t) as in Python (eq. 6): pieces of the logit, cut at the clamps of eq. 5.
  function trainingTimes() {
    const reach = NORMAL_REACH * P_STD + 2 * P_STD * P_STD, clamp = Math.log(T_EPS / (1 - T_EPS));
    const cuts = [P_MEAN - reach, clamp, P_MEAN, -clamp, P_MEAN + reach], rule = legendre(NODES);
    const found = cuts.slice(1).flatMap((end, piece) => {
      const half = (end - cuts[piece]) / 2;
      return rule.map(([point, weight]) => {
        const logit = cuts[piece] + half * (point + 1), t = 1 / (1 + Math.exp(-logit));
        return { t, probability: half * weight * Math.exp(-(((logit - P_MEAN) / P_STD) ** 2) / 2) };
      });
    });
    const total = found.reduce((sum, { probability }) => sum + probability, 0);
    return found.map(({ t, probability }) => ({ t, probability: probability / total }));
  }

  // The matched loss's weight of a squared error of the output (eq. 5), times the probability of the time.
  function weightAt({ t, probability }, mix) {
    const gain = t * (1 - t) / (slope(mix, t) * Math.max(1 - t, T_EPS) * Math.max(t, T_EPS));
    return probability * gain * gain;
  }

  // What is lost when the first 0..d directions are kept.
  function dropped(risks) {
    const curve = new Float64Array(risks.length + 1);
    for (let rank = risks.length - 1; rank >= 0; rank--) curve[rank] = curve[rank + 1] + risks[rank];
    return curve;
  }

  // Eq. 13: the excess risk of the best predictor of each rank 0..d, summed over directions.
  function capacityCurve(name, lam) {
    const kept = new Float64Array(lam.length), power = new Float64Array(lam.length);
    for (const time of times) {
      const mix = mixture(name, time.t), weight = weightAt(time, mix);
      for (let index = 0; index < lam.length; index++) power[index] = explainedPower(mix, lam[index], time.t);
      power.sort();
      for (let rank = 0; rank < lam.length; rank++) kept[rank] += weight * power[lam.length - 1 - rank];
    }
    return dropped(kept);
  }

  // The risk that no network of each width 0..d goes below, since its last layer is linear.
  function floorCurve(name, lam) {
    const risks = new Float64Array(lam.length);
    for (const time of times) {
      const mix = mixture(name, time.t), weight = weightAt(time, mix);
      for (let index = 0; index < lam.length; index++) risks[index] += weight * targetVariance(mix, lam[index]);
    }
    return dropped(risks.sort().reverse());
  }

  // The risk that no predictor goes below (eq. 11).
  function unavoidableRisk(lam) {
    let sum = 0;
    for (const time of times) {
      const mix = mixture("v", time.t), weight = weightAt(time, mix);
      for (const l of lam) sum += weight * conditionalVariance(mix, l, time.t);
    }
    return sum;
  }

  // The rank from which on a curve stays within a risk.
  function requiredRank(curve, risk) {
    const inside = curve.findIndex(value => value <= risk);
    return inside <= 0 ? 0 : inside - 1 + (curve[inside - 1] - risk) / (curve[inside - 1] - curve[inside]);
  }

  // The target that is expected to win, of needed directions by name: x, eps, v or even.
  function outcome(needed, lam) {
    const mean = lam.reduce((sum, l) => sum + l, 0) / lam.length;
    const sphericity = Math.exp(lam.reduce((sum, l) => sum + Math.log(l), 0) / lam.length) / mean;
    if (sphericity > ISOTROPIC && mean < LIKE_NOISE && mean > 1 / LIKE_NOISE) return "even";
    if (Math.abs(needed.v - needed.x) < EVEN_MARGIN * lam.length) return "even";
    return ["x", "eps", "v"].reduce((best, name) => needed[name] < needed[best] ? name : best);
  }

  return { STATED_SHARE, times, capacityCurve, floorCurve, unavoidableRisk, requiredRank, outcome };
})();
