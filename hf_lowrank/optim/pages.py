"""The pages of the baseline and of the optimizer methods: what each says besides the entry.

W is a target weight of m × n, G its gradient, η the learning rate, μ the momentum. Texts are Markdown.
"""

from hf_lowrank.methods import MethodPage

PAGES = {
    "full_rank": MethodPage(
        idea="AdamW on the dense weights. Every other method is compared with it at the same size, on the same "
        "data, with the same seed.",
        formula=(
            "M ← β₁ M + (1−β₁) G,  V ← β₂ V + (1−β₂) G²",
            "W ← (1 − η·wd) W − η M̂ / (√V̂ + ε),  M̂ = M / (1−β₁ᵗ),  V̂ = V / (1−β₂ᵗ)",
        ),
        use="Use it when the two moments of every weight fit into memory, and as the baseline of every comparison.",
        cost="For an m × n weight: its gradient, and 2mn values of optimizer state.",
        notes=(
            "AdamW's options are fields of `TrainingArguments`, in the recipe's `training:` block.",
            "The published runs use one learning rate of 1e-3 for all parameters and no weight decay.",
            "Methods with a `scale` train embeddings, norms and the output head at the full learning rate and their "
            "target matrices at a fraction of it. `matrix_lr_scale: 0.25` gives full-rank training the same choice: "
            "the target matrices get a quarter of `training.learning_rate`, and of every value of its schedule. "
            "Weight decay, which AdamW multiplies by the learning rate, shrinks with it. To tell the effect of two "
            "rates from that of low rank, a study has both: one member with the published rate, and one with two "
            "rates as the baseline.",
        ),
    ),
    "galore": MethodPage(
        idea="Each target's gradient is projected onto its own leading singular subspace. Adam runs inside the "
        "subspace, and its step is lifted back to the dense weight. The basis is recomputed every "
        "`update_proj_gap` steps.",
        formula=(
            "R = Pᵀ G for m < n, R = G Q for m ≥ n",
            "every update_proj_gap steps: P, Q ← top r singular vectors of G",
            "Adam(R): M ← β₁ M + (1−β₁) R,  V ← β₂ V + (1−β₂) R²,  N = M / (√V + ε)",
            "η_t = η √(1−β₂ᵗ) / (1−β₁ᵗ)",
            "W ← W − η_t · scale · P N  (N Qᵀ)",
        ),
        use="Use it when optimizer state is what exceeds memory and the model has to stay dense.",
        cost="For m ≤ n: mr values for the basis and 2nr for the moments, instead of 2mn. The dense gradient still "
        "exists, with `layerwise` one matrix at a time. A refresh costs a few products with the gradient per "
        "matrix; with `subspace: svd`, a singular value decomposition.",
        notes=(
            "Published: learning rate 1e-2, scale 0.25, refresh every 200 steps. As in the official package, a "
            'refresh keeps the moments in the old basis by default; `moments="rotate"` rotates them into the new '
            "one.",
        ),
    ),
    "q_galore": MethodPage(
        idea="GaLore with less memory: each basis is stored in four bits, the moments in eight and, with "
        "`weight_dtype: 8bit`, the target weights in eight; the interval between refreshes of a matrix doubles "
        "each time its subspace has settled.",
        formula=(
            "R, N and η_t as for GaLore, by P̃ (or Q̃), the basis as it is stored",
            "basis: codes of 4 bits, in groups of 256 values:",
            "s = max(max − min, 1e-5) / 15,  z = round(−min / s),  code = clip(round(w / s) + z, 0, 15)",
            "|cos| of first vectors of the last five bases ≥ 0.4 on average: the interval doubles",
            "W ← W − η_t · scale · P̃ N;  with weight_dtype 8bit rounded at random",
        ),
        use="Use it where GaLore's state, or the time of its refreshes, is too much. FSDP2 is refused: a group of "
        "values that share a scale could be split between two processes.",
        cost="For m ≤ n, bytes of optimizer state per matrix: mr/2 for the codes of the basis and mr/32 for their "
        "scales and zero points; 2nr for the codes of the moments and nr/32 for their scales. In bfloat16 "
        "GaLore takes 2mr and 4nr. The dense gradient still exists, with `layerwise` one matrix at a time. A "
        "basis is decoded while its batch of matrices is stepped. With `weight_dtype: 8bit` a target weight "
        "takes mn bytes for its codes and mn/32 for their scales and zero points, and exists as a matrix only "
        "during one product in the forward pass, one in the backward pass, and its own update.",
        notes=(
            "Published: learning rate 1.5e-2 at 60M and 130M, 1e-2 at 350M and 1B, 4e-3 at 7B; rank 128, 256, 256, "
            "1024 and 1024; scale 0.25, refresh every 200 steps (7B: 500), no weight decay.",
            "Bases (`projection_bits`): 256 values in row-major order share a scale `s = max(max − min, 1e-5)/15` "
            "and a zero point `z = round(−min/s)`; a code is `round(w/s) + z`, limited to 0 … 15, and two codes "
            "share a byte. P and Q are taken as matrices with r columns. The authors' code also limits the zero "
            "point to 0 … 15, which moves every value of a group of one sign to one end; here it is not limited. "
            "The gradient is projected and lifted by the decoded basis, which is not quite orthonormal: Fira, which "
            "takes `projection_bits` too, allows for that.",
            "Interval (`lazy`): from the second refresh of a matrix on, the cosine between the first vectors of its "
            "old and new basis is recorded; when the last five average at least 0.4, the interval doubles. The "
            "authors' code takes the cosine with its sign, though singular vectors have none: the same subspace may "
            "count as −1. Here it is taken absolute. That it costs no loss is reproduced at nano scale, with a "
            "refresh every 10 steps: GaLore's loss after 200 steps is 0.019 nats lower with it (95 % interval 0.004 "
            "to 0.034, three seeds, `recipes/studies/ablations.yaml`).",
            "Weights (`weight_dtype`): codes of eight bits in groups of 256, with float32 scales. Each update "
            "decodes a weight, adds the step and rounds every value up or down at random, so that the mean is exact "
            "and small updates are not lost; a group's extremes are kept exactly, by a zero point that is no "
            "integer. There is no other copy. Checkpoints hold the codes, load by `AutoModelForCausalLM` after "
            "`import hf_lowrank`, and `hf-lowrank export` writes the plain architecture. A loaded model computes; "
            "to train it on, call `hf_lowrank.adapters.eight_bit.train_weights`. Combine with `layerwise: true` and "
            "`max_grad_norm: 0` to hold one gradient at a time. The published runs kept weights in eight bits, as "
            "the recipes do from 60M on.",
            "Moments (`state_dtype`): torchao's blocks of 256. Matrices whose moments have fewer than 4096 values, "
            "or not a multiple of 256, keep them in float32.",
        ),
    ),
    "fira": MethodPage(
        idea="GaLore inside the subspace. Outside it, Fira applies the gradient itself, with each column scaled by "
        "how much Adam changed that column inside. A limiter keeps the norm of this part from growing by more "
        "than 1 % per step.",
        formula=(
            "R = Pᵀ G for m < n, R = G Q for m ≥ n",
            "P, Q, N and η_t as for GaLore",
            "φᵢ = ‖Nᵢ‖ / ‖Rᵢ‖ per channel,  S = φ (G − scale · P R)",
            "if ‖S‖ > norm_growth_limit · ‖S of the last step‖: rescale S to that",
            "W ← W − η_t (scale · P N + S)",
        ),
        use="Use it where GaLore's state fits but its loss stays behind full-rank training.",
        cost="GaLore's state, plus one value per matrix for the limiter.",
        notes=(
            "Published: learning rate 1e-2, scale 0.25, refresh every 200 steps, gradient clipping at 1. The "
            "official code differs from the paper's formula when scale is not 1. Both are available; the official "
            "one is the default.",
        ),
    ),
    "apollo": MethodPage(
        idea="Adam runs on a random projection of the gradient, only to learn how strongly to scale each channel; "
        "the update is the raw gradient, scaled by these factors. The projection is drawn from a seed at each "
        "refresh and kept until the next.",
        formula=(
            "R = Pᵀ G for m < n, R = G Q for m ≥ n",
            "every update_proj_gap steps: P, Q ← Gaussian of variance 1/r",
            "N = Adam(R) and η_t as for GaLore;  φᵢ = ‖Nᵢ‖ / ‖Rᵢ‖ per channel",
            "S = √scale · φ G, limited in growth as for Fira",
            "W ← W − η_t S",
        ),
        use="Use it for the least optimizer state at AdamW's quality, and where decompositions are too slow.",
        cost="2nr values for the moments and mr for the projection for m ≤ n; no decomposition. With `subspace: "
        "seeded` the projection is not stored, as in the paper, and each step draws it again.",
        notes=(
            "Published: learning rate 1e-2, one factor per channel, rank 128 / 192 / 256 at 60M / 130M / 350M. "
            "Implemented from the formulas.",
        ),
    ),
    "apollo_mini": MethodPage(
        idea="APOLLO with rank 1 and a single scaling factor per matrix.",
        formula=(
            "R = Pᵀ G with r = 1;  N = Adam(R)",
            "S = √scale · (‖N‖ / ‖R‖) · G, limited in growth as for Fira",
            "W ← W − η_t S",
        ),
        use="Use it when memory matters most: its state is about that of plain SGD.",
        cost="2n values for the moments and m for the projection, per matrix with m ≤ n.",
        notes=(
            "Published: learning rate 1e-2, scale 128 (its square root is applied, before the limiter), refresh "
            "every 200 steps.",
        ),
    ),
    "frugal": MethodPage(
        idea="Adam inside a subspace, and a rule without state (the sign of the gradient, or plain SGD) outside, so "
        "that every step trains every direction.",
        formula=(
            "R = Pᵀ G for m < n, R = G Q for m ≥ n",
            "every update_proj_gap steps: a new subspace, by default r random columns",
            "N = Adam(R) and η_t as for GaLore",
            "W ← W − η_t · scale · P N − η · state_free_lr_ratio · sign(G − P R)",
        ),
        use="Use it when you want full-rank updates and a subspace that is cheap to choose (columns need no "
        "decomposition).",
        cost="2nr values for the moments; nothing outside the subspace.",
        notes=("A refresh resets the moments by default.",),
    ),
    "muon": MethodPage(
        idea="Momentum on the target matrices, orthogonalised by a few Newton–Schulz or Polar Express iterations. "
        "AdamW on the rest.",
        formula=(
            "M ← μ M + (1−μ) G,  U = orthogonalise(M), with Nesterov of (1−μ) G + μ M",
            "W ← (1 − η·wd) W − η · factor(m, n) · U,  factor by adjust_lr_fn",
        ),
        use="Use it as a strong full-rank competitor of the low-rank optimizers.",
        cost="mn values of momentum per matrix, half of AdamW's state. The iterations cost about 15 products of the "
        "matrix's size per step (three in each of five). All matrices of a shape are stepped in one stack, up "
        "to 2²⁵ elements at a time on an accelerator, which is copied.",
        notes=(
            "It is not a low-rank method; it is included for comparison. With the default settings it is the rule "
            "of `torch.optim.Muon`, which loops over the matrices: the same momentum, iterations and learning rates "
            '(in float64 to 12 digits). `orthogonaliser="polar_express"` (arXiv 2505.16932) brings singular values '
            "closer to one in the same number of iterations. Under FSDP2 each matrix is sent whole to one process, "
            "different ones to different processes.",
        ),
    ),
    "normuon": MethodPage(
        idea="Muon, and then each row of the orthogonalised momentum (an output neuron) is divided by the root of a "
        "running mean of its squares, and the whole rescaled to its former norm. AdamW on the rest.",
        formula=(
            "M ← μ M + G,  U = orthogonalise(M)",
            "V ← β V + (1−β) · mean of squares of each row of U",
            "U' = U / √V, rescaled to ‖U‖",
            "W ← (1 − η·wd) W − η √(m/n) U'",
        ),
        use="Use it where you would use Muon: it evens out rows whose updates Muon leaves much larger than others, "
        "at the same cost.",
        cost="mn values of momentum and m of row means per matrix, half of AdamW's state. The time is Muon's.",
        notes=(
            "The paper's sum `μM + G` and Muon's running mean differ by a factor that the orthogonalisation "
            "removes; the mean is kept, so that `nesterov` means the same as in Muon. The learning rate is "
            "multiplied by √(rows/columns) (`spectral`); the authors' code also offers the RMS rule, here "
            "`match_rms_adamw`. Published: matrices at 1e-2, momentum 0.95, weight decay 0.01. FSDP2 shards the row "
            "means with the rows.",
        ),
    ),
    "dion": MethodPage(
        idea="Momentum of low rank: one power iteration per step gives an orthonormal basis P of the momentum's "
        "columns and its coordinates R, whose part is taken out of the momentum only to a share of 1 − μ "
        "(error feedback); the weight moves along P Qᵀ, with Q the normalised columns of R. AdamW on the rest.",
        formula=(
            "M ← M + G;  P = orthonormal columns of M Q",
            "R = Mᵀ P;  M ← M − (1−μ) P Rᵀ;  Q ← R with columns of norm 1",
            "W ← (1 − η·wd) W − η √(m/n) P Qᵀ",
        ),
        use="Use it on many devices: sharded matrices stay sharded, and only products of rank r are sent. On one "
        "device Muon is as good or better.",
        cost="For m ≥ n: mn values of momentum and nr of the basis per matrix. The momentum is dense, so that it "
        "saves half of AdamW's state and not more. A step costs four products of rank r.",
        notes=(
            "Orthonormal columns come from Cholesky QR, twice, in float64, for all matrices of a shape at once: no "
            "loop and no wait for the device. The first basis is Gaussian. A direction in which the momentum is "
            "zero to rounding moves nothing and keeps its basis vector; the formula would divide zero by zero "
            "there. Published: matrices at 1e-2, momentum 0.95, weight decay 0.01; in the authors' code all other "
            "parameters have the same learning rate, and the head that over √d. FSDP2 shards momentum and basis.",
        ),
    ),
    "dion2": MethodPage(
        idea="Of each momentum the rows (or columns, if there are fewer) with the largest L1 norms are "
        "orthogonalised and move the weight; they are then damped by μ, while the others gather until their "
        "turn. AdamW on the rest.",
        formula=(
            "M ← M + G;  sel: the rows (columns, if fewer) of largest L1 norm, a share `fraction`",
            "U[sel] = orthogonalise(M[sel]);  M[sel] ← μ M[sel]",
            "W[sel] ← W[sel] − η √(m/n) U[sel], and W decays by η·wd",
        ),
        use="Use it where Muon's iterations or its communication are too slow: both shrink with `fraction`.",
        cost="mn values of momentum per matrix, half of AdamW's state. The iterations cost `fraction` of Muon's or "
        "less, and so do the slices that FSDP2 sends.",
        notes=(
            "Rows of square matrices are chosen. Sharded matrices are chosen from whole, so that any number of "
            "processes takes the same steps; the authors' code chooses rows within each shard. Published: matrices "
            "at 1e-2, fraction 0.25, momentum 0.95, weight decay 0.01.",
        ),
    ),
    "ldadam": MethodPage(
        idea="Adam in a subspace that follows the gradient at each step: one power iteration moves the basis towards "
        "the leading subspace of the momentum and the gradient, and the moments are turned into it. What the subspace "
        "cannot hold, of the gradient and of the momentum, is kept as an error and added to the next gradient. AdamW "
        "on the rest.",
        formula=(
            "A = G + E, in a basis Q of the shorter side (here m ≥ n): Q is n × r",
            "B = ρ · M̂ Q₋ᵀ + (1−ρ) A;  Q = orthonormal columns of Bᵀ B Q₋, with Q₋ the last basis",
            "T = Q₋ᵀ Q;  M ← M₋ T,  V ← (1−β₂ᵗ⁻¹) |(V̂₋ − M̂₋²) T² + (M̂₋ T)²|, squares by entry",
            "R = A Q",
            "E ← A − R Qᵀ + β₁/(1−β₁) · (M₋ Q₋ᵀ − M Qᵀ)",
            "M ← β₁ M + (1−β₁) R,  V ← β₂ V + (1−β₂) R²",
            "W ← (1 − η·wd) W − η · M̂ / (√V̂ + ε) · Qᵀ",
        ),
        use="Use it for small ranks, and where the refreshes of GaLore disturb training: the basis follows every "
        "gradient, and no gradient is lost. Without error feedback it has GaLore's memory.",
        cost="For m ≥ n: 2mr values of moments and nr of the basis per matrix, and mn of the error with "
        "`error_feedback`, so that it then saves less than half of AdamW's state. A step costs seven products of "
        "rank r, and r orthonormal columns; only the first one decomposes a matrix.",
        notes=(
            "A square matrix is projected on its left; otherwise the longer side is kept. Orthonormal columns come "
            "from Cholesky QR in float64, for all matrices of a shape at once: no loop and no wait for the device. A "
            "direction in which there is neither momentum nor gradient keeps its basis vector.",
            "The error is optimizer state: it is saved and resumed, neither clipping nor `zero_grad` changes it, and "
            "FSDP2 shards it with the weight. In bfloat16 it rounds small gradients away; `state_dtype: float32` "
            "keeps them.",
            "`training.adam_beta1` and `adam_beta2` set the decay of the moments, of all other parameters too. "
            "Published: 0.908 and 0.99.",
            "The authors' code ignores the betas of groups, does not save the step count, and keeps the error in "
            "`p.grad`, where clipping rescales it.",
            "Error feedback helps at nano scale, as the paper claims: the loss after 200 steps is 0.053 nats lower "
            "with it (95 % interval 0.040 to 0.067, three seeds, `recipes/studies/ablations.yaml`).",
        ),
    ),
    "cosmos": MethodPage(
        idea="Adam in the leading subspace of the gradients' second moment (as SOAP does in the whole space), and "
        "Muon in what of the momentum lies outside it: both are added, and the sum is brought to a fixed size. The "
        "basis follows by one power iteration per step. AdamW on the rest.",
        formula=(
            "M ← β₁ M + G,  κ = (1−β₁ᵗ)/(1−β₁),  H = (G + β₁ M) / (1 + β₁ κ)",
            "P = orthonormal columns of β₂ P₋ S + (1−β₂) GᵀG P₋, with P₋ the last basis (n × r)",
            "S ← β₂ (P₋ᵀP)ᵀ S (P₋ᵀP) + (1−β₂) (GP)ᵀ GP,  V ← β₂ V + (1−β₂) (GP)²",
            "A = H P / (√(V / (1−β₂ᵗ)) + ε) · Pᵀ",
            "C = orthogonalise(H − H P Pᵀ), with a root mean square of 1",
            "D = A + gamma · C",
            "W ← (1 − η·wd) W − η · lr_ratio · √(mn) · D / (‖D‖ + ε)",
        ),
        use="Use it in place of SOAP, whose state is larger, or of Muon, where a few directions of the gradients "
        "dominate. It does not save state as GaLore does: its momentum is dense.",
        cost="mn values of momentum, mr of the second moment, nr of the basis and r² of its covariance per matrix: "
        "a little more than half of AdamW's state. A step costs about five products of rank r, and the iterations of "
        "Muon.",
        notes=(
            "The basis is always of the columns' side. A target matrix moves by `learning_rate · lr_ratio` in root "
            "mean square, whatever its gradient. A rank above the shorter side of a target is refused by name.",
            "`training.adam_beta1` and `adam_beta2` set the decay of momentum and second moments, of AdamW's too. "
            "Published: a learning rate of 2e-3, betas of 0.95, `lr_ratio` 0.2 and weight decay 0.1 in the authors' "
            "example.",
            "The authors' code steps embeddings and other matrices of more than 10 000 rows by AdamW; here "
            "`target_modules` decides. Without Nesterov it does not use the momentum at all; here H is then the mean "
            "of the gradients. Where the basis leaves nothing but rounding errors outside, as with a rank of all "
            "columns, that part is left out.",
            "The part outside is orthogonalised in bfloat16; `ns_dtype: float32` keeps runs on different numbers of "
            "processes together. FSDP2 shards momentum, second moment and basis, and sends the part outside to one "
            "process per matrix.",
        ),
    ),
}
