"""A study: recipes × seeds against a baseline, from training to the report, by one file and one call."""

from hf_lowrank.study.engine import Failure, StudyResult, run_study
from hf_lowrank.study.plan import Plan, plan_tables
from hf_lowrank.study.spec import STAGES, StudySettings, load_study

__all__ = ["STAGES", "Failure", "Plan", "StudyResult", "StudySettings", "load_study", "plan_tables", "run_study"]
