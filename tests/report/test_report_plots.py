"""The matplotlib figures draw what was measured, with the page's looks, and import matplotlib only when asked."""

import ast
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hf_lowrank.errors import UserError
from hf_lowrank.metrics import describe
from hf_lowrank.report import plots
from hf_lowrank.report.members import looks
from hf_lowrank.report.plots import (
    PLOTS,
    barrier_matrix,
    landscapes,
    layer_profiles,
    layer_step_map,
    line_curves,
    loss_curves,
    solutions,
    trends,
)
from hf_lowrank.runs.records import load_runs


@pytest.fixture
def study(make_run):
    """Three methods with two seeds each, everything measured."""
    return [
        make_run(f"{method}-{seed}", method, seed, loss=loss + 0.02 * seed, activations=True, barriers=bases)
        for method, loss, bases in (
            ("full_rank", 3.3, ("galore-0",)),
            ("galore", 3.4, ("full_rank-0",)),
            ("cola", 3.5, ("full_rank-0", "galore-0")),
        )
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("name", PLOTS)
def test_every_picture_saves(study, tmp_path, name):
    figure = PLOTS[name](study)
    figure.savefig(tmp_path / "picture.png", dpi=40)
    assert (tmp_path / "picture.png").stat().st_size > 2000
    assert figure.axes


def test_lines_are_means_over_seeds_in_the_method_s_look(study):
    (axes,) = loss_curves(study).axes
    assert [line.get_label() for line in axes.lines] == ["Full-rank", "GaLore", "CoLA"]
    for line, method in zip(axes.lines, ("full_rank", "galore", "cola"), strict=True):
        assert to_hex(line.get_color()) == looks([method])[method].light
    assert axes.lines[1].get_ydata()[-1] == pytest.approx(3.41)
    assert axes.lines[0].get_linestyle() == "-"
    assert axes.lines[2].get_linestyle() != "-"
    # The t interval of two values 0.02 apart: half width 12.706 · 0.01.
    low, high = axes.collections[1].get_paths()[0].get_extents().get_points()[:, 1]
    assert high - low > 2 * 12.706 * 0.0099


def test_a_single_run_keeps_its_own_band(make_run):
    (axes,) = line_curves([make_run("a")]).axes
    assert len(axes.collections) == 1
    (line,) = axes.lines
    assert line.get_xdata()[0] == -0.3
    assert line.get_ydata()[6] == 0


def test_solutions_stand_at_their_means(study):
    axes = solutions(study, ["random_sharpness", "activation_cka", "weight_spectral_gap"]).axes
    titles = [describe(name).title for name in ("random_sharpness", "activation_cka", "weight_spectral_gap")]
    assert [place.get_title().split(" (")[0] for place in axes] == titles
    assert [container.get_label() for container in axes[0].containers] == ["Full-rank", "GaLore", "CoLA"]
    runs = [run for run in load_runs(study) if run.method == "galore"]
    line, _, bars = axes[0].containers[1]
    values = [run.last("random_sharpness").value for run in runs]
    assert line.get_xdata()[0] == pytest.approx(np.mean([run.perplexity for run in runs]))
    assert line.get_ydata()[0] == pytest.approx(np.mean(values))
    low, high = bars[1].get_segments()[0][:, 1]
    assert high - low == pytest.approx(12.706 * abs(values[0] - values[1]), rel=1e-3)
    assert [container.get_label() for container in axes[1].containers] == ["GaLore", "CoLA"]
    with pytest.raises(UserError, match="none of hessian_trace was measured"):
        solutions(study, ["hessian_trace"])


def test_planes_maps_and_matrices_hold_the_measured_numbers(study):
    figure = landscapes(study)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["Full-rank, seed 0", "GaLore, seed 0", "CoLA, seed 0 †"]
    figure = layer_step_map(study, "activation_cosine")
    assert [axes.get_title() for axes in figure.axes[:2]] == ["GaLore", "CoLA"]
    assert figure.axes[0].images[0].get_array().shape == (5, 5)
    grid = barrier_matrix(study).axes[0].images[0].get_array()
    assert np.allclose(np.ma.filled(grid, np.nan), np.ma.filled(grid.T, np.nan), equal_nan=True)
    assert len(layer_profiles(study).axes) == 7
    assert len(trends(study).axes) == 7
    assert len(trends(study, ["random_sharpness"]).axes) == 1


def test_what_was_not_measured_is_an_error_of_one_line(make_run):
    bare = [make_run("bare", measured=False)]
    for name, plot in PLOTS.items():
        if name != "loss_curves":
            with pytest.raises(UserError, match="measure"):
                plot(bare)
    with pytest.raises(UserError, match="did you mean 'random_curve'"):
        line_curves(bare, "random_curv")
    with pytest.raises(UserError, match="was not measured"):
        trends([make_run("b")], ["update_normal"])
    with pytest.raises(UserError, match="share one evaluation set"):
        loss_curves([make_run("c"), make_run("d", fingerprint="cd" * 32)])


def test_matplotlib_comes_only_with_a_picture():
    parsed = ast.parse(Path(plots.__file__).read_text(encoding="utf-8"))
    names = [alias.name for node in parsed.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in parsed.body if isinstance(node, ast.ImportFrom)]
    assert "numpy" in names
    assert not [name for name in names if name.startswith("matplotlib")]


def marks(figure):
    """Positions of the marks, by axes, and the footnote."""
    found = [[text.xy for text in axes.texts if text.get_text() == "†"] for axes in figure.axes]
    return found, figure.get_supxlabel()


def test_what_is_not_of_dense_weights_is_marked(study):
    note = "† moves the model's own parameters instead of dense weights: not comparable with the others"
    figure = line_curves(study)
    (found,), said = marks(figure)
    cola = next(line for line in figure.axes[0].lines if line.get_label() == "CoLA")
    assert found == [(cola.get_xdata()[-1], cola.get_ydata()[-1])]
    assert said == note
    found, said = marks(solutions(study, ["random_sharpness", "activation_cka"]))
    assert ([len(points) for points in found], said) == ([1, 0], note)
    found, said = marks(trends(study, ["random_sharpness", "update_norm"]))
    assert ([len(points) for points in found], said) == ([1, 0], note)
    assert landscapes(study).get_supxlabel() == note
    dense = [run for run in study if "cola" not in run.name]
    for figure in (line_curves(dense), landscapes(dense), solutions(dense), line_curves(study, "method_path")):
        assert marks(figure)[1] == ""
        assert not any(marks(figure)[0])
