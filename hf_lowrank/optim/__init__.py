"""Optimizers that keep their moments in low-rank subspaces of the gradients."""

from typing import TYPE_CHECKING

from hf_lowrank.compat import lazy_names

if TYPE_CHECKING:
    from hf_lowrank.optim.apollo import ApolloAdamW
    from hf_lowrank.optim.core import ProjectedAdamW
    from hf_lowrank.optim.diagnostics import SubspaceLogCallback
    from hf_lowrank.optim.fira import FiraAdamW
    from hf_lowrank.optim.frugal import FrugalAdamW
    from hf_lowrank.optim.galore import GaLoreAdamW
    from hf_lowrank.optim.groups import adam_arguments, check_coverage, param_groups
    from hf_lowrank.optim.muon import MuonAdamW

__all__ = [
    "ApolloAdamW",
    "FiraAdamW",
    "FrugalAdamW",
    "GaLoreAdamW",
    "MuonAdamW",
    "ProjectedAdamW",
    "SubspaceLogCallback",
    "adam_arguments",
    "check_coverage",
    "param_groups",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ApolloAdamW": "hf_lowrank.optim.apollo",
        "FiraAdamW": "hf_lowrank.optim.fira",
        "FrugalAdamW": "hf_lowrank.optim.frugal",
        "GaLoreAdamW": "hf_lowrank.optim.galore",
        "MuonAdamW": "hf_lowrank.optim.muon",
        "ProjectedAdamW": "hf_lowrank.optim.core",
        "SubspaceLogCallback": "hf_lowrank.optim.diagnostics",
        "adam_arguments": "hf_lowrank.optim.groups",
        "check_coverage": "hf_lowrank.optim.groups",
        "param_groups": "hf_lowrank.optim.groups",
    },
)
