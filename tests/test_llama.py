"""Llama: the numbers of transformers, every kind of checkpoint, the cache, padding, bad files."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from small import RELEASED, llama_config, one_line
from torch import nn

from llamba_ref.checkpoint import find_checkpoint, read_weights
from llamba_ref.conventions import relative_error
from llamba_ref.convert import LLAMA
from llamba_ref.llama import (
    Attention,
    KVCache,
    Llama,
    LlamaConfig,
    Rope,
    apply_rope,
    causal_attention,
    causal_mask,
    rope_frequencies,
)
from llamba_ref.llamba import Llamba
from llamba_ref.operators import peak_bytes

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = llama_config(vocab_size=96, hidden_size=32, intermediate_size=56, eos_token_id=1)
LLAMA3 = Rope(500_000.0, 32.0, 1.0, 4.0, 8192)
CONFIGS = {
    "multi-head": replace(SMALL, num_key_value_heads=4),
    "grouped": SMALL,
    "multi-query": replace(SMALL, num_key_value_heads=1),
    "wide heads": replace(SMALL, head_dim=12),
    "narrow heads": replace(SMALL, head_dim=6),
    "tied": replace(SMALL, tie_word_embeddings=True),
    "llama3 scaling": replace(
        SMALL, rope=replace(LLAMA3, original_max_position_embeddings=64), max_position_embeddings=2048
    ),
    "attention bias": replace(SMALL, attention_bias=True),
    "mlp bias": replace(SMALL, mlp_bias=True),
    "other epsilon and theta": replace(SMALL, rms_norm_eps=1e-2, rope=Rope(123.0)),
    "like Llama-3.2-1B": replace(
        SMALL,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        head_dim=16,
        rope=LLAMA3,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        bos_token_id=2,
        eos_token_id=[3, 4, 5],
    ),
}


def random_llama(config, std=0.3):
    model = Llama(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std * (32 / config.hidden_size) ** 0.5)
    return model


def pair(config, directory):
    """The same random weights in our model and in transformers', through files."""
    random_llama(config).save_pretrained(directory / "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "llama", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(theirs) is transformers.LlamaForCausalLM
    return Llama.from_pretrained(directory / "llama"), theirs


# Against transformers


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_gradients_equal_transformers(kind, tmp_path):
    ours, theirs = pair(CONFIGS[kind], tmp_path)
    ids = torch.randint(96, (2, 150))
    out, ref = ours(ids), theirs(ids).logits
    assert relative_error(out, ref) < 1e-5
    weight = torch.randn_like(ref)
    (out * weight).sum().backward()
    (ref * weight).sum().backward()
    grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, grads[LLAMA.stored_as(name)].grad) < 1e-4, name


def test_hidden_states_and_attention_equal_transformers(tmp_path):
    ours, theirs = pair(SMALL, tmp_path)
    ids = torch.randint(96, (2, 20))
    ref = theirs(ids, output_attentions=True, output_hidden_states=True)
    for layer in ours.walk(ids):
        assert relative_error(layer.input, ref.hidden_states[layer.index]) < 1e-5
        assert relative_error(layer.matrix(), ref.attentions[layer.index]) < 1e-5
    assert relative_error(ours.backbone.final_layernorm(layer.output), ref.hidden_states[-1]) < 1e-5


@pytest.mark.parametrize("kind", ["grouped", "llama3 scaling"])
def test_greedy_generation_equals_transformers(kind, tmp_path):
    ours, theirs = pair(CONFIGS[kind], tmp_path)
    ids = torch.randint(2, 96, (3, 12))
    ref = theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(ids, 20), ref)
    stop = ref[0, 15].item()
    ref = theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=stop, pad_token_id=stop)
    assert torch.equal(ours.generate(ids, 20, stop_tokens=[stop]), ref)


def test_left_padding_equals_transformers(tmp_path):
    ours, theirs = pair(SMALL, tmp_path)
    ids, mask = torch.randint(2, 96, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5], mask[2, :11] = 0, 0
    with torch.no_grad():
        ref = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        assert relative_error(ours(ids, mask)[mask.bool()], ref[mask.bool()]) < 1e-5
    ref = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(ours.generate(ids, 10, attention_mask=mask), ref)


