"""Corpora and recipes that train in seconds."""

import random
import re

import pytest
import yaml

WORDS = re.findall("..", "albegadeepzeetthiokalamunuxiompirhsitauphchps")


def make_text(seed, words=400):
    """Text with something to learn: each word is mostly followed by its neighbour in the list."""
    generator = random.Random(seed)
    place, text = 0, []
    for _ in range(words):
        place = (place + 1) % len(WORDS) if generator.random() < 0.8 else generator.randrange(len(WORDS))
        text.append(WORDS[place])
    return " ".join(text)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder for this test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(folder))
    return folder


@pytest.fixture
def texts(tmp_path):
    """A folder of twelve .txt files; two are for evaluation."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(10):
        (folder / f"train{number}.txt").write_text(make_text(number))
    for number in range(2):
        (folder / f"held{number}.txt").write_text(make_text(100 + number))
    return folder


@pytest.fixture
def plain_recipe(texts):
    """A tiny recipe as plain data."""
    return {
        "method": {"name": "full_rank"},
        "model": {
            "architecture": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        },
        "data": {
            "source": "files",
            "train_files": ["texts/train*.txt"],
            "held_out_files": ["texts/held*.txt"],
            "sequence_length": 16,
            "vocabulary_size": 300,
            "evaluation_sequences": 8,
        },
        "training": {
            "learning_rate": 0.003,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 3,
            "save_steps": 3,
            "logging_steps": 1,
        },
    }


@pytest.fixture
def write_recipe(tmp_path, plain_recipe):
    """Writes the tiny recipe with changes by dotted key; None removes the key. Returns the path."""

    def write(file="tiny.yaml", /, **changes):
        for dotted, value in changes.items():
            section = plain_recipe
            *parts, last = dotted.split("__")
            for part in parts:
                section = section.setdefault(part, {})
            if value is None:
                section.pop(last, None)
            else:
                section[last] = value
        path = tmp_path / file
        path.write_text(yaml.safe_dump(plain_recipe))
        return path

    return write
