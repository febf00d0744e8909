"""From text to sequences: tokenizer, packing, storage, order, cache."""

import itertools
import logging
import math
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch

from hf_lowrank.errors import UserError
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.storage.cache import cached_folder
from hf_lowrank.training.corpus import prepare_corpus
from hf_lowrank.training.recipe import DataSettings
from hf_lowrank.training.sequences import (
    LONGEST_RUN,
    SequenceStore,
    ShuffledSequences,
    _without_long_runs,
    collate,
    document_rows,
    encoded,
    load_tokenizer,
    packed_rows,
    padding_id,
    tokenizer_fingerprint,
    train_tokenizer,
    unigram_loss,
)

SOURCE = ["def f(x):\n    return x + 1\n", "naïve → text, with ß and 漢字\n", "import os\nimport sys\n"] * 5


@pytest.fixture
def tokenizer():
    return train_tokenizer(SOURCE, 300)


@pytest.fixture
def settings(texts):
    def make(**changes):
        given = {
            "source": "files",
            "train_files": [str(texts / "train*.txt")],
            "held_out_files": [str(texts / "held*.txt")],
            "sequence_length": 16,
            "vocabulary_size": 300,
            "evaluation_sequences": 8,
            **changes,
        }
        return DataSettings.model_validate(given)

    return make


def test_the_trained_tokenizer_is_lossless_and_reproducible(tokenizer, tmp_path):
    assert len(tokenizer) <= 300
    for text in [*SOURCE[:3], "never seen: \t\x00 é ☃"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer_fingerprint(train_tokenizer(SOURCE, 300)) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(train_tokenizer(SOURCE, 320)) != tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(tokenizer)
    assert padding_id(tokenizer) == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(UserError, match=r"data\.tokenizer must be a tokenizer .* got 'no/such-tokenizer'"):
        load_tokenizer("no/such-tokenizer")


def test_packed_sequences_are_the_concatenated_documents(tokenizer):
    ids = list(encoded(SOURCE, tokenizer, cut=None))
    assert all(document[-1] == tokenizer.eos_token_id for document in ids)
    joined = [token for document in ids for token in document]
    rows = list(packed_rows(iter(ids), 7))
    assert len(rows) == len(joined) // 7
    assert np.concatenate([row for row, _ in rows]).tolist() == joined[: len(rows) * 7]
    assert {tokens for _, tokens in rows} == {7}


def test_documents_are_truncated_and_padded(tokenizer):
    ids = list(encoded([*SOURCE[:3], "", "a"], tokenizer, cut=12))
    assert len(ids) == 4
    assert max(map(len, ids)) == 12
    assert ids[-1][-1] == tokenizer.eos_token_id
    rows = list(document_rows(iter([*ids, [5]]), 12, padding=1))
    assert len(rows) == 4
    for (row, tokens), document in zip(rows, ids, strict=True):
        assert row[:tokens].tolist() == document
        assert set(row[tokens:].tolist()) <= {1}


def store_of(folder, rows, length=4, vocabulary=100):
    SequenceStore.write(folder, "train", iter(rows), length, vocabulary)
    return SequenceStore.open(folder, "train")


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 2500])
@pytest.mark.parametrize("vocabulary", [100, 70_000])
def test_a_store_reads_back_what_was_written(tmp_path, count, vocabulary):
    ids = np.random.default_rng(0).integers(0, vocabulary, size=(count, 4))
    store = store_of(tmp_path, [(row, 3) for row in ids], vocabulary=vocabulary)
    assert len(store) == count
    assert store.ids.shape == (count, 4)
    assert np.array_equal(store.ids, ids)
    assert store.ids.dtype.itemsize == (2 if vocabulary == 100 else 4)
    assert store.lengths.tolist() == [3] * count
    # An independent reader, without pickle.
    assert np.array_equal(np.load(tmp_path / "train.npy", allow_pickle=False), ids)