def test_bfloat16_is_as_close_as_bfloat16_can_be(tmp_path):
    ours, _ = pair(CONFIGS["like Llama-3.2-1B"], tmp_path)
    half = Llama.from_pretrained(tmp_path / "llama", dtype=torch.bfloat16)
    ids = torch.randint(96, (1, 600))
    assert half(ids).dtype == torch.bfloat16 and relative_error(half(ids), ours(ids)) < 0.05


# Rotary positions


@pytest.mark.parametrize("head_dim", [2, 12, 64, 128])
@pytest.mark.parametrize("rope", [Rope(), Rope(500_000.0), LLAMA3, replace(LLAMA3, factor=8.0),
                                  Rope(1e4, 4.0, 1.0, 2.0, 64), Rope(1e4, 4.0, linear=True)])
def test_frequencies_equal_transformers_to_the_bit(rope, head_dim):
    config = replace(SMALL, head_dim=head_dim, rope=rope, max_position_embeddings=10**6).to_dict()
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**config))
    assert torch.equal(rope_frequencies(rope, head_dim, torch.device("cpu")), theirs.inv_freq)


@given(m=st.integers(0, 10**6), n=st.integers(0, 10**6), shift=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_scores_depend_on_the_distance_only(m, n, shift):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    freqs = rope_frequencies(LLAMA3, 16)

    def score(m, n):
        return (apply_rope(q, torch.tensor([[m]]), freqs) * apply_rope(k, torch.tensor([[n]]), freqs)).sum()

    scale = q.norm() * k.norm()
    assert abs(score(m, n) - score(m + shift, n + shift)) < 1e-8 * scale
    assert abs(apply_rope(q, torch.tensor([[m]]), freqs).norm() - q.norm()) < 1e-12 * q.norm()


def test_positions_of_half_precision_models_are_exact():
    x = torch.randn(1, 1, 3000, 16)
    where, freqs = torch.arange(3000)[None], rope_frequencies(Rope(), 16)
    assert relative_error(apply_rope(x.bfloat16(), where, freqs), apply_rope(x, where, freqs)) < 0.01


def test_rope_config_of_both_generations():
    numbers = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    new = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **numbers}}
    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **numbers}}
    older = {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **numbers}}
    bare = {name: value for name, value in SMALL.to_dict().items() if not name.startswith("rope")}

    def rope(entries):
        return LlamaConfig.from_dict(bare | entries).rope

    assert rope(new) == rope(old) == rope(older) == LLAMA3
    assert rope({}) == rope({"rope_scaling": None}) == Rope() == rope({"rope_theta": 10000})
    for other in (LLAMA3, Rope(7.0), Rope(7.0, 3.0, linear=True)):
        assert LlamaConfig.from_dict(replace(SMALL, rope=other).to_dict()).rope == other


# The mixer


def test_causal_mask():
    assert causal_mask(2, 1, None, "cpu")[0, 0].tolist() == [[True, True, False], [True, True, True]]
    assert causal_mask(3, 0, torch.tensor([[2]]), "cpu")[0, 0].tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


def test_the_cache_grows_by_one_entry_a_token_and_is_not_changed():
    mixer = Attention(16, 4, 2, 4)
    state = mixer.init_state(3)
    for t in range(5):
        before = state
        _, state = mixer.step(torch.randn(3, 16), state)
        assert before.k.shape == (3, 2, t, 4) and state.k.shape == state.v.shape == (3, 2, t + 1, 4)
        assert torch.equal(state.k[:, :, :t], before.k)


def addresses(state):
    return [cache.k.data_ptr() for cache in state if hasattr(cache, "k")]


def hybrid(**sizes):
    """Layer 1 keeps its attention."""
    teacher = random_llama(replace(SMALL, num_hidden_layers=3)).double()
    return Llamba.from_teacher(teacher, keep_attention=[1], d_state=4, **RELEASED, **sizes)


