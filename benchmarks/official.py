"""The methods' own packages, which tests and benchmarks compare with."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

# galore-torch and apollo-torch cannot be imported without bitsandbytes, for 8-bit classes that are not compared here.
_ASKED_FOR = ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")


def official(package: str) -> Any:
    """Imports `galore_torch`, `apollo_torch` or `fira`, with empty modules in bitsandbytes' place while it does."""
    before = {name: sys.modules.get(name) for name in _ASKED_FOR}
    for name in _ASKED_FOR:
        sys.modules[name] = ModuleType(name)
    sys.modules["bitsandbytes"].functional = sys.modules["bitsandbytes.functional"]  # type: ignore[attr-defined]
    sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object  # type: ignore[attr-defined]
    try:
        return importlib.import_module(package)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
