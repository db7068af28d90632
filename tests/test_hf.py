"""A student among transformers, peft and the hub: the library's numbers through other people's doors."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small import RELEASED, VOCAB, llama_config, llamba_config, one_line, shaken
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import llamba_ref as lr
from llamba_ref import hf
from llamba_ref.checkpoint import find_checkpoint
from llamba_ref.conventions import relative_error
from llamba_ref.llama import Rope
from llamba_ref.llamba import AttentionConfig, RotaryConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HYBRID = AttentionConfig((1,), 4, 2, 8)
KINDS = {
    "pure": llamba_config(),
    "tied": llamba_config(tie_embeddings=True),
    "padded vocabulary": llamba_config(vocab_size=VOCAB - 3),
    "fixed rotation": llamba_config(ssm_cfg=replace(llamba_config().ssm_cfg, d_state=6), rotary_cfg=RotaryConfig()),
    "rotation by data": llamba_config(
        ssm_cfg=replace(llamba_config().ssm_cfg, d_state=6), rotary_cfg=RotaryConfig("data", Rope(100.0))),
    "hybrid of layers": llamba_config(attn_cfg=HYBRID),
    "hybrid of heads": llamba_config(attn_cfg=replace(HYBRID, layers=(0, 1, 1), heads=(2, 0, 3))),
    "gateloop": lr.GateLoopConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_heads=4, intermediate_size=24, d_state=2),
}
CLASSES = {lr.LlambaConfig: (lr.Llamba, hf.LlambaForCausalLM),
           lr.GateLoopConfig: (lr.GateLoopLM, hf.GateLoopForCausalLM)}


def pair(kind, directory):
    """A model of ours and the same one as transformers loads it from our file."""
    torch.manual_seed(0)
    ours = shaken(CLASSES[type(KINDS[kind])][0](KINDS[kind])).eval()
    ours.save_pretrained(directory / "model")
    theirs = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    assert type(theirs) is CLASSES[type(KINDS[kind])][1] and not theirs.training
    return ours, theirs


def prompts(vocab=VOCAB - 3):
    """Three prompts padded on the left, and their mask."""
    torch.manual_seed(1)
    ids, mask = torch.randint(vocab, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    mask[0, :4], mask[2, :10] = 0, 0
    return ids, mask


@pytest.fixture(scope="module")
def tiny():
    """The demo's student in float32, its counterpart in transformers, and its tokenizer."""
    path = find_checkpoint("tiny-llamba")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return lr.Llamba.from_pretrained(path), model, AutoTokenizer.from_pretrained(path, padding_side="left")


# Numbers


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_bit_equal_wherever_padding_is(kind, tmp_path):
    ours, theirs = pair(kind, tmp_path)
    ids, mask = prompts()
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids))
        assert torch.equal(theirs(input_ids=ids, return_dict=False)[0], ours(ids))
        for one in (mask, mask.flip(1), mask[:, torch.randperm(11)]):
            assert torch.equal(theirs(ids, attention_mask=one).logits[one.bool()], ours(ids, one)[one.bool()])
        assert torch.equal(theirs(ids, logits_to_keep=2).logits, ours(ids)[:, -2:])
        assert torch.equal(theirs(ids, logits_to_keep=torch.tensor([0, 5])).logits, ours(ids)[:, [0, 5]])
        embedded = theirs.get_input_embeddings()(ids)
        assert torch.equal(theirs(inputs_embeds=embedded).logits, ours(ids))
        hidden = theirs(ids, attention_mask=mask.flip(1), output_hidden_states=True).hidden_states
    for layer in ours.walk(ids[1:2]):
        assert relative_error(hidden[layer.index][1:2], layer.input) < 1e-6
    assert len(hidden) == 3 and relative_error(hidden[-1][1:2], ours.backbone.final_layernorm(layer.output)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_librarys(kind, tmp_path):
    ours, theirs = pair(kind, tmp_path)
    ids, mask = prompts()
    written = theirs.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0)
    assert torch.equal(written, ours.generate(ids, 15, attention_mask=mask))
    again = theirs.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0,
                            prefill_chunk_size=3, past_key_values=hf.StateCache(ours.init_state(3)))
    assert torch.equal(again, written)  # read in pieces, of which some hold nothing but padding for some rows


