"""Models that several processes hold together: the rows of one process, half the weights in each."""

from __future__ import annotations

import math
import os
from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor

from hf_lowrank.cli import main
from hf_lowrank.errors import UserError
from hf_lowrank.geometry import Gaussian, TokenLoss, movable, random_curve, trajectory_pca_directions
from hf_lowrank.geometry.directions import Difference
from hf_lowrank.measuring import measure
from hf_lowrank.metrics import METRICS
from hf_lowrank.processes import placement as placements
from hf_lowrank.processes.placement import RowSharded, parameters_of
from hf_lowrank.processes.work import Progress
from hf_lowrank.runs.measurements import read_measurements
from hf_lowrank.runs.trajectory import Trajectory
from tests.distributed.processes import in_processes
from tests.distributed.sharded_training import launched
from tests.measuring.adapted import write_adapted

# Five sequences of twelve tokens, two at a time: with two processes a batch of two each, and one that does not go up.
SMALL = {
    "random": {"draws": 2, "steps": 1},
    "pca": {"count": 2, "steps": 1},
    "path": {"points": 1},
    "plane": {"steps": 1},
    "sequences": 5,
    "batch_tokens": 24,
}
OTHER = {
    "filter": {
        **SMALL,
        "random": {**SMALL["random"], "normalize": "filter"},
        "pca": {"count": 1, "steps": 1, "normalize": "filter"},
    },
    "trajectory": {
        **SMALL,
        "random": {**SMALL["random"], "normalize": "tensor"},
        "pca": {"count": 2, "steps": 1, "basis": "trajectory"},
    },
}
EXTRAS = (
    "loss", "perplexity", "random_plane", "weight_overlap", "intrinsic_dimension", "critical_sharpness",
    "aligned_method_barrier", "curved_method_barrier", "gradient_noise_scale",
)  # fmt: skip
WHOLE = ("critical_sharpness", "aligned_method_barrier", "curved_method_barrier", "gradient_noise_scale")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_run):
    """A full-rank run and two adapted ones; lengths that no number of processes divides."""
    folder = tmp_path_factory.mktemp("sharded")
    full = make_run(folder / "full_rank-0", vocab_size=83, intermediate_size=49, tie_word_embeddings=True)
    return [full, *(write_adapted(folder / f"{method}-0", full, method) for method in ("sltrain", "cola"))]


def measured(runs, output, **options):
    metrics = [*METRICS.sixteen, *EXTRAS]
    measure(runs, metrics=metrics, steps=10, settings=SMALL, output=output / "all", **options)
    for name, settings in OTHER.items():
        measure(runs[:2], metrics="random,pca", steps=20, settings=settings, output=output / name, **options)


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    measured(runs, output)
    return output


def together(runs, output, rank, world):
    """What each of the processes does in the tests below, in one launch."""
    launched(rank, world, on_accelerators=False)
    measured(runs, output, sharded=True)
    placement = RowSharded(torch.device("cpu"))
    return {
        "held": held(runs, placement),
        "moved": {run.name: moved(Trajectory(run), placement) for run in runs[:2]},
        "chunks": chunked_loss(Trajectory(runs[0]), placement),
        "one failed": one_failed(runs[0], output / "one failed", rank),
    }


