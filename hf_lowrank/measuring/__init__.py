"""Running the metrics over trajectories."""

from typing import Any

__all__ = ["measure", "unmeasured"]


def __getattr__(name: str) -> Any:
    """Public names, imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_lowrank.measuring import runner

    return getattr(runner, name)