@pytest.mark.parametrize("options", [
    {"num_beams": 4, "do_sample": False}, {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    {"do_sample": True, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5, "temperature": 0.7},
    {"num_beams": 3, "do_sample": True}, {"do_sample": False, "repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("kind", ["fixed rotation", "hybrid of heads", "gateloop"])
def test_every_way_to_choose_is_the_same_with_a_cache_and_without(kind, options, tmp_path):
    _, model = pair(kind, tmp_path)
    ids, mask = prompts()
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=9, pad_token_id=0, use_cache=use_cache,
                                    **options))
    assert torch.equal(*texts) and len(texts[0]) == 3 * options.get("num_return_sequences", 1)


@pytest.mark.parametrize("kind", ["pure", "hybrid of layers"])
def test_a_cache_goes_on_and_a_copy_goes_on_again(kind, tmp_path):
    _, model = pair(kind, tmp_path)
    ids, mask = prompts()
    options = {"do_sample": False, "pad_token_id": 0}
    first = model.generate(ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True, **options)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=10, **options)
    longer = nn.functional.pad(mask, (0, 5), value=1)
    for cache in (copy.deepcopy(first.past_key_values), first.past_key_values):
        assert cache.get_seq_length() == 15  # the last token was written, not read
        again = model.generate(first.sequences, attention_mask=longer, past_key_values=cache, max_new_tokens=5,
                               **options)
        assert torch.equal(again, whole)


def test_the_cache_of_a_student_does_not_grow(tmp_path):
    _, model = pair("pure", tmp_path)
    with torch.no_grad():
        sizes = {sum(z.nbytes for z in tree_leaves(model(torch.randint(VOCAB, (1, n))).past_key_values.states))
                 for n in (1, 50, 300)}
    assert len(sizes) == 1


def test_streamers_stop_strings_and_pipelines(tiny, capsys):
    ours, model, tokenizer = tiny
    batch = tokenizer("It is a truth", return_tensors="pt")
    ids = model.generate(batch.input_ids, max_new_tokens=12, do_sample=False, streamer=TextStreamer(tokenizer))
    text = tokenizer.decode(ids[0])
    assert capsys.readouterr().out.strip() == text.strip()
    word = text.split()[-3]
    stopped = model.generate(batch.input_ids, max_new_tokens=12, do_sample=False, stop_strings=[word],
                             tokenizer=tokenizer)
    assert word in tokenizer.decode(stopped[0]) and len(stopped[0]) < len(ids[0])
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == ours.stop_tokens[0]
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    made = write("It is a truth", max_new_tokens=12, do_sample=False)
    assert made[0]["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_what_a_state_cannot_do_is_refused(tmp_path):
    _, model = pair("pure", tmp_path)
    ids, mask = prompts()
    with pytest.raises(ValueError):  # transformers' own words
        model.generate(ids[:1], max_new_tokens=5, assistant_model=model)
    with pytest.raises(ValueError) as error:
        model(ids).past_key_values.crop(3)
    assert "cannot take back" in one_line(error)
    with pytest.raises(ValueError) as error:
        model(ids, past_key_values=transformers.DynamicCache())
    assert one_line(error) == "past_key_values is a DynamicCache: it must be a StateCache, or None to begin"
    cache, late = model(ids, use_cache=True).past_key_values, nn.functional.pad(mask, (0, 3), value=1)
    late[1, -3:] = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError) as error:
        model(ids[:, :3], attention_mask=late, past_key_values=cache)
    assert "padding behind tokens" in one_line(error)
    with pytest.raises(ValueError) as error:
        model(ids, attention_mask=torch.zeros_like(mask))
    assert "row without a token" in one_line(error)
    with pytest.raises(ValueError) as error:
        model(ids, inputs_embeds=torch.zeros(3, 11, 16))
    assert "either input_ids or inputs_embeds" in one_line(error)
    with pytest.raises(ValueError) as error:
        model(ids, position_ids=torch.arange(11)[None] + 5)
    assert "position_ids must count" in one_line(error)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_a_row_are_told_apart_by_their_positions(kind, tmp_path):
    ours, model = pair(kind, tmp_path)
    ids, lengths = torch.randint(VOCAB - 3, (2, 23)), (9, 1, 13)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    starts = (positions == 0).expand(2, -1)
    with torch.no_grad():
        expected = torch.cat([ours(one) for one in ids.split(lengths, 1)], 1)
        assert relative_error(model(ids, position_ids=positions).logits, expected) < 1e-5
        masked = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids))
        assert relative_error(masked.logits, expected) < 1e-5
        assert torch.equal(model(ids, position_ids=positions).logits, ours(ids, starts=starts & (torch.arange(23) > 0)))
        cache = model(ids[:, :5], use_cache=True).past_key_values
        after = model(ids[:, 5:], position_ids=positions[:, 5:], past_key_values=cache).logits
        assert relative_error(after, expected[:, 5:]) < 1e-5
    model.train()
    labels = ids.masked_fill(starts, -100)
    loss = model(ids, position_ids=positions, labels=labels).loss
    parts = [nn.functional.cross_entropy(one[:, :-1].flatten(0, 1), target[:, 1:].flatten(), reduction="sum")
             for one, target in zip(expected.split(lengths, 1), ids.split(lengths, 1))]
    assert relative_error(loss, sum(parts) / (2 * (23 - 3))) < 1e-5


