"""Curvature: the Hessian's top eigenvalue and trace, and the critical sharpness.

`terms(model)` yields the loss as differentiable scalars that sum to it, one per batch, so that the graph of one batch
exists at a time; `TokenLoss.terms` is such a function. Only parameters that require a gradient are considered.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_lowrank.statistics import Estimate

from .directions import RankOne, keyed_generator
from .engine import Memory, eval_mode, sweep
from .landscape import interval_of_draws
from .losses import Loss
from .sharding import ProcessGroup, map_over

Terms = Callable[[nn.Module], Iterable[Tensor]]


def gradient(model: nn.Module, terms: Terms) -> dict[str, Tensor]:
    """The loss's gradient by parameter name, float32, for parameters that require one."""
    parameters = _trainable(model)
    return dict(zip(parameters, _summed_gradients(terms(model), [*parameters.values()]), strict=True))


def hessian_vector_product(model: nn.Module, terms: Terms, vector: list[Tensor]) -> list[Tensor]:
    """`H v` over the parameters that require a gradient, in their order, by double backward."""
    parameters = list(_trainable(model).values())

    def inner_products() -> Iterator[Tensor]:
        for term in terms(model):
            first = torch.autograd.grad(term, parameters, create_graph=True, allow_unused=True)
            yield sum(((g * v).sum() for g, v in zip(first, vector, strict=True) if g is not None), term * 0)

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        return _summed_gradients(inner_products(), parameters)


def _summed_gradients(scalars: Iterable[Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for scalar in scalars:
        gradients = torch.autograd.grad(scalar, parameters, allow_unused=True)
        for tensor, summand in zip(total, gradients, strict=True):
            if summand is not None:
                tensor.add_(summand)
    return total


def hessian_top_eigenvalue(
    model: nn.Module,
    terms: Terms,
    *,
    iterations: int = 20,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> tuple[float, float]:
    """(largest eigenvalue of the Hessian, bound on its error) by Lanczos with full reorthogonalisation.

    Keeps a vector of the size of the model for each iteration. Stops when the residual of the top Ritz pair is below
    `tolerance` times its value. "Largest" is by value, not magnitude; higher is sharper.

    Raises:
        ValueError: no parameter requires a gradient, or a product is not finite.
    """
    parameters = _trainable(model)
    basis: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    current = _flat(_random_like(parameters, seed, torch.randn))
    current /= current.norm()
    top, residual = math.nan, math.inf
    with eval_mode(model):
        for _ in range(min(iterations, current.numel())):
            basis.append(current)
            product = _flat(hessian_vector_product(model, terms, _split(current, [*parameters.values()])))
            if progress:
                progress()
            if not bool(torch.isfinite(product).all()):
                raise ValueError("the Hessian-vector product is not finite")
            alphas.append(float(product @ current))
            for _repeat in range(2):
                for earlier in basis:
                    product = product - (product @ earlier) * earlier
            beta = float(product.norm())
            diagonal, off = (torch.tensor(values, dtype=torch.float64) for values in (alphas, betas))
            ritz, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
            top, residual = float(ritz[-1]), beta * abs(float(vectors[-1, -1]))
            if residual <= tolerance * abs(top) or beta < 1e-12:
                break
            betas.append(beta)
            current = product / beta
    return top, residual


def hessian_trace(
    model: nn.Module,
    terms: Terms,
    *,
    probes: int = 10,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
    replicas: ProcessGroup | None = None,
) -> Estimate:
    """Trace of the Hessian by Hutchinson's estimator with Rademacher probes, and its Student-t interval.

    `replicas` as for `line_curve`; they split the probes.
    """
    parameters = _trainable(model)

    def draw(probe: int) -> float:
        vector = _random_like(parameters, (seed, probe), _signs)
        product = hessian_vector_product(model, terms, vector)
        if progress:
            progress()
        return float(_flat(product) @ _flat(vector))

    with eval_mode(model):
        draws = map_over(replicas, draw, range(probes))
    return interval_of_draws(draws)


def critical_sharpness(
    model: nn.Module,
    loss: Loss,
    direction: dict[str, Tensor],
    *,
    start: float = 1e-3,
    tolerance: float = 0.05,
    center: float | None = None,
    memory: Memory = "copy",
    progress: Callable[[], None] | None = None,
) -> float:
    """`2/η_c`, η_c the smallest step along `−direction` that no longer lowers the loss (arXiv 2601.16979).

    With the gradient as direction and a quadratic loss it is `gᵀHg/gᵀg`. η_c is bracketed by doubling or halving
    from `start` and bisected to a relative `tolerance`, in about ten evaluations. Higher is sharper.

    Raises:
        ValueError: no step up to 2⁴⁰ `start` raises the loss, or every one down to 2⁻⁴⁰ `start` does.
    """
    along = RankOne({}, direction)
    with sweep(model, loss, memory=memory, progress=progress) as loss_at:
        center = loss_at(()) if center is None else center

        def rises(step: float) -> bool:
            return not loss_at([(along, -step)]) < center

        low, high, step = 0.0, math.inf, start
        for _ in range(40):
            if rises(step):
                high, step = step, step / 2
            else:
                low, step = step, step * 2
            if low > 0 and math.isfinite(high):
                break
        if not math.isfinite(high) or low == 0:
            which = "raises" if not math.isfinite(high) else "lowers"
            raise ValueError(f"no step along the direction {which} the loss; there is no critical step")
        while high - low > tolerance * high:
            middle = (low + high) / 2
            low, high = (low, middle) if rises(middle) else (middle, high)
    return 2 / ((low + high) / 2)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    chosen = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not chosen:
        raise ValueError("no parameter of the model requires a gradient")
    return chosen


def _random_like(parameters: dict[str, nn.Parameter], seed: object, draw: Callable) -> list[Tensor]:
    return [draw(p.shape, generator=keyed_generator(seed, name)).to(p) for name, p in parameters.items()]


def _signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def _split(flat: Tensor, like: list[nn.Parameter]) -> list[Tensor]:
    pieces = flat.split([parameter.numel() for parameter in like])
    return [piece.view(parameter.shape).to(parameter) for piece, parameter in zip(pieces, like, strict=True)]
