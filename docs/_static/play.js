// The gates of docs/play.md: sums that can be checked first, then drawings. No library, nothing from the network.

const llambaPlay = {
  // T[t][s] = a_{s+1} ... a_t for s <= t, as [real, imaginary]: each row is the one above it, times the gate of its token.
  decayMatrix(magnitudes, phases) {
    const rows = [];
    magnitudes.forEach((magnitude, t) => {
      const [re, im] = [magnitude * Math.cos(phases[t]), magnitude * Math.sin(phases[t])];
      const above = t ? rows[t - 1] : [];
      rows.push([...above.map(([x, y]) => [re * x - im * y, re * y + im * x]), [1, 0]]);
    });
    return rows;
  },

  // h_t = a h_{t-1} + x_t from h = 0, as [real, imaginary].
  statePath(magnitude, phase, inputs) {
    const [re, im] = [magnitude * Math.cos(phase), magnitude * Math.sin(phase)];
    let [x, y] = [0, 0];
    return inputs.map((input) => ([x, y] = [re * x - im * y + input, re * y + im * x]));
  },

  // Tokens until half is left: ln 2 / -ln |a|.
  halfLife: (magnitude) => (magnitude === 1 ? Infinity : magnitude === 0 ? 0 : Math.log(2) / -Math.log(magnitude)),

  // Tokens for a full turn.
  period: (phase) => (phase === 0 ? Infinity : (2 * Math.PI) / Math.abs(phase)),

  // For each token, how many tokens before it still have a weight of at least `least`.
  horizons: (matrix, least) => matrix.map((row, t) => row.filter(([x, y], s) => s < t && Math.hypot(x, y) >= least).length),
};

