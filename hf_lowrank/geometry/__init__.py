"""Geometry of trained models as pure functions of tensors, plain modules and a loss callable.

Needs torch, and of this package only `hf_lowrank.statistics`.
"""

from hf_lowrank.statistics import Estimate

from .activations import LayerSimilarity, activation_similarity, causal_lm_hidden_states, linear_cka
from .alignment import Layout, Permutations, match_weights, permute
from .directions import Gaussian, RankOne, trajectory_pca_directions, weight_pca_directions
from .engine import movable
from .hessian import critical_sharpness, gradient, hessian_top_eigenvalue, hessian_trace, hessian_vector_product
from .landscape import (
    Curve,
    expected_sharpness,
    interpolation_curve,
    line_curve,
    loss_barrier,
    path_grid,
    pca_curve,
    plane,
    random_curve,
    random_sharpness,
    random_variance,
    symmetric_grid,
    weight_scale,
)
from .losses import TokenLoss
from .sharding import ProcessGroup
from .spectra import (
    effective_rank,
    many_singular_values,
    numerical_rank,
    principal_angles,
    product_singular_values,
    relative_norm,
    singular_value_fraction,
    singular_values,
    spectral_gap,
    stable_rank,
    subspace_overlap,
    tail_exponent,
)

__all__ = [
    "Curve",
    "Estimate",
    "Gaussian",
    "LayerSimilarity",
    "Layout",
    "Permutations",
    "ProcessGroup",
    "RankOne",
    "TokenLoss",
    "activation_similarity",
    "causal_lm_hidden_states",
    "critical_sharpness",
    "effective_rank",
    "expected_sharpness",
    "gradient",
    "hessian_top_eigenvalue",
    "hessian_trace",
    "hessian_vector_product",
    "interpolation_curve",
    "line_curve",
    "linear_cka",
    "loss_barrier",
    "many_singular_values",
    "match_weights",
    "movable",
    "numerical_rank",
    "path_grid",
    "pca_curve",
    "permute",
    "plane",
    "principal_angles",
    "product_singular_values",
    "random_curve",
    "random_sharpness",
    "random_variance",
    "relative_norm",
    "singular_value_fraction",
    "singular_values",
    "spectral_gap",
    "stable_rank",
    "subspace_overlap",
    "symmetric_grid",
    "tail_exponent",
    "trajectory_pca_directions",
    "weight_pca_directions",
    "weight_scale",
]
