"""Optimizers that keep their moments in low-rank subspaces of the gradients."""

from typing import TYPE_CHECKING

from hf_lowrank.compat import lazy_imports

if TYPE_CHECKING:
    from hf_lowrank.optim.apollo import ApolloAdamW as ApolloAdamW
    from hf_lowrank.optim.core import ProjectedAdamW as ProjectedAdamW
    from hf_lowrank.optim.cosmos import CosmosAdamW as CosmosAdamW
    from hf_lowrank.optim.diagnostics import SubspaceLogCallback as SubspaceLogCallback
    from hf_lowrank.optim.dion import DionAdamW as DionAdamW
    from hf_lowrank.optim.dion2 import Dion2AdamW as Dion2AdamW
    from hf_lowrank.optim.fira import FiraAdamW as FiraAdamW
    from hf_lowrank.optim.frugal import FrugalAdamW as FrugalAdamW
    from hf_lowrank.optim.galore import GaLoreAdamW as GaLoreAdamW
    from hf_lowrank.optim.groups import check_coverage as check_coverage
    from hf_lowrank.optim.groups import param_groups as param_groups
    from hf_lowrank.optim.ldadam import LDAdamW as LDAdamW
    from hf_lowrank.optim.muon import MuonAdamW as MuonAdamW
    from hf_lowrank.optim.normuon import NorMuonAdamW as NorMuonAdamW
    from hf_lowrank.optim.q_galore import QGaLoreAdamW as QGaLoreAdamW
    from hf_lowrank.targets import adam_arguments as adam_arguments

__getattr__, __dir__, __all__ = lazy_imports(__name__)
