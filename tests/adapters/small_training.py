"""A small training by Trainer with one of the methods, that can be told to kill itself."""

import os

import torch
from transformers import LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from hf_lowrank.methods import METHODS


class Killed(TrainerCallback):
    """SIGKILL right after a step, or right after its checkpoint."""

    def __init__(self, step, moment):
        self.step, self.moment = step, moment

    def on_step_begin(self, args, state, control, **kwargs):
        if self.moment == "step" and state.global_step == self.step:
            os.kill(os.getpid(), 9)

    def on_save(self, args, state, control, **kwargs):
        if self.moment == "save" and state.global_step == self.step:
            os.kill(os.getpid(), 9)


def train(
    output,
    steps,
    name="relora",
    kill=None,
    moment="step",
    accumulation=1,
    batch=4,
    save_steps=1,
    resume=None,
    **settings,
):
    torch.set_num_threads(1)
    method = METHODS[name]
    restarts = {"restart_every": 3, "restart_warmup_steps": 1} if name == "relora" else {}
    options = method.settings(**{"r": 2, **restarts, **settings})
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = method.build_model(config, options, 0)
    args = TrainingArguments(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=4 // accumulation // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        warmup_steps=1,
        weight_decay=0.01,
        save_steps=save_steps,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        train_sampling_strategy="sequential",
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )
    data = torch.randint(32, (64, 12), generator=torch.Generator().manual_seed(3))
    callbacks = [*method.callbacks(options, args), *([Killed(kill, moment)] if kill else [])]
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in data],
        optimizers=(method.optimizer(model, options, args), None),
        callbacks=callbacks,
    )
    if method.build_scheduler is not None:
        trainer.lr_scheduler = method.build_scheduler(trainer.create_optimizer(), options, args, steps)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