(() => {
  const LEAST = 0.05; // below this weight a token counts as forgotten
  const element = (id) => document.getElementById(id);
  const number = (x, digits = 3) => (Number.isFinite(x) ? Number(x.toPrecision(digits)).toString() : "∞");

  function draw(parent, tag, attributes, words) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (words !== undefined) node.textContent = words;
    return parent.appendChild(node);
  }

  // A picture is drawn anew at each change; `description` is what a screen reader says of it.
  function clear(id, description) {
    const svg = element(id);
    svg.replaceChildren();
    svg.setAttribute("aria-label", description);
    return svg;
  }

  // Blue for weights above zero, orange for those below, the paler the smaller.
  function drawMatrix(svg, matrix, part, { x = 26, y = 8, size = 246, row = -1 } = {}) {
    const side = size / matrix.length;
    matrix.forEach((entries, t) =>
      entries.forEach((entry, s) => {
        const weight = part(entry);
        draw(svg, "rect", {
          x: x + s * side, y: y + t * side, width: side - 0.6, height: side - 0.6,
          class: weight < 0 ? "minus" : "plus", "fill-opacity": Math.min(1, Math.abs(weight)).toFixed(3),
        });
      }));
    draw(svg, "path", { d: `M${x} ${y} V${y + size} H${x + size}`, class: "axis" });
    if (row >= 0) draw(svg, "rect", { x, y: y + row * side - 0.5, width: (row + 1) * side, height: side, class: "chosen" });
    draw(svg, "text", { x: x + size / 2, y: y + size + 18, "text-anchor": "middle" }, "written at s");
    draw(svg, "text", { transform: `translate(${x - 9} ${y + size / 2}) rotate(-90)`, "text-anchor": "middle" }, "read at t");
  }

  // One gate, the same at every token.

  const LENGTH = 24;
  const PRESETS = { attention: [1, 0], rope: [1, 0.5], retnet: [0.9, 0.5], real: [0.9, 0], forget: [0, 0] };
  const toMagnitude = (place) => 1 - (1 - place / 1000) ** 3; // fine steps near 1
  const toPlace = (magnitude) => Math.round(1000 * (1 - Math.cbrt(1 - magnitude)));

  function drawPath(path, phase) {
    const most = Math.max(1, ...path.map(([x, y]) => Math.hypot(x, y)));
    const svg = clear("gate-path", `The state in the complex plane after each of ${path.length} tokens, from ${number(Math.hypot(...path[0]))} ` +
      `to ${number(Math.hypot(...path.at(-1)))} in magnitude${phase ? ", turning" : ", on the real axis"}.`);
    const place = ([x, y]) => [150 + (120 * x) / most, 132 - (120 * y) / most];
    draw(svg, "path", { d: "M22 132 H278 M150 6 V258", class: "axis" });
    draw(svg, "circle", { cx: 150, cy: 132, r: 120 / most, class: "unit" });
    draw(svg, "polyline", { points: path.map((h) => place(h).map((z) => z.toFixed(1)).join()).join(" "), class: "path" });
    path.forEach((h, t) => {
      const [cx, cy] = place(h);
      draw(svg, "circle", { cx, cy, r: t === path.length - 1 ? 5 : 3, class: t === path.length - 1 ? "last" : "state" });
    });
    draw(svg, "text", { x: 278, y: 126, "text-anchor": "end" }, "real");
    draw(svg, "text", { x: 156, y: 15 }, "imaginary");
    draw(svg, "text", { x: 22, y: 275 }, `dashed: magnitude 1; large dot: token ${path.length}`);
  }

  function showGate() {
    const magnitude = toMagnitude(element("gate-magnitude").valueAsNumber);
    const phase = (element("gate-phase").valueAsNumber * Math.PI) / 180;
    const again = element("gate-constant").checked;
    const part = element("gate-absolute").checked ? ([x, y]) => Math.hypot(x, y) : ([x]) => x;
    const matrix = llambaPlay.decayMatrix(Array(LENGTH).fill(magnitude), Array(LENGTH).fill(phase));
    const path = llambaPlay.statePath(magnitude, phase, Array.from({ length: LENGTH }, (_, t) => (again || t === 0 ? 1 : 0)));
    const [half, turn] = [llambaPlay.halfLife(magnitude), llambaPlay.period(phase)];

    element("gate-magnitude").setAttribute("aria-valuetext", number(magnitude, 4));
    element("gate-magnitude-value").textContent = number(magnitude, 4);
    element("gate-phase-value").textContent = `${number(phase, 3)} rad`;
    drawMatrix(clear("gate-matrix", `Decay matrix of ${LENGTH} tokens. ${turn < Infinity ? `Its sign changes with a period of ${number(turn)} tokens. ` : ""}` +
      `Weights fall by half in ${number(half)} tokens.`), matrix, part);
    drawPath(path, phase);
    element("gate-status").textContent = (magnitude === 1 ? "Nothing is forgotten. " : magnitude === 0 ? "Everything is forgotten at once. " :
      `Half is left after ${number(half)} tokens. `) + (turn === Infinity ? "No turn." : `A full turn takes ${number(turn)} tokens.`);
  }

  // A gate for each token, one of them a reset.

  const TOKENS = 32;
  const strip = { x: 20, width: 560 / TOKENS };

  function drawTokens(row, reset, query) {
    const svg = element("reset-tokens");
    svg.querySelectorAll(".drawn").forEach((node) => node.remove());
    row.forEach(([x], s) => {
      const height = 60 * Math.abs(x);
      draw(svg, "rect", { x: strip.x + s * strip.width + 1, y: 90 - height, width: strip.width - 2, height, class: "drawn plus" });
    });
    draw(svg, "path", { d: `M${strip.x} 90.5 H${strip.x + TOKENS * strip.width}`, class: "drawn axis" });
    for (const t of [1, 8, 16, 24, 32]) draw(svg, "text", { x: strip.x + (t - 0.5) * strip.width, y: 106, "text-anchor": "middle", class: "drawn" }, t);
    draw(svg, "text", { x: strip.x + (query - 0.5) * strip.width, y: 22, "text-anchor": "middle", class: "drawn" }, "reads");
    const handle = element("reset-handle");
    handle.setAttribute("transform", `translate(${strip.x + (reset - 0.5) * strip.width} 0)`);
    handle.setAttribute("aria-valuenow", reset);
    handle.setAttribute("aria-valuetext", `token ${reset}`);
  }

  function drawHorizons(gated, fixed, query) {
    const svg = clear("reset-horizon", `Memory horizon of each token. With the reset: ${gated.join(", ")}. With fixed gates: ${fixed.join(", ")}.`);
    const place = (tokens, t) => `${30 + (t + 0.5) * (246 / TOKENS)},${(254 - (tokens * 246) / TOKENS).toFixed(1)}`;
    draw(svg, "path", { d: "M30 8 V254 H276", class: "axis" });
    draw(svg, "polyline", { points: fixed.map(place).join(" "), class: "fixed" });
    draw(svg, "polyline", { points: gated.map(place).join(" "), class: "path" });
    const [cx, cy] = place(gated[query - 1], query - 1).split(",");
    draw(svg, "circle", { cx, cy, r: 5, class: "last" });
    for (const tokens of [0, 16, 32]) draw(svg, "text", { x: 25, y: 258 - (tokens * 246) / TOKENS, "text-anchor": "end" }, tokens);
    draw(svg, "text", { x: 153, y: 272, "text-anchor": "middle" }, "token t");
    draw(svg, "text", { x: 38, y: 20 }, "tokens it remembers");
  }

  function showReset() {
    const magnitude = toMagnitude(element("reset-magnitude").valueAsNumber);
    const [reset, query] = [element("reset-place").valueAsNumber, element("reset-query").valueAsNumber];
    const still = Array(TOKENS).fill(0);
    const gates = Array.from({ length: TOKENS }, (_, t) => (t === reset - 1 ? 0 : magnitude));
    const matrix = llambaPlay.decayMatrix(gates, still);
    const fixed = llambaPlay.horizons(llambaPlay.decayMatrix(Array(TOKENS).fill(magnitude), still), LEAST);
    const gated = llambaPlay.horizons(matrix, LEAST);

    element("reset-magnitude").setAttribute("aria-valuetext", number(magnitude, 4));
    element("reset-magnitude-value").textContent = number(magnitude, 4);
    element("reset-place-value").textContent = reset;
    element("reset-query-value").textContent = query;
    drawTokens(matrix[query - 1], reset, query);
    drawMatrix(clear("reset-matrix", `Decay matrix of ${TOKENS} tokens: two triangles. No token from ${reset} on sees one before it.`), matrix, ([x]) => x, { row: query - 1 });
    drawHorizons(gated, fixed, query);
    element("reset-status").textContent = `Token ${query} remembers ${gated[query - 1]} of the ${query - 1} tokens before it. ` +
      (gated[query - 1] < fixed[query - 1] ? `Without the reset at token ${reset} it would be ${fixed[query - 1]}.` : `The reset at token ${reset} makes no difference to it.`);
  }

  function moveReset(place) {
    element("reset-place").value = Math.min(TOKENS, Math.max(1, place));
    showReset();
  }

  function letDrag() {
    const [svg, handle] = [element("reset-tokens"), element("reset-handle")];
    const tokenAt = (event) => {
      const box = svg.getBoundingClientRect();
      return Math.floor((((event.clientX - box.left) / box.width) * 600 - strip.x) / strip.width) + 1;
    };
    svg.addEventListener("pointerdown", (event) => {
      svg.setPointerCapture(event.pointerId);
      moveReset(tokenAt(event));
      handle.focus();
      event.preventDefault();
    });
    svg.addEventListener("pointermove", (event) => svg.hasPointerCapture(event.pointerId) && moveReset(tokenAt(event)));
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -8, PageUp: 8, Home: -TOKENS, End: TOKENS };
    handle.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      moveReset(element("reset-place").valueAsNumber + steps[event.key]);
      event.preventDefault();
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll(".play input").forEach((input) => input.addEventListener("input", input.closest("#gate") ? showGate : showReset));
    document.querySelectorAll("#gate button").forEach((button) => button.addEventListener("click", () => {
      const [magnitude, phase] = PRESETS[button.dataset.preset];
      element("gate-magnitude").value = toPlace(magnitude);
      element("gate-phase").value = Math.round((phase * 180) / Math.PI);
      showGate();
    }));
    letDrag();
    showGate();
    showReset();
  });
})();
