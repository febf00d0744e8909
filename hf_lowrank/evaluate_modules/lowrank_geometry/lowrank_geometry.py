"""Sixteen geometric and spectral metrics of causal language model checkpoints against their baselines."""

# `evaluate` reads the imports line by line, so each is on a line of its own.
import datasets
import evaluate

import hf_lowrank.measuring.runner

_DESCRIPTION = """\
Describes the solution that a checkpoint is, in addition to its perplexity: the loss landscape around it, barriers to
the previous checkpoint and to a baseline, spectra of weights and updates, and similarity of activations to a baseline.
"""

_KWARGS_DESCRIPTION = """\
Args:
    predictions: list of str, checkpoints to measure: `RUN/checkpoint-N` or `user/repo@step-N`.
    references: list of str, for each of them the baseline's checkpoint of the same step.
    metrics: ids, dimensions or groups of metrics; None: the sixteen.
    preset: "fast" or "paper".
    settings: overrides of the preset, a mapping or a YAML file.
    device: where the models run; None: a GPU if there is one.
    evaluation_set: held-out sequences: a safetensors file of hf_lowrank, its folder, or a text file; None: those of
        the run.
Returns:
    a dict with a list of values for each metric, in the order of the predictions, None where there is no value; and
    under "reasons", for each prediction, the reasons by metric, and under "remarks" the remarks on values.
Examples:
    >>> import evaluate
    >>> from hf_lowrank.evaluate_modules import path
    >>> geometry = evaluate.load(path("lowrank_geometry"))
    >>> geometry.compute(predictions=["runs/galore/checkpoint-400"], references=["runs/full_rank/checkpoint-400"])
"""

_CITATION = """\
@misc{hf_lowrank,
  title = {hf_lowrank: low-rank pre-training and its geometry in the Hugging Face stack},
  year = {2026}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LowrankGeometry(evaluate.Metric):
    """The class that `evaluate.load` instantiates."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=features,
            reference_urls=["https://arxiv.org/abs/2605.13652", "https://arxiv.org/abs/1905.00414"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        metrics: str | list[str] | None = None,
        preset: str = "fast",
        settings: dict | str | None = None,
        device: str | None = None,
        evaluation_set: str | None = None,
    ) -> dict[str, list]:
        options = {} if metrics is None else {"metrics": metrics}
        return hf_lowrank.measuring.runner.measure_pairs(
            predictions,
            references,
            preset=preset,
            settings=settings,
            device=device,
            evaluation_set=evaluation_set,
            **options,
        )
