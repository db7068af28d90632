// The two models of docs/write.md: a Llamba and a Llama, one token at a time. Plain JavaScript, nothing else is needed.
window.llambaWrite = (() => {
  const silu = (x) => x / (1 + Math.exp(-x));

  // y = W x + b, with the rows of W one after the other.
  function product(W, x, b) {
    const n = x.length, y = new Float32Array(W.length / n);
    for (let r = 0, w = 0; r < y.length; r++) {
      let one = 0, two = 0, three = 0, four = 0;
      for (let i = 0; i < n; i += 4, w += 4) {
        one += W[w] * x[i]; two += W[w + 1] * x[i + 1]; three += W[w + 2] * x[i + 2]; four += W[w + 3] * x[i + 3];
      }
      y[r] = one + two + three + four + (b ? b[r] : 0);
    }
    return y;
  }

  // RMSNorm
  function norm(x, weight, epsilon) {
    let sum = 0;
    for (const v of x) sum += v * v;
    const scale = 1 / Math.sqrt(sum / x.length + epsilon);
    return x.map((v, i) => v * scale * weight[i]);
  }

  // Turn the pairs (i, i + width / 2) of some numbers that begin at `from`.
  function turn(x, from, angles) {
    const half = angles.length;
    for (let i = from; i < from + half; i++) {
      const [cos, sin] = [Math.cos(angles[i - from]), Math.sin(angles[i - from])], [a, b] = [x[i], x[i + half]];
      x[i] = a * cos - b * sin;
      x[i + half] = b * cos + a * sin;
    }
  }
  const frequencies = (theta, width) => Float64Array.from({ length: width / 2 }, (_, i) => theta ** ((-2 * i) / width));

  // What both models have: embedding, blocks of a mixer and an MLP, head. `get` gives a weight by its name.
  class Decoder {
    constructor(config, get, names) {
      const c = (this.config = config);
      [this.width, this.count] = [c.d_model ?? c.hidden_size, c.n_layer ?? c.num_hidden_layers];
      this.epsilon = c.norm_epsilon ?? c.rms_norm_eps;
      [this.embedding, this.last] = [get(names.embedding), get(names.last)];
      this.layers = Array.from({ length: this.count }, (_, l) =>
        new Proxy({}, { get: (made, name) => (made[name] ??= get(`${names.layers}.${l}.${name}`) ?? null) }));
    }

    // One token: logits of the next. `state` is changed in place.
    step(token, state) {
      let x = this.embedding.slice(token * this.width, (token + 1) * this.width);
      this.layers.forEach((layer, l) => {
        const mixed = this.mix(layer, norm(x, layer["input_layernorm.weight"], this.epsilon), state.layers[l], state.tokens);
        x = x.map((v, i) => v + mixed[i]);
        const h = norm(x, layer["post_attention_layernorm.weight"], this.epsilon), up = product(layer["mlp.up_proj.weight"], h);
        const gated = product(layer["mlp.gate_proj.weight"], h).map((g, i) => silu(g) * up[i]);
        const down = product(layer["mlp.down_proj.weight"], gated);
        x = x.map((v, i) => v + down[i]);
      });
      state.tokens++;
      return product(this.embedding, norm(x, this.last, this.epsilon));
    }
  }

  class Llamba extends Decoder {
    constructor(config, get) {
      super(config, get, { embedding: "backbone.embedding.weight", last: "backbone.final_layernorm.weight", layers: "backbone.layers" });
      const s = config.ssm_cfg;
      Object.assign(this, { N: s.d_state, heads: s.n_v_heads, P: this.width / s.n_v_heads });
      if (s.n_qk_heads !== s.n_v_heads || config.rotary_cfg?.rotation !== "fixed") throw new Error("not a student of the demo");
      this.frequencies = frequencies(config.rotary_cfg.rope.theta, this.N);
    }

    // All that is remembered of the text: as many numbers after ten tokens as after ten million.
    start() {
      const channels = this.width + 2 * this.heads * this.N;
      const layer = () => ({ window: new Float32Array(channels * 4), S: new Float32Array(this.width * this.N), angle: new Float64Array(this.N / 2) });
      return { tokens: 0, layers: Array.from({ length: this.count }, layer) };
    }

    copy = (state) => ({ tokens: state.tokens, layers: state.layers.map(({ window, S, angle }) => ({ window: window.slice(), S: S.slice(), angle: angle.slice() })) });
    bytes = (state) => state.layers.reduce((sum, { window, S, angle }) => sum + window.byteLength + S.byteLength + angle.byteLength / 2, 0);

    mix(layer, u, { window, S, angle }) {
      const { width: D, N, P, heads } = this, channels = D + 2 * heads * N;
      const all = product(layer["mixer.in_proj.weight"], u, layer["mixer.in_proj.bias"]); // x, B, C, z and the gates
      const [taps, bias, skip] = ["conv1d.weight", "conv1d.bias", "D"].map((name) => layer[`mixer.${name}`]);
      const xBC = new Float32Array(channels), y = new Float32Array(D);
      for (let c = 0, w = 0; c < channels; c++, w += 4) { // the convolution: its window moves on by one token
        window.copyWithin(w, w + 1, w + 4);
        window[w + 3] = all[c];
        xBC[c] = window[w] * taps[w] + window[w + 1] * taps[w + 1] + window[w + 2] * taps[w + 2] + window[w + 3] * taps[w + 3] + bias[c];
      }
      angle.forEach((a, i) => (angle[i] = (a + this.frequencies[i]) % (2 * Math.PI)));
      // [recurrence]
      for (let h = 0, s = 0; h < heads; h++) {
        const B = D + h * N, C = B + heads * N;
        turn(xBC, B, angle);
        turn(xBC, C, angle);
        const a = 1 / (1 + Math.exp(all[channels + D + h])); // exp(-softplus(A))
        for (let i = h * P; i < (h + 1) * P; i++) {
          let sum = 0;
          for (let k = 0; k < N; k++, s++) sum += (S[s] = a * S[s] + xBC[i] * xBC[B + k]) * xBC[C + k];
          y[i] = (sum + skip[h] * xBC[i]) * silu(all[channels + i]);
        }
      }
      // [end]
      return product(layer["mixer.out_proj.weight"], y, layer["mixer.out_proj.bias"]);
    }
  }

  class Llama extends Decoder {
    constructor(config, get) {
      super(config, get, { embedding: "model.embed_tokens.weight", last: "model.norm.weight", layers: "model.layers" });
      Object.assign(this, { heads: config.num_attention_heads, shared: config.num_attention_heads / config.num_key_value_heads, P: config.head_dim });
      this.frequencies = frequencies(config.rope_theta, this.P);
    }

    start = () => ({ tokens: 0, layers: Array.from({ length: this.count }, () => ({ keys: [], values: [] })) });
    copy = (state) => ({ tokens: state.tokens, layers: state.layers.map(({ keys, values }) => ({ keys: [...keys], values: [...values] })) });
    crop = (state, tokens) => (state.layers.forEach(({ keys, values }) => (keys.length = values.length = tokens)), (state.tokens = tokens), state);
    bytes = (state) => state.layers.reduce((sum, { keys }) => sum + 2 * keys.length * (keys[0]?.byteLength ?? 0), 0);

    mix(layer, u, { keys, values }, position) {
      const [q, k, v] = ["q", "k", "v"].map((name) => product(layer[`self_attn.${name}_proj.weight`], u));
      const angles = this.frequencies.map((f) => f * position), { P, heads, shared } = this, y = new Float32Array(u.length);
      for (let i = 0; i < q.length; i += P) turn(q, i, angles);
      for (let i = 0; i < k.length; i += P) turn(k, i, angles);
      keys.push(k);
      values.push(v);
      // [attention]
      for (let h = 0; h < heads; h++) {
        const g = Math.floor(h / shared) * P, scores = keys.map((key) => {
          let sum = 0;
          for (let i = 0; i < P; i++) sum += q[h * P + i] * key[g + i];
          return sum / Math.sqrt(P);
        });
        const top = scores.reduce((a, b) => Math.max(a, b)), weights = scores.map((score) => Math.exp(score - top));
        const all = weights.reduce((a, b) => a + b);
        weights.forEach((weight, s) => { for (let i = 0; i < P; i++) y[h * P + i] += (weight / all) * values[s][g + i]; });
      }
      // [end]
      return product(layer["self_attn.o_proj.weight"], y);
    }
  }

  // Byte-level BPE: text to bytes in their own alphabet, words, and the pairs that are merged first to last.
  class Tokenizer {
    constructor({ vocab, merges }) {
      this.vocab = vocab;
      this.ranks = new Map(merges.map((pair, rank) => [pair.join(" "), rank]));
      this.words = Object.keys(vocab).sort((a, b) => vocab[a] - vocab[b]);
      const plain = (b) => (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173;
      let more = 256;
      this.letters = Array.from({ length: 256 }, (_, b) => String.fromCharCode(plain(b) ? b : more++));
      this.bytes = new Map(this.letters.map((letter, b) => [letter, b]));
    }

    encode(text) {
      const words = text.match(/'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu) ?? [];
      return words.flatMap((word) => {
        let parts = [...new TextEncoder().encode(word)].map((b) => this.letters[b]);
        for (;;) {
          const ranks = parts.slice(1).map((part, i) => this.ranks.get(`${parts[i]} ${part}`) ?? Infinity);
          const best = ranks.reduce((a, b) => Math.min(a, b), Infinity), at = ranks.indexOf(best);
          if (best === Infinity) return parts.map((part) => this.vocab[part]);
          parts.splice(at, 2, parts[at] + parts[at + 1]);
        }
      });
    }

    decode(ids) {
      const bytes = ids.filter((id) => id > 0).flatMap((id) => [...this.words[id]].map((letter) => this.bytes.get(letter)));
      return new TextDecoder().decode(Uint8Array.from(bytes));
    }
  }

  // A token by its probability, each logit divided by the temperature first; 0: the most likely one.
  function draw(logits, temperature, random) {
    const top = logits.reduce((a, b) => Math.max(a, b));
    if (temperature === 0) return logits.indexOf(top);
    const weights = Float64Array.from(logits, (x) => Math.exp((x - top) / temperature));
    let left = random() * weights.reduce((a, b) => a + b);
    const token = weights.findIndex((weight) => (left -= weight) < 0);
    return token < 0 ? logits.indexOf(top) : token;
  }

  // Weights as write-models.js has them: numbers of 8 bits with a scale for each row, or floats, in base64.
  const decoded = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const weightsOf = (saved) => (name) => {
    const tensor = saved[name];
    if (!tensor?.scales) return tensor && new Float32Array(decoded(tensor.data));
    const scales = new Float32Array(decoded(tensor.scales)), whole = new Int8Array(decoded(tensor.data)), row = whole.length / scales.length;
    return Float32Array.from(whole, (v, i) => v * scales[Math.floor(i / row)]);
  };

  return { Llamba, Llama, Tokenizer, draw, weightsOf, product };
})();