@pytest.mark.parametrize("model", [lambda: random_llama(SMALL).double(), hybrid], ids=["llama", "hybrid"])
@pytest.mark.parametrize("mask", [None, [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]], ids=["whole", "padded"])
def test_the_cache_grows_in_place(model, mask):
    """256 steps copy the past a handful of times (they used to copy it 256 times), and give what forward gives."""
    model, ids = model(), torch.randint(96, (2, 261))
    mask = None if mask is None else torch.tensor(mask)
    whole = None if mask is None else torch.cat([mask, torch.ones(2, 256, dtype=torch.long)], 1)
    with torch.no_grad():
        reference = model(ids, whole)
        logits, state = model.prefill(ids[:, :5], mask)
        places, errors = [addresses(state)], []
        for t in range(5, 261):
            logits, state = model.step(ids[:, t], state)
            places.append(addresses(state))
            errors.append(relative_error(logits, reference[:, t]))
    assert max(errors) < 1e-12
    for layer in zip(*places):
        assert 1 < sum(a != b for a, b in zip(layer, layer[1:])) <= 5


def test_bytes_of_256_steps():
    """What the steps make at most at one time: the cache with its room and, while it is copied, the one before; not a
    copy a step."""
    mixer, u = Attention(64, 4, 4, 16), torch.randn(1, 1024 + 256, 64)
    with torch.no_grad():
        _, start = mixer(u[:, :1024], mixer.init_state(1))

        def steps():
            states = [start]
            for u_t in u[:, 1024:].unbind(1):
                states.append(mixer.step(u_t, states[-1])[1])  # all old states are kept: they share the memory

        entry = 2 * 4 * 16 * 4  # bytes a token
        assert peak_bytes(steps) < 1.5 * 1025 * entry + 256 * 64 * 4 + 100_000


@pytest.mark.parametrize("model", [lambda: random_llama(SMALL).double(), hybrid], ids=["llama", "hybrid"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_state_goes_on_in_several_ways(model, grad):
    """Branches from one state, in turns and in depth, after a prompt or a step; none sees the tokens of another."""
    model, prompt, tails = model(), torch.randint(96, (2, 6)), torch.randint(96, (3, 2, 4))
    with torch.set_grad_enabled(grad):
        _, state = model.prefill(prompt)
        _, state = model.step(prompt[:, 0], state)  # now there is room behind it
        branches, outs = [state] * 3, [[], [], []]
        for t in range(4):
            for i in range(3):
                logits, branches[i] = model.step(tails[i, :, t], branches[i])
                outs[i].append(logits)
        late, _ = model.prefill(tails[0], state=state)  # the old state, once more, all at once
        for i in range(3):
            reference = model(torch.cat([prompt, prompt[:, :1], tails[i]], 1))[:, 7:]
            assert relative_error(torch.stack(outs[i], 1), reference) < 1e-12
        assert relative_error(late, torch.stack(outs[0], 1)) < 1e-12


def test_the_room_is_taken_once():
    """Two ways to go on from one cache: the first is written in place, the second gets a copy."""
    with torch.no_grad():
        entry = lambda n: torch.randn(2, 1, 2, n, 4)
        old = KVCache(*entry(3)).extend(*entry(1))
        first, second = old.extend(*entry(2)), old.extend(*entry(2))
        assert first.k.data_ptr() == old.k.data_ptr() != second.k.data_ptr()
        assert (
            first.extend(*entry(1)).k.data_ptr() == old.k.data_ptr()
            and first.extend(*entry(1)).k.data_ptr() != old.k.data_ptr()
        )
        zeroed = second._replace(v=torch.zeros_like(second.v))  # other values than those in the room
        assert not zeroed.extend(*entry(1)).v[:, :, :-1].any() and second.extend(*entry(1)).v[:, :, :-1].equal(second.v)
        wide = KVCache(*entry(3)).extend(*entry(1).double())
        assert wide.k.dtype == wide.v.dtype == torch.float64
        with pytest.raises(ValueError, match="state is of 1 sequences: it cannot go on with 2"):
            old.extend(*torch.randn(2, 2, 2, 1, 4))


@pytest.mark.parametrize("before, after", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode),
                                           (torch.no_grad, torch.enable_grad), (torch.enable_grad, torch.no_grad)])
