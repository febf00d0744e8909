"""A ledger of every storage that torch allocates, real or fake, until it is freed.

Fake tensors have sizes, but no memory. What a kernel allocates and frees internally is not seen.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_lowrank.compat import FakeTensor, TorchDispatchMode, active_fake_mode, tree_leaves

WEIGHTS, GRADIENTS, STATE = "weights", "gradients", "optimizer_state"
ACTIVATIONS, WORKSPACE = "activations", "workspace"


@dataclass
class Peak:
    """The most that was held at a time: bytes in total, and by kind."""

    total: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """Counts storages while it is active, each under the `kind` that is current when it is allocated or claimed.

    Attributes:
        kind: of new storages.
        total: bytes held now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = WORKSPACE
        self.total = 0
        self._sizes: dict[int, tuple[int, str]] = {}
        self._kinds: dict[str, int] = {}
        self._peak = Peak()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and skipping dynamo would import it.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _stand_in(args[0])
        if kwargs.get("generator") is not None and active_fake_mode() is not None:
            # Fake tensors need no random numbers, and the generator must not change.
            kwargs = {**kwargs, "generator": None}
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            result = _grouped_product(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor, self.kind)
        return result

    def claim(self, tensors: Iterable[Tensor | None], kind: str) -> int:
        """Moves the storages of `tensors` to `kind`; returns their bytes, each storage once."""
        found = {}
        for tensor in tensors:
            if tensor is None:
                continue
            self._enter(tensor, kind)
            key = tensor.untyped_storage()._cdata
            size, before = self._sizes[key]
            self._kinds[before] -= size
            self._kinds[kind] = self._kinds.get(kind, 0) + size
            self._sizes[key] = (size, kind)
            found[key] = size
        return sum(found.values())

    def held(self, kind: str) -> int:
        """Bytes of `kind` held now."""
        return self._kinds.get(kind, 0)

    @contextmanager
    def phase(self, kind: str) -> Iterator[Peak]:
        """Runs the body with new storages under `kind`; the yielded peak is updated as the body runs."""
        self.kind = kind
        self._peak = peak = Peak(self.total, dict(self._kinds))
        yield peak
        self._peak, self.kind = Peak(), WORKSPACE

    def _enter(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = (size, kind)
        self._kinds[kind] = self._kinds.get(kind, 0) + size
        self.total += size
        weakref.finalize(storage, self._leave, key).atexit = False
        if self.total > self._peak.total:
            self._peak.total, self._peak.kinds = self.total, dict(self._kinds)

    def _leave(self, key: int) -> None:
        size, kind = self._sizes.pop(key)
        self._kinds[kind] -= size
        self.total -= size


class StandIns(TorchFunctionMode):
    """Lets code that reads values run on fake tensors: every number is 1, every flag True."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.tolist and isinstance(args[0], FakeTensor):
            return _nested(_stand_in(args[0]), tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def _stand_in(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _grouped_product(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """The products of a mixture's experts, which torch supports on fake tensors in bfloat16 only.

    Of two matrices the shared dimension is split into groups at `offs`; of a matrix and a stack the matrix is split.
    """
    rows, columns = left.shape[-2], right.shape[-1]
    groups = [] if left.ndim != right.ndim else [offs.shape[0]] if offs is not None else [left.shape[0]]
    return left.new_empty((*groups, rows, columns), dtype=out_dtype or left.dtype)


def _nested(value: Any, shape: tuple[int, ...]) -> Any:
    return value if not shape else [_nested(value, shape[1:]) for _ in range(shape[0])]
