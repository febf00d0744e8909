"""Files that are read beside a run's tables: stamps of a study, caches, texts, cards, locks, item scores."""

import hashlib
import json
import os

from hf_lowrank.errors import UserError
from tests.fuzz import mutations

CONFIG = {"model_type": "llama", "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1}


def as_jsonl(rows):
    """A row a line, whatever `rows` has become."""
    rows = rows if isinstance(rows, list) else [rows]
    return b"".join(mutations.as_json(row) + b"\n" for row in rows)


# -- a study's own files

CLAIMS = {
    "alpha": 0.05,
    "claims": [
        {
            "id": "random_sharpness",
            "statement": "Full-rank is sharper.",
            "verdict": "reproduced",
            "effect": 0.5,
            "ci_low": 0.2,
            "ci_high": 0.8,
            "unit": "ln",
            "p_value": 0.01,
            "n": 5,
            "test": "paired t",
            "reason": "",
            "details": [{"label": "galore", "effect": 0.5, "p_value": 0.01, "n": 5}],
        }
    ],
}


def read_claims(folder, content):
    from hf_lowrank.claims.claim import read_claims
    from hf_lowrank.claims.examine import claims_table

    (folder / "claims.json").write_bytes(content)
    claims_table(read_claims(folder))


ANSWER = {
    "methods": 8, "runs": 16, "checkpoints": 32, "reason": None, "gain": 0.1, "gain_low": 0.0, "gain_high": 0.2,
    "p_value": 0.04, "r2_perplexity": 0.5, "r2_both": 0.6, "ranking": [{"metric": "random_sharpness", "gain": 0.05}],
}  # fmt: skip
PREDICTION = {"unseen_method": ANSWER, "unseen_run": ANSWER, "notes": []}


def read_prediction(folder, content):
    from hf_lowrank.claims.predicted import prediction_claim

    (folder / "prediction.json").write_bytes(content)
    prediction_claim(folder / "prediction.json")


SWEEP = [
    {"member": "galore", "learning_rate": rate, "loss": 4.0, "chosen": rate == 1e-3, "at_edge": True, "run": "sweep/x"}
    for rate in (1e-3, 2e-3)
]
SWEEP_OVER_TWO_KEYS = [
    {
        "member": "galore",
        "values": {"training.learning_rate": rate, "method.scale": 0.25},
        "ranges": {"training.learning_rate": [1e-3, 2e-3], "method.scale": {"uniform": [0.1, 1]}},
        "loss": None if rate == 2e-3 else 4.0,
        "failure": "diverged" if rate == 2e-3 else None,
        "chosen": rate == 1e-3,
        "extension": False,
        "edges": {"training.learning_rate": 0} if rate == 1e-3 else {},
        "run": "sweep/x",
    }
    for rate in (1e-3, 2e-3)
]


def read_sweep(folder, content):
    from hf_lowrank.study.spec import load_study
    from hf_lowrank.study.stages import read_winners

    members = {"full_rank": "recipe.yaml", "galore": "recipe.yaml"}
    study = {"name": "tiny", "baseline": "full_rank", "members": members, "sweep": {"learning_rate": [1e-3, 2e-3]}}
    (folder / "recipe.yaml").write_text("method: {name: full_rank}\n")
    (folder / "study.yaml").write_bytes(mutations.as_yaml(study))
    (folder / "sweep.json").write_bytes(content)
    read_winners(load_study(folder / "study.yaml"), folder)


def read_timings(folder, content):
    from hf_lowrank.study.plan import TIMINGS, read_timings

    (folder / TIMINGS).write_bytes(content)
    read_timings(folder)


def read_stamps(folder, content):
    from hf_lowrank.study.units import STAMPS, read_stamps

    (folder / STAMPS).write_bytes(content)
    read_stamps(folder)


# -- a run's own files

RUN_RECIPE = {"name": "tiny", "seed": 0, "method": {"name": "galore", "rank": 4}, "training": {"max_steps": 2}}


def read_run_recipe(folder, content):
    """The recipe of a run directory, for whoever goes on with the run, measures it, shows it or pushes it."""
    from types import SimpleNamespace

    from hf_lowrank.hub.cards import public_recipe
    from hf_lowrank.hub.contents import push_file
    from hf_lowrank.methods import METHODS
    from hf_lowrank.runs.records import load_run
    from hf_lowrank.runs.trajectory import Trajectory
    from hf_lowrank.training.start import check_belongs

    (folder / "recipe.yaml").write_bytes(content)
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    (checkpoint / "model.safetensors").write_bytes(b"")
    settings = METHODS["galore"].settings(rank=4)
    whole = {**RUN_RECIPE, "method": {"name": "galore", **settings.model_dump(mode="json")}}
    faults = []
    readers = (
        lambda: check_belongs(folder, SimpleNamespace(plain=lambda: whole, settings=settings)),
        lambda: push_file("recipe.yaml", folder / "recipe.yaml"),
        lambda: load_run(folder),
        lambda: public_recipe(folder),
        lambda: Trajectory(folder).run,
    )
    for read in readers:
        try:
            read()
        except UserError as error:
            faults.append(error)
    if faults:
        raise faults[0]


CHECKSUMS = {"model.safetensors": {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7, "samples": "00"}}


def read_checksums(folder, content):
    from hf_lowrank.runs.checkpoints import check_files
    from hf_lowrank.storage.checksums import fingerprint

    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "checksums.json").write_bytes(content)
    fingerprint(folder, ["model.safetensors"])
    check_files(folder)


