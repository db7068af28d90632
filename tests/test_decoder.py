"""The backbone with any mixer: prefill and step, padding, sampling, generation, walking, bad input."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import HostReads
from torch import nn

from llamba_ref.conventions import relative_error
from llamba_ref.decoder import Backbone, Decoder, RMSNorm, SwiGLU, init_weights, pack_left, sample
from llamba_ref.llama import Attention

VOCAB, WIDTH = 19, 12


class Average(nn.Module):
    """A recurrent mixer without any code of the package: y_t = a y_{t-1} + (1 - a) u_t."""

    def __init__(self, width):
        super().__init__()
        self.logit = nn.Parameter(torch.linspace(-2, 2, width))

    def init_state(self, batch):
        return self.logit.new_zeros(batch, len(self.logit))

    def step(self, u_t, state):
        y = torch.lerp(u_t, state, self.logit.sigmoid())
        return y, y

    def forward(self, u, state=None, padding=None):
        if padding is not None:
            u = u * (torch.arange(u.shape[1]) >= padding[:, None])[..., None]
        s, ys = self.init_state(len(u)) if state is None else state, []
        for u_t in u.unbind(1):
            ys.append(s := self.step(u_t, s)[1])
        return torch.stack(ys, 1) if state is None else (torch.stack(ys, 1), s)

    def matrix(self, u):
        a, t = self.logit.sigmoid()[:, None, None], torch.arange(u.shape[1])
        return ((1 - a) * a ** (t[:, None] - t).clamp(min=0)).tril().expand(len(u), -1, -1, -1)


MIXERS = {
    "average": lambda: [Average(WIDTH) for _ in range(3)],
    "attention": lambda: [Attention(WIDTH, 4, 2, 4) for _ in range(3)],
    "hybrid": lambda: [Average(WIDTH), Attention(WIDTH, 2, 1, 6, bias=True), Average(WIDTH)],
}


def build(kind="hybrid", dtype=torch.float64, tied=True, mlp=20):
    model = Decoder(Backbone(MIXERS[kind](), VOCAB, WIDTH, mlp), tie_embeddings=tied).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def tokens(*shape):
    return torch.randint(VOCAB, shape)


def clone(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    return (
        type(state)(*map(clone, state))
        if hasattr(state, "_fields")
        else [clone(s) for s in state]
        if isinstance(state, list)
        else state
    )


def flat(state):
    return [state] if isinstance(state, torch.Tensor) else [t for s in state if s is not None for t in flat(s)]


def gradients(model, logits):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    return torch.cat([g.flatten() for g in torch.autograd.grad((logits * weight).sum(), list(model.parameters()))])


# Parts


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
def test_rmsnorm(dtype, bound):
    norm = RMSNorm(8, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 8, dtype=torch.float64) * 300
    x[0] /= 1e5
    out = norm(x.to(dtype))
    assert out.dtype == dtype
    assert relative_error(out, F.rms_norm(x, (8,), norm.weight.double(), 1e-6)) < bound


def test_rmsnorm_does_not_overflow_in_half():
    x = torch.full((1, 4), 60000.0, dtype=torch.float16)
    assert relative_error(RMSNorm(4).half()(x), torch.ones(1, 4)) < 1e-3


def test_swiglu():
    mlp, x = SwiGLU(6, 10, bias=True).double(), torch.randn(3, 6, dtype=torch.float64)
    gate = x @ mlp.gate_proj.weight.T + mlp.gate_proj.bias
    up = x @ mlp.up_proj.weight.T + mlp.up_proj.bias
    assert relative_error(mlp(x), (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T + mlp.down_proj.bias) < 1e-14


def test_init_weights():
    linear, norm = nn.Linear(400, 300), RMSNorm(4)
    init_weights(linear)
    init_weights(norm)
    assert 0.019 < linear.weight.std() < 0.021 and not linear.bias.any() and norm.weight.eq(1).all()
    with torch.device("meta"):
        model = Decoder(Backbone(MIXERS["hybrid"](), VOCAB, WIDTH, 20), tie_embeddings=False)
    model.apply(init_weights)
    assert all(p.is_meta and p.requires_grad for p in model.parameters())


def test_names_are_those_of_the_released_checkpoints():
    names = set(build(tied=False).state_dict())
    assert {
        "backbone.embedding.weight",
        "backbone.final_layernorm.weight",
        "lm_head.weight",
        "backbone.layers.0.input_layernorm.weight",
        "backbone.layers.2.post_attention_layernorm.weight",
        "backbone.layers.1.mlp.down_proj.weight",
    } <= names
    assert "lm_head.weight" not in build(tied=True).state_dict()


def test_tied_head_and_blocks_without_mlp():
    model, ids = build(tied=True, mlp=None), tokens(2, 5)
    x = model.backbone.embedding(ids)
    for block in model.backbone.layers:
        assert block.mlp is None
        x = x + block.mixer(block.input_layernorm(x))
    assert relative_error(model(ids), model.backbone.final_layernorm(x) @ model.backbone.embedding.weight.T) < 1e-14


# Prefill and step


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_prefill_and_step_equal_forward_at_every_split(kind, length):
    model, ids = build(kind), tokens(2, length)
    reference = model(ids)
    gradient = gradients(model, reference)
    for split in range(1, length + 1):
        logits, state = model.prefill(ids[:, :split])
        parts = list(logits.unbind(1))
        for token in ids[:, split:].unbind(1):
            logits_t, state = model.step(token, state)
            parts.append(logits_t)
        out = torch.stack(parts, 1)
        assert relative_error(out, reference) < 1e-12
        assert relative_error(gradients(model, out), gradient) < 1e-11


@pytest.mark.parametrize("kind", MIXERS)
def test_step_from_nothing_and_prefill_in_parts(kind):
    model, ids = build(kind), tokens(2, 8)
    state, parts = model.init_state(2), []
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
        parts.append(logits)
    assert relative_error(torch.stack(parts, 1), model(ids)) < 1e-12
    for split in range(1, 8):
        head, state = model.prefill(ids[:, :split])
        tail, _ = model.prefill(ids[:, split:], state=state)
        assert relative_error(torch.cat([head, tail], 1), model(ids)) < 1e-12


@pytest.mark.parametrize("kind", MIXERS)
def test_a_state_is_never_changed(kind):
    """One prefill can be continued in several ways."""
    model = build(kind)
    _, state = model.prefill(tokens(2, 5))
    before = clone(state)
    first, _ = model.step(torch.tensor([1, 2]), state)
    model.prefill(tokens(2, 3), state=state)
    model.step(torch.tensor([3, 4]), state)
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(before), strict=True))
    assert torch.equal(model.step(torch.tensor([1, 2]), state)[0], first)


@pytest.mark.parametrize("kind", MIXERS)
def test_causal(kind):
    model, ids = build(kind), tokens(1, 9)
    for t in range(8):
        other = ids.clone()
        other[:, t + 1 :] = tokens(1, 8 - t)
        assert torch.equal(model(ids)[:, : t + 1], model(other)[:, : t + 1])


@pytest.mark.parametrize("kind", MIXERS)
def test_half_precision_runs_and_keeps_its_type(kind):
    model, ids = build(kind, torch.bfloat16), tokens(2, 6)
    logits, state = model.prefill(ids)
    assert logits.dtype == model.step(ids[:, 0], state)[0].dtype == torch.bfloat16 and logits.isfinite().all()


# Padding


@given(
    mask=st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
def test_pack_left(mask):
    mask = torch.tensor(mask)
    if (mask.sum(1) == 0).any():
        with pytest.raises(ValueError, match="row without a token"):
            pack_left(mask)
        return
    order, padding = pack_left(mask)
    assert torch.equal(order.sort(1).values, torch.arange(mask.shape[1]).expand_as(mask))
    for row, row_order, pads in zip(mask, order, padding.tolist()):
        assert row_order[pads:].tolist() == row.nonzero().flatten().tolist() and not row[row_order[:pads]].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_pack_left_of_other_types(dtype):
    order, padding = pack_left(torch.tensor([[1, 0, 1]]).to(dtype))
    assert order.tolist() == [[1, 0, 2]] and padding.tolist() == [1]


@given(data=st.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("kind", MIXERS)
def test_masked_is_absent(kind, data):
    """Padding left, right and in holes: logits, gradients and the state are those of the tokens alone."""
    torch.manual_seed(0)
    model, width = build(kind), data.draw(st.integers(1, 7))
    masks = data.draw(
        st.lists(st.lists(st.booleans(), min_size=width, max_size=width).filter(any), min_size=1, max_size=3)
    )
    mask, ids, following = torch.tensor(masks).long(), tokens(len(masks), width), tokens(len(masks))
    out, (logits, state) = model(ids, mask), model.prefill(ids, mask)
    assert torch.equal(out, logits)
    step, _ = model.step(following, state)
    longer, _ = model.prefill(following[:, None], state=state)
    assert relative_error(longer[:, 0], step) < 1e-12
    alone = []
    for row in range(len(masks)):
        reference, own_state = model.prefill(ids[row : row + 1, mask[row].bool()])
        alone.append(reference[0])
        assert relative_error(out[row, mask[row].bool()], reference[0]) < 1e-12
        assert relative_error(step[row], model.step(following[row : row + 1], own_state)[0][0]) < 1e-12
    assert relative_error(gradients(model, out[mask.bool()]), gradients(model, torch.cat(alone))) < 1e-11


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_from_padded_prompts(kind, side):
    model, prompts = build(kind), [tokens(1, n) for n in (6, 3, 1)]
    padded, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        where = slice(6 - prompt.shape[1], 6) if side == "left" else slice(0, prompt.shape[1])
        padded[row, where], mask[row, where] = prompt[0], 1
    out = model.generate(padded, 7, attention_mask=mask)
    assert torch.equal(out[:, :6], padded)
    for row, prompt in zip(out, prompts):
        assert torch.equal(row[6:], model.generate(prompt, 7)[0, prompt.shape[1] :])


def test_a_mask_of_ones_is_no_mask():
    model, ids = build(), tokens(2, 5)
    assert torch.equal(model(ids, torch.ones_like(ids)), model(ids))


# Sampling

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12)


@given(logits=LOGITS, k=st.integers(1, 15), temperature=st.floats(0.01, 100))
@settings(deadline=None)
def test_top_k_keeps_the_k_most_likely(logits, k, temperature):
    """Exactly k at most, also when several tokens are equally likely."""
    z = torch.tensor(logits)
    drawn = sample(z.expand(300, -1), temperature, top_k=k).unique()
    assert len(drawn) <= k
    kth = z.sort(descending=True).values[min(k, len(z)) - 1]
    assert z[drawn].min() >= kth - 1e-6 * z.abs().max()  # logits closer than float32's rounding count as equal


@given(logits=LOGITS, p=st.floats(0.01, 1), temperature=st.floats(0.1, 10))
@settings(deadline=None)
def test_top_p_keeps_the_fewest_that_reach_p(logits, p, temperature):
    z = torch.tensor(logits, dtype=torch.float64)
    probs = (z / temperature).softmax(0).sort(descending=True).values
    needed = int((probs.cumsum(0) < p + 1e-9).sum()) + 1  # one more where a sum is p up to rounding
    drawn = sample(z.expand(300, -1), temperature, top_p=p).unique()
    assert len(drawn) <= needed
    assert z[drawn].min() >= z.sort(descending=True).values[min(needed, len(z)) - 1]


@given(
    logits=LOGITS,
    temperature=st.floats(1e-30, 1e30),
    k=st.none() | st.integers(1, 20),
    p=st.none() | st.floats(1e-6, 1),
)
@settings(deadline=None)
def test_sample_draws_a_token_whatever_the_settings(logits, temperature, k, p):
    drawn = sample(torch.tensor([logits]), temperature, k, p)
    assert drawn.shape == (1,) and drawn.dtype == torch.int64 and 0 <= drawn < len(logits)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 1, "top_k": 1}, {"temperature": 1, "top_p": 1e-9}, {"temperature": 1e-20}],
)
def test_four_ways_to_be_greedy(options):
    z = torch.randn(50, 30)
    assert torch.equal(sample(z, **options), z.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frequencies(dtype):
    z = torch.tensor([1.0, 0.5, 0.0, -1.0, -torch.inf], dtype=dtype)
    cases = [
        ({}, z.double()),
        ({"temperature": 2.0}, z.double() / 2),
        ({"top_k": 2}, torch.tensor([1.0, 0.5, *[-torch.inf] * 3]).double()),
        ({"top_p": 0.7}, torch.tensor([1.0, 0.5, *[-torch.inf] * 3]).double()),
        ({"top_k": 3, "top_p": 0.8}, torch.tensor([1.0, 0.5, *[-torch.inf] * 3]).double()),
    ]
    for options, kept in cases:
        drawn = sample(z.expand(40_000, -1), **({"temperature": 1.0} | options)).bincount(minlength=5) / 40_000
        assert relative_error(drawn, kept.softmax(0)) < 0.02, options


def test_top_p_counts_what_top_k_has_left():
    """0.5 of what top-k leaves, as in transformers: with k = 2 of four equal tokens, one is enough."""
    assert len(sample(torch.zeros(500, 4), 1.0, top_k=2, top_p=0.5).unique()) == 1
    assert len(sample(torch.zeros(500, 4), 1.0, top_p=0.5).unique()) == 2


def test_a_generator_makes_draws_repeatable():
    z, draws = torch.randn(4, 30), []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        draws.append([sample(z, 1.0, k, p, generator) for k, p in ((None, None), (5, None), (None, 0.9))])
    assert all(torch.equal(a, b) for a, b in zip(*draws))


@pytest.mark.parametrize(
    "options, name",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_sample_refuses(options, name):
    with pytest.raises(ValueError, match=f"{name} is {options[name]}"):
        sample(torch.zeros(1, 4), **options)


# Generation


class Recorder:
    def __init__(self):
        self.seen, self.ended = [], 0

    def put(self, ids):
        assert not self.ended
        self.seen.append(ids.clone())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("kind", MIXERS)
def test_greedy_generation_is_the_argmax_of_forward(kind):
    model, ids = build(kind), tokens(2, 4)
    out = model.generate(ids, 9)
    assert torch.equal(out[:, :4], ids) and out.shape == (2, 13)
    assert torch.equal(out[:, 4:], model(out)[:, 3:-1].argmax(-1))


def test_streamer_gets_the_prompt_and_every_token():
    model, ids, recorder = build(), tokens(1, 4), Recorder()
    out = model.generate(ids, 5, streamer=recorder)
    assert torch.equal(recorder.seen[0], ids) and recorder.ended == 1
    assert torch.cat(recorder.seen[1:]).tolist() == out[0, 4:].tolist()


def test_stop_tokens_end_each_sequence_for_itself():
    model, ids = build(), tokens(6, 3)
    free = model.generate(ids, 12)
    stop = free[0, 5].item()
    ends = [(row[3:] == stop).nonzero()[:1].flatten().tolist() for row in free]
    recorder = Recorder()
    out = model.generate(ids, 12, stop_tokens=[stop, VOCAB - 1], streamer=recorder)
    for row, reference in zip(out, free):
        hits = torch.isin(reference[3:], torch.tensor([stop, VOCAB - 1])).nonzero()
        end = 4 + hits[0].item() if len(hits) else out.shape[1]
        assert torch.equal(row[:end], reference[:end]) and (row[end:] == stop).all()
    assert ends[0] and recorder.ended == 1
    alone = model.generate(ids[:1], 12, stop_tokens=[stop])
    assert alone.shape[1] == 4 + ends[0][0] and alone[0, -1] == stop


def test_generate_nothing_and_one():
    model, ids, recorder = build(), tokens(2, 3), Recorder()
    assert torch.equal(model.generate(ids, 0, streamer=recorder), ids) and recorder.ended == 1
    assert model.generate(ids, 1).shape == (2, 4)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        model.generate(ids, -1)
    with pytest.raises(ValueError, match="top_k"):
        model.generate(ids, 2, temperature=1.0, top_k=0)


def test_generate_keeps_the_type_of_the_ids_and_needs_no_gradient():
    model, ids = build(), tokens(1, 3).int()
    out = model.generate(ids, 4, temperature=1.0, stop_tokens=[1])
    assert out.dtype == torch.int32 and not out.requires_grad


# Walking


@pytest.mark.parametrize("kind", MIXERS)
def test_walk_shows_what_forward_does(kind):
    model, ids = build(kind), tokens(2, 6)
    x = model.backbone.embedding(ids)
    for index, layer in enumerate(model.walk(ids)):
        assert layer.index == index and layer.block is model.backbone.layers[index]
        assert torch.equal(layer.input, x) and not layer.output.requires_grad
        assert relative_error(layer.mixer_output, layer.block.mixer(layer.mixer_input)) < 1e-14
        assert relative_error(layer.output, layer.block(layer.input)) < 1e-14
        matrix = layer.matrix()
        assert (
            matrix.shape[:1] + matrix.shape[2:] == (2, 6, 6) and not matrix.triu(1).any() and not matrix.requires_grad
        )
        x = layer.output
    assert index == 2 and relative_error(model.head(x), model(ids)) < 1e-14


def test_walk_keeps_nothing_of_a_layer():
    """Memory must not grow with depth: when the next layer is asked for, only its input is left of the one before."""
    walk = build().walk(tokens(1, 4))
    layer = next(walk)
    traces = [weakref.ref(tensor) for tensor in (layer.input, layer.mixer_input, layer.mixer_output)]
    del layer
    kept = next(walk)
    gc.collect()
    assert [trace() for trace in traces] == [None] * 3 and kept.index == 1


def test_walk_leaves_gradients_on_outside():
    for _ in build().walk(tokens(1, 3)):
        assert torch.is_grad_enabled()


def test_matrix_of_the_toy_mixer():
    mixer, u = Average(5).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    assert relative_error((mixer.matrix(u) @ u.mT[..., None])[..., 0].mT, mixer(u)) < 1e-14


# Bad input


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.tensor([1, 2]), r"input_ids has shape \(2,\)"),
        (torch.empty(1, 0, dtype=torch.long), r"input_ids has shape \(1, 0\)"),
        (torch.empty(0, 3, dtype=torch.long), r"input_ids has shape \(0, 3\)"),
        (torch.zeros(1, 2), "input_ids has dtype torch.float32"),
        (torch.tensor([[0, VOCAB]]), rf"holds id {VOCAB}: ids must be in \[0, {VOCAB}\)"),
        (torch.tensor([[-1, 3]]), "holds id -1"),
    ],
)
def test_bad_ids(ids, message):
    model = build()
    for call in (model, model.prefill, lambda i: model.generate(i, 1), lambda i: next(model.walk(i))):
        with pytest.raises(ValueError, match=message):
            call(ids)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(2, 4), r"attention_mask has shape \(2, 4\)"),
        (torch.tensor([[1, 2, 1], [1, 1, 1]]), "only 0 .* and 1"),
        (torch.tensor([[1, 1, 1], [0, 0, 0]]), "row without a token: row 1"),
        (torch.full((2, 3), torch.nan), "only 0 .* and 1"),
    ],
)
def test_bad_mask(mask, message):
    model, ids = build(), tokens(2, 3)
    for call in (model, model.prefill, lambda i, m: model.generate(i, 1, attention_mask=m)):
        with pytest.raises(ValueError, match=message):
            call(ids, mask)


def test_bad_state_and_step():
    model, ids = build(), tokens(2, 3)
    _, state = model.prefill(ids)
    with pytest.raises(ValueError, match="attention_mask and state"):
        model.prefill(ids, torch.ones_like(ids), state)
    with pytest.raises(ValueError, match=r"token_ids has shape \(2, 1\)"):
        model.step(ids[:, :1], state)
    with pytest.raises(ValueError):
        model.step(ids[:, 0], state[:2])


# Logits that are no numbers, settings at the edge

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "row", [[0.0, NAN, 1.0], [NAN] * 3, [INF, 0.0, 1.0], [INF, -INF, 0.0], [INF, NAN, 0.0], [-INF] * 3]
)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2, "top_p": 0.5}, {"temperature": 1e-300}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_no_numbers_are_an_error(row, options, dtype):
    logits = torch.tensor([[0.0, 1.0, -INF], row], dtype=dtype)
    with pytest.raises(FloatingPointError, match="^logits of row 1 are nan, .inf, or -inf throughout"):
        sample(logits, **options)
    assert sample(logits[:1], **options) in (0, 1)  # -inf for some tokens is a mask, and none of them is drawn


@pytest.mark.parametrize("options", [{}, {"stop_tokens": [3]}, {"streamer": True}, {"temperature": 1.0}])
@pytest.mark.parametrize("at", [0, 3])
def test_generate_says_that_logits_are_no_numbers(options, at, monkeypatch):
    model, ids, recorder = build("average"), tokens(2, 4), Recorder()
    broken, step = iter(range(10)), Decoder.step

    def step_that_breaks(self, token, state, **options):
        logits, state = step(self, token, state, **options)
        logits[1] = NAN if next(broken) == at - 1 else logits[1]
        return logits, state

    monkeypatch.setattr(Decoder, "step", step_that_breaks)
    if at == 0:
        model.backbone.final_layernorm.weight.data.fill_(NAN)
    with pytest.raises(FloatingPointError, match=f"logits of row {int(at > 0)}"):
        model.generate(ids, 9, **options | ({"streamer": recorder} if "streamer" in options else {}))
    if "streamer" in options:  # nothing that was drawn from them is shown, and the stream is closed
        assert len(recorder.seen) == 1 + at and recorder.ended == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-38, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_tiny_temperature_is_greedy(temperature, dtype):
    z = torch.randn(200, 30).to(dtype)
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}):
        assert torch.equal(z.gather(1, sample(z, temperature, **options)[:, None])[:, 0], z.amax(-1))


@pytest.mark.parametrize("temperature", [1e30, 1e300, INF])
def test_a_huge_temperature_is_uniform(temperature):
    z = torch.tensor([[3.0, 0.0, -200.0, -INF]]).expand(4000, -1)
    assert relative_error(sample(z, temperature).bincount(minlength=4) / 4000, torch.tensor([1, 1, 1, 0]) / 3) < 0.05


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-50, 1e-9])
def test_a_tiny_top_p_leaves_one_token(top_p):
    z = torch.randn(100, 30)
    assert torch.equal(sample(z, 1.0, top_p=top_p), z.argmax(-1))


def test_top_k_beyond_the_vocabulary_is_none():
    z, draws = torch.randn(50, 30), []
    for k in (30, 31, 10**9):
        draws.append(sample(z, 1.0, k, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    "options, name",
    [
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": NAN}, "top_p is nan"),
        ({"temperature": -1e-300}, "temperature is -1e-300"),
    ],
)
def test_generate_refuses_settings_before_it_reads(options, name):
    with pytest.raises(ValueError, match=name):
        build().generate(tokens(1, 3), 0, **options)


# Several end tokens


def test_generation_stops_at_each_of_several_stop_tokens():
    """Whichever comes, and wherever it stands in the list."""
    model, ids = build("average"), tokens(1, 3)
    free = model.generate(ids, 12)[0, 3:].tolist()
    seen = list(dict.fromkeys(free))
    assert len(seen) >= 3
    for token in seen:
        unused = [t for t in range(VOCAB) if t not in free]
        for stops in ([token, *unused[:2]], [*unused[:2], token], (unused[0], token)):
            out = model.generate(ids, 12, stop_tokens=stops)[0, 3:].tolist()
            assert out == free[: free.index(token) + 1]


@pytest.mark.parametrize("stops", [[VOCAB], [1, -1], [2.0], ["1"], [None], [1, 2**70]])
def test_stop_tokens_that_are_no_ids(stops):
    with pytest.raises(ValueError, match=r"stop_tokens holds .*: ids must be integers in \[0, 19\)"):
        build().generate(tokens(1, 3), 2, stop_tokens=stops)


@pytest.mark.parametrize("kind", MIXERS)
def test_the_loop_reads_no_numbers(kind):
    """On a GPU each look would wait for the device. Streaming and stop tokens have to look."""
    model, ids, reads = build(kind), tokens(2, 4), []
    for new in (2, 30):
        with HostReads() as mode:
            model.generate(ids, new, temperature=1.0, top_k=3)
        reads.append(mode.count)
    assert reads[0] == reads[1] < 10


# Graphs


@pytest.mark.parametrize("kind", MIXERS)
def test_a_graph_of_forward_and_step(kind):
    """One graph without breaks, masks included: values are not looked at while it is traced."""
    model, ids, mask = build(kind), tokens(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
    with torch.no_grad():
        graph = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        assert relative_error(graph(ids), model(ids)) < 1e-14
        assert relative_error(graph(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()]) < 1e-12
        _, state = model.prefill(ids)
        step = torch.compile(model.step, backend="eager", fullgraph=True, dynamic=False)
        logits, after = step(ids[:, 0], state)
        assert relative_error(logits, model.step(ids[:, 0], state)[0]) < 1e-14
        assert relative_error(step(ids[:, 1], after)[0], model.step(ids[:, 1], after)[0]) < 1e-14
        exported = torch.export.export(model, (ids,)).module()
        assert relative_error(exported(ids), model(ids)) < 1e-14
    with pytest.raises(ValueError, match="holds id"):
        model(ids + VOCAB)


# What the four models share


def language_models():
    """One small model of each kind, head untied, a vocabulary of 300."""
    from llamba_ref.gateloop_lm import GateLoopConfig, GateLoopLM
    from llamba_ref.llama import Llama, LlamaConfig
    from llamba_ref.llamba import Llamba, LlambaConfig, MLPConfig, SSMConfig
    from llamba_ref.mamba2 import Mamba2Config, Mamba2LM

    yield Llama(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=False,
        )
    )
    yield Llamba(LlambaConfig(vocab_size=300, d_model=64, n_layer=2, ssm_cfg=SSMConfig(8, 4, 4), mlp_cfg=MLPConfig(96),
                              tie_embeddings=False, lm_head_bias=True))
    yield GateLoopLM(
        GateLoopConfig(vocab_size=300, d_model=64, n_layer=2, n_heads=4, intermediate_size=96, tie_embeddings=False)
    )
    yield Mamba2LM(Mamba2Config(vocab_size=300, d_model=64, n_layer=2, d_state=8, headdim=16, tie_embeddings=False,
                                pad_vocab_size_multiple=16))


def test_embedding_mlps_and_head_start_alike_in_all_models():
    """Normal with deviation 0.02, as Llama's: an untied head of a Llamba had 0.07."""
    for model in language_models():
        parts = [
            model.backbone.embedding,
            model.lm_head,
            *(m for block in model.backbone.layers if block.mlp for m in block.mlp.children()),
        ]
        assert len(parts) in (2, 8)
        for part in parts:
            weight = part.weight.detach()
            assert abs(weight.std() / 0.02 - 1) < 0.05 and abs(weight.mean()) < 1e-3, type(model)
            assert weight.abs().max() > 0.055  # normal: a uniform distribution of this spread ends at 0.035
            assert getattr(part, "bias", None) is None or not part.bias.any()


def test_rows_that_pad_the_vocabulary():
    """The backbone rounds the rows up; no logits for them, and no ids."""
    rows = {"Llama": 300, "Llamba": 304, "GateLoopLM": 300, "Mamba2LM": 304}
    for model in language_models():
        assert model.vocab_size == model.backbone.vocab_size == 300
        assert model.backbone.embedding.num_embeddings == model.lm_head.out_features == rows[type(model).__name__]
        assert model(torch.tensor([[299]])).shape == (1, 1, 300)
        with pytest.raises(ValueError, match=r"holds id 300: ids must be in \[0, 300\)"):
            model(torch.tensor([[300]]))
    assert Backbone([], 300, 4, None, pad_vocab_size_multiple=64).embedding.num_embeddings == 320


def test_each_class_is_one_class():
    from llamba_ref.mamba2 import SSDMixer

    assert Decoder.__bases__ == SSDMixer.__bases__ == (nn.Module,)
