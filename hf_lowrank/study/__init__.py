"""Studies: recipes × seeds against a baseline, from training to the report, in one file and one call."""

from typing import TYPE_CHECKING

from hf_lowrank.compat import lazy_imports

if TYPE_CHECKING:
    from hf_lowrank.study.engine import Failure as Failure
    from hf_lowrank.study.engine import StudyResult as StudyResult
    from hf_lowrank.study.engine import run_study as run_study
    from hf_lowrank.study.plan import Plan as Plan
    from hf_lowrank.study.spec import STAGES as STAGES
    from hf_lowrank.study.spec import StudySettings as StudySettings
    from hf_lowrank.study.spec import load_study as load_study

__getattr__, __dir__, __all__ = lazy_imports(__name__)