def test_states_go_from_mode_to_mode(before, after):
    model, ids = random_llama(SMALL).double(), torch.randint(96, (1, 8))
    with before():
        _, state = model.prefill(ids[:, :5])
        _, state = model.step(ids[:, 5], state)
    with after():
        for t in (6, 7):
            logits, state = model.step(ids[:, t], state)
    assert relative_error(logits, model(ids)[:, -1]) < 1e-12
    if after is torch.enable_grad:
        logits.sum().backward()


def test_gradients_through_frozen_keys():
    """Keys without a gradient are kept for that of the queries: a later step must not write over them."""
    model, ids = random_llama(SMALL).double(), torch.randint(96, (1, 6))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    logits, state = model.prefill(ids[:, :3])
    parts = [logits]
    for token in ids[:, 3:].unbind(1):
        logits, state = model.step(token, state)
        parts.append(logits[:, None])
    weights = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(out.square().sum(), weights) for out in (torch.cat(parts, 1), model(ids)))
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(ours, theirs))


LONG = 4096


@pytest.mark.parametrize(
    "kind", ["prompt", "prompt with a state", "prompt in two parts", "padded", "padded with a state"]
)
def test_attention_builds_no_mask_of_all_pairs(kind):
    """A mask of 4096 x 4096 is 17 MB, and 67 more where it becomes numbers. All else is 1 MB a tensor."""
    mixer, u = Attention(64, 4, 2, 16), torch.randn(1, LONG, 64)
    state = mixer.init_state(1) if "state" in kind else None
    padding = torch.tensor([7]) if "padded" in kind else None
    with torch.no_grad():
        if kind == "prompt in two parts":
            _, state = mixer(u[:, :100], mixer.init_state(1))
            u = u[:, 100:]
        assert peak_bytes(lambda: mixer(u, state, padding=padding)) < 16e6


