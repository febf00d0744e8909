"""A study that runs in seconds: a corpus of random words, a model of a few thousand parameters."""

import json
import random

import yaml

MODEL = {
    "architecture": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TRAINING = {
    "learning_rate": 0.003,
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "save_steps": 6,
    "logging_steps": 4,
}
METHODS = {
    "full_rank": {"name": "full_rank"},
    "galore": {"name": "galore", "rank": 4, "update_proj_gap": 3},
}
MEASURE = {"metrics": ["loss", "weight_stable_rank", "method_barrier"], "settings": {"sequences": 4}}
EVALUATE = {"tasks": "pylib_bits_per_byte", "limit": 8, "steps": "last"}


def make_text(seed, lines=700, words=6):
    """Lines of words that mostly follow each other in one order."""
    generator = random.Random(seed)
    known = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    place, text = 0, []
    for _ in range(lines):
        line = []
        for _ in range(generator.randint(1, 2 * words - 1)):
            place = (place + 1) % len(known) if generator.random() < 0.8 else generator.randrange(len(known))
            line.append(known[place])
        text.append(" ".join(line) + ".")
    return "\n".join(text)


def write_corpus(folder):
    """A training text, and enough held-out documents to make downstream items from."""
    (folder / "train.txt").write_text(make_text(0))
    documents = [json.dumps({"text": make_text(seed, lines=85, words=2)}) for seed in range(1, 180)]
    (folder / "held.jsonl").write_text("\n".join(documents))


def write_recipe(folder, corpus, method, file=None, **changes):
    """A tiny recipe; changes by dotted key with __, None removes a key."""
    recipe = {
        "method": dict(METHODS[method]),
        "model": dict(MODEL),
        "data": {
            "source": "files",
            "train_files": [str(corpus / "train.txt")],
            "held_out_files": [str(corpus / "held.jsonl")],
            "sequence_length": 24,
            "vocabulary_size": 300,
            "evaluation_sequences": 8,
        },
        "training": dict(TRAINING),
    }
    for key, value in changes.items():
        *parts, last = key.split("__")
        section = recipe
        for part in parts:
            section = section.setdefault(part, {})
        if value is None:
            section.pop(last)
        else:
            section[last] = value
    path = folder / (file or f"{method}.yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def study_data(**changes):
    """A study of two methods as plain data."""
    data = {
        "name": "tiny",
        "baseline": "full_rank",
        "members": {"full_rank": "full_rank.yaml", "galore": "galore.yaml"},
        "seeds": [0, 1],
        "measure": dict(MEASURE),
        "evaluate": dict(EVALUATE),
        "threads": 1,
    }
    data.update(changes)
    return {key: value for key, value in data.items() if value is not None}