def held(runs, placement):
    """Entries of parameters here and in all; whether a sweep leaves them bit-equal."""
    found = {}
    for run in runs:
        model = placement.model(Trajectory(run), 10)
        parameters = dict(model.named_parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
        here = {name: parameter.to_local().detach().clone() for name, parameter in parameters.items()}
        sequences = Trajectory(run).evaluation_set()
        loss = TokenLoss(sequences.input_ids, sequences.attention_mask, shards=placement.shards)
        random_curve(model, loss, offsets=[-0.1, 0, 0.1], draws=1, normalize="tensor")
        equal = all(torch.equal(p.to_local(), here[name]) for name, p in model.named_parameters())
        whole = sum(parameter.numel() for parameter in parameters.values())
        found[run.name] = [sum(part.numel() for part in here.values()), whole, equal]
    return found


def moves(model, end, states):
    """Weights after a move along a direction of each kind."""
    along = trajectory_pca_directions(states, states[0], 1, normalize="tensor")[0][0]
    found = {}
    with movable(model) as move:
        for name, direction in {
            "none": Gaussian(1, 0),
            "tensor": Gaussian(1, 0, "tensor"),
            "filter": Gaussian(1, 0, "filter"),
            "difference": Difference(end),
            "trajectory": along,
        }.items():
            move([(direction, 0.3)])
            found[name] = {
                key: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
                for key, p in model.named_parameters()
            }
    return found


def moved(run, placement):
    states = [placement.weights(run, step) for step in run.steps]
    return moves(placement.model(run, 10), states[2], states)


def chunked_loss(run, placement):
    sequences = run.evaluation_set()
    loss = TokenLoss(sequences.input_ids, sequences.attention_mask, vocabulary_chunk=20, shards=placement.shards)
    model = placement.model(run, 10)
    first = loss(model)
    assert loss._chunkable[model]
    return [first, loss(model)]


def one_failed(run, output, rank):
    """Process 1 cannot read step 10 and cannot decompose a matrix of step 20."""
    read, decompose = Trajectory.tensor, Trajectory.dense_weight

    def tensor(self, step, name, **rows):
        if rank == 1 and step == 10 and rows:
            raise OSError("the disk is on fire")
        return read(self, step, name, **rows)

    def dense_weight(self, step, module):
        if rank == 1 and step == 20 and module.endswith("k_proj"):
            raise MemoryError("too large")
        return decompose(self, step, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trajectory, "tensor", tensor)
        patch.setattr(Trajectory, "dense_weight", dense_weight)
        rows = measure(
            run, metrics="loss,weight_stable_rank", steps="10,20", settings=SMALL, sharded=True, output=output
        )
    return {f"{row.metric} {row.step}": row.reason for row in rows if row.scope == "model"}


@pytest.fixture(scope="module")
def halves(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return folder, in_processes(2, partial(together, runs, folder / "rows"), folder / "of", ACCELERATE_USE_CPU="true")


def by_key(folder):
    rows = [row for run in sorted(folder.iterdir()) for row in read_measurements(run)]
    return {row.key: row for row in rows}


def check_rows(alone, other):
    """The same rows but for what needs the whole model; losses to rounding, what is their difference to that."""
    for name in ("all", *OTHER):
        expected, got = by_key(alone / name), by_key(other / name)
        for key, row in expected.items():
            if row.metric in (*WHOLE, "aligned_method_path", "curved_method_path"):
                continue
            assert got[key].reason == row.reason, key
            for field in ("value", "ci_low", "ci_high"):
                one, two = getattr(row, field), getattr(got[key], field)
                assert two == pytest.approx(one, rel=1e-6, abs=2e-7, nan_ok=True), (name, key, field)


def test_two_processes_that_hold_models_together_give_the_rows_of_one(alone, halves):
    check_rows(alone, halves[0] / "rows")
    rows = by_key(halves[0] / "rows" / "all").values()
    with_value = {row.metric for row in rows if row.scope == "model" and math.isfinite(row.value)}
    assert with_value >= {*METRICS.sixteen, "loss", "random_plane", "weight_overlap", "intrinsic_dimension"}


def test_what_needs_the_whole_model_is_a_row_that_says_so(halves):
    rows = by_key(halves[0] / "rows" / "all").values()
    reasons = {(row.run, row.metric): row.reason for row in rows}
    assert reasons["sltrain-0", "critical_sharpness"] == (
        "the gradient needs the whole model in one process; measure it without --sharded"
    )
    assert reasons["sltrain-0", "aligned_method_barrier"].startswith("matching hidden units needs the whole model")
    assert reasons["sltrain-0", "curved_method_barrier"].startswith("training a curve needs the whole model")
    assert reasons["cola-0", "curved_method_barrier"].startswith("undefined: the layers are not linear")
    assert reasons["sltrain-0", "gradient_noise_scale"].startswith("the gradient needs the whole model")
    for metric in ("aligned_method_barrier", "curved_method_barrier"):
        assert reasons["full_rank-0", metric] == "undefined: the run is its own baseline"


def test_each_process_holds_half_of_the_weights_and_gets_them_back_bit_for_bit(runs, halves):
    for run in runs:
        entries = [found["held"][run.name] for found in halves[1]]
        whole = sum(parameter.numel() for parameter in Trajectory(run).model(10).parameters())
        assert all(equal for _, _, equal in entries)
        assert sum(here for here, _, _ in entries) == whole
        assert max(here for here, _, _ in entries) < 0.51 * whole


def test_parts_move_to_where_whole_parameters_do(runs, halves):
    for run in map(Trajectory, runs[:2]):
        states = [parameters_of(run.model(step)) for step in run.steps]
        expected = moves(run.model(10), states[2], states)
        for found in halves[1]:
            for kind, weights in expected.items():
                for name, weight in weights.items():
                    got = found["moved"][os.path.basename(run.path)][kind][name]
                    if kind == "trajectory":  # the Gram matrix is a sum over processes
                        torch.testing.assert_close(got, weight, rtol=1e-5, atol=1e-6)
                    else:
                        assert torch.equal(got, weight), (kind, name)


def test_an_output_head_in_chunks_has_the_loss_of_a_whole_one(runs, halves):
    run = Trajectory(runs[0])
    sequences = run.evaluation_set()
    expected = TokenLoss(sequences.input_ids, sequences.attention_mask)(run.model(10))
    for found in halves[1]:
        assert found["chunks"] == pytest.approx([expected, expected], rel=1e-6)


def test_what_fails_on_one_process_is_a_row_and_the_others_go_on(halves):
    assert halves[1][0]["one failed"] == {
        "loss 10": "process 1: OSError: the disk is on fire",
        "weight_stable_rank 10": None,
        "loss 20": None,
        "weight_stable_rank 20": "process 1: MemoryError: too large",
    }


@pytest.mark.drill
def test_four_processes_give_the_rows_of_one(runs, alone, tmp_path):
    ranks = in_processes(4, partial(together, runs, tmp_path / "rows"), tmp_path / "of", ACCELERATE_USE_CPU="true")
    check_rows(alone, tmp_path / "rows")
    for run in runs:
        entries = [found["held"][run.name] for found in ranks]
        assert max(here for here, _, _ in entries) < 0.27 * entries[0][1]


def lost(run, output, how, rank, world):
    """Process 1 dies, or fails by itself, at the third evaluation of a sweep; the other says how it ends."""
    launched(rank, world, on_accelerators=False)
    evaluations = []

    def tick(self):
        evaluations.append(None)
        if rank == 1 and len(evaluations) == 3:
            if how == "dies":
                os._exit(9)
            raise MemoryError("no room for a batch")

    placements.PEER_TIMEOUT_SECONDS = 0.5
    Progress.tick = tick
    try:
        measure(run, metrics="loss,random", steps=10, settings=SMALL, output=output, sharded=True)
        said = "measured"
    except UserError as error:
        said = str(error)
    (output / f"said-{rank}").write_text(said)
    os._exit(2)


@pytest.mark.parametrize(
    ("how", "said"),
    [("dies", {0: "another process is gone"}), ("fails", {1: "only process 1 failed: MemoryError: no room"})],
)
def test_a_lost_process_ends_the_command_and_what_is_written_stays(runs, tmp_path, how, said):
    with pytest.raises(AssertionError, match="a process of 2 failed"):
        in_processes(2, partial(lost, runs[0], tmp_path, how), tmp_path / "of", ACCELERATE_USE_CPU="true")
    for rank, words in said.items():
        assert words in (tmp_path / f"said-{rank}").read_text()
    assert "measuring with several processes stopped" in (tmp_path / "said-0").read_text()
    written = {row.metric for row in read_measurements(tmp_path / "full_rank-0")}
    assert written == {"loss"}
    measure(runs[0], metrics="loss,random", steps=10, settings=SMALL, output=tmp_path)
    rows = read_measurements(tmp_path / "full_rank-0")
    expected = {"loss", "random_sharpness", "random_variance", "random_curve", "random_draw"}
    assert {row.metric for row in rows} == expected
    assert all(math.isfinite(row.value) for row in rows)


@pytest.mark.parametrize(
    ("world", "arguments", "message"),
    [
        ("1", ["--sharded"], "accelerate launch --num_processes N"),
        ("2", ["--sharded", "--device", "auto"], "one process"),
        ("2", ["--device", "auto"], "one process"),
        ("1", ["--device", "abacus"], "device must be cpu"),
    ],
)
def test_what_does_not_go_together_is_one_line(runs, tmp_path, monkeypatch, capsys, world, arguments, message):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit) as stop:
        main(["measure", str(runs[0]), "--output", str(tmp_path), *arguments])
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
