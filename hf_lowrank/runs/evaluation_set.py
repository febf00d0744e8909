"""The fixed held-out sequences on which every loss of a run is measured."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.layout import EVALUATION_SET
from hf_lowrank.storage.files import whole_file


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out token sequences, all of one length.

    Attributes:
        input_ids: (N, T) int64 token ids.
        attention_mask: (N, T) int64, 1 for tokens, 0 for padding.
        fingerprint: SHA-256 of shape, ids and mask, hex; losses are only compared if their fingerprints are equal.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.shape != self.attention_mask.shape:
            shapes = f"{tuple(self.input_ids.shape)} and {tuple(self.attention_mask.shape)}"
            raise UserError(f"input_ids and attention_mask must be (N, T) and have the same shape, got {shapes}")
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.attention_mask):
            digest.update(tensor.to(torch.int32).contiguous().numpy().tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def first(self, count: int | None) -> EvaluationSet:
        """The first `count` sequences (all for None), with the fingerprint of just these."""
        if count is None or count >= len(self):
            return self
        return EvaluationSet(self.input_ids[:count], self.attention_mask[:count])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `evaluation.safetensors` into `folder`."""
        path = Path(folder) / EVALUATION_SET
        tensors = {
            "input_ids": self.input_ids.to(torch.int32).contiguous(),
            "attention_mask": self.attention_mask.to(torch.uint8).contiguous(),
        }
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationSet:
        """Reads the set from a file or from a folder that holds `evaluation.safetensors`.

        A file without `attention_mask` has no padding.

        Raises:
            UserError: the file is missing or not a safetensors file, or its content does not match its fingerprint.
        """
        file = Path(path)
        file = file / EVALUATION_SET if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"{file}: no such evaluation set; hf-lowrank train writes one into each run")
        try:
            with safe_open(file, framework="pt") as tensors:
                recorded = (tensors.metadata() or {}).get("fingerprint")
                ids = tensors.get_tensor("input_ids").long()
                names = list(tensors.keys())
                masked = "attention_mask" in names
                mask = tensors.get_tensor("attention_mask").long() if masked else torch.ones_like(ids)
        except SafetensorError as error:
            raise UserError(
                f"{file}: not a readable evaluation set: {error}; it must be a safetensors file, or a text named *.txt"
            ) from None
        loaded = cls(ids, mask)
        if recorded is not None and recorded != loaded.fingerprint:
            raise UserError(
                f"{file}: damaged: its fingerprint is {loaded.fingerprint[:12]}, the header says {recorded[:12]}"
            )
        return loaded


def recorded_fingerprint(run: Path) -> str | None:
    """The fingerprint in the header of a run's evaluation set; None without a file or an entry. Tensors are not read.

    Raises:
        UserError: the file is damaged.
    """
    file = run / EVALUATION_SET
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            return (tensors.metadata() or {}).get("fingerprint")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a readable evaluation set: {one_line(error)}") from None