@pytest.mark.parametrize("rows", [1, 2, 5, 256])
@pytest.mark.parametrize("past", [0, 1, 4])
@pytest.mark.parametrize(
    "first", [None, [[0], [3]], [[7], [1]], [[0, 0, 0, 3, 3, 5, 5, 7, 8], [0, 1, 2, 2, 2, 2, 2, 2, 8]]]
)
def test_attention_in_pieces_is_attention(rows, past, first):
    q, k, v = (
        torch.randn(2, heads, 9 + past * (heads == 2), 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    first = None if first is None else torch.tensor(first)
    mask = causal_mask(9, past, first, "cpu")
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    out = causal_attention(q, k, v, first, rows)
    assert relative_error(out, expected) < 1e-14
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((y * weight).sum(), (q, k, v), retain_graph=True) for y in (out, expected)]
    assert all(relative_error(a, b) < 1e-13 for a, b in zip(*grads))


def test_matrix_times_values_is_the_output():
    mixer, u = Attention(16, 4, 2, 4, LLAMA3, bias=True).double(), torch.randn(2, 11, 16, dtype=torch.float64)
    values = mixer.project(u, 0, None)[2].repeat_interleave(2, dim=1)
    y = (mixer.matrix(u) @ values).transpose(1, 2).flatten(2)
    assert relative_error(mixer.o_proj(y), mixer(u)) < 1e-13
    assert relative_error(mixer.matrix(u).sum(-1), torch.ones(2, 4, 11)) < 1e-14


@pytest.mark.parametrize("heads, name", [((4, 3, 8), "n_heads is 4"), ((4, 2, 7), "head_dim is 7")])
def test_impossible_heads(heads, name):
    with pytest.raises(ValueError, match=name):
        Attention(16, *heads)


@pytest.mark.parametrize("kind", ["grouped", "llama3 scaling", "attention bias"])
def test_prefill_and_step_equal_forward_at_every_split(kind):
    model, ids = random_llama(CONFIGS[kind]), torch.randint(96, (2, 12))
    with torch.no_grad():
        reference = model(ids)
        for split in range(1, 13):
            logits, state = model.prefill(ids[:, :split])
            parts = list(logits.unbind(1))
            for token in ids[:, split:].unbind(1):
                logits_t, state = model.step(token, state)
                parts.append(logits_t)
            assert relative_error(torch.stack(parts, 1), reference) < 1e-5


@pytest.mark.parametrize("holes", ["left", "right", "anywhere"])
def test_padding_equals_unpadded(holes):
    model = random_llama(CONFIGS["llama3 scaling"]).double()
    rows, width = [torch.randint(96, (1, n)) for n in (12, 5, 1)], 12
    ids, mask = torch.randint(96, (3, width)), torch.zeros(3, width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        n = tokens.shape[1]
        where = {
            "left": torch.arange(width - n, width),
            "right": torch.arange(n),
            "anywhere": torch.randperm(width)[:n].sort().values,
        }[holes]
        ids[row, where], mask[row, where] = tokens[0], 1
    out, (_, state) = model(ids, mask), model.prefill(ids, mask)
    step, _ = model.step(torch.tensor([7, 8, 9]), state)
    for row, tokens in enumerate(rows):
        assert relative_error(out[row, mask[row].bool()], model(tokens)[0]) < 1e-12
        assert relative_error(step[row], model(torch.cat([tokens, torch.tensor([[7 + row]])], 1))[0, -1]) < 1e-12
    gradients = torch.autograd.grad(out[mask.bool()].sum(), list(model.parameters()))
    alone = torch.autograd.grad(sum(model(tokens).sum() for tokens in rows), list(model.parameters()))
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(gradients, alone))


# Checkpoints


@pytest.mark.parametrize("kind", ["tied", "grouped"])
def test_save_and_reload_bit_exactly(kind, tmp_path):
    model = random_llama(CONFIGS[kind])
    model.save_pretrained(tmp_path / "a")
    again = Llama.from_pretrained(tmp_path / "a")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    reference = theirs.state_dict()
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, reference[LLAMA.stored_as(name)])
    theirs.save_pretrained(tmp_path / "b")  # and back from there
    back = Llama.from_pretrained(tmp_path / "b")
    assert back.config == model.config
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "a")


def test_sharded_safetensors_of_transformers(tmp_path):
    ours, theirs = pair(CONFIGS["tied"], tmp_path)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ids = torch.randint(96, (1, 9))
    assert torch.equal(Llama.from_pretrained(tmp_path / "shards")(ids), ours(ids))


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_files(shards, tmp_path):
    """.bin files, with what old ones also hold: the tied head a second time, and the rotary frequencies."""
    ours, theirs = pair(CONFIGS["tied"], tmp_path)
    weights = theirs.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert "lm_head.weight" in weights
    path = tmp_path / "bin"
    path.mkdir()
    shutil.copy(tmp_path / "llama" / "config.json", path)
    names = {
        name: "pytorch_model.bin" if shards == 1 else f"pytorch_model-{1 + i % shards}.bin"
        for i, name in enumerate(weights)
    }
    for file in set(names.values()):
        torch.save({name: weights[name] for name in names if names[name] == file}, path / file)
    if shards > 1:
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    ids = torch.randint(96, (1, 9))
    assert torch.equal(Llama.from_pretrained(path)(ids), ours(ids))


def test_stored_type(tmp_path):
    random_llama(SMALL).bfloat16().save_pretrained(tmp_path / "a")
    for asked, got in ((None, torch.bfloat16), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert {p.dtype for p in Llama.from_pretrained(tmp_path / "a", dtype=asked).parameters()} == {got}
    assert {p.dtype for p in Llama.from_pretrained(tmp_path / "a").parameters()} == {torch.float32}


@pytest.fixture
def saved(tmp_path):
    random_llama(SMALL).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def rewrite(path, change_weights=None, change_config=None):
    """Change a checkpoint in place."""
    from safetensors.torch import save_file

    if change_weights:
        weights = {k: v.clone() for k, v in read_weights(path).items()}
        change_weights(weights)
        save_file(weights, path / "model.safetensors")
    if change_config:
        config = json.loads((path / "config.json").read_text())
        change_config(config)
        (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "1 missing (model.layers.1.mlp.up_proj.weight)"),
    (lambda w: w.pop("lm_head.weight"), "1 missing (lm_head.weight)"),
    (lambda w: w.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
     "1 unexpected (model.layers.2.input_layernorm.weight)"),
    (lambda w: w.update({"model.norm.weight": torch.ones(31)}), "model.norm.weight has shape (31,) instead of (32,)")])
