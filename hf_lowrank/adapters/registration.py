"""How our tuners get into PEFT.

PEFT keys its tables by the `PeftType` enum and refuses names outside it; the enum is closed, and there is no hook for
packages outside PEFT. So the member is added here first, the way the enum module itself adds one, and everything
after that is PEFT's own `register_peft_method`. A test fails when a new PEFT changes what this relies on.
"""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def register_with_peft(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Makes `PeftType` know `name` and registers the tuner under it; does nothing when it is there already."""
    key = name.upper()
    if key not in PeftType.__members__:
        member = str.__new__(PeftType, key)
        member._name_ = key
        member._value_ = key
        member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
        PeftType._member_names_.append(key)
        PeftType._member_map_[key] = member
        PeftType._value2member_map_[key] = member
        type.__setattr__(PeftType, key, member)
    if PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(key)) is not model_cls:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
