// The page docs/write.md: two models of write-model.js write side by side, a few milliseconds each in every frame.
(() => {
  const { Llamba, Llama, Tokenizer, draw, weightsOf } = window.llambaWrite;
  const saved = window.llambaModels, find = (id) => document.getElementById(`write-${id}`);
  const EVERY = 16; // tokens between two snapshots of the student's state
  const LONGEST = 10000; // tokens of a text: the snapshots of more would fill the memory of a phone
  const SLICE = 8; // milliseconds of each model in a frame
  const tokenizer = new Tokenizer(saved.tokenizer);
  const make = (Kind, name) => {
    const model = new Kind(saved[name].config, weightsOf(saved[name].weights));
    model.step(0, model.start()); // unpacks the weights, which shall not count as writing
    return model;
  };
  const sides = { student: { model: make(Llamba, "student") }, teacher: { model: make(Llama, "teacher") } };
  const both = Object.entries(sides);
  let running = 0; // which call of `write` may go on; a new one ends the one before

  // A seeded source of chance, so that both models have the same luck.
  function chance(seed) {
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  // One token through a model; the student keeps a copy of its state now and then.
  function read(side, id) {
    if (side.model instanceof Llamba && side.state.tokens % EVERY === 0) side.snapshots[side.state.tokens / EVERY] = side.model.copy(side.state);
    side.logits = side.model.step(id, side.state);
  }

  function begin(side, ids) {
    Object.assign(side, { ids, given: ids.length, state: side.model.start(), snapshots: [], logits: null, spent: 0, points: [], mark: [0, 0] });
  }

  // Forget what comes after a token: crop the cache, or go on from the last snapshot before it.
  function goBack(side, tokens) {
    tokens = Math.max(1, Math.min(tokens, side.ids.length));
    side.ids = side.ids.slice(0, tokens);
    if (side.state.tokens >= tokens) { // else it has not come so far yet, and reads on
      const { model } = side, start = Math.floor((tokens - 1) / EVERY);
      if (model instanceof Llamba) {
        side.state = model.copy(side.snapshots[start]);
        side.snapshots.length = start + 1;
      } else model.crop(side.state, tokens - 1); // its last token is read once more, for its logits
      while (side.state.tokens < tokens) read(side, side.ids[side.state.tokens]);
    }
    side.given = Math.min(side.given, tokens);
    side.points = side.points.filter(([n]) => n <= tokens);
    side.mark = [tokens, side.spent];
  }

  // Steps for some milliseconds; true when there is nothing left to write.
  function work(side, total, temperature, random) {
    const until = performance.now() + SLICE;
    while (performance.now() < until) {
      if (side.state.tokens === side.ids.length) {
        if (side.ids.length >= total) return true;
        side.ids.push(draw(side.logits, temperature, random));
      }
      const begun = performance.now();
      read(side, side.ids[side.state.tokens]);
      side.spent += performance.now() - begun;
      const [tokens, spent] = side.mark, done = side.state.tokens - tokens;
      if (done >= 20 && side.spent - spent >= 5) {
        side.points.push([side.state.tokens, (done / (side.spent - spent)) * 1000]);
        side.mark = [side.state.tokens, side.spent];
      }
    }
    return side.state.tokens === side.ids.length && side.ids.length >= total;
  }

  const size = (bytes) => (bytes < 1e6 ? `${(bytes / 1000).toFixed(0)} kB` : `${(bytes / 1e6).toFixed(2)} MB`);

  function show() {
    for (const [name, side] of both) {
      const box = find(name), text = box.querySelector(".write-text"), put = (what, words) => (box.querySelector(`.${what}`).textContent = words);
      const given = Object.assign(document.createElement("span"), { className: "given", textContent: tokenizer.decode(side.ids.slice(0, side.given)) });
      const follow = text.scrollTop + text.clientHeight > text.scrollHeight - 30; // unless somebody reads further up
      text.replaceChildren(given, tokenizer.decode(side.ids.slice(side.given)));
      if (follow) text.scrollTop = text.scrollHeight;
      put("count", side.state.tokens);
      put("rate", side.points.length ? Math.round(side.points.at(-1)[1]) : "–");
      put("bytes", size(side.model.bytes(side.state)));
    }
    drawLines();
    drawState();
    showNext();
  }

  // Lines of both models over the length of the text.
  function drawLines() {
    const longest = Math.max(50, ...both.map(([, side]) => side.state.tokens));
    const memory = ({ model, state, snapshots }) => {
      if (model instanceof Llamba) return [[0, model.bytes(state)], [state.tokens, model.bytes(state)]];
      return [[0, 0], [state.tokens, model.bytes(state)]];
    };
    picture("speed", (side) => side.points, longest, (v) => `${Math.round(v)}`);
    picture("memory", memory, longest, size);
  }

  function picture(id, points, longest, label) {
    const svg = find(id), [width, height, left, bottom] = [svg.clientWidth || 300, 170, 56, 26];
    const lines = both.map(([name, side]) => [name, points(side)]), top = Math.max(1, ...lines.flatMap(([, line]) => line.map(([, v]) => v))) * 1.1;
    const x = (n) => left + (n / longest) * (width - left - 12), y = (v) => height - bottom - (v / top) * (height - bottom - 8);
    const word = (wx, wy, anchor, words) => `<text class="tick" x="${wx}" y="${wy}" text-anchor="${anchor}">${words}</text>`;
    const parts = [`<path class="axis" d="M${left} 8V${height - bottom}H${width - 12}"/>`, word(left - 6, y(top / 1.1) + 4, "end", label(top / 1.1)),
      word(left - 6, y(0) + 4, "end", 0), word(width - 12, height - 8, "end", `${longest} tokens`)];
    for (const [name, line] of lines) if (line.length) parts.push(`<path class="${name}" d="M${line.map(([n, v]) => `${x(n).toFixed(1)} ${y(v).toFixed(1)}`).join("L")}"/>`);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.querySelector("g").innerHTML = parts.join("");
  }

  // The state of a head, each number as a colour between orange and blue.
  function drawState() {
    const { model, state } = sides.student, [layer, head] = find("head").value.split(",").map(Number), { P, N } = model;
    const numbers = state.layers[layer].S.subarray(head * P * N, (head + 1) * P * N), largest = numbers.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-9);
    const image = new ImageData(N, P), dark = document.documentElement.dataset.theme === "dark", ground = dark ? 24 : 255;
    numbers.forEach((v, i) => {
      const share = Math.sqrt(Math.abs(v) / largest), colour = v > 0 ? [11, 92, 173] : [192, 86, 0];
      colour.forEach((c, k) => (image.data[4 * i + k] = ground + share * (Math.min(255, c + (dark ? 60 : 0)) - ground)));
      image.data[4 * i + 3] = 255;
    });
    find("state").getContext("2d").putImageData(image, 0, 0);
  }

  function showNext() {
    const { logits } = sides.student, list = find("next");
    if (!logits) return list.replaceChildren();
    const top = logits.reduce((a, b) => Math.max(a, b)), weights = Array.from(logits, (v) => Math.exp(v - top)), all = weights.reduce((a, b) => a + b);
    const best = weights.map((_, id) => id).sort((a, b) => weights[b] - weights[a]).slice(0, 6);
    list.replaceChildren(...best.map((id) => {
      const item = document.createElement("li"), bar = document.createElement("span"), word = document.createElement("code"), share = weights[id] / all;
      bar.className = "bar";
      bar.style.width = `${(share * 6).toFixed(2)}rem`;
      word.textContent = (id ? tokenizer.decode([id]) : "end of the text").replace(/\n/g, "↵");
      item.append(bar, word, ` ${(share * 100).toFixed(1)}%`);
      return item;
    }));
  }

  // Buttons and sliders say what can be done now.
  function ready(busy) {
    find("stop").setAttribute("aria-disabled", !busy);
    const tokens = sides.student.state.tokens;
    Object.assign(find("back"), { max: Math.max(1, tokens), disabled: busy || tokens < 2 });
    if (busy || Number(find("back").value) > tokens) find("back").value = Math.max(1, tokens);
    find("again").setAttribute("aria-disabled", busy || tokens < 2);
    find("back-value").textContent = find("back").value;
  }

  async function write(total) {
    const mine = ++running, temperature = Number(find("temperature").value), seed = Math.floor(Math.random() * 2 ** 31);
    const luck = Object.fromEntries(both.map(([name]) => [name, chance(seed)]));
    find("status").textContent = "Writing.";
    ready(true);
    for (let done = false; !done && mine === running; ) {
      done = both.map(([name, side]) => work(side, total, temperature, luck[name])).every(Boolean);
      show();
      await new Promise(requestAnimationFrame);
    }
    if (mine !== running) return;
    find("back").max = sides.student.state.tokens;
    find("back").value = sides.student.state.tokens;
    ready(false);
    const [student, teacher] = both.map(([, side]) => size(side.model.bytes(side.state)));
    find("status").textContent = `Done. The student remembers ${student}, the teacher ${teacher}.`;
  }

  function start() {
    const ids = tokenizer.encode(find("prompt").value);
    if (!ids.length) return (find("status").textContent = "Give at least one letter to begin with.");
    for (const [, side] of both) begin(side, [...ids]);
    write(ids.length + Number(find("tokens").value));
  }

  find("form").addEventListener("submit", (event) => (event.preventDefault(), start()));
  find("stop").addEventListener("click", () => {
    if (find("stop").getAttribute("aria-disabled") === "true") return;
    running++;
    find("back").max = find("back").value = sides.student.state.tokens;
    ready(false);
    find("status").textContent = "Stopped.";
  });
  find("again").addEventListener("click", () => {
    if (find("again").getAttribute("aria-disabled") === "true" || !find("form").reportValidity()) return;
    const tokens = Number(find("back").value);
    if (tokens + Number(find("tokens").value) > LONGEST) return (find("status").textContent = `A text has ${LONGEST} tokens at most here.`);
    for (const [, side] of both) goBack(side, tokens);
    write(tokens + Number(find("tokens").value));
  });
  const value = (id, digits) => () => (find(`${id}-value`).textContent = Number(find(id).value).toFixed(digits));
  find("temperature").addEventListener("input", value("temperature", 2));
  find("back").addEventListener("input", value("back", 0));
  find("head").addEventListener("change", drawState);
  for (let layer = 0; layer < sides.student.model.count; layer++)
    for (let head = 0; head < sides.student.model.heads; head++) find("head").add(new Option(`layer ${layer}, head ${head}`, [layer, head]));
  value("temperature", 2)();
  for (const [, side] of both) begin(side, []);
  show();
  ready(false);
  new ResizeObserver(drawLines).observe(find("speed"));
  new MutationObserver(drawState).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  window.llambaPage = { sides, tokenizer, write, goBack, begin };
})();