def test_a_collator_of_transformers_that_flattens(tiny):
    ours, model, tokenizer = tiny
    rows = [{"input_ids": tokenizer(text).input_ids} for text in ("It was a dark night.", "No.", "She smiled at him.")]
    batch = DataCollatorWithFlattening(return_tensors="pt")(rows)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        apart = torch.cat([ours(torch.tensor([row["input_ids"]]))[0] for row in rows])
    assert relative_error(logits, apart) < 1e-5


@pytest.mark.parametrize("positions", [[5, 6, 7, 8], [0, 1, 1, 2], [0, 2, 3, 4], [0, 1, 0, 2]], ids=str)
def test_positions_that_do_not_count_are_refused(positions, tmp_path):
    _, model = pair("pure", tmp_path)
    with pytest.raises(ValueError) as error:
        model(torch.ones(1, 4, dtype=torch.long), position_ids=torch.tensor([positions]))
    assert "position_ids must count" in one_line(error)


@pytest.mark.parametrize("shape", [(3, 5), (3, 15), (2, 11), (1, 11), (3, 1, 11, 11)], ids=str)
def test_masks_of_another_shape_are_refused(shape, tmp_path):
    _, model = pair("pure", tmp_path)
    with pytest.raises(ValueError) as error:
        model(prompts()[0], attention_mask=torch.ones(shape, dtype=torch.long))
    assert f"attention_mask has shape {shape}: it must be (3, 11)" in one_line(error)


def test_a_mask_of_new_tokens_alone(tmp_path):
    ours, model = pair("hybrid of heads", tmp_path)
    a, b = prompts()[0], prompts()[0][:, :4]
    with torch.no_grad():
        cache = model(a, use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        assert torch.equal(model(b, attention_mask=torch.ones_like(b), past_key_values=cache).logits,
                           ours.prefill(b, state=ours.prefill(a)[1])[0])
    mask = torch.ones_like(b)
    mask[0, 0] = 0
    with pytest.raises(ValueError) as error:
        model(b, attention_mask=mask, past_key_values=again)
    assert "padding behind tokens" in one_line(error)


@pytest.mark.parametrize("kind", ["pure", "hybrid of heads"])
def test_hooks_are_called_for_every_token(kind, tmp_path):
    """A hook that steers a mixer gives the same text with a cache and without one."""
    _, model = pair(kind, tmp_path)
    calls, ids = [], prompts()[0][1:2]
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    mixer = model.backbone.layers[0].mixer
    mixer = getattr(mixer, "recurrent", mixer)
    mixer.out_proj.register_forward_hook(lambda module, inputs, y: (calls.append(1), y + 3)[1])
    model.backbone.layers[1].register_forward_hook(lambda module, inputs, y: calls.append(2))
    steered = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert calls.count(1) == calls.count(2) == 6 and not torch.equal(steered, plain)
    assert torch.equal(steered, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("kind", ["pure", "hybrid of layers"])
def test_a_cache_from_inference_mode_goes_on(kind, tmp_path):
    ours, model = pair(kind, tmp_path)
    ids = prompts()[0]
    with torch.inference_mode():
        first = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = model.generate(first.sequences.clone(), past_key_values=first.past_key_values, max_new_tokens=4,
                          do_sample=False)
    assert torch.equal(more, ours.generate(ids, 8))


def test_a_cache_of_what_the_library_has_read(tmp_path):
    ours, model = pair("pure", tmp_path)
    ids = prompts()[0]
    cache = hf.StateCache(ours.read(ids[:, :-1])[1], length=10)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False),
                       ours.generate(ids, 5))
    assert cache.get_max_length() == -1
    with pytest.raises(ValueError):
        cache.reset()
    with pytest.raises(ValueError) as error:
        model(ids, output_attentions=True)
    assert "output_attentions is True" in one_line(error)


