"""Running the metrics over trajectories."""

from typing import TYPE_CHECKING

from hf_lowrank.compat import lazy_imports

if TYPE_CHECKING:
    from hf_lowrank.measuring.runner import measure as measure
    from hf_lowrank.measuring.runner import unmeasured as unmeasured

__getattr__, __dir__, __all__ = lazy_imports(__name__)
