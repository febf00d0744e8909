"""Seeded faults against the command line: every call resumes to the same bits, or is refused by name.

`HF_LOWRANK_DRILL_SEEDS=17` (or `0:500`) selects the seeds of both drills, e.g. to repeat a failed one.
"""

import os

import pytest

from hf_lowrank.downstream.prediction import too_few
from tests.drill.faults import FILE_KINDS, KINDS, METHODS, STUDY_FILE_KINDS, plan_of
from tests.drill.run import drill_seeds, seeds_of
from tests.drill.studies import STUDY

SHORT = "2,5,9"
LONG = "0:500"


def run_drill(seeds, folder):
    results = drill_seeds(seeds_of(os.environ.get("HF_LOWRANK_DRILL_SEEDS", seeds)), None, folder)
    assert [breach for result in results for breach in result["breaches"]] == []
    return results


def test_a_short_drill(tmp_path):
    results = run_drill(SHORT, tmp_path)
    assert all(result["struck"] for result in results)


def test_plans_depend_on_the_seed_alone_and_cover_everything():
    plans = [plan_of(seed) for seed in range(500)]
    assert plans == [plan_of(seed) for seed in range(500)]
    assert {plan.kind for plan in plans} == set(KINDS)
    assert {plan.method for plan in plans} == set(METHODS)
    damages = {plan.damage.file_kind for plan in plans if plan.damage}
    assert damages == {*FILE_KINDS, *STUDY_FILE_KINDS}


def test_the_study_has_enough_runs_for_a_prediction_to_damage():
    assert too_few([*STUDY["members"]] * len(STUDY["seeds"])) is None


@pytest.mark.drill
@pytest.mark.timeout(6 * 3600)
def test_the_whole_drill(tmp_path):
    results = run_drill(LONG, tmp_path)
    assert len(results) >= 1
    assert {result["outcome"] for result in results} <= {"survived", "refused"}
