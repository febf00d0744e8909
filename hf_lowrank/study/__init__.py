"""Studies: recipes × seeds against a baseline, from training to the report, in one file and one call."""

from hf_lowrank.study.engine import Failure, StudyResult, run_study
from hf_lowrank.study.plan import Plan
from hf_lowrank.study.spec import STAGES, StudySettings, load_study

__all__ = ["STAGES", "Failure", "Plan", "StudyResult", "StudySettings", "load_study", "run_study"]
