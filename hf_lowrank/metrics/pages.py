"""What a metric's page says besides its entry: formula, how to read it, pitfalls, cost, settings and source.

W is a dense weight of m × n with singular values σ₁ ≥ σ₂ ≥ …; L(θ) is the mean negative log-likelihood per token of
the held-out sequences, in nats. Formulas are plain text, one a line.
"""

from dataclasses import dataclass

from hf_lowrank.metrics import METRICS, Metric

# The study that most of the metrics are from, and the papers of others.
STUDY = "arXiv 2605.13652"

_EQUAL_GRIDS = "Compare only values of equal settings: they depend on the offsets and on the sequences."
_EQUAL_LOSS = "A model that has fitted less is often flatter: compare methods at equal loss as well as at equal step."
_DENSE = (
    "It moves dense weights where there are any; with layers that have none (CoLA) it moves what they store, which is "
    "marked † and not comparable."
)
_STRAIGHT = (
    "A hill on the straight line does not separate two solutions: permuting hidden units (aligned_method_barrier) or "
    "bending the path (curved_method_barrier) may go around it."
)
_DISTANCE = "It grows with the number of steps between checkpoints: compare runs that save equally often."
_FIRST = "The first checkpoint has no value."
_SURROGATE = "With CoLA it is of the product B A, whose rank is at most r by construction, and labelled so."
_SAME_STEP = "It needs a baseline of the same size, tokenizer and step."
_SEEDS = "Full-rank runs of two seeds differ, too: compare with that difference."
_FEW_POSITIONS = "With fewer positions than dimensions CKA is pushed towards 1."
_PATH_COST = "About 14 evaluations of the loss, and a second copy of the weights."
_SPECTRUM_COST = "One singular value decomposition per target matrix; factors are decomposed without forming W."
_ACTIVATION_COST = "One forward pass of each of the two models, layer by layer: no hidden states are kept."


@dataclass(frozen=True, kw_only=True)
class MetricPage:
    """What the page of a metric says besides its entry.

    Attributes:
        formula: plain text, one formula a line.
        reading: what a high and a low value mean.
        pitfalls: what is easily got wrong, a sentence or two each.
        cost: time and memory.
        settings: blocks and keys of the measurement's settings that the value depends on.
        source: the paper that it is from.
    """

    formula: str
    reading: str
    pitfalls: tuple[str, ...]
    cost: str
    settings: tuple[str, ...] = ()
    source: str = STUDY


_SHARPNESS = "S(d, t) = ½ [L(θ + t d) + L(θ − t d)] − L(θ)"
_EFFECTIVE_RANK = "exp(−Σᵢ pᵢ log pᵢ) / min(m, n),  pᵢ = σᵢ / Σⱼ σⱼ"
_CHORD = "L((1−t) θ₀ + t θ₁) − [(1−t) L(θ₀) + t L(θ₁)]"
_MEAN_OF_ENDS = "L((1−t) θ₀ + t θ₁) − ½ [L(θ₀) + L(θ₁)]"
_CKA = "‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F),  X, Y: centred hidden states, one row per position"
_HELD_OUT = ("sequences",)
_RANDOM_COST = "2 · steps · draws evaluations of the loss (fast: 50), and a second copy of the weights."
_PCA_COST = "One decomposition per matrix, 2 · steps · count evaluations (fast: 50), and a second copy of the weights."
_MOVED = ("sequences", "memory", "space")

