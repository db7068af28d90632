"""Perplexity, bits per byte, comparison of models, generation of text from prompts, the figure of a run."""

import math
import re
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from small import RELEASED, one_line

from llamba_ref.conventions import relative_error
from llamba_ref.data import TokenBlocks, train_tokenizer
from llamba_ref.evaluate import (
    PEOPLE,
    PLACES,
    Comparison,
    Evaluation,
    compare,
    copy_accuracy,
    evaluate,
    fact_accuracy,
    first_tokens,
    generate_text,
    prompt_tokens,
    token_nll,
)
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba
from llamba_ref.plots import draw_progress

TOKENIZER = train_tokenizer(
    ["the cat sat on the mat, and the dog sat on the cat", "a man, a plan, a canal: Panama"] * 3, 280
)
V = len(TOKENIZER)


def llama(seed: int = 0, scale: float = 8.0, vocab_size: int = V) -> Llama:
    """A random Llama with predictions that are far from uniform."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
                              bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        model.backbone.final_layernorm.weight *= scale
    return model.requires_grad_(False)


def blocks_of(n: int, length: int, seed: int = 0, bytes_per_token: int = 3) -> TokenBlocks:
    tokens = torch.randint(V, (n, length), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return TokenBlocks(tokens, n * length, 1, n * length * bytes_per_token)


# Perplexity


def test_nll_is_the_sum_over_next_tokens():
    model, ids = llama().double(), blocks_of(3, 9).blocks
    log_q = model(ids).log_softmax(-1)
    by_hand = -sum(log_q[row, t - 1, ids[row, t]] for row in range(3) for t in range(1, 9))
    assert token_nll(model(ids), ids).dtype == torch.float64
    assert relative_error(token_nll(model(ids), ids), by_hand) < 1e-12
    result = evaluate(model, blocks_of(3, 9))
    assert result.tokens == 3 * 8 and result.nll == pytest.approx(by_hand.item() / 24, rel=1e-12)


def test_half_precision_is_summed_in_float32():
    ids = blocks_of(4, 64).blocks
    logits = llama()(ids).bfloat16()
    assert token_nll(logits, ids).dtype == torch.float32
    assert relative_error(token_nll(logits, ids), token_nll(logits.double(), ids)) < 1e-6


def test_against_transformers(tmp_path):
    from transformers import LlamaForCausalLM

    model, blocks = llama(), blocks_of(5, 33)
    model.save_pretrained(tmp_path / "model")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        loss = theirs(input_ids=blocks.blocks, labels=blocks.blocks).loss.item()
    assert evaluate(model, blocks).nll == pytest.approx(loss, rel=1e-5)


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 7), length=st.integers(2, 20), batch_size=st.integers(1, 9))
def test_batch_size_changes_nothing(n, length, batch_size):
    model, blocks = llama(), blocks_of(n, length)
    assert evaluate(model, blocks, batch_size).nll == pytest.approx(evaluate(model, blocks, n).nll, rel=1e-5)
    ours, all_at_once = (compare(model, llama(1), blocks, size) for size in (batch_size, n))
    assert ours.kl == pytest.approx(all_at_once.kl, rel=1e-5) and ours.agreement == pytest.approx(
        all_at_once.agreement, abs=1e-9
    )


def test_uniform_guesser():
    model = llama()
    model.backbone.embedding.weight.zero_()
    result = evaluate(model, blocks_of(2, 17))
    assert result.perplexity == pytest.approx(V, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(V) / 3, rel=1e-5)


def test_bits_per_byte_does_not_depend_on_the_tokens():
    """Two ways of cutting a text that costs 1000 nats and has 600 bytes."""
    few, many = (Evaluation(1000 / tokens, tokens, 600 / tokens) for tokens in (200, 500))
    assert few.bits_per_byte == pytest.approx(many.bits_per_byte) == pytest.approx(1000 / math.log(2) / 600)
    assert few.perplexity == pytest.approx(many.perplexity**2.5)


def test_a_hopeless_model_has_no_perplexity():
    assert Evaluation(709.0, 1, 1.0).perplexity == math.exp(709) and Evaluation(1e4, 1, 1.0).bits_per_byte > 1e4
    with pytest.raises(FloatingPointError, match=r"^the loss of the student is 1e\+04: its exp overflows$"):
        Evaluation(1e4, 1, 1.0, "student").perplexity  # noqa: B018
    for nll in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match=f"^the loss of the model is {nll}"):
            Evaluation(nll, 1, 1.0)


def test_a_model_with_nan_is_named():
    broken, blocks = llama(1), blocks_of(2, 9)
    broken.backbone.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="^the loss of the model is nan"):
        evaluate(broken, blocks)
    for models, name in (((broken, llama()), "teacher"), ((llama(), broken), "student")):
        with pytest.raises(FloatingPointError, match=f"^the loss of the {name} is nan"):
            compare(*models, blocks)


def test_a_divergence_that_is_infinite():
    """Finite losses, but a token that the student rules out and the teacher does not."""
    student, blocks = llama(), TokenBlocks(torch.zeros(1, 5, dtype=torch.int32), 5, 1, 5)
    head = student.head
    student.head = lambda x: head(x).index_fill(-1, torch.tensor([7]), -math.inf)
    with pytest.raises(FloatingPointError, match="^the divergence from teacher to student is inf"):
        compare(llama(), student, blocks)


@pytest.mark.parametrize(
    "blocks, batch_size, message", [(blocks_of(2, 1), 8, "at least 2"), (blocks_of(2, 4), 0, "batch_size is 0")]
)
def test_bad_input(blocks, batch_size, message):
    with pytest.raises(ValueError, match=message):
        evaluate(llama(), blocks, batch_size)
    with pytest.raises(ValueError, match=message):
        compare(llama(), llama(), blocks, batch_size)


# Comparison


def test_comparison_against_the_definitions():
    teacher, student, blocks = llama(0).double(), llama(1).double(), blocks_of(4, 21)
    p, q = (model(blocks.blocks)[:, :-1].softmax(-1) for model in (teacher, student))
    result = compare(teacher, student, blocks, 3)
    assert result.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-6)
    assert result.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    for ours, model in ((result.teacher, teacher), (result.student, student)):
        assert ours.nll == pytest.approx(evaluate(model, blocks).nll, rel=1e-6) and ours.tokens == 80
    assert result.ratio == pytest.approx(result.student.perplexity / result.teacher.perplexity)


def test_a_model_agrees_with_itself():
    result = compare(llama(), llama(), blocks_of(3, 12))
    assert (result.kl, result.agreement, result.ratio) == (0, 1, 1)


@settings(max_examples=10, deadline=None)
@given(seeds=st.tuples(st.integers(0, 50), st.integers(51, 99)), scale=st.floats(0.1, 20))
def test_divergence_is_positive(seeds, scale):
    result = compare(llama(seeds[0], scale), llama(seeds[1], scale), blocks_of(2, 8))
    assert result.kl > 0 and 0 <= result.agreement <= 1


def test_temperature_keeps_agreement_and_costs_divergence():
    result = compare(llama(scale=8.0), llama(scale=4.0), blocks_of(3, 30))
    assert result.agreement > 0.99 and result.kl > 0.01


def test_other_vocabulary():
    with pytest.raises(ValueError, match=f"student has {V + 1} token ids, teacher {V}"):
        compare(llama(), llama(vocab_size=V + 1), blocks_of(2, 4))


# Memory


class Reader:
    """A model that is a function from the tokens so far to the token it finds most likely."""

    device = "cpu"

    def __init__(self, answer, vocab_size=V):
        self.answer, self.vocab_size, self.read = answer, vocab_size, []

    def __call__(self, ids):
        self.read.append(ids)
        guesses = [[self.answer(row[: t + 1].tolist()) for t in range(len(row))] for row in ids]
        return torch.nn.functional.one_hot(torch.tensor(guesses), self.vocab_size).float()


@pytest.mark.parametrize("length", [2, 3, 17])
def test_copies_are_right_when_the_passage_is_remembered(length):
    model = Reader(lambda seen: seen[-length] if len(seen) >= length else 0, 10_000)
    assert copy_accuracy(model, length, rows=3) == 1
    assert all(ids.shape == (1, 2 * length) and torch.equal(ids[:, :length], ids[:, length:]) for ids in model.read)
    assert len({tuple(ids[0].tolist()) for ids in model.read}) == 3
    late = Reader(lambda seen: seen[-length - 1] if len(seen) > length else 0, 10_000)
    assert copy_accuracy(late, length, rows=3) == 0


def test_the_share_of_copies_that_are_right():
    half = Reader(lambda seen: seen[-9] if len(seen) >= 9 and len(seen) % 2 else 0, 10_000)
    assert copy_accuracy(half, 9) == 0.5
    assert copy_accuracy(half, 9, seed=1) == 0.5
    assert not torch.equal(half.read[0], half.read[8])  # another seed, other tokens


WORDS = train_tokenizer([" ".join(f"{who} is in {place}.\n{who} is in" for who in PEOPLE for place in PLACES)] * 3, 600)
FILLER = torch.tensor(WORDS("Anne is in Charles is in Edward is in " * 20)["input_ids"])


def told(text: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+) is in (\w+)\.", text))


@pytest.mark.parametrize("facts, distance", [(1, 0), (4, 0), (4, 7), (12, 60)])
def test_facts_that_are_remembered(facts, distance):
    def answer(seen):
        text = WORDS.decode(seen)
        places = told(text)
        known = places.get(text.rstrip().rpartition("\n")[2].partition(" ")[0])
        return first_tokens(WORDS, [known])[0] if known and text.endswith(" is in") else 0

    model = Reader(answer, len(WORDS))
    assert fact_accuracy(model, WORDS, FILLER, distance, facts, rows=5) == 1
    for ids in model.read:
        text = WORDS.decode(ids[0])
        assert len(told(text)) == len(set(told(text).values())) == facts
        between = text[text.rindex(".") + 1 :].rpartition("\n")[0]
        assert len(WORDS(between)["input_ids"]) == distance if distance == 0 else len(between) > distance


def test_facts_are_guessed_among_places_alone():
    first = first_tokens(WORDS, PLACES)
    guess = Reader(lambda seen: first[0], len(WORDS))
    elsewhere = Reader(lambda seen: 0, len(WORDS))  # all places are equally unlikely: the first one is taken
    scores = [fact_accuracy(model, WORDS, FILLER, 3, rows=200, seed=seed)
              for model in (guess, elsewhere) for seed in (0, 1)]
    assert scores[:2] == scores[2:] and scores[0] != scores[1] and all(0.02 < score < 0.13 for score in scores)


@pytest.mark.parametrize("given, message", [
    (lambda: copy_accuracy(llama(), 1), "length is 1: at least 2 tokens"),
    (lambda: copy_accuracy(llama(), 4, rows=0), "rows is 0"),
    (lambda: fact_accuracy(llama(), WORDS, FILLER, 1, rows=0), "rows is 0"),
    (lambda: fact_accuracy(llama(), WORDS, FILLER, 1, facts=0), "facts is 0"),
    (lambda: fact_accuracy(llama(), WORDS, FILLER, 1, facts=13), "facts is 13, distance 1: there are 12 people"),
    (lambda: fact_accuracy(llama(), WORDS, FILLER[:5], 6), "facts is 4, distance 6: there are 12 people and 5 tokens"),
    (lambda: fact_accuracy(llama(), WORDS, FILLER, -1), "distance -1"),
    (lambda: fact_accuracy(llama(), TOKENIZER, FILLER, 1), "begins Bath, Boston, .* with the same tokens"),
])
def test_memory_that_cannot_be_asked_for(given, message):
    with pytest.raises(ValueError, match=message) as err:
        given()
    one_line(err)


# Text


def student_of(teacher: Llama, **options) -> Llamba:
    torch.manual_seed(3)
    return Llamba.from_teacher(teacher, **RELEASED, **options).requires_grad_(False)


@pytest.mark.parametrize(
    "model", [llama(), student_of(llama()), student_of(llama(), keep_attention=[0])], ids=["llama", "llamba", "hybrid"]
)
def test_prompts_do_not_disturb_each_other(model):
    prompts = ["the", "the cat sat on the mat, and the dog", "a man, a", "x"]
    together = generate_text(model, TOKENIZER, prompts, 12)
    assert together == [generate_text(model, TOKENIZER, [prompt], 12)[0] for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(together, prompts))


def test_no_new_tokens_gives_the_prompt():
    assert generate_text(llama(), TOKENIZER, ["the cat", "a"], 0) == ["the cat", "a"]


def test_text_ends_at_the_end_of_text_token():
    model = llama()
    end = TOKENIZER.eos_token_id
    generator = torch.Generator().manual_seed(0)
    texts = generate_text(model, TOKENIZER, ["the cat"] * 64, 40, temperature=30.0, generator=generator)
    lengths = {len(TOKENIZER(text)["input_ids"]) for text in texts}
    assert "<|endoftext|>" not in "".join(texts)
    ids = model.generate(
        torch.tensor([TOKENIZER("the cat")["input_ids"]] * 64),
        40,
        temperature=30.0,
        stop_tokens=[end],
        generator=torch.Generator().manual_seed(0),
    )
    assert (ids == end).any() and len(lengths) > 1  # some ended early
    assert texts == [TOKENIZER.decode(row, skip_special_tokens=True) for row in ids]


class Ending(Llama):
    """A Llama with end tokens of its own."""

    stop_tokens = ()


@pytest.mark.parametrize("streamed", [True, False])
def test_text_ends_at_every_end_token(streamed):
    """Each row at the first token that is the tokenizer's end or one of the model's, special tokens or not."""
    model, shown = llama(), []
    model.__class__ = Ending
    prompts = ["the cat"] * 48 + ["a man"] * 16
    options = {"temperature": 30.0}
    if streamed:
        options["streamer"] = types.SimpleNamespace(put=lambda ids: shown.append(ids), end=lambda: None)
    free = model.generate(torch.tensor([TOKENIZER("the cat")["input_ids"]]), 4, temperature=0.0)[0, -4:].tolist()
    for ends in ((), (free[0],), (free[2], free[1])):
        Ending.stop_tokens = ends
        greedy = generate_text(model, TOKENIZER, ["the cat"], 4)[0]
        length = min([free.index(token) for token in (*ends, TOKENIZER.eos_token_id) if token in free], default=4)
        assert greedy == TOKENIZER.decode(TOKENIZER("the cat")["input_ids"] + free[:length], skip_special_tokens=True)
    Ending.stop_tokens = tuple(range(20, 60))  # some of them ordinary letters
    texts = generate_text(model, TOKENIZER, prompts, 30, generator=torch.Generator().manual_seed(0), **options)
    ids = [TOKENIZER(prompt)["input_ids"] for prompt in prompts]
    new = [TOKENIZER(text)["input_ids"][len(own):] for text, own in zip(texts, ids)]
    assert len({len(row) for row in new}) > 3 and not {*sum(new, [])} & {*Ending.stop_tokens}
    assert not streamed or shown


def test_tokenizer_without_an_end():
    tokenizer = train_tokenizer(["the cat sat"] * 3, V)
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = None
    assert generate_text(llama(), tokenizer, ["the", "the cat"], 3)[1].startswith("the cat")


@pytest.mark.parametrize(
    "prompts, message",
    [([], "no tokens"), ([""], "no tokens"), (["the", ""], "no tokens"), ("the cat", "a list of strings")],
)
def test_prompts_that_cannot_be_continued(prompts, message):
    with pytest.raises(ValueError, match=message):
        prompt_tokens(TOKENIZER, prompts)
    with pytest.raises(ValueError, match=message):
        generate_text(llama(), TOKENIZER, prompts, 3)


# Figure


def records(*stages: str, teacher: bool = True) -> list[dict]:
    evaluation = {"perplexity": 30.0} | ({"teacher_perplexity": 25.0} if teacher else {})
    lines = [{"step": 0, "evaluation": "attention replaced", **evaluation}]
    for index, stage in enumerate(stages):
        lines += [{"step": 5 * index + step, "stage": stage, "loss": 1.0 / step} for step in range(1, 6)]
        lines += [{"step": 5 * index + 5, "evaluation": f"after {stage}", **evaluation}]
    return lines


@pytest.mark.parametrize(
    "metrics, axes",
    [(records("orientation", "alignment", "distillation"), 4), (records("language", teacher=False), 2), (records(), 1),
     ([], 1)],
)
def test_draw_progress(metrics, axes, tmp_path):
    figure = draw_progress(metrics)
    assert isinstance(figure, Figure) and len(figure.axes) == axes
    figure.savefig(tmp_path / "progress.png")  # lays it out as well
    assert len(figure.axes[-1].lines[0].get_xdata()) == len([record for record in metrics if "evaluation" in record])


def test_comparison_is_a_value():
    result = Comparison(Evaluation(1.0, 5, 2.0), Evaluation(2.0, 5, 2.0), 0.5, 0.1)
    assert result.ratio == pytest.approx(math.e) and result == Comparison(
        Evaluation(1.0, 5, 2.0), Evaluation(2.0, 5, 2.0), 0.5, 0.1
    )
