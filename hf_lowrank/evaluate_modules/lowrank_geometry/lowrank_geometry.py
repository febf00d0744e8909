"""Sixteen geometric and spectral metrics of causal language model checkpoints against their baselines."""

# `evaluate` reads the imports line by line, so each stands on one of its own.
import datasets
import evaluate

import hf_lowrank.measuring.pairs

_DESCRIPTION = """\
Says what kind of solution a checkpoint is, beside its perplexity: the loss landscape around it, barriers to the
checkpoint before and to a baseline, spectra of weights and updates, and likeness of activations to the baseline's.
"""

_KWARGS_DESCRIPTION = """\
Args:
    predictions: list of str, checkpoints to measure: `RUN/checkpoint-N` or `user/repo@step-N`.
    references: list of str, the baseline's checkpoint of the same step for each of them.
    metrics: ids, dimensions or groups of metrics; None: the sixteen.
    preset: "fast" or "paper".
    settings: own settings over the preset's, a mapping or a YAML file.
    device: where the models run; None: a GPU if there is one.
    evaluation_set: held-out sequences: a safetensors file of hf_lowrank, its folder, or a text file; None: those
        that were written with the run.
Returns:
    a dict with a list of values for each metric, in the order of the predictions, None where there is none; and
    under "reasons", for each prediction, why, by metric.
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
    """The module that `evaluate.load` finds."""

    def _info(self):
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
        predictions,
        references,
        metrics=None,
        preset="fast",
        settings=None,
        device=None,
        evaluation_set=None,
    ):
        options = {} if metrics is None else {"metrics": metrics}
        return hf_lowrank.measuring.pairs.measure_pairs(
            predictions,
            references,
            preset=preset,
            settings=settings,
            device=device,
            evaluation_set=evaluation_set,
            **options,
        )
