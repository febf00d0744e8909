"""The model class for lm-eval: its `hf`, extended by this package's checkpoints and the sharpness of their loss."""

import hashlib
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedModel

from hf_lowrank.adapters import LowRankForCausalLM
from hf_lowrank.adapters.dense import dense_weight_kind
from hf_lowrank.downstream.sharpness import DirectionRequest, sharpness_along
from hf_lowrank.downstream.sources import tokenizer_folder
from hf_lowrank.errors import UserError
from hf_lowrank.geometry import ProcessGroup
from hf_lowrank.geometry.sharding import map_over
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.layout import CONFIG
from hf_lowrank.runs.selection import Checkpoint, find_checkpoint
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.runs.weights import check_checkpoint

logger = logging.getLogger(__name__)

KEPT_ENCODINGS = 500_000


class LowRankLM(HFLM):
    """lm-eval's `hf` for run checkpoints, exported models and Hub revisions of this package.

    Scores text exactly as `hf` does. In addition it answers requests for the sharpness of its loss along a direction
    (tasks `lowrank_random_sharpness`, `lowrank_pca1_sharpness`), in float32.

    Args:
        pretrained: `RUN/checkpoint-N`, `RUN@N`, `RUN@last`, `RUN`, an exported folder, `user/repo`, or a model.
        revision: of a repository, e.g. `step-1000`.
        tokenizer: None: the checkpoint's, else its run's.
        evaluation_set: the file or folder with the sequences of the loss; None: the run's.
        device: None: an accelerator if there is one.
        show_progress: whether lm-eval's bars are shown.
        **options: as for `hf`, whose backend is "causal" by default.

    Attributes:
        replicas: processes that hold the same model and get the same requests; they split the batches, which are those
            of one process. None: there is one process.

    Raises:
        UserError: no checkpoint is given, or it or its tokenizer does not exist.
    """

    replicas: ProcessGroup | None = None

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        revision: str | None = "main",
        tokenizer: Any = None,
        evaluation_set: str | EvaluationSet | None = None,
        device: str | None = None,
        show_progress: bool = True,
        **options: Any,
    ) -> None:
        if pretrained is None:
            raise UserError("pretrained must be a checkpoint, such as --model_args pretrained=runs/galore@last")
        self.checkpoint: Checkpoint | None = None
        self.show_progress = show_progress
        self.truncated_items = self.scored_items = 0
        self._given_set = evaluation_set
        self._encodings: dict[tuple[str, bool | None], list[int]] = {}
        if isinstance(pretrained, str):
            self.checkpoint = find_checkpoint(pretrained, None if revision == "main" else revision)
            pretrained, revision = self.checkpoint.path, self.checkpoint.revision or "main"
            if not tokenizer and Path(pretrained).is_dir():
                trajectory = Trajectory(pretrained)
                tokenizer = tokenizer_folder(trajectory, trajectory.steps[-1])
            if (Path(pretrained) / CONFIG).is_file():
                check_checkpoint(Path(pretrained))
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = device or (accelerator.type if accelerator else "cpu")
        # By itself `hf` takes the decoders of BART's family, which AutoModelForCausalLM gives, for encoder-decoders.
        options.setdefault("backend", "causal")
        super().__init__(pretrained=pretrained, revision=revision, tokenizer=tokenizer, device=device, **options)

    def replace_model(self, model: PreTrainedModel) -> None:
        """Switches to another checkpoint of the same run and keeps the encodings."""
        self._model = model.to(self.device).eval()
        self._config = model.config

    @cached_property
    def evaluation_set(self) -> EvaluationSet:
        """The held-out sequences on which the loss is measured."""
        if isinstance(self._given_set, EvaluationSet):
            return self._given_set
        if self._given_set is not None:
            return EvaluationSet.load(self._given_set)
        if self.checkpoint is None:
            raise UserError("the sharpness tasks need the run's sequences: --model_args evaluation_set=RUN")
        if self.checkpoint.run is not None:
            return EvaluationSet.load(self.checkpoint.run)
        if Path(self.checkpoint.path).is_dir():
            raise UserError(
                f"{self.checkpoint.path} is not in a run directory; the sharpness tasks need the run's sequences: "
                "--model_args evaluation_set=RUN"
            )
        return Trajectory(self.checkpoint.path).evaluation_set()

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: Any,
    ) -> list[int]:
        """As `hf`, with a cache."""
        if left_truncate_len or options:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)
        key = (string, add_special_tokens)
        if key not in self._encodings:
            if len(self._encodings) >= KEPT_ENCODINGS:
                self._encodings.clear()
            self._encodings[key] = super().tok_encode(string, add_special_tokens)
        return list(self._encodings[key])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.show_progress)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As `hf` for text; requests for a sharpness evaluate the loss."""
        directions = [request.args[0] for request in requests if DirectionRequest.is_one(request.args[0])]
        text = [request for request in requests if not DirectionRequest.is_one(request.args[0])]
        if directions:
            self._check_same(directions)
        sharpnesses = iter(self._sharpnesses(directions) if directions else ())
        likelihoods = iter(self._rolling(text, disable_tqdm) if text else ())
        return [next(sharpnesses if DirectionRequest.is_one(r.args[0]) else likelihoods) for r in requests]

    def _sharpnesses(self, directions: Sequence[str]) -> list[float]:
        """Of dense weights where the model has them, as in `measure`."""
        model: Any = self.model
        if isinstance(model, LowRankForCausalLM) and dense_weight_kind(model.config.adapter_config) == "exact":
            model = model.to_dense().eval()

        def sharpness(text: str) -> float:
            return sharpness_along(model, self.evaluation_set, DirectionRequest.from_text(text))

        return map_over(self.replicas, sharpness, directions)

    def _rolling(self, requests: list[Any], disable_tqdm: bool) -> list[float]:
        if self.replicas is None:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self.show_progress)
        windows = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                )
            ]
            for request in requests
        ]
        flat = [window for of_request in windows for window in of_request]
        self._count(flat)
        self._check_same(flat)
        answers = iter(self._split(self._answer_tokens, flat, consecutive_batches(len(flat), self.batch_size)))
        return [sum(next(answers)[0] for _ in of_request) for of_request in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As `hf`; processes do not split requests for sampled text."""

        def generate(some: list[Any]) -> list[str]:
            return super(LowRankLM, self).generate_until(some, disable_tqdm=disable_tqdm or not self.show_progress)

        arguments = [request.args for request in requests]
        if self.replicas is None or any(normalize_gen_kwargs(options)["do_sample"] for _, options in arguments):
            return generate(requests)
        batches = generation_batches(arguments, self.batch_size, self.tok_encode)
        self._check_same(arguments)
        return self._split(generate, requests, batches)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._count(requests)
        hidden = disable_tqdm or not self.show_progress
        if self.replicas is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=hidden, override_bs=override_bs)
        batches = likelihood_batches(requests, self.batch_size, share_contexts=self.logits_cache)
        self._check_same(requests)
        return self._split(self._answer_tokens, requests, batches)

    def _answer_tokens(self, batch: list[Any]) -> list[tuple[float, bool]]:
        return super()._loglikelihood_tokens(batch, disable_tqdm=True, override_bs=len(batch))

    def _check_same(self, requests: Sequence[Any]) -> None:
        """Raises UserError where processes would split requests that are not the same in all of them."""
        if self.replicas is not None:
            digests = self.replicas.all_gather(hashlib.sha256(repr(requests).encode()).hexdigest())
            if len(set(digests)) > 1:
                raise UserError(
                    "its requests differ from process to process, so they cannot be split; evaluate it in one process"
                )

    def _split(
        self, answer: Callable[[list[Any]], list[Any]], requests: Sequence[Any], batches: Sequence[Sequence[int]]
    ) -> list[Any]:
        """The answers to all requests; `batches` are their indices."""
        found = map_over(self.replicas, lambda batch: answer([requests[index] for index in batch]), batches)
        answers: dict[int, Any] = {}
        for batch, values in zip(batches, found, strict=True):
            answers.update(zip(batch, values, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _count(self, requests: Sequence[Any]) -> None:
        room = self.max_length
        for _, context, continuation in requests:
            if len(continuation) > room:
                raise UserError(f"an item's answer of {len(continuation)} tokens is longer than the context of {room}")
            self.truncated_items += len(context) + len(continuation) > room + 1
        self.scored_items += len(requests)


# hf evaluates requests in these batches of their indices; its answers depend on them in their last digits.
def consecutive_batches(count: int, size: int) -> list[list[int]]:
    """Indices 0 … `count` − 1 in order, `size` per batch."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def likelihood_batches(requests: Sequence[Any], size: int, *, share_contexts: bool) -> list[list[int]]:
    """Batches of requests `(text, context, continuation)` with lists of tokens: longest first, `size` sequences each.

    Args:
        share_contexts: whether requests that differ only in their last token share a sequence.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        key: Hashable = (*context, *continuation[:-1]) if share_contexts else index
        groups.setdefault(key, []).append(index)

    def length_and_tokens(group: list[int]) -> tuple[int, tuple[int, ...]]:
        _, context, continuation = max((requests[index] for index in group), key=lambda request: len(request[2]))
        return -len(context) - len(continuation), (*context, *continuation)

    ordered = sorted(groups.values(), key=length_and_tokens)
    return [
        sorted(index for group in batch for index in ordered[group])
        for batch in consecutive_batches(len(ordered), size)
    ]


def generation_batches(
    requests: Sequence[tuple[str, dict[str, Any]]], size: int, encode: Callable[[str], list[int]]
) -> list[list[int]]:
    """Batches of requests `(text, options)`, each with equal options: longest first, `size` requests each."""
    groups: dict[str, list[int]] = {}
    for index, (_, options) in enumerate(requests):
        groups.setdefault(repr(sorted(options.items())), []).append(index)
    batches: list[list[int]] = []
    for group in groups.values():
        ordered = sorted(group, key=lambda index: (-len(encode(requests[index][0])), requests[index][0]))
        batches += [[ordered[i] for i in batch] for batch in consecutive_batches(len(ordered), size)]
    return batches
