"""Sources of text, and the errors of unusable ones."""

import bz2
import gzip
import hashlib
import json
import lzma

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from hf_lowrank.errors import UserError
from hf_lowrank.training.files import expanded, read_files
from hf_lowrank.training.recipe import DataSettings, load_recipe
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


MARK = b"\xef\xbb\xbf"
ROWS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
LISTED = json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
TABLE = "".join(["id,text\n", *(f'{number},"{text}"\n' for number, text in enumerate(TEXTS))]).encode()
KINDS = {
    "plain.jsonl": ROWS,
    "part[0].jsonl": ROWS,
    "UPPER.JSONL": ROWS,
    "marked.jsonl": MARK + ROWS,
    "rows.ndjson": ROWS,
    "rows.json": ROWS,
    "array.json": LISTED,
    "zipped.jsonl.gz": gzip.compress(ROWS),
    "zipped.json.bz2": bz2.compress(LISTED),
    "zipped.jsonl.XZ": lzma.compress(ROWS),
    "table.csv": TABLE,
    "table.tsv": TABLE.replace(b",", b"\t"),
    "table.csv.gz": gzip.compress(TABLE),
}


@pytest.mark.parametrize("name", KINDS)
def test_files_of_every_kind_have_the_same_documents(tmp_path, name):
    (tmp_path / name).write_bytes(KINDS[name])
    documents = local_files([str(tmp_path / name)], None, 0.25, "text")
    assert list(documents.train()) == [text for text in TEXTS if not is_held_out(text, 0.25)]
    assert list(documents.held_out()) == [text for text in TEXTS if is_held_out(text, 0.25)]


def test_words_that_a_table_reader_takes_for_nothing_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("text\nnull\nNA\n\nnan\n")
    assert list(read_files([str(tmp_path / "a.csv")], "text")) == ["null", "NA", "nan"]


def test_a_folder_stands_for_all_that_is_readable_in_it(tmp_path):
    write_all_kinds(tmp_path)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "d.txt").write_text("deep")
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert list(read_files(expanded([str(tmp_path)], "data.train_files"), "text")) == [*TEXTS, "deep"]


def test_remote_files_are_read_by_their_address(tmp_path, write_recipe):
    system = fsspec.filesystem("memory")
    for number in (0, 1):
        system.pipe(f"/corpus/part{number}.jsonl", ROWS)
    documents = local_files(["memory://corpus/*.jsonl"], None, 0.25, "text")
    assert list(documents.train()) == 2 * [text for text in TEXTS if not is_held_out(text, 0.25)]
    whole = local_files(["memory://corpus"], None, 0.25, "text")
    assert (whole.fingerprint, list(whole.train())) == (documents.fingerprint, list(documents.train()))
    system.pipe("/corpus/part1.jsonl", ROWS + ROWS)
    assert local_files(["memory://corpus"], None, 0.25, "text").fingerprint != documents.fingerprint
    with pytest.raises(UserError, match=r"none.jsonl: data.train_files names a file that does not exist"):
        local_files(["memory://corpus/none.jsonl"], None, 0.25, "text")
    path = write_recipe(data__train_files=["memory://corpus/*.jsonl"])
    assert load_recipe(path).data.train_files == ["memory://corpus/*.jsonl"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "marked.txt").write_bytes(MARK + b"hello\r\nworld")
    (tmp_path / "plain.txt").write_bytes(b"hello\nworld")
    marked, plain = (local_files([f"{tmp_path}/{name}.txt"], [], 0.5, "text") for name in ("marked", "plain"))
    assert [*marked.train(), *marked.held_out()] == [*plain.train(), *plain.held_out()] == ["hello\n", "world"]
    # What an earlier version had cached for such a file, with the mark, is not used.
    assert marked.fingerprint != hashlib.sha256(b"text 0.5 TrueTrue" + _digest(tmp_path / "marked.txt")).hexdigest()
    assert plain.fingerprint == hashlib.sha256(b"text 0.5 TrueTrue" + _digest(tmp_path / "plain.txt")).hexdigest()


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_a_byte_order_mark_in_compressed_text_is_no_text(tmp_path, suffix, pack):
    (tmp_path / f"marked.txt.{suffix}").write_bytes(pack(MARK + b"hello"))
    assert list(read_files([f"{tmp_path}/marked.txt.{suffix}"], "text")) == ["hello"]


@pytest.mark.parametrize(("suffix", "package"), [(".jsonl.zst", "zstandard"), (".txt.lz4", "lz4")])
def test_a_compression_whose_package_is_missing_is_named(tmp_path, monkeypatch, suffix, package):
    (tmp_path / f"a{suffix}").write_bytes(b"(\xb5/\xfd")
    monkeypatch.setattr("hf_lowrank.training.files.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"a{suffix}: reading it needs the package {package}; run `pip install"):
        local_files([f"{tmp_path}/a{suffix}"], None, 0.5, "text")


def _digest(file):
    return hashlib.sha256(file.read_bytes()).digest()


def test_one_text_file_holds_out_its_end(tmp_path):
    lines = [f"line {number}\n" for number in range(100)]
    (tmp_path / "input.txt").write_text("".join(lines))
    documents = local_files([f"{tmp_path}/input.txt"], None, 0.05, "text")
    assert list(documents.train()) + list(documents.held_out()) == ["".join(lines[:95]), "".join(lines[95:])]


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
    ("image.png", b"x", r"must name .txt, .jsonl, .*, .parquet files, compressed or not, got '.png'"),
    ("bare", b"x", "no suffix"),
    ("empty.txt", b" \n", "contains no text"),
    ("empty.jsonl", b"", "contains no text"),
    ("latin.txt", b"caf\xe9 ", "not UTF-8 text"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    ("list.jsonl", b"[1]\n", "row 1: data.text_column 'text' must hold text, got int"),
    ("column.jsonl", b'{"body": "a"}\n', "no data.text_column 'text'; columns: body"),
    ("number.jsonl", b'{"text": 3}\n', "data.text_column 'text' must hold text, got int"),
    ("lines.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 must be a JSON object, got list"),
    ("null.jsonl", b"\xef\xbb\xbfnull\n", "line 1 must be a JSON object, got null"),
    ("late.jsonl", b'{"text": "a"}\n' * 70_000 + b'{"text": "b"\n', "line 70001 is not JSON"),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8 text"),
    ("broken.json.gz", b"no gzip", "not readable|not a readable json file"),
    ("number.csv", b"text\n1\n", "row 1: data.text_column 'text' must hold text, got int"),
    ("column.csv", b"body\na\n", "row 1 has no data.text_column 'text'; columns: body"),
    ("broken.parquet", b"PAR1 no", "not a readable parquet file"),
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
    with pytest.raises(UserError, match=r"the folder contains no .txt"):
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
            next(iter(hub_stream(settings, settings.split)) if streaming else hub_documents(settings).train())
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
