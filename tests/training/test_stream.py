"""Streams: an order that depends on nothing but the seed, and places from which it goes on."""

import itertools
import json
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from hf_lowrank.training import load_recipe
from hf_lowrank.training.corpus import prepare_corpus
from hf_lowrank.training.sequences import collate, encoded_batch, train_tokenizer
from hf_lowrank.training.stream import Notes, Place
from tests.training.test_pretrain import same, trained, weights_of

TEXTS = [f"{number} of {number * 31} documents " * (number % 5) for number in range(120)]
FILES = 3
LENGTH = 16


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """The `data:` block of a stream of three files, some of whose documents are empty."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(FILES):
        part = TEXTS[number * 40 : number * 40 + 40]
        (folder / f"train-{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "tokenizer")
    return {
        "source": "hub",
        "dataset": str(folder),
        "streaming": True,
        "sequence_length": LENGTH,
        "tokenizer": str(tmp_path / "tokenizer"),
        "evaluation_sequences": 4,
    }


def corpus_of(write_recipe, stream, **changes):
    path = write_recipe(data={**stream, **changes})
    return prepare_corpus(load_recipe(path).data)


def rows_of(data, count):
    return [(row["ids"].tolist(), row["length"]) for row in itertools.islice(data, count)]


def batches_of(data, workers, count, batch):
    loader = DataLoader(data, batch_size=batch, num_workers=workers, collate_fn=collate, drop_last=True)
    return [found["input_ids"] for found in itertools.islice(loader, count)]


def test_packed_sequences_are_the_documents_in_order(write_recipe, stream):
    corpus = corpus_of(write_recipe, stream, shape="packed")
    end = corpus.tokenizer.eos_token_id
    kept = [text for text in TEXTS[corpus.stream_skip :] if text]
    ids = [token for text in kept for token in [*corpus.tokenizer(text)["input_ids"], end]]
    a_pass = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    rows = rows_of(corpus.training_set(0, 3), 2 * len(a_pass))
    assert [row for row, _ in rows] == a_pass + a_pass


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(("shape", "buffer"), [("packed", 0), ("documents", 0), ("packed", 20)])
def test_workers_change_no_batch(write_recipe, stream, workers, shape, buffer):
    corpus = corpus_of(write_recipe, stream, shape=shape, shuffle_buffer=buffer)

    def batches(number):
        data = corpus.training_set(0, 5, batch=3)
        return batches_of(data, number, 130, 3)  # more than one pass

    assert all(torch.equal(one, other) for one, other in zip(batches(0), batches(workers), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("shape", "buffer"), [("packed", 0), ("documents", 0), ("packed", 20)])
def test_a_stream_goes_on_from_every_place(write_recipe, stream, tmp_path, workers, shape, buffer):
    corpus = corpus_of(write_recipe, stream, shape=shape, shuffle_buffer=buffer)
    whole = corpus.training_set(0, 5)
    expected = rows_of(whole, 330)
    places = {place.sequences: place for *_, place in itertools.islice(whole.rows(), 330)}
    for sequences in (1, 2, 30, 31, 32, 33, 34, 100, 250, 300) if not workers else (34, 250):
        place = Place(**json.loads(json.dumps(vars(places[sequences]))))
        notes = Notes(tmp_path / f"notes{sequences}")
        data = corpus.training_set(0, 5, batch=2, noted=2, start=place, notes=notes)
        if workers:
            found = [row.tolist() for batch in batches_of(data, workers, 150, 2) for row in batch]
        else:
            found = [row for row, _ in rows_of(data, 330)]
        assert found[sequences:] == [row for row, _ in expected[sequences : len(found)]]
        after = (sequences // 2 + 5) * 2
        assert notes.place_of(after) == places[after]
        assert notes.place_of(sequences + 5 if sequences % 2 == 0 else sequences + 6) is None


def test_notes_hold_no_more_than_a_checkpoint_can_need(write_recipe, stream, tmp_path, monkeypatch):
    """However many steps lie between checkpoints, one place and what is read ahead is on disk."""
    held = []

    def forget(notes, sequences):
        before(notes, sequences)
        held.append(sorted(int(file.stem) for file in notes._folder.glob("*.json")))

    before = Notes.forget
    monkeypatch.setattr(Notes, "forget", forget)
    path = write_recipe(data={**stream, "shape": "packed"}, training__max_steps=12, training__save_steps=12)
    run = trained(path, tmp_path / "run")
    assert len(held) == 12
    size = Place.load(run / "checkpoint-12").sequences // 12
    for step, places in enumerate(held, 1):
        assert places[0] == step * size
        assert len(places) <= 2


def test_a_place_is_sought_without_tokenizing_what_is_before_it(write_recipe, stream, monkeypatch):
    corpus = corpus_of(write_recipe, stream, shape="packed")
    whole = corpus.training_set(0, 5)
    *_, place = next(itertools.islice(whole.rows(), 30, None))
    assert place.number == 0
    assert place.documents > 20
    assert place.state is not None
    read = []

    def encode(texts, *args, **options):
        read.extend(texts)
        return encoded_batch(texts, *args, **options)

    monkeypatch.setattr("hf_lowrank.training.stream.encoded_batch", encode)
    next(corpus.training_set(0, 5, start=place).rows())
    assert read[0] == TEXTS[corpus.stream_skip + place.documents]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer", [0, 10])
def test_a_streamed_run_resumes_from_its_place(write_recipe, stream, tmp_path, workers, buffer):
    path = write_recipe(
        data={**stream, "shape": "packed", "shuffle_buffer": buffer},
        training__max_steps=30,
        training__save_steps=7,
        training__dataloader_num_workers=workers,
        training__gradient_accumulation_steps=2,
    )
    run = trained(path, tmp_path / "run")
    straight = trained(write_recipe("straight.yaml", training__dataloader_num_workers=0), tmp_path / "straight")
    assert same(weights_of(run, 30), weights_of(straight, 30))
    for step in (28, 14, 7):
        place = Place.load(run / f"checkpoint-{step}")
        assert place.sequences == step * 8
        for later in (7, 14, 21, 28, 30):
            if later > step:
                shutil.rmtree(run / f"checkpoint-{later}", ignore_errors=True)
        assert same(weights_of(trained(path, run), 30), weights_of(straight, 30))