def test_counts_and_the_unigram_loss_by_hand(tmp_path):
    rows = [(np.array([1, 2, 2, 0]), 3), (np.array([2, 3, 1, 2]), 4)]
    counts = store_of(tmp_path, rows).counts(5)
    expected = Counter([1, 2, 2, 2, 3, 1, 2])
    assert counts.tolist() == [expected[token] for token in range(5)]
    evaluation = EvaluationSet(torch.tensor([[4, 2, 1, 0]]), torch.tensor([[1, 1, 1, 0]]))
    by_hand = -(math.log(5 / 12) + math.log(3 / 12)) / 2
    assert unigram_loss(counts, evaluation) == pytest.approx(by_hand, rel=1e-12)


def test_the_evaluation_set_is_spread_over_the_held_out_split(tmp_path):
    rows = [(np.array([index, 1, 2, 0]), 3) for index in range(10)]
    evaluation = store_of(tmp_path, rows).spread(5)
    assert evaluation.input_ids[:, 0].tolist() == [0, 2, 4, 6, 8]
    assert evaluation.attention_mask.tolist() == [[1, 1, 1, 0]] * 5


def test_the_order_is_epochs_of_seeded_permutations(tmp_path):
    store = store_of(tmp_path, [(np.array([index, 1, 2, 3]), 4) for index in range(20)])

    def order(seed):
        sequences = ShuffledSequences(store, 50, seed)
        assert len(sequences) == 50
        return [int(sequences[index]["ids"][0]) for index in range(50)]

    first = order(0)
    assert sorted(first[:20]) == sorted(first[20:40]) == list(range(20))
    assert first[:20] != first[20:40]
    torch.manual_seed(5)
    np.random.seed(5)
    assert order(0) == first
    assert order(1) != first
    # Any index can be read without those before it.
    assert int(ShuffledSequences(store, 50, 0)[37]["ids"][0]) == first[37]


def test_a_batch_masks_what_is_not_predicted():
    full = {"ids": np.array([5, 6, 7], dtype=np.uint16), "length": 3}
    short = {"ids": np.array([8, 9, 0], dtype=np.uint16), "length": 2}
    batch = collate([full, short])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "attention_mask" not in collate([full, full])


def test_the_cache_is_used_and_rebuilt_when_damaged(cache, caplog):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "content").write_bytes(b"0123456789")

    folder = cached_folder("things", "key", make)
    assert folder.parent == cache
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert cached_folder("things", "key", make) == folder
    assert caplog.text.count("things from the cache") == 1
    assert cached_folder("things", "other key", make) != folder
    assert len(made) == 2
    for damage in (b"01234567", b"0123456780", None):
        if damage is None:
            (folder / "checksums.json").write_text("{")
        else:
            (folder / "content").write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            assert cached_folder("things", "key", make) == folder
        assert (folder / "content").read_bytes() == b"0123456789"
    assert len(made) == 5
    assert caplog.text.count("damaged") == 3
    assert not list(cache.glob(".making*"))


def test_a_failed_or_impossible_cache_leaves_nothing(cache, monkeypatch, tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise UserError("no text")

    with pytest.raises(UserError, match="no text"):
        cached_folder("things", "key", fail)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="HF_LOWRANK_CACHE"):
        cached_folder("things", "key", fail)


def test_a_second_preparation_reads_no_text(settings, monkeypatch, caplog):
    first = prepare_corpus(settings())
    monkeypatch.setattr("hf_lowrank.training.corpus.encoded", None)
    monkeypatch.setattr("hf_lowrank.training.corpus.train_tokenizer", None)
    second = prepare_corpus(settings())
    assert second.fingerprint == first.fingerprint
    assert second.evaluation.fingerprint == first.evaluation.fingerprint
    assert second.unigram_loss == first.unigram_loss
    assert np.array_equal(second.train.ids, first.train.ids)