PAGES: dict[str, MetricPage] = {
    "random_sharpness": MetricPage(
        formula=f"{_SHARPNESS}\nmean of S over draws d ~ N(0, I) of all parameters and offsets t > 0",
        reading="High: a narrow valley. Negative: the loss around the model is lower, as early in training.",
        pitfalls=(
            _EQUAL_GRIDS,
            "The fast preset's radius is a multiple of the root-mean-square weight; the paper's is absolute, so that "
            "models with larger weights look flatter.",
            _EQUAL_LOSS,
            _DENSE,
        ),
        cost=_RANDOM_COST,
        settings=(*_MOVED, "random"),
    ),
    "random_variance": MetricPage(
        formula="variance over draws d ~ N(0, I) of L(θ + t d), averaged over the grid of t",
        reading="Near zero: all directions are alike, and few draws are enough. It says nothing of the height.",
        pitfalls=(
            _EQUAL_GRIDS,
            "With five draws its interval is wide: raise random.draws to compare.",
            _DENSE,
        ),
        cost="None beyond random_sharpness, with which it is measured.",
        settings=(*_MOVED, "random"),
    ),
    "pca1_sharpness": MetricPage(
        formula=f"{_SHARPNESS}\nmean of S over t > 0 along d₁: u₁ v₁ᵀ on every matrix, the parameter itself where it "
        "has one dimension",
        reading="High: the loss rises fast when the strongest direction of every weight grows or shrinks.",
        pitfalls=(
            _EQUAL_GRIDS,
            "normalize: tensor (fast) moves every tensor by a share of its own norm, none (paper) all matrices by the "
            "same absolute amount.",
            "One direction has no draws and so no interval.",
            _DENSE,
        ),
        cost=_PCA_COST,
        settings=(*_MOVED, "pca"),
    ),
    "pcak_sharpness": MetricPage(
        formula=f"{_SHARPNESS}\nmean of S over t > 0 and d₁ … d_K, d_k: u_k v_kᵀ on every matrix",
        reading="As pca1_sharpness, for the K strongest directions.",
        pitfalls=(
            _EQUAL_GRIDS,
            "K matters: five in the fast preset, ten in the paper's.",
            "A matrix of rank below k does not move along direction k.",
            _DENSE,
        ),
        cost=_PCA_COST,
        settings=(*_MOVED, "pca"),
    ),
    "step_barrier": MetricPage(
        formula=f"max over 0 ≤ t ≤ 1 of {_CHORD}\nθ₀: the previous checkpoint, θ₁: this one",
        reading="0: no hill between them, as usual. High: training jumped over a ridge.",
        pitfalls=(_DISTANCE, "The straight line need not be the way that training took.", _FIRST, _DENSE),
        cost=_PATH_COST,
        settings=(*_MOVED, "path"),
        source="arXiv 2110.06296",
    ),
    "method_barrier": MetricPage(
        formula=f"max over 0 ≤ t ≤ 1 of {_CHORD}\nθ₀: this run's dense weights, θ₁: the baseline's at the same step",
        reading="0: both are in one basin. High: averaging the two models would ruin both.",
        pitfalls=(
            _STRAIGHT,
            "It needs a baseline at the same step, and dense weights: null for CoLA.",
            "Two full-rank runs of different seeds are separated as well: compare with that barrier.",
        ),
        cost=_PATH_COST,
        settings=("sequences", "memory", "path"),
        source="arXiv 2110.06296",
    ),
    "weight_effective_rank": MetricPage(
        formula=_EFFECTIVE_RANK,
        reading="1: a flat spectrum. Near 0: one direction.",
        pitfalls=(
            "It is a share of min(m, n); hf_lowrank.geometry.effective_rank is not divided.",
            "It uses σ, not σ²: other definitions give smaller values.",
            _SURROGATE,
        ),
        cost=_SPECTRUM_COST,
    ),
    "weight_stable_rank": MetricPage(
        formula="‖W‖_F² / σ₁²",
        reading="Small: one direction dominates. Unlike the effective rank it does not see the tail.",
        pitfalls=("It is a number of directions, not a share: larger matrices have larger values.", _SURROGATE),
        cost=_SPECTRUM_COST,
    ),
    "weight_spectral_gap": MetricPage(
        formula="(σ₁ − σ₂) / σ₁",
        reading="Near 1: the first direction stands alone. Near 0: the first two are alike.",
        pitfalls=("It says nothing of the other singular values.", _SURROGATE),
        cost=_SPECTRUM_COST,
    ),
    "weight_sv_fraction": MetricPage(
        formula="#{i : σᵢ > 0.1} / min(m, n)",
        reading="High: many directions of more than the threshold.",
        pitfalls=(
            "The threshold is absolute, so the value mixes rank with scale: it is kept to compare with the study.",
            _SURROGATE,
        ),
        cost=_SPECTRUM_COST,
    ),
    "update_norm": MetricPage(
        formula="‖W_b − W_a‖_F / ‖W_a‖_F,  a: the previous checkpoint, b: this one",
        reading="How far training moved, as a share of the weight.",
        pitfalls=(_DISTANCE, _FIRST, "It falls with the learning rate's schedule.", _SURROGATE),
        cost="None beyond update_effective_rank.",
    ),
    "update_effective_rank": MetricPage(
        formula=f"ΔW = W_b − W_a, σ of ΔW:  {_EFFECTIVE_RANK}",
        reading="Near 1: training changed the weight in all directions alike. Near 0: in one.",
        pitfalls=(_DISTANCE, _FIRST, "The sum of many low-rank updates can have a high rank.", _SURROGATE),
        cost=_SPECTRUM_COST,
    ),
    "update_stable_rank": MetricPage(
        formula="‖ΔW‖_F² / σ₁(ΔW)²,  ΔW = W_b − W_a",
        reading="Small: one direction dominates the change.",
        pitfalls=(_DISTANCE, _FIRST, _SURROGATE),
        cost="None beyond update_effective_rank.",
    ),
    "activation_l2": MetricPage(
        formula="mean over positions of ‖h − g‖ / mean over positions of ‖g‖,  h: hidden states, g: the baseline's",
        reading="0: the same hidden states. About 1.4: as far apart as independent vectors of equal norm.",
        pitfalls=(_SAME_STEP, "Rotated but otherwise equal hidden states are far apart: read it next to CKA.", _SEEDS),
        cost=_ACTIVATION_COST,
        settings=_HELD_OUT,
    ),
    "activation_cosine": MetricPage(
        formula="mean over positions of ⟨h, g⟩ / (‖h‖ ‖g‖)",
        reading="1: the same directions. Near 0: unrelated coordinates.",
        pitfalls=(
            _SAME_STEP,
            "A large mean shared by all positions brings it near 1: CKA centres, this does not.",
            _SEEDS,
        ),
        cost=_ACTIVATION_COST,
        settings=_HELD_OUT,
    ),
    "activation_cka": MetricPage(
        formula=_CKA,
        reading="1: the same up to rotation and scale. A high CKA with a low cosine: the same representation in other "
        "coordinates.",
        pitfalls=(_SAME_STEP, f"{_FEW_POSITIONS} activation_cka_debiased is not.", _SEEDS),
        cost=_ACTIVATION_COST,
        settings=_HELD_OUT,
        source="arXiv 1905.00414",
    ),
    "loss": MetricPage(
        formula="L(θ) = −(1/T) Σ log p(x_t | x_<t) over T held-out tokens",
        reading="Lower is better. Differences below the spread over seeds mean nothing.",
        pitfalls=(
            "Only values on the same evaluation set compare; its fingerprint tells.",
            "Another tokenizer has other tokens: compare bits per byte then.",
        ),
        cost="One pass over the sequences.",
        settings=_HELD_OUT,
        source="",
    ),
    "perplexity": MetricPage(
        formula="exp(L(θ))",
        reading="As the loss; a difference of 0.01 nats is one percent.",
        pitfalls=("Average losses, not perplexities, over seeds.", "As for the loss."),
        cost="None beyond the loss.",
        settings=_HELD_OUT,
        source="",
    ),
    "step_imib": MetricPage(
        formula=f"max over 0 < t < 1 of {_MEAN_OF_ENDS}",
        reading="The study's barrier. Positive on any steep descent, with or without a hill.",
        pitfalls=("It depends on how near the grid comes to the ends: no verdict rests on it.", _DISTANCE, _DENSE),
        cost="None beyond step_barrier.",
        settings=(*_MOVED, "path"),
    ),
    "method_imib": MetricPage(
        formula=f"max over 0 < t < 1 of {_MEAN_OF_ENDS},  θ₁: the baseline",
        reading="The study's barrier between methods; larger where one end has a higher loss.",
        pitfalls=("It depends on how near the grid comes to the ends: no verdict rests on it.", _STRAIGHT),
        cost="None beyond method_barrier.",
        settings=("sequences", "memory", "path"),
    ),
    "aligned_method_barrier": MetricPage(
        formula=f"max over 0 ≤ t ≤ 1 of {_CHORD},  θ₁: the baseline with its hidden units permuted to match",
        reading="A hill that stays is not just a renaming of units.",
        pitfalls=("It knows the layout of Llama alone.", "The best permutation is searched for, not known."),
        cost=f"{_PATH_COST} Matching solves assignment problems of the size of the model's layers.",
        settings=("sequences", "memory", "path"),
        source="arXiv 2209.04836",
    ),
    "curved_method_barrier": MetricPage(
        formula="max over 0 ≤ t ≤ 1 of L(θ(t)) − [(1−t) L(θ₀) + t L(θ₁)]\n"
        "θ(t) = (1−t)² θ₀ + 2t(1−t) θ_m + t² θ₁,  θ_m trained",
        reading="0: a path of low loss connects the two. High: none was found in so many steps.",
        pitfalls=(
            "More steps find lower paths: compare only equal settings.",
            "The middle point is trained on held-out sequences that are not measured.",
        ),
        cost="curve.steps training steps. Next to both models the middle point, its gradient and two moments.",
        settings=("sequences", "curve"),
        source="arXiv 1802.10026",
    ),
    "weight_tail_exponent": MetricPage(
        formula="α of p(λ) ∝ λ^(−α) for λ = σ² above the cutoff with the smallest Kolmogorov–Smirnov distance",
        reading="Lower: a heavier tail, more weight in few directions.",
        pitfalls=("Fits of a few dozen values are noisy.", "It always gives a number, also where no power law fits."),
        cost="None beyond weight_effective_rank.",
        source="arXiv 1901.08276",
    ),
    "weight_overlap": MetricPage(
        formula="‖UᵀV‖_F² / k,  U, V: top k singular vectors of the run's and the baseline's weight",
        reading="1: the same subspace. About k over the dimension: unrelated ones.",
        pitfalls=(_SAME_STEP, "Nearly equal singular values have arbitrary vectors.", _SEEDS),
        cost="One decomposition with vectors per target matrix of both runs.",
        settings=("overlap",),
        source="",
    ),
    "update_overlap": MetricPage(
        formula="‖UᵀV‖_F² / k,  U, V: top k singular vectors of ΔW of the run and of the baseline",
        reading="1: both moved in the same directions since the previous checkpoint.",
        pitfalls=(_SAME_STEP, _FIRST, "Nearly equal singular values have arbitrary vectors."),
        cost="One decomposition with vectors per target matrix of both runs.",
        settings=("overlap",),
        source="",
    ),
    "total_update_norm": MetricPage(
        formula="‖W_b − W_a‖_F / ‖W_a‖_F,  a: the first checkpoint",
        reading="How far training moved in all.",
        pitfalls=("The first checkpoint is the initial weights only if the run saved step 0.", _FIRST, _SURROGATE),
        cost="None beyond total_update_effective_rank.",
    ),
    "total_update_effective_rank": MetricPage(
        formula=f"ΔW = W_b − W_a, a: the first checkpoint, σ of ΔW:  {_EFFECTIVE_RANK}",
        reading="Near 1: training as a whole changed the weight in all directions alike.",
        pitfalls=("The first checkpoint is the initial weights only if the run saved step 0.", _FIRST, _SURROGATE),
        cost=_SPECTRUM_COST,
    ),
    "total_update_stable_rank": MetricPage(
        formula="‖ΔW‖_F² / σ₁(ΔW)²,  ΔW since the first checkpoint",
        reading="Small: one direction dominates what training changed in all.",
        pitfalls=("The first checkpoint is the initial weights only if the run saved step 0.", _FIRST, _SURROGATE),
        cost="None beyond total_update_effective_rank.",
    ),
    "activation_cka_debiased": MetricPage(
        formula=f"{_CKA}\nwith unbiased estimates of all three terms",
        reading="As activation_cka; near 0, also below it, for unrelated hidden states.",
        pitfalls=(_SAME_STEP, "It can be negative: that is noise around 0.", _SEEDS),
        cost=_ACTIVATION_COST,
        settings=_HELD_OUT,
        source="arXiv 2010.15327",
    ),
    "hessian_top": MetricPage(
        formula="λ_max(H),  H = ∂²L/∂θ², by Lanczos with full reorthogonalisation",
        reading="The curvature in the sharpest direction. Training by gradient descent at rate η is stable below 2/η.",
        pitfalls=(
            "It is bounded by a residual, not by an interval: the row's remark gives it.",
            "The largest by value, not by magnitude: negative curvature is not seen.",
            _DENSE,
        ),
        cost="hessian.iterations products of two backward passes, and as many vectors of the model's size.",
        settings=("sequences", "space", "hessian"),
        source="",
    ),
    "hessian_trace": MetricPage(
        formula="tr H = E[zᵀ H z],  zᵢ = ±1",
        reading="The sum of all curvatures; over the number of parameters, the mean one.",
        pitfalls=(
            "Positive and negative curvatures cancel.",
            "Its spread over probes is wide: raise hessian.probes.",
            _DENSE,
        ),
        cost="hessian.probes products of two backward passes.",
        settings=("sequences", "space", "hessian"),
        source="",
    ),
    "gradient_noise_scale": MetricPage(
        formula="B = tr(Σ) / ‖G‖²,  Σ: covariance of single sequences' gradients, G: their mean",
        reading="Batches far above it waste data; far below it they waste steps.",
        pitfalls=(
            "Null where the signal cannot be distinguished from the noise with this many batches.",
            "It is of held-out sequences at this point of training: it grows as the loss falls.",
        ),
        cost="A forward and backward pass over the sequences; one gradient is kept.",
        settings=("sequences", "noise"),
        source="arXiv 1812.06162",
    ),
    "intrinsic_dimension": MetricPage(
        formula="d of P(μ > x) = x^(−d),  μ: distance to the second over that to the first nearest neighbour",
        reading="Small next to the width: the hidden states lie near a surface of few dimensions.",
        pitfalls=(
            "It grows with the number of points and falls with noise: compare only equal settings.",
            "High dimensions are underestimated.",
        ),
        cost="One forward pass; distances of dimension.points positions per layer.",
        settings=("sequences", "dimension"),
        source="arXiv 1803.06992",
    ),
    "critical_sharpness": MetricPage(
        formula="2 / η_c,  η_c: smallest step along −∂L/∂θ that no longer lowers the loss\n= gᵀHg / gᵀg for a "
        "quadratic loss",
        reading="High: only small steps along the gradient lower the loss.",
        pitfalls=("It knows one direction, the gradient on held-out sequences.", _EQUAL_LOSS, _DENSE),
        cost="A backward pass and some ten evaluations of the loss.",
        settings=("sequences", "space"),
        source="arXiv 2601.16979",
    ),
    "random_plane": MetricPage(
        formula="L(θ + x d₁ + y d₂),  d₁, d₂ ~ N(0, I)\n"
        "each row of d scaled to the norm of the weight's row; 0 on parameters of one dimension",
        reading="A picture, one row for each point. Smooth and round: flat alike in both directions.",
        pitfalls=(
            "Two directions of millions: a plane shows no more than two random lines do.",
            _EQUAL_GRIDS,
            _DENSE,
        ),
        cost="(2 · steps + 1)² evaluations of the loss (fast: 121), and a second copy of the weights.",
        settings=(*_MOVED, "plane"),
        source="arXiv 1712.09913",
    ),
}


def page_of(name: str) -> tuple[Metric, MetricPage]:
    """The entry and the page of a metric.

    Raises:
        UserError: an unknown id, with the nearest ones.
    """
    return METRICS[name], PAGES[name]