def locks():
    return [b"", b"12345", b"4194304\n"]


def read_lock(folder, content):
    """A lock file that somebody left."""
    from hf_lowrank.storage.locks import locked

    (folder / ".train.lock").write_bytes(content)
    with locked(folder, "train"):
        pass


ITEMS = [{"item": "pylib_copy-0000", "acc": 1.0}, {"item": "pylib_copy-0001", "acc": 0.0}]
SCORE = {
    "run": "galore", "method": "galore", "seed": 0, "step": 100, "task": "pylib_copy", "metric": "acc", "value": 0.5,
    "stderr": 0.01, "ci_low": 0.4, "ci_high": 0.6, "n": 2, "chance": 0.5, "higher_is_better": True, "group": None,
    "task_version": "1", "lm_eval_version": "0.4.13", "items": "abc",
}  # fmt: skip


def read_items(folder, content):
    from hf_lowrank.downstream import compare
    from hf_lowrank.runs.scores import item_file

    for name, items in (("ours", content), ("theirs", as_jsonl(ITEMS))):
        (folder / name).mkdir()
        table = folder / name / "downstream.jsonl"
        table.write_bytes(as_jsonl([SCORE]))
        file = item_file(table, 100, "pylib_copy")
        file.parent.mkdir(parents=True)
        file.write_bytes(items)
    compare(folder / "ours", folder / "theirs")


# -- caches

CACHED = {"a.npy": {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}}


def read_cache(folder, content):
    """A cached folder whose index is wrong is rebuilt."""
    from hf_lowrank.storage.cache import cached_folder
    from hf_lowrank.storage.checksums import FILE_NAME

    def make(place):
        (place / "a.npy").write_bytes(b"abc")

    found = cached_folder("tokens", "key", make)
    (found / FILE_NAME).write_bytes(content)
    assert (cached_folder("tokens", "key", make) / "a.npy").read_bytes() == b"abc"


# -- texts

DOCUMENTS = [{"text": "a document"}, {"text": "another", "url": None}]


def read_documents(suffix):
    def read(folder, content):
        from hf_lowrank.training.files import read_files

        file = folder / f"text{suffix}"
        file.write_bytes(content)
        list(read_files([str(file)], "text"))

    return read


def texts():
    return [b"some text\n", "größer\r\n".encode(), "文".encode("utf-16")]


