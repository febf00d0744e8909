"""The table survives what happens to files: torn lines, repeated rows, foreign lines."""

from __future__ import annotations

import json
import math

import pytest

from hf_lowrank.errors import UserError
from hf_lowrank.runs.measurements import Measurement, append_measurements, read_measurements


def row(step=1, value=1.0, **rest):
    return Measurement(run="r", method="galore", seed=0, step=step, metric="loss", value=value, **rest)


def test_rows_come_back_as_they_went(tmp_path):
    rows = [row(1, 0.1 + 0.2, settings={"t": 1e-9}, n=3), row(2, math.nan, reason="because"), row(3, math.inf)]
    append_measurements(tmp_path / "m.jsonl", rows)
    first, second, third = read_measurements(tmp_path / "m.jsonl")
    assert first == rows[0]
    assert math.isnan(second.value)
    assert second.reason == "because"
    assert math.isnan(third.value)
    columns = list(json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0]))
    assert columns[:6] == ["run", "method", "seed", "step", "metric", "scope"]
    assert columns[6:] == ["value", "ci_low", "ci_high", "n", "baseline", "settings", "reason",
                           "checkpoint", "baseline_checkpoint", "checksum"]  # fmt: skip


def test_a_torn_last_line_is_dropped_and_repaired(tmp_path):
    file = tmp_path / "m.jsonl"
    append_measurements(file, [row(1), row(2)])
    whole = file.read_bytes()
    for cut in (2, 10, len(whole) // 2 - 1):
        file.write_bytes(whole[:-cut])
        assert [r.step for r in read_measurements(file)] == [1]
        append_measurements(file, [row(3)])
        assert [r.step for r in read_measurements(file)] == [1, 3]
    file.write_bytes(whole[:-1])  # an editor took the newline: the row is whole, as its checksum says
    assert [r.step for r in read_measurements(file)] == [1, 2]
    append_measurements(file, [row(3)])
    assert [r.step for r in read_measurements(file)] == [1, 2, 3]
    file.write_bytes(b'{"run": "r"')
    append_measurements(file, [row(4)])
    assert [r.step for r in read_measurements(file)] == [4]


def test_the_last_row_of_a_key_counts(tmp_path):
    file = tmp_path / "m.jsonl"
    append_measurements(file, [row(1, 1.0), row(1, 2.0, settings={"draws": 2}), row(1, 3.0)])
    assert [r.value for r in read_measurements(file)] == [2.0, 3.0]


def test_a_foreign_line_is_named(tmp_path):
    file = tmp_path / "m.jsonl"
    append_measurements(file, [row(1)])
    file.write_text(file.read_text() + "[1, 2]\n" + row(2).to_line())
    with pytest.raises(UserError, match="line 2"):
        read_measurements(file)


@pytest.mark.parametrize("lost", [1, 30, 0.5, 1.0])
def test_rows_that_were_overwritten_are_damage_and_not_a_torn_line(tmp_path, lost):
    file = tmp_path / "m.jsonl"
    append_measurements(file, [row(step) for step in range(4)])
    whole = file.read_bytes()
    count = lost if isinstance(lost, int) else int(lost * len(whole))
    for filling in (b"\0", b"\xff"):
        damaged = whole[: len(whole) - count] + filling * count
        file.write_bytes(damaged)
        first = damaged.count(b"\n") + 1
        with pytest.raises(UserError, match=rf"m\.jsonl: line {first} is not a valid measurement: .*damage"):
            read_measurements(file)
        with pytest.raises(UserError, match=r"m\.jsonl: its end is damaged"):
            append_measurements(file, [row(9)])
        assert file.read_bytes() == damaged


def test_a_number_that_is_not_the_written_one_is_named(tmp_path):
    file = tmp_path / "m.jsonl"
    append_measurements(file, [row(1, 1.5), row(2, 2.5)])
    text = file.read_text()
    file.write_text(text.replace('"value": 2.5', '"value": 2.7'))
    with pytest.raises(UserError, match=r"line 2 is n.* checksum differs.*; remove "):
        read_measurements(file)
    # Rows of other programs, and of versions before, carry none.
    file.write_text("".join(line.partition(', "checksum"')[0] + "}\n" for line in text.splitlines()))
    assert [r.value for r in read_measurements(file)] == [1.5, 2.5]


def test_no_file_has_no_rows_and_an_unwritable_one_is_named(tmp_path):
    assert read_measurements(tmp_path) == []
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"folder\.jsonl"):
        append_measurements(tmp_path / "folder.jsonl", [row()])
