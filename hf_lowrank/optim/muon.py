"""torch's Muon for the target matrices and AdamW for the rest, as one optimizer, to compare with."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from torch.utils.weak import WeakTensorKeyDictionary

from hf_lowrank.errors import UserError
from hf_lowrank.optim.base import Bound, Entry, Params, TargetedAdamW, is_count
from hf_lowrank.optim.groups import param_groups
from hf_lowrank.optim.sharding import Sharding, check_divided_by_rows, local_part, sharding_of

ADJUST_LR = ("original", "match_rms_adamw")
NS_DTYPES = ("bfloat16", "float32")
A, B, C = COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


def orthogonalise(matrix: Tensor, steps: int, dtype: str = "bfloat16") -> Tensor:
    """Newton–Schulz: the matrix with its singular values brought near one, in `dtype`; torch's own in bfloat16."""
    if dtype == "bfloat16":
        return _zeropower_via_newtonschulz(matrix, COEFFICIENTS, steps, SMALLEST_NORM)
    tall = matrix.shape[0] > matrix.shape[1]
    work = matrix.float().T if tall else matrix.float()
    work = work / work.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = work @ work.T
        work = torch.addmm(work, torch.addmm(gram, gram, gram, beta=B, alpha=C), work, beta=A)
    return work.T if tall else work


class MuonAdamW(TargetedAdamW):
    """`torch.optim.Muon`'s update of the groups that have `muon=True`, AdamW for the others.

    Args:
        params: a model (its target modules get Muon), groups, or parameters.
        lr: of both; `adjust_lr_fn="match_rms_adamw"` makes one rate fit both (arXiv 2502.16982).
        momentum, nesterov, ns_steps, adjust_lr_fn: as in `torch.optim.Muon`.
        ns_dtype: what Newton–Schulz computes in. Torch's "bfloat16" makes a hundredth of a difference in a gradient's
            last digit, so that runs on other numbers of processes differ visibly; "float32" keeps them together.

    The other arguments are `ProjectedAdamW`'s.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        target_modules: str | Sequence[str] = "auto",
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: str = "bfloat16",
        adjust_lr_fn: str = "match_rms_adamw",
        state_dtype: str = "parameter",
        stochastic_rounding: bool = False,
        seed: int = 0,
        layerwise: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "muon": False,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust_lr_fn": adjust_lr_fn,
            "adam_variant": "torch",
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        if isinstance(params, nn.Module):
            params = muon_groups(params, target_modules=target_modules, weight_decay=weight_decay)
        super().__init__(params, defaults, layerwise=layerwise)
        if not any(group["muon"] for group in self.param_groups):
            raise UserError("MuonAdamW needs at least one group with muon=True; pass the model itself")

    def _is_target(self, group: dict[str, Any]) -> bool:
        return bool(group["muon"])

    def _adopt(self, group: dict[str, Any], param: Tensor) -> None:
        if param.ndim != 2:
            raise UserError(
                f"{self.name_of(param)} of shape {tuple(param.shape)} is no matrix; put it into a group without muon"
            )
        check_divided_by_rows(param, self.name_of(param))
        self._shardings[param] = sharding_of(param)

    def _forget(self) -> None:
        self._shardings: MutableMapping[Tensor, Sharding | None] = WeakTensorKeyDictionary()

    def _how(self, group: dict[str, Any], param: Tensor) -> str:
        return "Muon"

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return super()._choices() | {"adjust_lr_fn": ADJUST_LR, "ns_dtype": NS_DTYPES}

    def _bounds(self) -> dict[str, Bound]:
        return super()._bounds() | {
            "momentum": (lambda x: 0 <= x < 1, "from 0 to below 1"),
            "ns_steps": (is_count, "a whole number from 1"),
        }

    def _update_targets(self, entries: Sequence[Entry]) -> None:
        for turn in self._turns(entries):
            updates = [self._momentum(entry) for entry in turn]
            for entry, update in zip(turn, self._orthogonalised(turn, updates), strict=True):
                lr = float(entry.group["lr"])
                wide = entry.weight.float() if self._rounds(entry) else entry.weight
                wide.mul_(1 - lr * entry.group["weight_decay"])
                wide.add_(update, alpha=-_adjust_lr(lr, entry.group["adjust_lr_fn"], entry.param.shape))
                self._write_weight(entry, wide)

    def _momentum(self, entry: Entry) -> Tensor:
        """The gradient's running mean, with Nesterov's look ahead: this process's rows of it."""
        state, momentum = self.state[entry.param], entry.group["momentum"]
        if not state:
            state["step"] = 0
            state["momentum_buffer"] = torch.zeros_like(entry.param, memory_format=torch.preserve_format)
        state["step"] += 1
        mean = local_part(state["momentum_buffer"])
        mean.lerp_(entry.grad, 1 - momentum)
        return entry.grad.lerp(mean, momentum) if entry.group["nesterov"] else mean

    def _turns(self, entries: Sequence[Entry]) -> Iterator[list[Entry]]:
        """Sharded matrices together, as many as there are processes; others one at a time."""
        alike: dict[Any, list[Entry]] = {}
        for entry in entries:
            sharding = self._shardings[entry.param]
            key = id(entry.param) if sharding is None else (sharding.key, entry.weight.dtype, entry.weight.device)
            alike.setdefault(key, []).append(entry)
        for members in alike.values():
            sharding = self._shardings[members[0].param]
            size = 1 if sharding is None else sharding.size
            for start in range(0, len(members), size):
                yield members[start : start + size]

    def _orthogonalised(self, turn: Sequence[Entry], updates: list[Tensor]) -> list[Tensor]:
        """Newton–Schulz of whole matrices, each by one process; every process gets its rows."""
        sharding = self._shardings[turn[0].param]
        if sharding is None:
            return [_direction(entry, update) for entry, update in zip(turn, updates, strict=True)]
        owners = list(range(len(turn)))
        shapes = [tuple(entry.param.shape) for entry in turn]
        wholes = sharding.to_owners(updates, owners, [rows for rows, _ in shapes])
        done = {i: _direction(turn[i], whole).to(whole.dtype).contiguous() for i, whole in wholes.items()}
        return sharding.from_owners(done, owners, shapes, updates[0])

    def _kept_dtype(self, key: str, value: Tensor, group: dict[str, Any], param: Tensor) -> torch.dtype:
        return param.dtype if key == "momentum_buffer" else super()._kept_dtype(key, value, group, param)


def _direction(entry: Entry, update: Tensor) -> Tensor:
    return orthogonalise(update, entry.group["ns_steps"], entry.group["ns_dtype"])


def muon_groups(
    model: nn.Module, *, target_modules: str | Sequence[str] = "auto", weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """`param_groups` with `muon=True` in the place of a rank."""
    groups = param_groups(model, rank=1, target_modules=target_modules, weight_decay=weight_decay)
    for group in groups:
        group["muon"] = group.pop("rank") is not None
    return groups