# Files


def test_files_of_either_side_are_read_by_the_other(tmp_path):
    for kind in KINDS:
        ours, theirs = pair(kind, tmp_path / kind)
        theirs.save_pretrained(tmp_path / kind / "again")
        again = type(ours).from_pretrained(tmp_path / kind / "again")
        assert again.config == ours.config
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))


def test_a_student_knows_its_context_and_its_end(tmp_path):
    teacher = lr.Llama(llama_config(max_position_embeddings=777, eos_token_id=[3, 4], bos_token_id=2))
    lr.Llamba.from_teacher(teacher, **RELEASED).save_pretrained(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert model.config.max_position_embeddings == 777 and model.generation_config.eos_token_id == [3, 4]
    assert json.loads((tmp_path / "student" / "generation_config.json").read_text())["eos_token_id"] == [3, 4]
    assert json.loads((tmp_path / "student" / "config.json").read_text())["max_position_embeddings"] == 777


@pytest.mark.parametrize("change, word", [
    (lambda w: w.pop("backbone.layers.1.mixer.D"), "missing backbone.layers.1.mixer.D"),
    (lambda w: w.update(more=torch.zeros(2)), "unexpected more"),
    (lambda w: w.update({"backbone.final_layernorm.weight": torch.zeros(3)}), "mismatched"),
    (lambda w: [w.pop(name) for name in [*w]], "missing"),
], ids=["missing", "unexpected", "wrong shape", "empty"])
def test_weights_that_do_not_fit_raise(change, word, tmp_path):
    pair("pure", tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", ignore_mismatched_sizes=True)
    assert word in one_line(error)


def test_a_bad_config_raises_in_our_words(tmp_path):
    pair("pure", tmp_path)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention": "linear"}))
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "unknown entry attention" in one_line(error)
    with pytest.raises(ValueError) as error:
        hf.LlambaConfig.from_dict(llamba_config().to_dict() | {"n_layer": 0})
    assert "n_layer is 0" in one_line(error)


def test_options_of_from_pretrained(tmp_path):
    ours, _ = pair("tied", tmp_path)
    config, left = AutoConfig.from_pretrained(tmp_path / "model", eos_token_id=7, other=1, return_unused_kwargs=True)
    assert config.eos_token_id == 7 and left == {"other": 1} and type(config) is hf.LlambaConfig
    for wrong in ({"eos_token_id": -7}, {"n_layer": 1, "attn_cfg": HYBRID}):  # which keeps layer 1
        with pytest.raises(ValueError):
            AutoConfig.from_pretrained(tmp_path / "model", **wrong)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    ids = torch.randint(VOCAB, (2, 100))
    with torch.no_grad():
        assert half(ids).logits.dtype == torch.bfloat16 and relative_error(half(ids).logits, ours(ids)) < 0.05
        assert torch.equal(half.generate(ids, max_new_tokens=4, do_sample=False),
                           copy.deepcopy(ours).to(torch.bfloat16).generate(ids, 4))
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_config(config).config.eos_token_id == 7


@pytest.mark.parametrize("kind", ["pure", "rotation by data", "hybrid of heads", "gateloop"])
def test_device_maps(kind, tmp_path):
    ours, _ = pair(kind, tmp_path)
    ids, mask = prompts()
    parts = ["backbone.embedding", "backbone.layers.0", "backbone.layers.1", "backbone.final_layernorm", "lm_head"]
    parts = parts if hasattr(ours, "lm_head") else parts[:-1]
    far = parts[1:] if kind == "gateloop" else parts
    cut = {part: "disk" if part in far else "cpu" for part in parts} | {parts[-2]: "cpu"}
    for device_map in ("auto", {"": "cpu"}, cut):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map,
                                                     offload_folder=tmp_path / "far")
        with torch.no_grad():
            assert relative_error(model(ids, attention_mask=mask).logits[1], ours(ids, mask)[1]) < 1e-6
        written = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(written, ours.generate(ids, 6, attention_mask=mask))


def test_a_tied_embedding_on_disk_is_refused(tmp_path):
    pair("tied", tmp_path)
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map={"backbone.embedding": "disk", "backbone.layers": "cpu",
                                            "backbone.final_layernorm": "cpu"}, offload_folder=tmp_path / "far")
    assert "it is the head, too" in one_line(error)


