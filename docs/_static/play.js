// The sums and the pictures of docs/play.md. Plain JavaScript: no library, no build step, nothing from the network.

// The sums, by themselves so that they can be checked. A complex number is [real, imaginary], and tokens count from 0.
window.llambaPlay = (() => {
  const add = ([a, b], [c, d]) => [a + c, b + d];
  const multiply = ([a, b], [c, d]) => [a * c - b * d, a * d + b * c];
  const divide = (x, [c, d]) => multiply(x, [c / (c * c + d * d), -d / (c * c + d * d)]);
  const size = ([a, b]) => Math.hypot(a, b);

  // a = |a| e^(i phase)
  const gate = (magnitude, phase) => [magnitude * Math.cos(phase), magnitude * Math.sin(phase)];

  // T[t][s] = a_{s+1} ... a_t for s <= t. Each row is the one above it, times the gate of its token.
  function decayMatrix(gates) {
    const rows = [];
    gates.forEach((a, t) => rows.push([...(t ? rows[t - 1] : []).map((entry) => multiply(a, entry)), [1, 0]]));
    return rows;
  }

  // Mode 1, recurrent: h_t = a_t h_{t-1} + x_t from h = 0, token by token. These are the states on their path.
  function statePath(gates, inputs) {
    let h = [0, 0];
    return gates.map((a, t) => (h = add(multiply(a, h), inputs[t])));
  }

  // Mode 2, scan: each round combines every step (a, x) with the one `far` before it, and then reaches twice as far.
  function scan(gates, inputs) {
    let steps = gates.map((a, t) => [a, inputs[t]]);
    for (let far = 1; far < steps.length; far *= 2) {
      const before = steps;
      steps = before.map(([a, x], t) => {
        if (t < far) return [a, x];
        const [earlier, y] = before[t - far];
        return [multiply(a, earlier), add(multiply(a, y), x)];
      });
    }
    return steps.map(([, x]) => x);
  }

  // Mode 3, attention: the decay matrix times the inputs.
  const attention = (gates, inputs) =>
    decayMatrix(gates).map((row) => row.reduce((sum, entry, s) => add(sum, multiply(entry, inputs[s])), [0, 0]));

  // The same with p_t / p_s for the matrix, p_t = a_1 ... a_t: right on paper, 0 / 0 once a gate was 0.
  function division(gates, inputs) {
    let [p, sum] = [[1, 0], [0, 0]];
    return gates.map((a, t) => {
      p = multiply(p, a);
      return multiply(p, (sum = add(sum, divide(inputs[t], p))));
    });
  }

  // The largest distance of two sequences, NaN if one of them has an entry that is no number.
  const difference = (one, other) => Math.max(...one.map(([a, b], t) => size([a - other[t][0], b - other[t][1]])));

  // Tokens until half is left, |a|^n = 1/2, and the magnitude that has this half-life.
  const halfLife = (magnitude) => Math.LN2 / Math.abs(Math.log(magnitude));
  const magnitudeOf = (tokens) => 2 ** (-1 / tokens);

  // Tokens for a full turn, and the sum of all weights, 1 + |a| + |a|^2 + ...
  const period = (phase) => (2 * Math.PI) / Math.abs(phase);
  const memory = (magnitude) => 1 / (1 - magnitude);

  // For each token, how many tokens back a weight is still at least `least`.
  const horizons = (matrix, least) => matrix.map((row, t) => t - row.findIndex((entry) => size(entry) >= least));

  return {
    add, multiply, divide, size, gate, decayMatrix, statePath, scan, attention, division, difference,
    halfLife, magnitudeOf, period, memory, horizons,
  };
})();

