// The moving pictures of docs/moving.md and of some chapters. Plain JavaScript: no library, no build step, nothing from
// the network. A frame is a string of SVG that depends on the picture, the step and the width only, so docs/_moving holds
// the last one of each for pages without JavaScript (tests/test_moving.py compares them).

// The sums, by themselves so that they can be checked. Tokens count from 0.
globalThis.llambaMoving = (() => {
  const dot = (x, y) => x.reduce((sum, entry, i) => sum + entry * y[i], 0);

  // First (a, x), then (b, y): h becomes b (a h + x) + y.
  const combine = ([a, x], [b, y]) => [b * a, b * x + y];

  // Hillis and Steele: all pairs before the first round, and after each one.
  function rounds(pairs) {
    const all = [pairs];
    for (let far = 1; far < pairs.length; far *= 2) {
      const before = all[all.length - 1];
      all.push(before.map((pair, t) => (t < far ? pair : combine(before[t - far], pair))));
    }
    return all;
  }

  // h_t = a_t h_{t-1} + x_t from h = 0.
  function loop(pairs) {
    let h = 0;
    return pairs.map(([a, x]) => (h = a * h + x));
  }

  // S_t = a_t S_{t-1} + x_t B_t^T and y_t = S_t C_t: for each token the state faded, the state written, and what is read.
  function memory({ x, a, B, C }) {
    let S = x[0].map(() => B[0].map(() => 0));
    return x.map((x_t, t) => {
      const faded = S.map((row) => row.map((entry) => a[t] * entry));
      S = faded.map((row, p) => row.map((entry, n) => entry + x_t[p] * B[t][n]));
      return { faded, written: S, y: S.map((row) => dot(row, C[t])) };
    });
  }

  const product = (gates) => gates.reduce((all, a) => all * a, 1);

  // M[t][s] = a_{s+1} ... a_t C_t . B_s for s <= t.
  const matrix = ({ a, B, C }) => a.map((_, t) => a.slice(0, t + 1).map((_, s) => product(a.slice(s + 1, t + 1)) * dot(C[t], B[s])));

  // SSD in chunks of Q tokens, values of one channel: what each chunk finds inside itself, the state that it makes alone,
  // the state after it, and what its tokens read from the state before it.
  function chunked({ x, a, B, C }, Q) {
    const M = matrix({ a, B, C }), starts = a.map((_, t) => t).filter((t) => t % Q === 0);
    const within = x.map((_, t) => M[t].reduce((sum, entry, s) => sum + (s >= t - (t % Q) ? entry * x[s] : 0), 0));
    const own = starts.map((f) => B[f].map((_, n) => {
      const end = f + Q; // of the chunk, exclusive
      return x.slice(f, end).reduce((sum, x_s, i) => sum + product(a.slice(f + i + 1, end)) * x_s * B[f + i][n], 0);
    }));
    const states = [];
    own.forEach((S, j) => states.push(j ? S.map((entry, n) => product(a.slice(j * Q, j * Q + Q)) * states[j - 1][n] + entry) : S));
    const read = x.map((_, t) => (t < Q ? 0 : product(a.slice(t - (t % Q), t + 1)) * dot(C[t], states[Math.floor(t / Q) - 1])));
    return { M, within, own, states, read, y: within.map((part, t) => part + read[t]) };
  }

  // GateLoop, a gate for each channel of the keys and values of one channel, in three modes.
  function recurrent({ q, k, v, a }) {
    let S = q[0].map(() => 0);
    const states = q.map((_, t) => (S = S.map((entry, d) => a[t][d] * entry + k[t][d] * v[t])));
    return { states, y: states.map((state, t) => dot(q[t], state)) };
  }
  function scan({ q, k, v, a }) {
    const channels = q[0].map((_, d) => rounds(q.map((_, t) => [a[t][d], k[t][d] * v[t]])));
    const levels = channels[0].map((_, r) => q.map((_, t) => channels.map((channel) => channel[r][t])));
    const last = levels[levels.length - 1];
    return { levels, y: q.map((row, t) => dot(row, last[t].map(([, x]) => x))) };
  }
  function attention({ q, k, v, a }) {
    const T = q.map((_, t) => q.slice(0, t + 1).map((_, s) =>
      q[t].reduce((sum, entry, d) => sum + entry * k[s][d] * product(a.slice(s + 1, t + 1).map((row) => row[d])), 0)));
    return { T, y: T.map((row) => dot(row, v)) };
  }

  // What the pictures show. Chosen by hand: a model computes them from its tokens.
  const [ANN, BOB, NOBODY] = [[1, 0.2], [0.2, 1], [0, 0]];
  const [TEA, CAKE, JAM, NOTHING] = [[2, 0, 0], [0, 2, 0], [0, 0, 2], [0, 0, 0]];
  const data = {
    scan: [[0.5, 2], [1, 1], [0.5, 4], [0.5, 2], [0, 3], [1, 1], [0.5, 2], [0.5, 1]],
    memory: {
      words: ["Ann", "tea", "cake", "Bob", "jam", ".", "Ann"],
      x: [NOTHING, TEA, CAKE, NOTHING, JAM, NOTHING, NOTHING],
      a: [0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.9],
      B: [NOBODY, ANN, ANN, NOBODY, BOB, NOBODY, NOBODY],
      C: [ANN, NOBODY, NOBODY, BOB, NOBODY, NOBODY, ANN],
    },
    chunks: {
      x: [1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1],
      a: [0.9, 0.8, 0.9, 0.9, 0.7, 0.9, 0.9, 0.8, 0.9, 0.9, 0.7, 0.9],
      B: [[1, 0], [0.5, 0.5], [0, 1], [1, 0.5], [0.5, 1], [1, 0], [0, 1], [0.5, 0.5], [1, 0.5], [0, 1], [1, 0], [0.5, 1]],
      C: [[1, 0.5], [1, 0], [0.5, 1], [0.5, 0.5], [1, 0.5], [0, 1], [1, 0.5], [0.5, 1], [1, 0], [0.5, 1], [1, 0.5], [0.5, 0.5]],
    },
    modes: {
      words: ["the", "small", "red", "cat", "sat", "on", "my", "mat"],
      q: [[1, 0], [1, 1], [0, 1], [1, 0.5], [1, 1], [0.5, 1], [1, 0], [1, 1]],
      k: [[0.5, 0], [1, 0.5], [0, 1], [1, 0], [0.5, 1], [0, 0.5], [0.5, 0], [1, 1]],
      v: [1, 2, 1, 2, 1, 1, 1, 2],
      a: [[0.9, 0.5], [0.9, 0.5], [0.8, 0.5], [0.9, 0.2], [0.9, 0.8], [0.5, 0.5], [0.9, 0.5], [0.8, 0.9]],
    },
  };
  return { combine, rounds, loop, memory, matrix, chunked, recurrent, scan, attention, data };
})();

