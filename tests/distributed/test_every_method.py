"""DDP and FSDP2 against one process at the same global batch, for every method, through Trainer and by hand."""

import shutil
from functools import partial

import pytest

from hf_lowrank.methods import METHODS
from hf_lowrank.runs.trajectory import Trajectory
from tests.distributed.every_method import (
    CASES,
    UNSHARDED,
    by_hand,
    by_trainer,
    differences,
    launch,
    method_of,
    write_recipe,
    write_texts,
)

# torch's Newton–Schulz in bfloat16 is not reproducible to the last digits.
EXACT = [case for case in CASES if case != "muon_bfloat16"]
LOSS, WEIGHT = 1e-4, 2e-5


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)


def check_same(alone, ranks, *where, weight=WEIGHT):
    found = differences(alone, ranks)
    assert found["loss_difference"] <= LOSS, (*where, found)
    assert found["weight_difference"] <= weight, (*where, found)
    assert found["replicas_identical"], (*where, found)
    assert found["bytes_ratio"] <= (0.3 if where[-2:] == ("fsdp", 4) else 1), (*where, found)


def shared_by(way, cases):
    """The cases that processes can share in this way."""
    return [case for case in cases if way != "fsdp" or case not in UNSHARDED]


def test_every_method_is_covered():
    assert {method_of(case)[0].name for case in EXACT} == set(METHODS)


@pytest.mark.parametrize(
    ("ways", "steps"),
    [
        pytest.param([("ddp", 2)], 8, id="short"),
        pytest.param(
            [(way, world) for way in ("ddp", "fsdp") for world in (1, 2, 4)], 30, id="long", marks=pytest.mark.drill
        ),
    ],
)
@pytest.mark.timeout(3600)
def test_by_hand_with_accelerate(tmp_path, ways, steps):
    alone = by_hand(EXACT, "alone", steps)
    for way, world in ways:
        cases = shared_by(way, EXACT)
        ranks = launch(partial(by_hand, cases, way, steps), world, tmp_path / "meet")
        for case in cases:
            check_same(alone[case], [found[case] for found in ranks], case, way, world, weight=1e-6)


@pytest.mark.parametrize(
    ("cases", "ways", "resumed", "steps"),
    [
        pytest.param(["relora"], [("ddp", 2)], (), 8, id="ddp"),
        pytest.param(["galore"], [("fsdp", 2)], (1,), 6, id="fsdp"),
        pytest.param(
            EXACT, [(way, world) for way in ("ddp", "fsdp") for world in (1, 2, 4)], (1, 4), 30,
            id="long", marks=pytest.mark.drill,
        ),
    ],
)  # fmt: skip
@pytest.mark.timeout(7200)
def test_by_a_recipe(tmp_path, cases, ways, resumed, steps):
    write_texts(tmp_path)
    recipe = partial(write_recipe, tmp_path, steps=steps, saved=steps // 2)
    for case in cases:
        alone = by_trainer(recipe(case, 1, "alone"), tmp_path / f"{case}-alone", "alone")
        possible = [(way, world) for way, world in ways if shared_by(way, [case])]
        for way, world in possible:
            run = tmp_path / f"{case}-{way}{world}"
            ranks = launch(partial(by_trainer, recipe(case, world, way), run, way), world, tmp_path / "meet")
            check_same(alone, ranks, case, way, world)
            assert Trajectory(run).steps == [0, steps // 2, steps]
        for way in {way for way, world in possible if world == 2}:
            for world in resumed:
                other = tmp_path / f"{case}-{way}-resumed{world}"
                shutil.copytree(tmp_path / f"{case}-{way}2", other)
                shutil.rmtree(other / f"checkpoint-{steps}")
                ranks = launch(partial(by_trainer, recipe(case, world, way), other, way), world, tmp_path / "meet")
                check_same(alone, ranks, case, "resumed", way, world)
