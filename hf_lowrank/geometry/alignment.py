"""Permuting one model's hidden units to match another's without changing its function (arXiv 2209.04836).

The symmetries of a decoder with the layout of Llama (also Mistral, Qwen2, Qwen3) are the channels of the residual
stream, the channels of each MLP, and the heads of each attention layer: with grouped queries, whole key/value groups
and the query heads inside a group. Channels inside a head are not permuted, since rotary positions distinguish them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

BLOCK = re.compile(r"(.*\.layers\.\d+)\.self_attn\.q_proj\.weight")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RESIDUAL_OUT = ("self_attn.o_proj", "mlp.down_proj")
RESIDUAL_IN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Permutations:
    """For each unit of the permuted model, the index of the unit that it is taken from.

    Attributes:
        residual: (H,) source channels of the residual stream.
        mlp: (I,) source channels of each block's MLP, by the block's name.
        heads: (query heads,) source heads of each block's attention; whole groups stay together.
    """

    residual: Tensor
    mlp: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """The heads of an attention layer; `key_value_heads` divides `query_heads`."""

    query_heads: int
    key_value_heads: int

    def __post_init__(self) -> None:
        if self.query_heads % self.key_value_heads:
            raise ValueError(f"{self.key_value_heads} key/value heads must divide {self.query_heads} query heads")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query_heads // self.key_value_heads


def blocks_of(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the decoder blocks.

    Raises:
        ValueError: the parameters do not have the layout of Llama; the message names what is missing.
    """
    blocks = [match[1] for name in state if (match := BLOCK.fullmatch(name))]
    needed = [f"{block}.{module}.weight" for block in blocks for module in (*RESIDUAL_IN, *RESIDUAL_OUT)]
    problems = [f"{name} is missing" for name in needed if name not in state]
    if not blocks or problems:
        problem = problems[0] if problems else "there is no layers.N.self_attn.q_proj.weight"
        raise ValueError(f"alignment needs a decoder with the layout of Llama; {problem}")
    return blocks


def permute(state: Mapping[str, Tensor], permutations: Permutations, layout: Layout) -> dict[str, Tensor]:
    """The parameters of the same function with its units reordered.

    Raises:
        ValueError: it is unknown how a parameter changes with the permutations.
    """
    blocks = blocks_of(state)
    result = dict(state)
    for name, tensor in state.items():
        block = next((b for b in blocks if name.startswith(b + ".")), None)
        rows, columns = _orders(name, tensor, block, permutations, layout)
        if rows is not None:
            result[name] = result[name][_entries(rows, tensor.shape[0])]
        if columns is not None and name.endswith(".weight"):
            result[name] = result[name][:, _entries(columns, tensor.shape[1])]
    return result


def _orders(
    name: str, tensor: Tensor, block: str | None, permutations: Permutations, layout: Layout
) -> tuple[Tensor | None, Tensor | None]:
    """The source units of a parameter's rows and of its columns; None where they keep their order."""
    residual, kind = permutations.residual, name.rpartition(".")[0].rpartition(".")[2]
    if block is not None:
        heads, channels = permutations.heads.get(block), permutations.mlp.get(block)
        groups = None if heads is None else heads[:: layout.group] // layout.group
        orders: dict[str, tuple[Tensor | None, Tensor | None]] = {
            "q_proj": (heads, residual), "k_proj": (groups, residual), "v_proj": (groups, residual),
            "o_proj": (residual, heads), "gate_proj": (channels, residual), "up_proj": (channels, residual),
            "down_proj": (residual, channels), "q_norm": (None, None), "k_norm": (None, None),
        }  # fmt: skip
        if kind in orders:
            return orders[kind]
    if kind in ("embed_tokens", "lm_head"):
        return None, residual
    if tensor.shape != residual.shape:
        raise ValueError(f"alignment cannot permute {name} of shape {tuple(tensor.shape)}")
    return residual, None


