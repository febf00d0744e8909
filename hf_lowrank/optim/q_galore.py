"""Q-GaLore (arXiv 2407.08296): GaLore with bases in four bits, a lazy interval and moments in eight bits."""

from hf_lowrank.optim.galore import GaLoreAdamW
from hf_lowrank.optim.methods import QGaLoreSettings


class QGaLoreAdamW(GaLoreAdamW):
    """Q-GaLore: GaLore's step with `projection_bits=4`, `lazy=True` and `state_dtype="8bit"` (needs torchao).

    Arguments: see `ProjectedAdamW`; `scale` is 0.25. Parameters must not be sharded. Weights in eight bits are a
    property of the model, see `hf_lowrank.adapters.eight_bit`.
    """

    settings = QGaLoreSettings
    settings_of_model = GaLoreAdamW.settings_of_model | {"weight_dtype"}
