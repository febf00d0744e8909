"""Sources of text, and the errors of unusable ones."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from hf_lowrank.errors import UserError
from hf_lowrank.training.recipe import DataSettings
from hf_lowrank.training.sources import hub_documents, hub_stream, is_held_out, local_files, python_library

TEXTS = [f"document number {number} says {number * 7}" for number in range(60)]


def write_all_kinds(folder):
    (folder / "a.txt").write_text(TEXTS[0])
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS[1:30]) + "\n")
    parquet.write_table(pyarrow.table({"text": [*TEXTS[30:], None]}), folder / "c.parquet")


def test_all_kinds_of_local_files_are_read_in_order(tmp_path):
    write_all_kinds(tmp_path)
    documents = local_files([f"{tmp_path}/a.txt", f"{tmp_path}/[bc].*"], None, 0.25, "text")
    train, held_out = list(documents.train()), list(documents.held_out())
    assert sorted(train + held_out) == sorted(TEXTS)
    assert train == [text for text in TEXTS if not is_held_out(text, 0.25)]
    assert 5 <= len(held_out) <= 25
    assert list(documents.train()) == train


def test_named_held_out_files_are_the_whole_held_out_split(tmp_path):
    write_all_kinds(tmp_path)
    documents = local_files([f"{tmp_path}/b.jsonl"], [f"{tmp_path}/c.parquet"], 0.5, "text")
    assert list(documents.train()) == TEXTS[1:30]
    assert list(documents.held_out()) == TEXTS[30:]


def test_the_fingerprint_follows_the_content_alone(tmp_path):
    write_all_kinds(tmp_path)
    names = [f"{tmp_path}/*.txt", f"{tmp_path}/*.jsonl"]
    first = local_files(names, None, 0.1, "text").fingerprint
    (tmp_path / "a.txt").write_text(TEXTS[0])
    assert local_files(names, None, 0.1, "text").fingerprint == first
    (tmp_path / "a.txt").write_text(TEXTS[0] + ".")
    assert local_files(names, None, 0.1, "text").fingerprint != first
    assert local_files(names, None, 0.2, "text").fingerprint != local_files(names, None, 0.1, "text").fingerprint


BAD_FILES = [
    ("none.txt", None, "names a file that does not exist"),
    ("none*.txt", None, "matches no file"),
    ("image.png", b"x", r"must name .txt, .jsonl, .parquet files, got '.png'"),
    ("bare", b"x", "no suffix"),
    ("empty.txt", b" \n", "contains no text"),
    ("empty.jsonl", b"", "contains no text"),
    ("latin.txt", b"caf\xe9 ", "not UTF-8 text"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    ("list.jsonl", b"[1]\n", "line 1 must be a JSON object, got list"),
    ("column.jsonl", b'{"body": "a"}\n', "line 1 has no data.text_column 'text'; columns: body"),
    ("number.jsonl", b'{"text": 3}\n', "data.text_column 'text' must hold text, got int"),
    ("broken.parquet", b"PAR1 no", "not a readable Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "part"), BAD_FILES, ids=[bad[0] for bad in BAD_FILES])
def test_bad_files_are_named(tmp_path, name, content, part):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=part) as error:
        list(local_files([str(tmp_path / name)], None, 0.5, "text").train())
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_column_and_a_folder(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"no data.text_column 'text'; columns: body"):
        list(local_files([f"{tmp_path}/c.parquet"], None, 0.5, "text").train())
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(UserError, match="this is a folder"):
        local_files([f"{tmp_path}/d.txt"], None, 0.5, "text")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="held_out_files must not be among"):
        local_files([f"{tmp_path}/a.txt"], [f"{tmp_path}/a.txt"], 0.5, "text")


def test_the_standard_library_is_split_by_file_without_packages(tmp_path):
    for number in range(40):
        (tmp_path / f"module{number}.py").write_text(f"x = {number}\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "site-packages" / "other").mkdir(parents=True)
    (tmp_path / "site-packages" / "other" / "foreign.py").write_text("foreign")
    documents = python_library(0.3, tmp_path)
    train, held_out = list(documents.train()), list(documents.held_out())
    assert sorted(train + held_out) == sorted(f"x = {number}\n" for number in range(40))
    assert 4 <= len(held_out) <= 20
    assert is_held_out(f"module{held_out[0].split()[-1]}.py", 0.3)
    (tmp_path / "new.py").write_text("y = 1\n")
    assert set(held_out) <= set(python_library(0.3, tmp_path).held_out())
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no readable .py files"):
        python_library(0.3, empty)


def test_the_installed_standard_library_is_found():
    text = next(python_library(0.05).train())
    assert len(text) > 10


def test_the_held_out_share_is_a_fixed_property_of_the_key():
    keys = [f"key {number}" for number in range(4000)]
    held_out = [key for key in keys if is_held_out(key, 0.1)]
    assert 320 <= len(held_out) <= 480
    assert all(is_held_out(key, 0.2) for key in held_out)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Settings for a dataset that `datasets` reads from a folder, as it would from the Hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:50]))
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[50:]))

    def settings(**changes):
        given = {"source": "hub", "dataset": str(folder), "sequence_length": 16, "tokenizer": "x", **changes}
        return DataSettings.model_validate(given)

    return settings


def test_a_hub_dataset_is_split_by_share_or_by_name(hub):
    documents = hub_documents(hub(held_out_share=0.3))
    assert sorted([*documents.train(), *documents.held_out()]) == sorted(TEXTS[:50])
    assert list(documents.train()) == [text for text in TEXTS[:50] if not is_held_out(text, 0.3)]
    named = hub_documents(hub(held_out_split="validation"))
    assert list(named.train()) == TEXTS[:50]
    assert list(named.held_out()) == TEXTS[50:]
    assert named.fingerprint != documents.fingerprint


def test_a_stream_skips_and_shuffles_by_the_seed(hub):
    settings = hub(streaming=True)
    assert list(hub_stream(settings, "train")) == TEXTS[:50]
    assert list(hub_stream(settings, "train", seed=1, skip=7)) == TEXTS[7:50]
    shuffled = hub(streaming=True, shuffle_buffer=20)
    first = list(hub_stream(shuffled, "train", seed=1))
    assert sorted(first) == sorted(TEXTS[:50])
    assert first != TEXTS[:50]
    assert list(hub_stream(shuffled, "train", seed=1)) == first
    assert list(hub_stream(shuffled, "train", seed=2)) != first


@pytest.mark.parametrize("streaming", [False, True])
def test_errors_of_a_hub_dataset_are_one_line(hub, tmp_path, streaming):
    def message(**changes):
        settings = hub(streaming=streaming, **changes)
        with pytest.raises(UserError) as error:
            next(hub_stream(settings, settings.split) if streaming else hub_documents(settings).train())
        assert "\n" not in str(error.value)
        return str(error.value)

    # The tests run with HF_HUB_OFFLINE=1: the Hub is really out of reach.
    assert "data.dataset 'allenai/c4' must be reachable" in message(dataset="allenai/c4", subset="en")
    assert "data.dataset" in message(dataset=str(tmp_path / "none"))
    assert "must be a dataset on the Hub" in message(dataset=str(tmp_path / "none"))
    assert "data.split 'dev' is not among those" in message(split="dev")
    assert "data.subset 'fr' is not among those" in message(subset="fr")
    assert "data.text_column 'body' is not in" in message(text_column="body")


def test_a_missing_dataset_and_an_unknown_failure(hub, monkeypatch):
    import datasets

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    error = datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")
    with pytest.raises(UserError, match=r"data.dataset 'a/b' must be a dataset on the Hub that you can access"):
        hub_documents(hub(dataset="a/b"))
    error = RuntimeError("the disk is on fire\nsecond line")
    with pytest.raises(UserError, match=r"could not be read, RuntimeError: the disk is on fire$"):
        hub_documents(hub(dataset="a/b"))
