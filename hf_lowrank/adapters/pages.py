"""The pages of the methods that change the layers: what each says besides the entry.

W is a target weight of m × n, G its gradient, η the learning rate, μ the momentum. Texts are Markdown.
"""

from hf_lowrank.methods import MethodPage

PAGES = {
    "low_rank": MethodPage(
        idea="Two factors in place of each weight, W = B A, throughout training.",
        formula=("W = B A,  B: m × r, A: r × n, both trained",),
        use="Use it as the control: what the other methods add has to show against it.",
        cost="r(m + n) parameters with gradients and moments.",
        notes=(
            "On C4 it falls far behind: the papers report perplexity 78 against 34 at 60M.",
            "`refactorise_every` turns on the refactorised low rank with momentum reset (arXiv 2505.22922), for "
            "SLTrain as well: every so many steps the factors become the balanced ones of the same product, B ← U √S "
            "and A ← √S Vᵀ with U S Vᵀ = B A; all moments and Adam's step counts start anew, and the learning rate "
            "climbs back linearly, within `recovery_steps`, from a thousandth of its schedule. The product is never "
            "formed: a refactorisation costs a QR of each factor and the SVD of an r × r matrix. Published at 60M: "
            "learning rate 1.5e-3, r 128, lora_alpha 32. In the released code the schedule runs one step late, and "
            "where `refactorise_every` does not divide the number of steps, the recoveries vanish while restarts go "
            "on; here neither happens. Whether it helps is undecided at nano scale: the loss after 200 steps with "
            "four refactorisations is 0.038 nats lower (95 % interval −0.179 to 0.255, three seeds, "
            "`recipes/studies/ablations.yaml`).",
            "`guide_share` adds the dense guide of self-guided training (arXiv 2406.16450) for the first part of "
            "training, see [structured](structured.md).",
        ),
    ),
    "cola": MethodPage(
        idea="Each linear layer becomes two factors with SiLU between them: y = B · σ(A x). No dense weight exists, "
        "during training or after it.",
        formula=("y = B σ(A x),  A: r × n, B: m × r",),
        use="Use it when compute is the limit: forward and backward passes are cheaper than the dense layer's, and "
        "the trained model stays small.",
        cost="r(m + n) parameters with gradients and moments; about r(m + n) / mn of the dense layer's FLOPs. "
        "`checkpoint_activations=True` is CoLA-M: the same results with fewer stored activations.",
        notes=(
            "The layer is not linear, so it has no dense equivalent and cannot be merged. Spectra are those of the "
            "product B A, labelled as its surrogate; landscapes and step barriers move its own parameters and are "
            "marked as not dense. Published: learning rate 6e-3 / 3e-3 / 3e-3, weight decay 0.01, clipping at 0.5.",
        ),
    ),
    "sltrain": MethodPage(
        idea="Each weight is a low-rank product plus a sparse matrix: W = (α/r) B A + S. The support of S is drawn "
        "once from a seed; only its values are trained.",
        formula=("W = (α/r) B A + S,  S: sparse with fixed support of sparsity · m · n entries",),
        use="Use it when the model itself has to be small during training and you want a dense equivalent at the end.",
        cost="r(m + n) + δmn parameters with gradients and moments, and a 4-byte index per sparse entry. The dense "
        "weight exists only while its layer computes.",
        notes=(
            "`to_dense()` gives the plain architecture exactly (to rounding). Published: sparsity 0.03, lora_alpha "
            "32 / 16 / 16, learning rate 2e-3 / 3e-3 / 2e-3.",
            "`refactorise_every` refactorises B A with a reset of all moments, as for [the low-rank "
            "control](low_rank.md); the sparse values stay. At nano scale it harms, against the paper: the loss after "
            "200 steps with four refactorisations is 0.147 nats higher (95 % interval 0.108 to 0.186, three seeds, "
            "`recipes/studies/ablations.yaml`).",
        ),
    ),
    "structured": MethodPage(
        idea="Two factors in place of each weight of an MLP, with none, the first or both of them block-diagonal. "
        "During the first part of training each layer has a dense guide: o = α W_g x + (1 − α) f(x), α = ½ (1 "
        "+ cos(πk/T)) at step k of T.",
        formula=(
            "y = U V x, V (and U) block-diagonal",
            "while guided: o = α W_g x + (1−α) y,  α = ½ (1 + cos(πk/T)) at step k of T",
        ),
        use="Use it to make the MLPs smaller and faster, in training after the guide and in inference, where the "
        "guide makes up for the harder optimisation of factors.",
        cost="For a weight of m × n, width k = r and b blocks: low_rank k(m + n), block_dense km + kn/b, "
        "block_shuffle min(m, n) (m + n)/b parameters with gradients and moments. While guided, mn more of "
        "each.",
        notes=(
            "The MLP of the first block stays dense: `exclude_modules` names it. Architectures that call their MLP "
            "something else than `mlp` need patterns of their own.",
            "`blocks` must divide the sides that it cuts; where it does not, the layer is named.",
            "α falls from 1 to 0 over `guide_share` of the optimizer steps. W_g starts as the product of the "
            "factors. It acts in training mode alone; evaluation and `to_dense()` have the structure alone from the "
            "beginning, and the dense weight is exact (to rounding).",
            "When its time is over the guide leaves the model, its config, the optimizer and the checkpoints. A run "
            "resumes on both sides of that step.",
            "Not with FSDP2, from whose sharded parameters none can be dropped: set `guide_share: 0` there.",
            "In the released code the guide of block-shuffle lacks the shuffles, also acts in evaluation, and stays "
            "in the checkpoint.",
            "The low-rank control takes `guide_share` as well.",
            "Whether the guide helps is undecided at nano scale: the loss after 200 steps is 0.219 nats lower with it "
            "(95 % interval −0.164 to 0.602, three seeds, `recipes/studies/ablations.yaml`).",
        ),
    ),
    "sst": MethodPage(
        idea="Sparse spectral training keeps each weight as its singular value decomposition, W = U diag(S) Vᵀ, of "
        "full rank. All singular values train; of the singular vectors only `r` pairs at a time, drawn anew "
        "every `redraw_every` steps, pair i with probability ½ (1/k + S_i/ΣS), k = min(m, n).",
        formula=(
            "W = U diag(S) Vᵀ,  k = min(m, n)",
            "every redraw_every steps: draw r pairs i with probability ½ (1/k + S_i/ΣS)",
            "drawn u_i, v_i and all S train:  ∂u_i = G v_i, ∂v_i = Gᵀ u_i, ∂S_i = u_iᵀ G v_i",
            "after each step u_i, v_i ← norm 1, S ← max(S, 0)",
        ),
        use="Use it when gradients and moments of dense weights do not fit but their decomposition does, and the "
        "weights should not be confined to a low rank.",
        cost="Weights: k(m + n) frozen values of U and V, r(m + n) of the active pairs and k singular values: for a "
        "square weight twice the dense one. Gradients and moments of r(m + n) + k values. A forward pass costs "
        "two products with a k-wide matrix where the dense layer has one with the weight. A new decomposition, "
        "once in ⌈k/r⌉ draws, costs one SVD per weight.",
        notes=(
            "The gradients of the active vectors are G v_i and Gᵀ u_i, without the factor S_i; singular values have "
            "their own gradient. After each step the vectors are normalised and negative singular values set to "
            "zero. A draw starts the moments and the step count of Adam anew for everything that an SST layer "
            "trains, and the learning rate warms up from zero.",
            "The model starts as the dense model of the same seed, and `to_dense()` gives the plain architecture "
            "exactly (to rounding).",
            "Second derivatives are refused; metrics that need them are measured on the dense weights.",
            "Under FSDP2 all of the decomposition is sharded; a draw gathers one layer at a time.",
            "The paper trains on other data than this series; the recipes take the series' ranks and full-rank "
            "learning rates.",
        ),
    ),
    "relora": MethodPage(
        idea="LoRA from scratch. Every `restart_every` steps the factors are merged into the frozen weight and "
        "re-initialised, most of their moments are pruned, and the learning rate warms up again. The sum of "
        "many low-rank updates has a high rank.",
        formula=(
            "y = (W + (α/r) B A) x,  W frozen, A and B trained",
            "every restart_every steps: W ← W + (α/r) B A,  A ← random,  B ← 0",
            "then most moments are 0, and η climbs again from 0",
        ),
        use="Use it when the frozen weights fit but the gradients and moments of dense weights do not, and training "
        "is long enough for several restarts.",
        cost="The frozen weight with mn values, and factors with r(m + n) values, their gradients and moments. A "
        "restart costs one matrix product per weight.",
        notes=(
            "Published: restarts every 1000 to 5000 steps, learning rate 1e-3 / 1e-3 / 5e-4. Here the factors start "
            "as in LoRA (A random, B zero) from the beginning; the official wrapper starts with both at zero.",
            "`ReLoraCallback` refuses a model that PEFT wraps: Trainer saves the adapter alone of it, without the "
            "weights that restarts merge into the base. `LowRankForCausalLM.from_dense(model, LoraConfig(...))` is "
            "saved whole.",
        ),
    ),
}