@pytest.mark.parametrize("kind", ["padded vocabulary", "tied"])
def test_more_tokens(kind, tmp_path):
    ours, model = pair(kind, tmp_path)
    ids, old = torch.randint(VOCAB - 3, (2, 9)), model.vocab_size
    with torch.no_grad():
        before = model(ids).logits
        assert model.resize_token_embeddings() is model.get_input_embeddings() and model.vocab_size == old
        model.resize_token_embeddings(old + 9)
        after = model(ids).logits
    assert after.shape[-1] == old + 9 and torch.equal(after[..., :old], before)
    model(torch.full((1, 2), old + 8))
    model.save_pretrained(tmp_path / "more")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    assert torch.equal(again(ids).logits, after) and lr.Llamba.from_pretrained(tmp_path / "more").vocab_size == old + 9
    with pytest.raises(ValueError) as error:
        hf.LlambaForCausalLM.around(ours).resize_token_embeddings(60)
    assert "shares its weights" in one_line(error)


# Around a model in training


@pytest.mark.parametrize("model", [lr.Llama(llama_config()), lr.Llamba(KINDS["hybrid of heads"]),
                                   lr.GateLoopLM(KINDS["gateloop"])], ids=lambda model: type(model).__name__)
def test_around_shares_weights(model):
    before = copy.deepcopy(model.state_dict())
    wrapped = hf.DecoderForCausalLM.around(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in model.parameters()} and wrapped.training
    ids = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        assert wrapped(ids).past_key_values is None and wrapped.eval()(ids).past_key_values.get_seq_length() == 9
        assert torch.equal(wrapped(ids).logits, model(ids))
        assert torch.equal(wrapped.generate(ids, max_new_tokens=5, do_sample=False), model.generate(ids, 5))
    with pytest.raises(ValueError) as error:
        wrapped.save_pretrained("nowhere")
    assert "save the model that this one is around" in one_line(error)


def test_gradients_reach_the_model_inside(tmp_path):
    student = lr.Llamba(KINDS["pure"])
    before = copy.deepcopy(student.state_dict())
    wrapped = hf.LlambaForCausalLM.around(student)
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())
    ids = torch.randint(VOCAB, (2, 9))
    wrapped(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    wrapped.save_pretrained(tmp_path / "student")
    assert torch.equal(lr.Llamba.from_pretrained(tmp_path / "student")(ids), student(ids))


# Training


def test_loss_and_gradient_checkpointing(tmp_path):
    _, model = pair("hybrid of heads", tmp_path)
    ids, labels = torch.randint(VOCAB, (2, 21)), torch.randint(VOCAB, (2, 21))
    labels[0, :7] = -100
    mask = torch.ones_like(ids)
    mask[0, -3:], labels[0, -3:] = 0, -100
    grads = []
    for recompute in (None, False, True):
        model.train().zero_grad()
        if recompute is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": recompute})
        out = model(ids, attention_mask=mask, labels=labels)
        assert out.past_key_values is None
        out.loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for other in grads[1:]:
        assert all(torch.equal(grads[0][name], other[name]) for name in grads[0])
    with pytest.raises(ValueError) as error:
        model(ids, use_cache=True)
    assert "gradient checkpointing" in one_line(error)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert relative_error(out.loss, expected) < 1e-6


def trainer(model, tokenizer, folder, **options):
    """A trainer on four sentences."""
    texts = ["It was a dark night.", "She smiled.", "He did not reply to this.", "No, said she, I do not."]
    settings = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_strategy="no", learning_rate=1e-3, seed=0, **options)
    rows = [{"input_ids": tokenizer(text).input_ids} for text in texts]
    return Trainer(model=model, args=settings, train_dataset=rows,
                   data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))


