"""Full-rank AdamW with a learning rate of its own for the target matrices."""

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from hf_lowrank.errors import UserError
from hf_lowrank.optim.groups import param_groups
from hf_lowrank.optim.methods import FullRankSettings


def build_optimizer(model: nn.Module, settings: FullRankSettings, args: TrainingArguments) -> Optimizer | None:
    """Trainer's own optimizer, with the target matrices at `matrix_lr_scale` times the learning rate.

    None where there is one rate for all: Trainer builds its optimizer as it does without this package.

    Raises:
        UserError: the target pattern matches nothing, or `training.optim` makes its own groups.
    """
    if settings.matrix_lr_scale in (None, 1.0):
        return None
    groups = param_groups(model, rank=1, target_modules=settings.target_modules, weight_decay=args.weight_decay)
    for group in groups:
        scale = 1.0 if group.pop("rank") is None else settings.matrix_lr_scale
        group.update(lr=scale * args.learning_rate, params=[param for _, param in group["params"]])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    if {"params", "model", "optimizer_dict"} & set(options):
        raise UserError(
            f"matrix_lr_scale must be left out with training.optim {args.optim}, which makes its own groups"
        )
    # Trainer logs the learning rate of the first group, which should be the recipe's.
    optimizer: Optimizer = kind(groups[::-1], **options)
    return optimizer