def parquets():
    import io

    import pyarrow
    from pyarrow import parquet

    files = []
    for table in ({"text": ["a", "b", None]}, {"text": [1, 2]}, {"other": ["a"]}):
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table(table), buffer)
        files.append(buffer.getvalue())
    return files


# -- cards

CARD = {"license": "mit", "tags": ["low-rank"], "model-index": [{"name": "x", "results": []}]}


def as_card(tree):
    return b"---\n" + mutations.as_yaml(tree) + b"---\nMy own words.\n"


def read_card(folder, content):
    from hf_lowrank.hub.cards import model_card

    model_card(None, "user/repo", previous=content.decode("utf-8", errors="replace"))


STATE = {"global_step": 1, "max_steps": 1, "log_history": [{"step": 1, "eval_loss": 3.5}, {"step": 1, "loss": 3.6}]}


def read_for_card(name):
    """A file of a run directory, for the card that is pushed with it."""

    def read(folder, content):
        from hf_lowrank.hub.cards import model_card

        checkpoint = folder / "checkpoint-1"
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text(json.dumps(CONFIG))
        (checkpoint / "trainer_state.json").write_text(json.dumps(STATE))
        (folder / "recipe.yaml").write_bytes(mutations.as_yaml(RUN_RECIPE))
        (folder / name).write_bytes(content)
        model_card(folder, "user/repo", checkpoint=checkpoint)

    return read


MANIFEST = {"run": "galore", "identity": "0" * 64, "step": 100, "files": {"config.json": "0" * 64}}


def read_manifest(folder, content):
    from hf_lowrank.hub.repository import Repository

    class Stored(Repository):
        def __init__(self):
            pass

        def read(self, path, commit):
            return content

    Stored().manifest("0" * 40)


QUEUED = ["checkpoint-100", "checkpoint-7", "refused-3", ".scrap-0"]


def read_queue(folder, content):
    """What stands in the queue's folder, by name."""
    from hf_lowrank.hub.callback import Queue

    queue = Queue(folder, "user/repo")
    queue.folder.mkdir(parents=True)
    for line in content.split(b"\n")[:20]:
        name = line.replace(b"/", b"_").replace(b"\0", b"_")[:200]
        if name not in (b"", b".", b".."):
            (queue.folder / os.fsdecode(name)).mkdir(exist_ok=True)
    queue.clean()
    for job in queue.jobs():
        queue.set_aside(job.step)


SIDE_FILES = {
    "claims": ([CLAIMS], mutations.as_json, read_claims),
    "prediction": ([PREDICTION], mutations.as_json, read_prediction),
    "sweep": ([SWEEP, SWEEP_OVER_TWO_KEYS], mutations.as_json, read_sweep),
    "timings": ([{"train galore-seed0": 3.5}], mutations.as_json, read_timings),
    "stamps": ([{"claims": "0" * 64}], mutations.as_json, read_stamps),
    "run_recipe": ([RUN_RECIPE], mutations.as_yaml, read_run_recipe),
    "checksums": ([CHECKSUMS], mutations.as_json, read_checksums),
    "lock": (locks, None, read_lock),
    "item_scores": ([ITEMS], as_jsonl, read_items),
    "cache_index": ([CACHED], mutations.as_json, read_cache),
    "text": (texts, None, read_documents(".txt")),
    "jsonl": ([DOCUMENTS], as_jsonl, read_documents(".jsonl")),
    "parquet": (parquets, None, read_documents(".parquet")),
    "card": ([CARD], as_card, read_card),
    "card_facts": ([{"tokens_seen": 8, "device": "cpu"}], mutations.as_json, read_for_card("facts.json")),
    "card_state": ([STATE], mutations.as_json, read_for_card("checkpoint-1/trainer_state.json")),
    "card_scores": ([[SCORE]], as_jsonl, read_for_card("downstream.jsonl")),
    "manifest": ([MANIFEST], mutations.as_json, read_manifest),
    "push_queue": (lambda: ["\n".join(QUEUED).encode()], None, read_queue),
}
