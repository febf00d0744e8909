"""Geometry of trained models as pure functions of tensors, plain modules and a loss callable.

Needs torch, and of this package only `hf_lowrank.statistics`.
"""

from hf_lowrank.statistics import Estimate as Estimate

from .activations import LayerSimilarity as LayerSimilarity
from .activations import activation_similarity as activation_similarity
from .activations import causal_lm_hidden_states as causal_lm_hidden_states
from .activations import linear_cka as linear_cka
from .activations import random_positions as random_positions
from .activations import sampled_hidden_states as sampled_hidden_states
from .alignment import Layout as Layout
from .alignment import Permutations as Permutations
from .alignment import match_weights as match_weights
from .alignment import permute as permute
from .curves import Bezier as Bezier
from .curves import bezier_losses as bezier_losses
from .curves import train_bezier as train_bezier
from .dimension import intrinsic_dimension as intrinsic_dimension
from .directions import Gaussian as Gaussian
from .directions import RankOne as RankOne
from .directions import trajectory_pca_directions as trajectory_pca_directions
from .directions import weight_pca_directions as weight_pca_directions
from .engine import movable as movable
from .hessian import critical_sharpness as critical_sharpness
from .hessian import gradient as gradient
from .hessian import hessian_top_eigenvalue as hessian_top_eigenvalue
from .hessian import hessian_trace as hessian_trace
from .hessian import hessian_vector_product as hessian_vector_product
from .landscape import Curve as Curve
from .landscape import expected_sharpness as expected_sharpness
from .landscape import imib as imib
from .landscape import interpolation_curve as interpolation_curve
from .landscape import line_curve as line_curve
from .landscape import loss_barrier as loss_barrier
from .landscape import path_grid as path_grid
from .landscape import pca_curve as pca_curve
from .landscape import plane as plane
from .landscape import random_curve as random_curve
from .landscape import random_sharpness as random_sharpness
from .landscape import random_variance as random_variance
from .landscape import refined_path as refined_path
from .landscape import sharpness_per_direction as sharpness_per_direction
from .landscape import symmetric_grid as symmetric_grid
from .landscape import weight_scale as weight_scale
from .losses import TokenLoss as TokenLoss
from .noise import noise_scale as noise_scale
from .sharding import ProcessGroup as ProcessGroup
from .spectra import effective_rank as effective_rank
from .spectra import many_singular_values as many_singular_values
from .spectra import numerical_rank as numerical_rank
from .spectra import principal_angles as principal_angles
from .spectra import product_singular_values as product_singular_values
from .spectra import relative_norm as relative_norm
from .spectra import singular_value_fraction as singular_value_fraction
from .spectra import singular_values as singular_values
from .spectra import spectral_gap as spectral_gap
from .spectra import stable_rank as stable_rank
from .spectra import subspace_overlap as subspace_overlap
from .spectra import tail_exponent as tail_exponent