def test_trainer_with_checkpoints(tiny, tmp_path):
    _, model, tokenizer = tiny
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    ends = []
    for folder, resume in (("whole", None), ("whole-again", tmp_path / "whole" / "checkpoint-2")):
        run = trainer(copy.deepcopy(model), tokenizer, tmp_path / folder, gradient_checkpointing=True)
        run.train(resume_from_checkpoint=None if resume is None else str(resume))
        ends.append(run.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    saved = lr.Llamba.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert all(torch.equal(weight, ends[0][name]) for name, weight in saved.state_dict().items())
    assert not all(torch.equal(weight, ends[0][name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("kind", ["pure", "rotation by data", "hybrid of layers"])
def test_every_adapter_acts(kind, tmp_path):
    """Each adapter alone moves the logits, in parallel and step by step, is trained, saved and merged."""
    _, model = pair(kind, tmp_path)
    targets = ["in_proj", "out_proj"] + (["q_proj", "k_proj", "v_proj", "o_proj"] if "hybrid" in kind else [])
    ids = torch.randint(VOCAB - 3, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")).eval()
    names = [name for name, module in lora.named_modules() if hasattr(module, "lora_B")]
    assert len(names) == (6 if "hybrid" in kind else 4)
    with torch.no_grad():
        assert torch.equal(lora(ids).logits, before)
        for name in names:
            up = lora.get_submodule(name).lora_B["default"].weight
            up.normal_()
            whole, cache, pieces = lora(ids, use_cache=False).logits, None, []
            for t in range(9):
                out = lora(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
                cache, pieces = out.past_key_values, [*pieces, out.logits]
            assert relative_error(whole, before) > 1e-3 and relative_error(torch.cat(pieces, 1), whole) < 1e-5
            up.zero_()
    lora.train()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # with B at zero, A has no gradient in the first step
        optimizer.zero_grad()
        lora(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(p.grad.any() for p in lora.parameters() if p.requires_grad)
    lora.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        after = lora.eval()(ids).logits
        assert torch.equal(again(ids).logits, after) and relative_error(after, before) > 1e-4
        merged = again.merge_and_unload()
        assert type(merged) is hf.LlambaForCausalLM and relative_error(merged(ids).logits, after) < 1e-5


# The hub

ELSEWHERE = """
import sys
sys.modules["llamba_ref"] = None  # not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("me/student", trust_remote_code=True, dtype=torch.float32)
ids = torch.tensor([[1, 2, 3, 4]])
print(type(model).__module__.split(".")[0], model.generate(ids, max_new_tokens=8, do_sample=False).tolist())
model.save_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("kind", ["hybrid of heads", "gateloop"])
def test_a_student_on_the_hub_opens_without_this_package(kind, tmp_path, monkeypatch):
    """What is pushed is put into a hub's cache as a download would, and opened where llamba_ref cannot be imported."""
    ours, model = pair(kind, tmp_path)
    pushed, snapshot = {}, tmp_path / "home" / "hub" / "models--me--student" / "snapshots" / ("a" * 40)

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **_):
            for operation in operations:
                file = operation.path_or_fileobj
                pushed[operation.path_in_repo] = Path(file).read_bytes() if isinstance(file, str | Path) else file

        def create_branch(self, **_):
            pass

        def __getattr__(self, name):
            raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda *_, **__: Api())
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("no words"))
    model.push_to_hub("me/student")
    assert {"config.json", "model.safetensors", "hf.py", "llamba.py"} <= pushed.keys()
    snapshot.mkdir(parents=True)
    for name, content in pushed.items():
        (snapshot / name).write_bytes(content)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path / "again")], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = ours.generate(torch.tensor([[1, 2, 3, 4]]), 8)
    assert done.stdout.strip() == f"transformers_modules {ids.tolist()}"
    assert torch.equal(type(ours).from_pretrained(tmp_path / "again")(ids), ours(ids))
    assert (tmp_path / "again" / "hf.py").is_file()


def test_a_directory_with_code_asks_nobody_for_trust(tmp_path, tiny):
    """The library reads such a directory, and runs none of the code in it."""
    _, model, tokenizer = tiny
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "hf.py").write_text("raise SystemExit('this code was run')\n")
    program = "import sys, llamba_ref; print(type(llamba_ref.load_model(sys.argv[1])[0]).__name__)"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "student")], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=240)
    assert done.stdout.strip() == "Llamba", done.stderr[-2000:]