// The frames.
(() => {
  const sums = globalThis.llambaMoving, { data } = sums;
  const FOOD = ["tea", "cake", "jam"]; // rows of the state
  const number = (x, digits = 2) => Number(x.toFixed(digits)).toString().replace("-", "−");
  const listed = (numbers, digits = 2) => numbers.map((x) => number(x, digits)).join(", ");
  const range = (n) => Array.from({ length: n }, (_, i) => i);

  // SVG as text. Lengths are in CSS pixels, rounded so that files stay small.
  const tag = (name, attributes, inside = "") =>
    `<${name} ${Object.entries(attributes).map(([key, value]) => `${key}="${typeof value === "number" ? Number(value.toFixed(1)) : value}"`).join(" ")}>${inside}</${name}>`;
  const text = (x, y, words, kind = "", anchor = "middle") => tag("text", { x, y, "text-anchor": anchor, class: kind }, words);
  const line = (x1, y1, x2, y2, kind = "") => tag("path", { d: `M${[x1, y1].map((z) => z.toFixed(1)).join(" ")} L${[x2, y2].map((z) => z.toFixed(1)).join(" ")}`, class: `line ${kind}` });
  const box = (x, y, width, height, kind = "") => tag("rect", { x, y, width, height, rx: 4, class: `box ${kind}` });
  // A number on a cell that is the stronger coloured the larger it is.
  const shade = (x, y, width, height, value, most, kind) =>
    box(x, y, width, height) + tag("rect", { x, y, width, height, rx: 4, class: kind, "fill-opacity": (0.5 * Math.min(1, Math.abs(value) / most)).toFixed(2) });
  const arrow = (x1, y1, x2, y2, kind = "") => {
    const [length, size] = [Math.hypot(x2 - x1, y2 - y1), 5], [u, w] = [(x2 - x1) / length, (y2 - y1) / length];
    const corner = (side) => `${(x2 - size * (u + side * 0.7 * w)).toFixed(1)} ${(y2 - size * (w - side * 0.7 * u)).toFixed(1)}`;
    return line(x1, y1, x2, y2, kind) + tag("path", { d: `M${corner(1)} L${x2.toFixed(1)} ${y2.toFixed(1)} L${corner(-1)}`, class: `line ${kind}` });
  };

  // 1. A scan of eight pairs, and a loop beside it.
  function scanTree(step, width) {
    const pairs = data.scan, L = pairs.length, levels = sums.rounds(pairs), states = sums.loop(pairs), last = levels.length - 1;
    const cell = width / L, side = Math.min(cell - 4, 72), at = (t) => (t + 0.5) * cell, tall = 40, apart = 80, top = 26;
    const round = Math.min(step, last), y = (r) => top + r * apart;
    const parts = [text(2, 16, "Scan", "head", "start"), text(width - 2, 16, `${round} of ${last} rounds${round === last ? ": done" : ""}`, "count", "end")];
    for (let r = 1; r <= last; r++) {
      const far = 2 ** (r - 1), fresh = step === r ? "now fresh" : "", kind = r > step ? "later" : fresh;
      for (const t of range(L)) {
        parts.push(line(at(t), y(r - 1) + tall, at(t), y(r), kind));
        if (t >= far) parts.push(arrow(at(t - far), y(r - 1) + tall, at(t) - 3, y(r), kind));
      }
    }
    levels.forEach((level, r) => level.forEach(([a, x], t) => {
      const done = r <= step, same = r > 0 && t < 2 ** (r - 1), ready = t < 2 ** r;
      const fresh = r > 0 && step === r && !same ? "now fresh" : "";
      parts.push(box(at(t) - side / 2, y(r), side, tall, `${done ? (ready ? "ready" : "") : "empty"} ${fresh}`));
      if (done) parts.push(text(at(t), y(r) + 16, number(a, 3), `gate ${fresh && "fresh"}`), text(at(t), y(r) + 33, number(x, 3), `strong ${fresh && "fresh"}`));
    }));
    const below = y(last) + tall + 40, taken = Math.min(step, L - 1);
    parts.push(text(2, below - 10, "Loop", "head", "start"), text(width - 2, below - 10, `${taken} of ${L - 1} steps${taken === L - 1 ? ": done" : ""}`, "count", "end"));
    states.forEach((h, t) => {
      const done = t <= step, fresh = step > 0 && t === step ? "now fresh" : "";
      parts.push(box(at(t) - side / 2, below, side, 28, `${done ? "ready" : "empty"} ${fresh}`));
      if (done) parts.push(text(at(t), below + 19, number(h, 3), "strong"));
    });
    if (step > 0) parts.push(tag("path", { d: `M${at(step - 1).toFixed(1)} ${below + 30} q${(cell / 2).toFixed(1)} 18 ${cell.toFixed(1)} 0`, class: "line now fresh" }));
    const far = 2 ** (step - 1);
    const one = step > 0 && step <= last && levels[step - 1][far - 1], two = one && levels[step - 1][2 * far - 1], both = one && sums.combine(one, two);
    const words = step === 0
      ? `Eight pairs: above the gate a, below the input x. Blue holds a state already: h₁ = x₁.`
      : step <= last
        ? `Round ${step}: every pair is combined with the one ${far} before it, all at the same time. ${step === last ? "All eight states are there." : `${2 * far} states are there.`} Token ${2 * far}: (${listed(one, 3)}) then (${listed(two, 3)}) is (${number(both[0], 3)}, ${number(both[1], 3)}). The loop takes one step: h${"₁₂₃₄₅₆₇₈"[step]} = ${number(pairs[step][0])} · ${number(states[step - 1], 3)} + ${number(pairs[step][1])} = ${number(states[step], 3)}.`
        : `The scan is done. The loop goes on: h${"₁₂₃₄₅₆₇₈"[step]} = ${number(pairs[step][0])} · ${number(states[step - 1], 3)} + ${number(pairs[step][1])} = ${number(states[step], 3)}.${step === L - 1 ? ` The same eight states, after ${L - 1} steps in place of ${last}.` : ""}`;
    return { svg: parts.join(""), height: below + 46, words };
  }

  // 2. A state that is faded, written and read. What a token writes or reads is a step of its own where it is not zero.
  const memorySteps = data.memory.words.flatMap((_, t) => [
    [t, "fade"], ...(data.memory.B[t].some(Boolean) ? [[t, "write"]] : []), ...(data.memory.C[t].some(Boolean) ? [[t, "read"]] : [])]);
  function stateFilling(step, width) {
    const all = sums.memory(data.memory), { words: tokens, x, a, B, C } = data.memory, L = tokens.length;
    const [t, phase] = step ? memorySteps[step - 1] : [0, ""];
    const before = t ? all[t - 1].written : x[0].map(() => B[0].map(() => 0));
    const S = phase === "" ? before : phase === "fade" ? all[t].faded : all[t].written;
    const parts = [], cell = width / L;
    tokens.forEach((word, i) => {
      const now = step && i === t;
      parts.push(box(i * cell + 2, 2, cell - 4, 30, now ? "now" : i < t && step ? "ready" : "empty"), text((i + 0.5) * cell, 22, word, "strong"));
      parts.push(text((i + 0.5) * cell, 50, `${i ? "" : "a = "}${number(a[i])}`, "gate"));
    });
    const size = Math.min(70, (width - 92) / 4), tall = 46, gap = 14, left = 46 + Math.max(0, (width - 92 - 4 * size) / 2);
    const X = left, M = X + size + gap, Y = M + 2 * size + gap, top = 92, lines = (p) => top + tall + gap + p * tall;
    const writes = phase === "write", reads = phase === "read", row = (n) => M + n * size;
    FOOD.forEach((word, p) => parts.push(text(X - 8, lines(p) + 28, word, "small", "end")));
    ["Ann", "Bob"].forEach((word, n) => parts.push(text(row(n) + size / 2, lines(3) + gap + tall + 18, word, "small")));
    const vector = (value, px, py, on, kind) => box(px + 2, py + 2, size - 4, tall - 4, on ? `${kind} fresh` : "empty") + (on ? text(px + size / 2, py + 28, number(value), "strong fresh") : "");
    parts.push(text(X + size / 2, lines(0) - 8, "x", writes ? "symbol plus" : "symbol"), text(row(0) - 8, top + 28, "B", writes ? "symbol plus" : "symbol", "end"));
    parts.push(text(row(0) - 8, lines(3) + gap + 28, "C", reads ? "symbol mark" : "symbol", "end"), text(Y + size / 2, lines(0) - 8, "y", reads ? "symbol mark" : "symbol"));
    range(2).forEach((n) => parts.push(vector(B[t][n], row(n), top, writes, "wrote"), vector(C[t][n], row(n), lines(3) + gap, reads, "asked")));
    range(3).forEach((p) => parts.push(vector(x[t][p], X, lines(p), writes, "wrote"), vector(all[t].y[p], Y, lines(p), reads, "asked")));
    S.forEach((entries, p) => entries.forEach((entry, n) => {
      const changed = Math.abs(entry - (writes ? all[t].faded : before)[p][n]) > 1e-9 && (writes || phase === "fade");
      parts.push(shade(row(n) + 2, lines(p) + 2, size - 4, tall - 4, entry, 2, "plus"));
      if (changed) parts.push(tag("rect", { x: row(n) + 2, y: lines(p) + 2, width: size - 4, height: tall - 4, rx: 4, class: `ring fresh ${phase}` }));
      parts.push(text(row(n) + size / 2, lines(p) + 28, number(entry), "strong"));
    }));
    parts.push(text(row(1), 78, phase === "fade" ? `S ← ${number(a[t])} · S` : writes ? "S ← S + x Bᵀ" : reads ? "y = S C" : "S = 0", "head"));
    const where = `Token ${t + 1}, “${tokens[t]}”`, found = FOOD.map((food, p) => `${number(all[t].y[p])} for ${food}`).join(", ");
    const words = step === 0
      ? "An empty state. Its columns are channels of the keys, one for Ann and one for Bob, its rows channels of the values. Small numbers are pale."
      : phase === "fade" ? `${where}: the gate ${number(a[t])} fades all that the state holds.${tokens[t] === "." ? " A full stop fades more than a word." : ""}`
        : writes ? `${where}: the value (${listed(x[t])}) is written under the key (${listed(B[t])}). Each entry gets its row’s x times its column’s B.`
          : `${where}: the query (${listed(C[t])}) finds ${found}. ${["Nothing has been written yet.", "Nobody wrote them for Bob: his key overlaps with Ann’s.", "The last that was written for Ann is the strongest; jam came in by Bob’s key."][[0, 3, 6].indexOf(t)]}`;
    return { svg: parts.join(""), height: lines(3) + gap + tall + 26, words };
  }

  // 3. SSD in chunks.
  function chunks(step, width) {
    const Q = 4, L = data.chunks.a.length, n = L / Q, { M, within, own, states, read, y } = sums.chunked(data.chunks, Q);
    const cell = Math.min(30, Math.floor((width - 78) / L)), left = Math.max(24, (width - 54 - L * cell) / 2), top = 30, most = Math.max(...M.flat());
    const px = (s) => left + s * cell, py = (t) => top + t * cell, parts = [];
    parts.push(text(left + (L * cell) / 2, 16, "written at s", "small"), tag("text", { transform: `translate(${(left - 10).toFixed(1)} ${top + (L * cell) / 2}) rotate(-90)`, "text-anchor": "middle", class: "small" }, "read at t"));
    parts.push(text(px(L) + 30, 16, "y", "symbol"));
    for (const t of range(L)) {
      for (const s of range(t + 1)) {
        const inside = Math.floor(s / Q) === Math.floor(t / Q), on = inside ? step >= 1 : step >= 5, fresh = step === (inside ? 1 : 5) ? "fresh" : "";
        if (!on) parts.push(box(px(s) + 1, py(t) + 1, cell - 2, cell - 2, "empty"));
        else parts.push(tag("rect", { x: px(s) + 1, y: py(t) + 1, width: cell - 2, height: cell - 2, rx: 3, class: `${inside ? "plus" : "minus"} ${fresh}`, "fill-opacity": (0.12 + 0.88 * Math.min(1, M[t][s] / most)).toFixed(2) }));
      }
      const out = step >= 5 ? y[t] : step >= 1 ? within[t] : null, whole = step >= 5 || t < Q;
      if (out !== null) parts.push(text(px(L) + 50, py(t) + cell / 2 + 4, number(out), `${whole ? "strong" : "part"} ${step === 1 || (step === 5 && t >= Q) ? "fresh" : ""}`, "end"));
    }
    for (const j of range(n).slice(1)) parts.push(line(px(0), py(j * Q), px((j + 1) * Q), py(j * Q), "edge"), line(px(j * Q), py((j - 1) * Q), px(j * Q), py(L), "edge"));
    // The state that enters chunk j stands for all blocks left of the diagonal in its rows.
    for (const j of range(n).slice(1)) {
      if (step >= j + 1) parts.push(tag("rect", { x: px(0) - 1, y: py(j * Q) - 1, width: j * Q * cell + 2, height: Q * cell + 2, rx: 5, class: `ring block ${step === j + 1 ? "fresh" : ""}` }));
      if (step >= j + 1 && step < 5) parts.push(text(px((j * Q) / 2), py((j + 0.5) * Q) + 5, `from S⁽${"¹²³"[j - 1]}⁾`, "minus strong"));
    }
    const base = py(L) + 26;
    for (const j of range(n)) {
      const known = step >= Math.min(2 + j, 4) ? states[j] : step >= 2 ? own[j] : null, final = step >= 2 + j, fresh = (step === 2) || (step === 2 + j) ? "fresh" : "";
      const [x0, wide] = [px(j * Q) + 3, Q * cell - 6];
      parts.push(box(x0, base, wide, 42, `${known ? (final ? "held" : "ready") : "empty"} ${fresh}`));
      parts.push(text(x0 + wide / 2, base + 16, known && !final ? "alone" : `S⁽${"¹²³"[j]}⁾`, "small"));
      if (known) parts.push(text(x0 + wide / 2, base + 34, listed(known), `strong ${fresh}`));
      if (step >= 1 && step <= 2) parts.push(arrow(px((j + 0.5) * Q), py(L) + 4, px((j + 0.5) * Q), base - 2, step === 2 ? "now fresh" : "later"));
      if (j && step >= 2 + j) parts.push(tag("path", { d: `M${px((j - 0.5) * Q).toFixed(1)} ${base + 44} q${(Q * cell / 2).toFixed(1)} 26 ${(Q * cell).toFixed(1)} 2 m-9 2 l9 -3 l1 9`, class: `line ${step === 2 + j ? "now fresh" : ""}` }));
    }
    const pairs = (L * (L + 1)) / 2, blocks = (n * Q * (Q + 1)) / 2;
    const words = [
      `Twelve tokens in three chunks of ${Q}. The matrix has ${pairs} entries on and below its diagonal; none is computed yet.`,
      `Inside the chunks, all at the same time: attention of ${Q} tokens. That is ${blocks} of ${pairs} entries. The outputs of chunk 1 are complete, those of the others are parts.`,
      `Each chunk writes a state as if it were alone, all at the same time. That of chunk 1 is complete: it is all that chunk 2 has to know of chunk 1.`,
      `Chunk 1 hands over: its state fades through chunk 2 and is added to what chunk 2 wrote. S⁽²⁾ stands for the ${2 * Q * Q} entries left of chunk 3.`,
      `Chunk 2 hands over, and S⁽³⁾ is the state after the last token. Only these two steps came one after the other, ${n - 1} in place of ${L - 1}.`,
      `Outputs, all at the same time: each token of chunks 2 and 3 reads the state that entered its chunk. Those are the other ${pairs - blocks} entries, none of which was computed by itself. Token ${L}: ${number(within[L - 1])} from inside + ${number(read[L - 1])} from the state = ${number(y[L - 1])}.`,
    ][step];
    return { svg: parts.join(""), height: base + 66, words };
  }

  // 4. Three modes of one sentence.
  function threeModes(step, width) {
    const { words: tokens, q, v } = data.modes, L = tokens.length, cell = width / L, side = Math.min(cell - 4, 72), at = (t) => (t + 0.5) * cell, parts = [];
    const one = sums.recurrent(data.modes), two = sums.scan(data.modes), three = sums.attention(data.modes), rounds = two.levels.length - 1, N = q[0].length;
    tokens.forEach((word, t) => parts.push(text(at(t), 16, word, "strong")));
    const head = (y, name, taken, all, held) => parts.push(line(0, y - 22, width, y - 22, "rule"), text(2, y, name, "head", "start"), text(width - 2, y, `${taken} of ${all} step${all === 1 ? "" : "s"} · holds ${held} numbers`, "count", "end"));
    const outputs = (top, ys, done, fresh) => ys.forEach((y, t) => {
      parts.push(box(at(t) - side / 2, top, side, 26, `${done(t) ? "asked" : "empty"} ${fresh(t) ? "fresh" : ""}`));
      if (done(t)) parts.push(text(at(t), top + 18, number(y), `strong ${fresh(t) ? "fresh" : ""}`));
    });
    let top = 52;
    head(top, "Recurrent", step, L, step ? N : 0);
    one.states.forEach((S, t) => S.forEach((entry, d) => {
      const place = [at(t) - side / 2, top + 12 + 24 * d, side, 22];
      if (t === step - 1) parts.push(shade(...place, entry, 4, "plus fresh"), text(at(t), top + 28 + 24 * d, number(entry)));
      else parts.push(box(...place, "empty"));
    }));
    if (step > 1) parts.push(arrow(at(step - 2), top + 35, at(step - 1) - side / 2 - 1, top + 35, "now fresh"));
    outputs(top + 64, one.y, (t) => t < step, (t) => t === step - 1);

    top += 132;
    const round = Math.min(step, rounds), y = (r) => top + 12 + r * 32;
    head(top, "Scan", round, rounds, step ? L * 2 * N : 0);
    for (const r of range(rounds + 1)) for (const t of range(L)) {
      const far = 2 ** (r - 1), on = step > 0 && r <= round, kind = r > round ? "later" : step === r ? "now fresh" : "";
      if (r) parts.push(line(at(t), y(r - 1) + 12, at(t), y(r), kind));
      if (r && t >= far) parts.push(line(at(t - far), y(r - 1) + 12, at(t), y(r), kind));
      parts.push(box(at(t) - side / 4, y(r), side / 2, 12, on ? (t < 2 ** r ? "solid" : "half") : "empty"));
    }
    outputs(y(rounds) + 20, two.y, () => step >= rounds, () => step === rounds);

    top = y(rounds) + 88;
    const most = Math.max(...three.T.flat()), entries = (L * (L + 1)) / 2;
    head(top, "Attention", Math.min(step, 1), 1, step ? entries : 0);
    for (const t of range(L)) for (const s of range(t + 1)) {
      parts.push(box(at(t) - side / 2, top + 12 + 12 * s, side, 11, step ? "" : "empty"));
      if (step) parts.push(tag("rect", { x: at(t) - side / 2, y: top + 12 + 12 * s, width: side, height: 11, rx: 3, class: `minus ${step === 1 ? "fresh" : ""}`, "fill-opacity": Math.min(1, three.T[t][s] / most).toFixed(2) }));
    }
    outputs(top + 118, three.y, () => step > 0, () => step === 1);
    const latest = step && `y${"₁₂₃₄₅₆₇₈"[step - 1]} = ${number(one.y[step - 1])}`;
    const words = step === 0 ? "One sentence, the same queries, keys, values and gates for three modes. Below each mode are its outputs, one for each word."
      : step === 1 ? `Attention has all outputs after one step, from ${entries} weights: column t is what word t holds of each word before it. The recurrence has read one word, ${latest}. The scan has combined neighbours.`
        : step < rounds ? `The recurrence reads “${tokens[step - 1]}”, ${latest}, in the same ${N} numbers. The scan combines pairs ${2 ** (step - 1)} apart.`
          : step === rounds ? `After ${rounds} rounds the scan has every state, and reads them all. The recurrence is at “${tokens[step - 1]}”, ${latest}.`
            : step < L ? `The recurrence reads “${tokens[step - 1]}”: ${latest}, as the other two have said before.`
              : `The same ${L} outputs three times: in ${L} steps that hold ${N} numbers, in ${rounds} that hold ${L * 2 * N}, and in 1 that holds ${entries}.`;
    return { svg: parts.join(""), height: top + 150, words };
  }

  const pictures = {
    "scan-tree": { title: "Scan tree", last: data.scan.length - 1, frame: scanTree },
    "state-filling": { title: "State filling", last: memorySteps.length, frame: stateFilling },
    chunks: { title: "Chunks", last: 5, frame: chunks },
    "three-modes": { title: "Three modes", last: data.modes.words.length, frame: threeModes },
  };

  const drawing = (width, height, words, inside) =>
    `<svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" aria-label="${words}">${inside}</svg>`;

  // What stands in a page before this script has run: the last step, and controls that are not seen yet.
  function html(name) {
    const { title, last, frame } = pictures[name], { svg, height, words } = frame(last, 680);
    return `<section class="moving" data-picture="${name}" aria-label="${title}, a moving picture">
<div class="moving-picture">${drawing(680, height, words, svg)}</div>
<div class="moving-controls" hidden>
<button type="button" class="back" aria-label="Step back">◂ Back</button>
<button type="button" class="run">Play</button>
<button type="button" class="on" aria-label="Step forward">Step ▸</button>
<label>Step <input type="range" min="0" max="${last}" value="${last}"></label>
<output></output>
</div>
<p class="moving-words" aria-live="polite">${words}</p>
</section>
`;
  }
  Object.assign(sums, { pictures, html, drawing });
})();

