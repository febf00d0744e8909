"""A method of your own from a package of your own, in a study: Lion (arXiv 2302.06675).

Shows a whole plug-in: settings with explanations and bounds, an optimizer, a page, and the entry point in
pyproject.toml by which hf_lowrank finds them. Then recipes name it, commands list it, and a study compares it with
full-rank training, without a line changed in hf_lowrank:

    pip install -e examples/own_method
    hf-lowrank methods lion
    hf-lowrank study examples/own_method/study.yaml

Needs this package and, for pip, hatchling; the text is that of this folder. The study takes a minute or two.
"""

from typing import Any

import torch
from pydantic import Field

from hf_lowrank.methods import Method, MethodPage, MethodSettings


class LionSettings(MethodSettings):
    """The keys of a recipe's `method:` block."""

    beta1: float = Field(0.9, ge=0, lt=1, description="share of the momentum in the direction")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the momentum")


class Lion(torch.optim.Optimizer):
    """`C = β₁ M + (1−β₁) G`, `W ← (1 − η·wd) W − η sign(C)`, `M ← β₂ M + (1−β₂) G`. Its state is tensors alone."""

    def __init__(self, params: Any, lr: float, beta1: float, beta2: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                direction = torch.lerp(parameter.grad, momentum, group["beta1"]).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - group["beta2"])


def build_optimizer(model: torch.nn.Module, settings: LionSettings, args: Any) -> Lion:
    """The optimizer, with learning rate and weight decay of `TrainingArguments`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Lion(trained, lr=args.learning_rate, weight_decay=args.weight_decay, **settings.model_dump())


METHOD = Method(
    name="lion",
    title="Lion",
    summary="The sign of an interpolated momentum; one moment per weight.",
    kind="optimizer",
    settings=LionSettings,
    source="arXiv 2302.06675",
    build_optimizer=build_optimizer,
    page=MethodPage(
        idea="Every entry moves by the learning rate, in the direction of the sign of an interpolated momentum.",
        formula=("C = β₁ M + (1−β₁) G,  M ← β₂ M + (1−β₂) G", "W ← (1 − η·wd) W − η sign(C)"),
        use="Use it as an example of a method from another package.",
        cost="mn values of momentum per weight, half of AdamW's state.",
        notes=("Published: a learning rate three to ten times smaller than AdamW's.",),
    ),
)