@pytest.mark.parametrize("shape", ["packed", "documents"])
def test_a_corpus_is_what_the_texts_say(settings, texts, shape):
    corpus = prepare_corpus(settings(shape=shape, evaluation_sequences=2))
    decode = corpus.tokenizer.decode
    held_out = [(texts / f"held{number}.txt").read_text() for number in range(2)]
    if shape == "documents":
        assert len(corpus.train) == 10
        for row, text in zip(corpus.evaluation.input_ids, held_out, strict=True):
            assert text.startswith(decode(row.tolist()))
    else:
        assert held_out[0].startswith(decode(corpus.evaluation.input_ids[0].tolist()))
        assert len(corpus.train) > 100
    assert corpus.evaluation.input_ids.shape == (2, 16)
    assert 2 < corpus.unigram_loss < math.log(300)
    assert corpus.largest_id < len(corpus.tokenizer)


def test_a_tokenizer_is_trained_on_an_unbroken_run_in_seconds():
    generator = random.Random(0)
    run = "".join(generator.choice("abcdefghij") for _ in range(300_000))
    began = time.process_time()
    tokenizer = train_tokenizer([f"before {run} after", "plain text"], 400)
    assert time.process_time() - began < 40  # on a busy machine; whole, it takes minutes
    assert len(tokenizer) == 400
    assert tokenizer.decode(tokenizer(f"before {run} after")["input_ids"]) == f"before {run} after"
    # Texts without such runs are trained on as they are.
    words = [f"word{number} " * (number % 7) for number in range(200)]
    assert _without_long_runs("x" * LONGEST_RUN + " y") == ["x" * LONGEST_RUN + " y"]
    assert "".join(_without_long_runs(run + " y")) == run + " y"
    assert max(map(len, _without_long_runs(run))) == LONGEST_RUN
    assert len(train_tokenizer(words, 300)) <= 300
    assert max(map(len, _without_long_runs(" \n" * LONGEST_RUN))) == LONGEST_RUN


def test_too_little_text_is_named(settings, tmp_path):
    with pytest.raises(UserError, match=r"data\.evaluation_sequences must be at most \d+, .* got 100000"):
        prepare_corpus(settings(evaluation_sequences=100_000))
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match=r"short\.txt: the training split is empty"):
        prepare_corpus(settings(train_files=[str(tmp_path / "short.txt")]))


def test_a_stream_holds_out_its_head(tmp_path, monkeypatch):
    import json

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    texts = [f"{number} document {number * 31} of the stream" for number in range(300)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "tokenizer")
    settings = DataSettings(
        source="hub",
        dataset=str(folder),
        streaming=True,
        sequence_length=24,
        shape="documents",
        tokenizer=str(tmp_path / "tokenizer"),
        evaluation_sequences=8,
    )
    corpus = prepare_corpus(settings)
    decode = corpus.tokenizer.decode

    def text(ids):
        return decode([i for i in ids if i != corpus.tokenizer.pad_token_id]).split("<|")[0]

    held_out = [text(ids) for ids in corpus.evaluation.input_ids.tolist()]
    rows = list(itertools.islice(corpus.training_set(10, seed=0), 230))
    trained = [text(row["ids"].tolist()) for row in rows]
    assert len(held_out) == 8
    assert not set(held_out) & set(trained)
    assert len(trained) > 200
    # Without a shuffle buffer every pass, and every seed, has the stream's own order.
    again = list(itertools.islice(corpus.training_set(10, seed=1), 400))
    assert [row["ids"].tolist() for row in again[:230]] == [row["ids"].tolist() for row in rows]
    assert again[300 - 64]["ids"].tolist() == rows[0]["ids"].tolist()
    with pytest.raises(UserError, match="evaluation_sequences must be at most 300"):
        prepare_corpus(settings.model_copy(update={"evaluation_sequences": 301}))


def test_a_cache_folder_built_by_another_process_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path))

    def make(folder):
        (folder / "words.txt").write_text("the same")

    def slowly(folder):
        make(folder)
        there.append(cached_folder("things", "key", make))
        inodes.append((there[0] / "words.txt").stat().st_ino)

    there, inodes = [], []
    assert cached_folder("things", "key", slowly) == there[0]
    assert (there[0] / "words.txt").stat().st_ino == inodes[0]
    assert [path.name for path in tmp_path.iterdir()] == [there[0].name]