// The page: each picture has a step, and four ways to change it.
globalThis.document?.addEventListener("DOMContentLoaded", () => {
  const { pictures, drawing } = globalThis.llambaMoving;
  const PAUSE = 1800; // milliseconds that a step is shown

  for (const section of document.querySelectorAll("section.moving")) {
    const { last, frame } = pictures[section.dataset.picture], find = (what) => section.querySelector(what);
    const [picture, words, slider, run] = [find(".moving-picture"), find(".moving-words"), find("input"), find(".run")];
    let step = 0, timer = null;

    function show() {
      const width = Math.min(760, Math.max(280, Math.floor(picture.clientWidth))), now = frame(step, width);
      picture.innerHTML = drawing(width, now.height, now.words, now.svg);
      if (words.textContent !== now.words) words.textContent = now.words;
      slider.value = step;
      slider.setAttribute("aria-valuetext", `${step} of ${last}`);
      find("output").textContent = `${step} of ${last}`;
      find(".back").setAttribute("aria-disabled", step === 0);
      find(".on").setAttribute("aria-disabled", step === last);
      run.textContent = timer ? "Pause" : step === last ? "Again" : "Play";
    }
    function stop() {
      clearInterval(timer);
      timer = null;
    }
    function go(to) {
      step = Math.max(0, Math.min(last, to));
      if (step === last) stop();
      show();
    }
    function toggle() {
      if (timer) stop();
      else {
        step = step === last ? 0 : step + 1;
        timer = step < last && setInterval(() => go(step + 1), PAUSE);
      }
      show();
    }
    find(".back").addEventListener("click", () => { stop(); go(step - 1); });
    find(".on").addEventListener("click", () => { stop(); go(step + 1); });
    slider.addEventListener("input", () => { stop(); go(slider.valueAsNumber); });
    run.addEventListener("click", toggle);
    find(".moving-controls").hidden = false;
    section.classList.add("live");
    let width = 0;
    new ResizeObserver(() => {
      if (picture.clientWidth === width) return;
      width = picture.clientWidth;
      show();
    }).observe(picture);
    show();
  }
});