// The page. What is chosen lives in its sliders and buttons, and every change draws the pictures anew.
(() => {
  const sums = window.llambaPlay;
  const TOKENS = 32;
  const LEAST = 0.05; // below this weight a token counts as forgotten
  const [LEFT, TOP] = [36, 4]; // room for the axis of a picture, and above a matrix
  const range = Array.from({ length: TOKENS }, (_, t) => t);

  const element = (id) => document.getElementById(id);
  const value = (id) => element(id).valueAsNumber;
  function number(x, digits = 3) {
    if (!Number.isFinite(x)) return Number.isNaN(x) ? "NaN" : "∞";
    return Number(x.toPrecision(digits)).toString().replace("-", "−");
  }
  function complex(z) {
    const [x, y] = z.map((part) => Number(part.toFixed(9))); // no dust of rounding
    return Number.isNaN(x) || y === 0 ? number(x) : `${number(x)} ${y < 0 ? "−" : "+"} ${number(Math.abs(y))}i`;
  }
  const count = (n, what) => `${number(n)} ${what}${number(n) === "1" ? "" : "s"}`;
  const listed = (numbers) => numbers.join(", ").replace(/, (\d+)$/, " and $1");
  const last = (list) => list[list.length - 1];

  // Places of a slider: 0 is the gate 0, then come half-lives of 0.1 to 1000 tokens in equal factors, and 200 is the gate 1.
  const LONG = 200;
  const toMagnitude = (place) => (place === 0 ? 0 : place === LONG ? 1 : sums.magnitudeOf(10 ** ((4 * (place - 1)) / (LONG - 2) - 1)));
  const toPlace = (magnitude) => Math.max(0, Math.min(LONG, Math.round(1 + ((LONG - 2) * (Math.log10(sums.halfLife(magnitude)) + 1)) / 4)));
  const degrees = (phase) => Math.round((phase * 180) / Math.PI);

  function showMagnitude(id) {
    const magnitude = toMagnitude(value(id));
    const words = `${number(magnitude, 4)}, half-life ${count(sums.halfLife(magnitude), "token")}`;
    element(`${id}-value`).textContent = words;
    element(id).setAttribute("aria-valuetext", words.replace("∞", "infinitely many"));
    return magnitude;
  }

  // Say in words what has changed, once the slider rests: a screen reader reads out what is put here.
  const waiting = {};
  function say(id, words) {
    const put = () => element(id).textContent !== words && (element(id).textContent = words);
    if (!(id in waiting)) put(); // as the page loads
    clearTimeout(waiting[id]);
    waiting[id] = setTimeout(put, 250);
  }

  // Drawing

  const create = (tag) => document.createElementNS("http://www.w3.org/2000/svg", tag);

  function draw(parent, tag, attributes, words) {
    const node = create(tag);
    for (const [name, text] of Object.entries(attributes)) node.setAttribute(name, text);
    if (words !== undefined) node.textContent = words;
    return parent.appendChild(node);
  }

  const widths = {}; // of the pictures, in CSS pixels, which are their units

  // Draw a picture anew. `words` are what a screen reader says of it. The group comes into the page when it is complete:
  // the theme's icons look through the page after each node that is added.
  function picture(id, height, words, paint) {
    const svg = element(id), group = create("g");
    paint(group);
    svg.firstElementChild.replaceWith(group);
    svg.setAttribute("viewBox", `0 0 ${widths[id]} ${height}`);
    svg.setAttribute("height", height);
    svg.setAttribute("aria-label", words);
  }

  function tick(group, x, y, words, anchor = "middle") {
    draw(group, "text", { x, y, "text-anchor": anchor, class: "tick" }, words);
  }

  const ticked = [0, 7, 15, 23, 31]; // tokens 1, 8, 16, 24, 32

  // Row t is what token t holds of token s, column s. Blue above zero, orange below, the paler the closer to zero.
  function drawMatrix(group, cell, matrix, part) {
    const side = cell * TOKENS, x = (s) => LEFT + s * cell, y = (t) => TOP + t * cell;
    draw(group, "path", { d: `M${LEFT} ${TOP}${range.map((t) => `H${x(t + 1)} V${y(t + 1)}`).join("")} H${LEFT} Z`, class: "past" });
    matrix.forEach((row, t) => row.forEach((entry, s) => {
      const weight = part(entry), opacity = Math.min(1, Math.abs(weight));
      if (opacity < 0.004) return; // not to be seen
      const sign = weight < 0 ? "minus" : "plus";
      draw(group, "rect", { x: x(s), y: y(t), width: cell - 1, height: cell - 1, class: sign, "fill-opacity": opacity.toFixed(3) });
    }));
    draw(group, "path", { d: `M${LEFT - 1.5} ${TOP} V${y(TOKENS) + 0.5} H${x(TOKENS)}`, class: "axis" });
    for (const t of ticked) {
      tick(group, x(t + 0.5), y(TOKENS) + 15, t + 1);
      tick(group, LEFT - 6, y(t + 0.5) + 4, t + 1, "end");
    }
    draw(group, "text", { x: LEFT + side / 2, y: y(TOKENS) + 32, "text-anchor": "middle" }, "written at s");
    draw(group, "text", { transform: `translate(11 ${TOP + side / 2}) rotate(-90)`, "text-anchor": "middle" }, "read at t");
  }

  const cellOf = (id) => Math.floor((widths[id] - LEFT - 4) / TOKENS); // whole pixels are sharp
  const heightOf = (cell) => TOP + TOKENS * cell + 38;

  // The largest of 1, 2, 5, 10, ... that is not above `most`.
  function roundNumber(most) {
    const ten = 10 ** Math.floor(Math.log10(most));
    return ten * [5, 2, 1].find((digit) => digit * ten <= most * 1.0001);
  }

  // One gate, the same at every token

  // Where h = a h + 1.
  const restOf = ([x, y]) => sums.divide([1, 0], [1 - x, -y]);

  // Where a number lies in the picture of the path: `radius` pixels are `most`.
  function plane(most) {
    const middle = widths["gate-path"] / 2, radius = middle - 36;
    return { middle, radius, place: ([x, y]) => [middle + (radius * x) / most, middle - (radius * y) / most] };
  }

  // Axes, and the circle of magnitude 1.
  function drawPlane(group, most) {
    const { middle, radius } = plane(most), step = roundNumber(most), far = (radius * step) / most;
    draw(group, "path", { d: `M8 ${middle} H${2 * middle - 8} M${middle} 8 V${2 * middle - 8}`, class: "axis" });
    draw(group, "circle", { cx: middle, cy: middle, r: radius / most, class: "unit" });
    for (const sign of [1, -1]) {
      draw(group, "path", { d: `M${middle + sign * far} ${middle - 4} v8 M${middle - 4} ${middle - sign * far} h8`, class: "axis" });
      tick(group, middle + sign * (far + 3), middle + 17, number(sign * step));
      tick(group, middle + 8, middle - sign * far + (sign > 0 ? -4 : 14), `${number(sign * step)}i`.replace(/^(−?)1i/, "$1i"), "start");
    }
    draw(group, "text", { x: 2 * middle - 2, y: middle - 7, "text-anchor": "end" }, "real");
    draw(group, "text", { x: middle - 8, y: 18, "text-anchor": "end" }, "imaginary");
  }

  function drawPath(group, path, a, again) {
    const most = Math.max(1, ...path.map(sums.size)), { place } = plane(most);
    drawPlane(group, most);
    draw(group, "polyline", { points: path.map((h) => place(h).map((z) => z.toFixed(1)).join()).join(" "), class: "path" });
    path.forEach((h, t) => {
      const [cx, cy] = place(h), end = t === path.length - 1;
      draw(group, "circle", { cx, cy, r: end ? 6 : 3.5, class: end ? "end" : "state" });
    });
    const rest = restOf(a), [x, y] = place(rest);
    if (again && sums.size(a) < 1 && sums.size(rest) <= 1.1 * most) {
      draw(group, "path", { d: `M${x - 7} ${y - 7} l14 14 m0 -14 l-14 14`, class: "cross" });
    }

    const [cx, cy] = place(a);
    for (const ring of element("gate-path").querySelectorAll(".ring, .grip")) {
      ring.setAttribute("visibility", again ? "hidden" : "visible");
      ring.setAttribute("cx", cx);
      ring.setAttribute("cy", cy);
    }
  }

  // What the gate does, for a state that is left alone.
  function behaviour(magnitude, phase) {
    const half = count(sums.halfLife(magnitude), "token"), turn = count(sums.period(phase), "token");
    if (magnitude === 0) return "Everything is forgotten at once: a state holds its own token only.";
    const fades = magnitude === 1 ? "Nothing fades" : `Half is left after ${half}`;
    return phase === 0 ? `${fades}, and nothing turns.` : `${fades}, and a full turn takes ${turn}.`;
  }

  // Where it goes when every token writes 1.
  function destination(a, magnitude, phase) {
    if (magnitude < 1) return `Fed with 1 at every token, it comes to rest at ${complex(restOf(a))}.`;
    return `Fed with 1 at every token, it ${phase === 0 ? "grows without end" : "goes round a circle and never rests"}.`;
  }

  function readGate() {
    const magnitude = showMagnitude("gate-magnitude"), turned = value("gate-phase"), phase = (turned * Math.PI) / 180;
    const again = element("gate-constant").checked;
    return { magnitude, phase, turned, again, a: sums.gate(magnitude, phase), inputs: range.map((t) => [again || t === 0 ? 1 : 0, 0]) };
  }

  function showGate({ magnitude, phase, turned, again, a, inputs }) {
    const matrix = sums.decayMatrix(range.map(() => a)), path = sums.statePath(range.map(() => a), inputs);
    const absolute = element("gate-absolute").checked;
    element("gate-phase-value").textContent = `${number(phase, 3)} rad, ${number(turned)}°`;
    element("gate-phase").setAttribute("aria-valuetext", `${number(phase, 3)} radians, ${number(turned)} degrees`);
    element("gate-half-life").textContent = number(sums.halfLife(magnitude));
    element("gate-period").textContent = number(sums.period(phase));
    element("gate-memory").textContent = number(sums.memory(magnitude));

    const does = behaviour(magnitude, phase), words = again ? `${does} ${destination(a, magnitude, phase)}` : does;
    const cell = cellOf("gate-matrix");
    picture("gate-matrix", heightOf(cell),
      `Decay matrix of ${TOKENS} tokens, the ${absolute ? "magnitude" : "real part"} of a to the power t minus s. ${does}`,
      (group) => drawMatrix(group, cell, matrix, absolute ? sums.size : ([x]) => x));
    picture("gate-path", widths["gate-path"],
      `The state after each of ${TOKENS} tokens in the complex plane, from ${complex(path[0])} to ${complex(last(path))}. ${words}`,
      (group) => drawPath(group, path, a, again));
    element("gate-note-impulse").hidden = again;
    element("gate-note-constant").hidden = !again;
    say("gate-status", words);
    for (const button of document.querySelectorAll("[data-magnitude]")) {
      const same = toPlace(Number(button.dataset.magnitude)) === value("gate-magnitude") && Number(button.dataset.degrees) === turned;
      button.setAttribute("aria-pressed", same);
    }
  }

  function setGate(magnitude, turned) {
    element("gate-magnitude").value = toPlace(magnitude);
    element("gate-phase").value = turned;
    show();
  }

  // With a mouse or a finger the gate can be taken by its ring. The sliders do the same by keyboard.
  function letGateBeDragged() {
    const svg = element("gate-path"), grip = svg.querySelector(".grip");
    grip.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false }); // the page stays where it is
    grip.addEventListener("pointerdown", (event) => {
      svg.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    svg.addEventListener("pointermove", (event) => {
      if (!svg.hasPointerCapture(event.pointerId)) return;
      const box = svg.getBoundingClientRect(), { middle, radius } = plane(1);
      const [x, y] = [(event.clientX - box.left - middle) / radius, (middle - event.clientY + box.top) / radius];
      setGate(Math.min(1, Math.hypot(x, y)), degrees(Math.atan2(y, x)));
    });
  }

  // A gate for each token, and resets among them

  const resets = [...document.querySelectorAll("#resets .reset")];
  const placed = () => resets.filter((input) => !input.hidden).map((input) => input.valueAsNumber).sort((a, b) => a - b);

  function readResets() {
    const magnitude = showMagnitude("listening"), places = placed(), query = value("query");
    const gates = range.map((t) => [places.includes(t + 1) ? 0 : magnitude, 0]);
    return { places, query, gates, fixed: Array(TOKENS).fill([showMagnitude("fixed"), 0]) };
  }

  // Three strips on one axis of tokens: the gates, what the reading token sees, and how far back each token sees.
  const STRIPS = {
    gates: { top: 22, height: 36, most: 1, title: () => "gate of each token" },
    weights: { top: 86, height: 64, most: 1, title: (query) => `what token ${query} still holds of each token` },
    horizons: { top: 178, height: 110, most: TOKENS, title: () => "memory horizon: how many tokens back" },
  };
  const BOTTOM = STRIPS.horizons.top + STRIPS.horizons.height;

  function drawBars(group, { top, height, most }, values, x) {
    values.forEach((one, t) => {
      const high = (height * one) / most;
      draw(group, "rect", { x: x(t) + 1, y: top + height - high, width: x(1) - x(0) - 2, height: high, class: "plus" });
    });
  }

  function drawStairs(group, { top, height, most }, values, x, name) {
    const steps = values.map((one, t) => `V${top + height - (height * one) / most} H${x(t + 1)}`);
    draw(group, "path", { d: `M${x(0)} ${top + height} ${steps.join(" ")}`, class: name });
  }

  function drawStrips(group, { gates, matrix, fixedMatrix, horizons, fixedHorizons, query, places }) {
    const cell = (widths.strips - LEFT - 10) / TOKENS, x = (t) => LEFT + t * cell, row = query - 1;
    for (const [name, length] of [["--left", LEFT], ["--cell", cell]]) element("strips").parentElement.style.setProperty(name, `${length}px`);
    drawBars(group, STRIPS.gates, gates.map(sums.size), x);
    drawBars(group, STRIPS.weights, matrix[row].map(sums.size), x);
    for (const place of places) draw(group, "path", { d: `M${x(place - 0.5)} 0 V${BOTTOM}`, class: "cut" });
    draw(group, "path", { d: `M${x(row + 0.5)} ${STRIPS.weights.top} V${BOTTOM + 18}`, class: "reader" });
    drawStairs(group, STRIPS.weights, fixedMatrix[row].map(sums.size), x, "fixed");
    drawStairs(group, STRIPS.horizons, fixedHorizons, x, "fixed");
    drawStairs(group, STRIPS.horizons, horizons, x, "path");
    for (const { top, height, most, title } of Object.values(STRIPS)) {
      draw(group, "path", { d: `M${LEFT - 0.5} ${top} v${height + 0.5} H${x(TOKENS)}`, class: "axis" });
      tick(group, LEFT, top - 7, title(query), "start");
      tick(group, LEFT - 6, top + 9, most, "end");
      tick(group, LEFT - 6, top + height + 4, 0, "end");
    }
    for (const t of ticked) tick(group, x(t + 0.5), BOTTOM + 14, t + 1);
  }

  // The matrix, with the row of the reading token, and how far back the fixed gate sees as a line of steps.
  function drawBlocks(group, cell, { matrix, fixedHorizons, query }) {
    drawMatrix(group, cell, matrix, sums.size);
    const border = fixedHorizons.map((n, t) => `H${LEFT + (t - n) * cell} V${TOP + (t + 1) * cell}`);
    draw(group, "path", { d: `M${LEFT} ${TOP} ${border.join(" ")}`, class: "fixed" });
    draw(group, "rect", { x: LEFT - 1, y: TOP + (query - 1) * cell - 1, width: query * cell + 1, height: cell + 1, class: "reader" });
  }

  function showResets({ places, query, gates, fixed }) {
    const matrix = sums.decayMatrix(gates), fixedMatrix = sums.decayMatrix(fixed);
    const horizons = sums.horizons(matrix, LEAST), fixedHorizons = sums.horizons(fixedMatrix, LEAST);
    const back = horizons[query - 1], fixedBack = fixedHorizons[query - 1], first = query - back;
    const where = places.length ? `Reset${places.length === 1 ? " at token" : "s at tokens"} ${listed(places)}` : "No reset";
    const sees = back === 0 ? "sees no token before it" : `sees ${count(back, "token")} back, to token ${first}`;
    const words = `${where}. Token ${query} ${sees}${back && places.includes(first) ? ", a reset" : ""}. The fixed gate sees ${fixedBack}.`;

    const found = { matrix, fixedMatrix, horizons, fixedHorizons, gates, query, places };
    const cell = cellOf("reset-matrix"), blocks = new Set([1, ...places]).size;
    picture("strips", BOTTOM + 18,
      `${words} Memory horizon of each token: ${horizons.join(", ")}. With the fixed gate: ${fixedHorizons.join(", ")}.`,
      (group) => drawStrips(group, found));
    picture("reset-matrix", heightOf(cell),
      `Decay matrix of ${TOKENS} tokens. ${where}: ${blocks === 1 ? "one triangle" : `${blocks} triangles, and no weight between them`}.`,
      (group) => drawBlocks(group, cell, found));
    element("query-value").textContent = query;
    element("reset-horizon").textContent = back;
    element("fixed-horizon").textContent = fixedBack;
    element("same-horizon").textContent = range.filter((t) => horizons[t] === fixedHorizons[t]).length;
    for (const input of [...resets, element("query")]) input.setAttribute("aria-valuetext", `token ${input.value}`);
    element("add-reset").setAttribute("aria-disabled", places.length === resets.length);
    element("remove-reset").setAttribute("aria-disabled", places.length === 0);
    say("reset-status", words);
  }

  // A new reset goes into the middle of the longest stretch that has none.
  function addReset() {
    const free = resets.find((input) => input.hidden), ends = [1, ...placed(), TOKENS + 1];
    if (!free) return;
    const lengths = ends.slice(1).map((end, i) => end - ends[i]), widest = lengths.indexOf(Math.max(...lengths));
    free.value = Math.round((ends[widest] + ends[widest + 1]) / 2);
    free.hidden = false;
    show();
  }

  function removeReset() {
    const used = resets.filter((input) => !input.hidden);
    if (used.length) last(used).hidden = true;
    show();
  }

  // The same states in four ways

  const INPUTS = range.map((t) => [Math.sin(1 + 3 * t * t), 0]); // any numbers would do

  function showModes(one, several) {
    const chosen = element("modes-gate").checked, gates = chosen ? Array(TOKENS).fill(one.a) : several.gates;
    const { statePath, scan, attention, division, difference } = sums, truth = statePath(gates, INPUTS);
    for (const [name, mode] of Object.entries({ recurrent: statePath, scan, attention, division })) {
      const found = mode(gates, INPUTS);
      element(`${name}-state`).textContent = complex(found[several.query - 1]);
      element(`${name}-difference`).textContent = number(difference(found, truth), 2);
    }
    element("modes-query").textContent = several.query;
    const failed = element("division-difference").textContent === "NaN";
    element("division-state").parentElement.classList.toggle("failed", failed);
    say("modes-status", `${chosen ? "With the gate of the first picture" : "With the gates of the second picture"} ` +
      (failed ? "three ways agree. The fourth has divided 0 by 0." : "all four ways agree."));
  }

  // All together

  function show() {
    const [one, several] = [readGate(), readResets()];
    showGate(one);
    showResets(several);
    showModes(one, several);
  }

  function startOver(section) {
    for (const input of section.querySelectorAll("input")) [input.value, input.checked] = [input.defaultValue, input.defaultChecked];
    for (const input of section.querySelectorAll(".reset")) input.hidden = input.dataset.start === "away";
    show();
  }

  document.querySelectorAll(".play input").forEach((input) => input.addEventListener("input", show));
  document.querySelectorAll("[data-magnitude]").forEach((button) =>
    button.addEventListener("click", () => setGate(Number(button.dataset.magnitude), Number(button.dataset.degrees))));
  document.querySelectorAll(".start-over").forEach((button) => button.addEventListener("click", () => startOver(button.closest(".play"))));
  element("add-reset").addEventListener("click", addReset);
  element("remove-reset").addEventListener("click", removeReset);
  letGateBeDragged();

  // Pictures are drawn for the width that they have, at the start and whenever it changes.
  const observer = new ResizeObserver((entries) => {
    const changed = entries.filter(({ target, contentRect }) => contentRect.width > 0 && widths[target.id] !== Math.floor(contentRect.width));
    for (const { target, contentRect } of changed) widths[target.id] = Math.floor(contentRect.width);
    if (changed.length) show();
  });
  document.querySelectorAll(".play svg").forEach((svg) => observer.observe(svg));
})();