def test_misfits_are_named(change, message, saved):
    rewrite(saved, change_weights=change)
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(saved)
    assert message in one_line(error) and str(saved) in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "model_type is 'gpt2': it must be 'llama'"), ({"model_type": None}, "model_type is None"),
    ({"model_type": "gateloop"}, "model_type is 'gateloop': only 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"vocab_size": None}, "vocab_size is None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"hidden_size": "32"}, "hidden_size is '32': it must be an integer from 1"), ({"head_dim": -8}, "head_dim is -8"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "missing.*factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5")])
def test_configs_that_do_not_fit(change, message, saved):
    rewrite(saved, change_config=lambda config: config.update(change))
    with pytest.raises(ValueError, match=message) as error:
        Llama.from_pretrained(saved)
    assert str(saved) in one_line(error)


def test_a_teacher_that_is_no_llama(tmp_path):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="config.json: model_type is 'gpt2': it must be 'llama' or 'mamba2' or 'llamba' or 'gateloop'"
    ):
        Llama.from_pretrained(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    for name, kind, message in (
        (tmp_path, FileNotFoundError, "no config.json"),
        (tmp_path / "text.txt", ValueError, "a directory or a .gguf file"),
        (tmp_path / "none", FileNotFoundError, "no such directory"),
        ("nobody/nothing", ConnectionError, "nobody/nothing"),
    ):
        with pytest.raises(kind, match=message) as error:
            Llama.from_pretrained(name)
        one_line(error)


def test_config_without_the_newer_entries():
    """The first Llamas knew neither head_dim nor key-value heads."""
    values = {
        k: v
        for k, v in SMALL.to_dict().items()
        if k not in ("head_dim", "num_key_value_heads", "rope_parameters", "attention_bias")
    }
    assert LlamaConfig.from_dict(values) == replace(SMALL, num_key_value_heads=4)


def test_parameters_of_the_released_sizes():
    """Counts of the model cards, on the meta device."""
    sizes = {
        (2048, 8192, 16, 32, 64, True): 1_235_814_400,
        (3072, 8192, 28, 24, 128, True): 3_212_749_824,
        (4096, 14336, 32, 32, 128, False): 8_030_261_248,
    }
    for (width, mlp, layers, heads, head_dim, tied), count in sizes.items():
        with torch.device("meta"):
            model = Llama(LlamaConfig(vocab_size=128256, hidden_size=width, intermediate_size=mlp,
                                      num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
                                      head_dim=head_dim, tie_word_embeddings=tied))
        assert sum(p.numel() for p in model.parameters()) == count


def test_a_new_model_starts_as_llama_does():
    model = Llama(replace(SMALL, hidden_size=200, attention_bias=True))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            assert 0.018 < parameter.std() < 0.022, name


# The models that come along


def test_tiny_prefill_and_64_steps_equal_forward():
    tiny, ids = Llama.from_pretrained("tiny"), torch.randint(2, 1000, (2, 100))
    with torch.no_grad():
        reference = tiny(ids)
        logits, state = tiny.prefill(ids[:, :36])
        parts = list(logits.unbind(1))
        for token in ids[:, 36:].unbind(1):
            logits_t, state = tiny.step(token, state)
            parts.append(logits_t)
    assert len(parts) == 100 and relative_error(torch.stack(parts, 1), reference) < 1e-5


def test_tiny_equals_transformers():
    path, ids = find_checkpoint("tiny"), torch.randint(2, 1000, (2, 200))
    theirs = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert relative_error(Llama.from_pretrained("tiny")(ids), theirs(ids).logits) < 1e-5