# Teachers

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)
TEACHERS = {
    "Llama": transformers.LlamaConfig(**SIZES),
    "SmolLM2": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=100000.0),
    "TinyLlama": transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5),
    "Mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "Mistral, wide heads": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "Qwen 2": transformers.Qwen2Config(**SIZES),
    "Qwen 2, tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True, rope_theta=1e6),
}
OTHERS = {
    "a window": transformers.MistralConfig(**SIZES, sliding_window=64),
    "a window in Qwen 2": transformers.Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1),
    "another activation": transformers.LlamaConfig(**SIZES, hidden_act="gelu"),
    "yarn": transformers.LlamaConfig(**SIZES, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    **{name: getattr(transformers, f"{name}Config")(**SIZES, pad_token_id=0) for name in (
        "Qwen3", "Gemma", "Gemma2", "Olmo2", "Granite", "SmolLM3", "Phi3", "Cohere", "StableLm", "Mixtral", "Glm")},
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_llama_in_disguise_is_exact(name, tmp_path):
    """Loaded from a file, and around the model that is there, every weight at random, biases too."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(TEACHERS[name]).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path / "teacher")
    ids = torch.randint(96, (2, 70))
    with torch.no_grad():
        expected = theirs(ids).logits
        around, loaded = hf.as_llama(theirs), lr.Llama.from_pretrained(tmp_path / "teacher")
        for ours in (around, loaded):
            assert relative_error(ours(ids), expected) < 1e-5
        assert around.backbone.embedding.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
        loaded.save_pretrained(tmp_path / "as-llama")
        assert relative_error(AutoModelForCausalLM.from_pretrained(tmp_path / "as-llama")(ids).logits, expected) < 1e-5
        student = lr.Llamba.from_teacher(loaded, (0, 1), **RELEASED)
        assert relative_error(student(ids), expected) < 1e-5
        assert lr.Llamba.from_teacher(loaded, d_state=8)(ids).isfinite().all()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_llama_is_refused(name, tmp_path):
    OTHERS[name].save_pretrained(tmp_path)
    for read in (lambda: hf.as_llama(AutoModelForCausalLM.from_config(OTHERS[name], attn_implementation="eager")),
                 lambda: lr.Llama.from_pretrained(tmp_path)):
        with pytest.raises(ValueError) as error:
            read()
        assert len(one_line(error)) < 600 and any(word in one_line(error) for word in (
            "model_type is", "sliding_window is", "hidden_act is", "rope_type is", "layer_types is"))


def test_contexts_that_a_file_leaves_out():
    for name, context in (("Mistral", 131072), ("Qwen 2", 32768), ("Llama", 2048)):
        values = TEACHERS[name].to_dict()
        del values["max_position_embeddings"]
        assert lr.LlamaConfig.from_dict(values).max_position_embeddings == context
    for name, entry, value in (("Mistral", "num_key_value_heads", None), ("Qwen 2", "num_key_value_heads", None),
                               ("Qwen 2", "layer_types", ["full_attention", "sliding_attention"]),
                               ("Qwen 2", "use_mrope", True)):
        values = {key: kept for key, kept in TEACHERS[name].to_dict().items() if key != entry}
        with pytest.raises(ValueError) as error:
            lr.LlamaConfig.from_dict(values | ({} if value is None else {entry: value}))
        assert entry in one_line(error)


def test_what_ends_a_text_comes_from_the_generation_config():
    theirs = AutoModelForCausalLM.from_config(TEACHERS["Llama"])
    theirs.generation_config.eos_token_id = [5, 7]
    assert hf.as_llama(theirs).stop_tokens == (5, 7)


def test_mistral_files_that_do_not_speak_of_a_window_have_one(tmp_path):
    values = TEACHERS["Mistral"].to_dict()
    values.pop("sliding_window", None)
    with pytest.raises(ValueError) as error:
        lr.LlamaConfig.from_dict(values)
    assert "missing entry sliding_window" in one_line(error)