def _entries(units: Tensor, length: int) -> Tensor:
    """Indices of the entries of units, each of the same number of consecutive entries, `length` in all."""
    size = length // units.numel()
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def match_weights(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    layout: Layout,
    *,
    residual: bool = True,
    rounds: int = 20,
    seed: int = 0,
) -> Permutations:
    """Permutations of `other`'s units that bring its parameters closest to `reference`'s (weight matching).

    The residual stream is first matched by the parameters that no other symmetry affects (embeddings, norms), then all
    layers by coordinate descent in random order until a round changes nothing. Needs scipy.

    Raises:
        ValueError: the parameters differ in name or shape, or do not have the layout of Llama.
    """
    blocks = blocks_of(reference)
    for name, tensor in reference.items():
        if name not in other or other[name].shape != tensor.shape:
            raise ValueError(f"the models must have the same parameters; {name} differs")
    ours = {name: tensor.detach().double().cpu() for name, tensor in reference.items()}
    theirs = {name: tensor.detach().double().cpu() for name, tensor in other.items()}
    hidden = ours[f"{blocks[0]}.self_attn.o_proj.weight"].shape[0]
    found = Permutations(torch.arange(hidden))
    if residual:
        found = Permutations(_assign(_residual_similarity(ours, theirs, blocks, found, layout, inside=False)))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        before = found
        order = torch.randperm(len(blocks), generator=generator).tolist()
        mlp, heads = dict(found.mlp), dict(found.heads)
        for index in order:
            block = blocks[index]
            mlp[block] = _assign(_mlp_similarity(ours, theirs, block, found.residual))
            heads[block] = _match_heads(ours, theirs, block, found.residual, layout)
        found = Permutations(found.residual, mlp, heads)
        if residual:
            better = _assign(_residual_similarity(ours, theirs, blocks, found, layout, inside=True))
            found = Permutations(better, mlp, heads)
        orders = ([p.residual, *p.mlp.values(), *p.heads.values()] for p in (before, found))
        if all(a is not None and b is not None and torch.equal(a, b) for a, b in zip_longest(*orders)):
            break
    return found


def _mlp_similarity(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], block: str, hidden: Tensor) -> Tensor:
    similarity = ours[f"{block}.mlp.down_proj.weight"].mT @ theirs[f"{block}.mlp.down_proj.weight"][hidden]
    for kind in ("gate_proj", "up_proj"):
        weight, bias = f"{block}.mlp.{kind}.weight", f"{block}.mlp.{kind}.bias"
        similarity = similarity + ours[weight] @ theirs[weight][:, hidden].mT
        if bias in ours:
            similarity = similarity + torch.outer(ours[bias], theirs[bias])
    return similarity


def _match_heads(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], block: str, hidden: Tensor, layout: Layout
) -> Tensor:
    """Source heads; groups are assigned by the best assignment of their query heads, plus their keys and values."""
    query = torch.zeros(layout.query_heads, layout.query_heads, dtype=torch.float64)
    shared = torch.zeros(layout.key_value_heads, layout.key_value_heads, dtype=torch.float64)
    for kind in ATTENTION:
        for suffix in ("weight", "bias"):
            name = f"{block}.self_attn.{kind}.{suffix}"
            if name not in ours or (kind == "o_proj" and suffix == "bias"):
                continue
            a, b = ours[name], theirs[name]
            if suffix == "weight":
                a, b = (a.mT, b[hidden].mT) if kind == "o_proj" else (a, b[:, hidden])
            target = query if kind in ("q_proj", "o_proj") else shared
            count = target.shape[0]
            target += a.reshape(count, -1) @ b.reshape(count, -1).mT
    inner: dict[tuple[int, int], Tensor] = {}
    for i, rows in enumerate(query.split(layout.group)):
        for j, block_ij in enumerate(rows.split(layout.group, dim=1)):
            inner[i, j] = _assign(block_ij)
            shared[i, j] += block_ij[torch.arange(layout.group), inner[i, j]].sum()
    groups = _assign(shared)
    return torch.cat([inner[i, int(j)] + int(j) * layout.group for i, j in enumerate(groups)])


def _residual_similarity(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    blocks: list[str],
    found: Permutations,
    layout: Layout,
    *,
    inside: bool,
) -> Tensor:
    """(H, H) similarity of residual channels; `inside` adds the blocks, permuted as found so far."""
    size = found.residual.numel()
    permuted = permute(theirs, Permutations(torch.arange(size), found.mlp, found.heads), layout)
    total = torch.zeros(size, size, dtype=torch.float64)
    for name, a in ours.items():
        b, module = permuted[name], name.rpartition(".")[0]
        if module.endswith(("embed_tokens", "lm_head")) and a.ndim == 2:
            total += a.mT @ b
        elif any(name.startswith(block + ".") for block in blocks) and a.ndim == 2:
            if inside and module.endswith(RESIDUAL_OUT):
                total += a @ b.mT
            elif inside and module.endswith(RESIDUAL_IN):
                total += a.mT @ b
        elif a.ndim == 1 and a.numel() == size and not module.endswith(RESIDUAL_IN):
            total += torch.outer(a, b)
    return total


def _assign(similarity: Tensor) -> Tensor:
    """For each row, the column in the assignment with the largest total similarity."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])
