"""Through lm-eval's own command line and classes: the same scores for a checkpoint, its dense export and `hf`."""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import BartConfig, BartForCausalLM

from hf_lowrank.adapters import CoLAConfig, LowRankConfig, LowRankForCausalLM, SLTrainConfig
from hf_lowrank.downstream import TASK_FOLDER, evaluate, run_lm_eval
from hf_lowrank.downstream.catalogue import register_models
from hf_lowrank.downstream.items import items_for, load_items
from hf_lowrank.downstream.lm_eval_model import LowRankLM
from hf_lowrank.downstream.lm_eval_tasks import sharpness_results
from hf_lowrank.downstream.sharpness import direction_requests
from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.processes.placement import Replicated
from hf_lowrank.runs.selection import find_checkpoint
from hf_lowrank.runs.trajectory import Trajectory
from tests.distributed.pairs import in_two

TEXTS = [("def f(a):\n    return", " a"), ("import os", "\nimport sys"), ("", "class A:")]


def answers(lm):
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(TEXTS)]
    rolling = [
        Instance("loglikelihood_rolling", {}, (context + answer,), i) for i, (context, answer) in enumerate(TEXTS)
    ]
    return lm.loglikelihood(requests, disable_tqdm=True), lm.loglikelihood_rolling(rolling, disable_tqdm=True)


@pytest.fixture(scope="module")
def adapted(run, tmp_path_factory, tokenizer):
    """An SLTrain checkpoint in a run directory, and its dense export."""
    folder = tmp_path_factory.mktemp("adapted")
    base = Trajectory(run).config
    torch.manual_seed(3)
    adapter = SLTrainConfig(r=4, target_modules="all-linear")
    model = LowRankForCausalLM(LowRankConfig(base_config=base, adapter_config=adapter)).eval()
    model.save_pretrained(folder / "run" / "checkpoint-7")
    dense = model.to_dense()
    dense.save_pretrained(folder / "dense")
    for place in (folder / "run" / "tokenizer", folder / "dense"):
        tokenizer.save_pretrained(place)
    for name in ("recipe.yaml", "evaluation.safetensors"):
        (folder / "run" / name).write_bytes((run / name).read_bytes())
    return folder


@pytest.mark.parametrize("named", ["{run}/checkpoint-10", "{run}@10", "{run}@last", "{run}"])
def test_every_name_of_a_checkpoint_scores_as_hf(run, named):
    ours = LowRankLM(named.format(run=run), batch_size=4, device="cpu")
    plain = HFLM(str(run / "checkpoint-10"), batch_size=4, device="cpu")
    assert answers(ours) == answers(plain)


def test_the_initial_checkpoint_takes_the_runs_tokenizer(run):
    assert not (run / "checkpoint-0" / "tokenizer.json").exists()
    assert answers(LowRankLM(f"{run}@0", batch_size=4, device="cpu"))


def test_an_adapted_checkpoint_scores_as_its_dense_export(adapted):
    ours = answers(LowRankLM(f"{adapted}/run@7", batch_size=4, device="cpu"))
    plain = answers(HFLM(str(adapted / "dense"), batch_size=4, device="cpu"))
    for mine, theirs in zip(ours[0], plain[0], strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
        assert mine[1] == theirs[1]
    assert ours[1] == pytest.approx(plain[1], abs=1e-4)


@pytest.fixture
def bart_run(request, tmp_path, tokenizer, make_run):
    """A run of a decoder that transformers also has an encoder for, plain or adapted."""
    run = make_run(tmp_path / "bart", tokenizer, steps=())
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = BartConfig(vocab_size=len(tokenizer), max_position_embeddings=96, **sizes, **special)
    torch.manual_seed(0)
    if request.param == "cola":
        model = LowRankForCausalLM(LowRankConfig(base_config=config, adapter_config=CoLAConfig(r=4)))
    else:
        model = BartForCausalLM(config)
    model.save_pretrained(run / "checkpoint-5")
    return run


def log_likelihood(model, context, answer):
    """Of the tokens of an answer after those of its context, from the model's logits, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *answer]])).logits[0].double()
    logs = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    return logs.gather(-1, torch.tensor(answer)[:, None]).sum().item()


@pytest.mark.parametrize("bart_run", ["plain", "cola"], indirect=True)
def test_a_decoder_of_barts_family_is_scored_as_the_causal_model_that_it_is(bart_run, tokenizer):
    model = Trajectory(bart_run).model(5)
    pairs = [(tokenizer.encode(context) or [0], tokenizer.encode(answer)) for context, answer in TEXTS]
    by_hand = [log_likelihood(model, context, answer) for context, answer in pairs]
    for lm in (LowRankLM(f"{bart_run}@5", device="cpu"), LowRankLM(model, tokenizer=tokenizer)):
        assert [value for value, _ in answers(lm)[0]] == pytest.approx(by_hand, rel=1e-5)
    (row,) = evaluate(bart_run, tasks="pylib_bits_per_byte", limit=5)
    texts = [item["text"] for item in load_items(items_for(Trajectory(bart_run), row.task))[:5]]
    nats = -sum(log_likelihood(model, [0], tokenizer.encode(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert row.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_hub_revision_is_passed_on():
    found = find_checkpoint("user/repo", "step-100")
    assert (found.path, found.revision, found.run) == ("user/repo", "step-100", None)
    assert find_checkpoint("user/repo@step-5").revision == "step-5"


def test_bad_names_are_one_line(run, tmp_path, tokenizer, make_run):
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        LowRankLM(f"{run}@3")
    with pytest.raises(UserError, match="no such folder"):
        LowRankLM(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="pretrained must be a checkpoint"):
        LowRankLM(device="cpu")
    bare = make_run(tmp_path / "bare", tokenizer, steps=(0,))
    for file in (bare / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        LowRankLM(f"{bare}@0")


def test_an_answer_longer_than_the_context_is_one_line(run):
    lm = LowRankLM(f"{run}@5", device="cpu")
    with pytest.raises(UserError, match="longer than the context of 96"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a", " b" * 200), 0)], disable_tqdm=True)
    lm.loglikelihood([Instance("loglikelihood", {}, ("a b " * 100, " c"), 0)], disable_tqdm=True)
    assert lm.truncated_items == 1


def test_lm_eval_finds_the_class_under_its_name():
    register_models()
    register_models()
    assert get_model("hf-lowrank") is LowRankLM


def run_door(arguments, monkeypatch):
    """`hf-lowrank lm-eval` without lm-eval's own thousands of task files, which take seconds to look through."""
    init = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", functools.partialmethod(init, include_defaults=False))
    run_lm_eval([*arguments, "--device", "cpu", "--batch_size", "16"])


def scores_in(folder):
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


def test_sharpness_tasks_say_what_measure_says(run, tmp_path, monkeypatch):
    run_door(
        ["--model_args", f"pretrained={run}@10", "--tasks", "lowrank_random_sharpness,lowrank_pca1_sharpness",
         "--output_path", str(tmp_path)],
        monkeypatch,
    )  # fmt: skip
    found = scores_in(tmp_path)
    rows = measure(run, metrics=["random_sharpness", "pca1_sharpness"], steps=10, output=tmp_path / "measured")
    for metric in ("random_sharpness", "pca1_sharpness"):
        (row,) = [r for r in rows if r.metric == metric and r.scope == "model"]
        assert found[f"lowrank_{metric}"]["sharpness,none"] == pytest.approx(row.value, rel=1e-6)


def test_sharpness_of_an_adapted_checkpoint_is_that_of_its_dense_weights(adapted, tmp_path):
    run = adapted / "run"
    lm = LowRankLM(f"{run}@7", batch_size=4, device="cpu")
    rows = measure(run, metrics="random_sharpness,pca1_sharpness", steps=7, output=tmp_path)
    for direction, metric in (("random", "random_sharpness"), ("pca", "pca1_sharpness")):
        requests = direction_requests(direction)
        instances = [Instance("loglikelihood_rolling", {}, (r.to_text(),), i) for i, r in enumerate(requests)]
        found = lm.loglikelihood_rolling(instances, disable_tqdm=True)
        (row,) = [r for r in rows if r.metric == metric]
        assert row.settings["space"] == "dense"
        assert sum(found) / len(found) == pytest.approx(row.value, rel=1e-5)


def test_sharpness_with_another_model_class_is_refused():
    (request, *_) = direction_requests("random")
    with pytest.raises(UserError, match="lowrank_random_sharpness needs --model hf-lowrank"):
        sharpness_results({"request": request.to_text()}, [-120.5])


def test_lm_evals_own_command_line_scores_checkpoint_and_export_alike(run, tmp_path, monkeypatch):
    """As its documentation says: --include_path, --model hf; the items come from the run's held-out text."""
    export = tmp_path / "export"
    Trajectory(run).dense_model(10).save_pretrained(export)
    for file in (run / "tokenizer").iterdir():
        (export / file.name).write_bytes(file.read_bytes())

    def arguments(name, model, pretrained):
        return [
            "--model", model, "--model_args", f"pretrained={pretrained}", "--tasks", "pylib_copy", "--metadata",
            f"run={run}", "--limit", "40", "--output_path", str(tmp_path / name),
        ]  # fmt: skip

    command = [sys.executable, "-m", "lm_eval", "run", *arguments("own", "hf", export), "--device", "cpu"]
    command += ["--batch_size", "16", "--include_path", str(TASK_FOLDER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    run_door(arguments("hf", "hf", run / "checkpoint-10"), monkeypatch)
    run_door(arguments("ours", "hf-lowrank", f"{run}@10"), monkeypatch)
    scores = [scores_in(tmp_path / name)["pylib_copy"] for name in ("own", "hf", "ours")]
    assert scores[0] == scores[1] == scores[2]


def test_cola_scores_too(run, tmp_path, tokenizer):
    torch.manual_seed(0)
    config = LowRankConfig(
        base_config=Trajectory(run).config, adapter_config=CoLAConfig(r=4, target_modules="all-linear")
    )
    model = LowRankForCausalLM(config).eval()
    lm = LowRankLM(model, tokenizer=tokenizer, batch_size=4)
    likelihoods, _ = answers(lm)
    assert lm.max_length == 96
    assert all(value < 0 for value, _ in likelihoods)


CODE = (
    "import os\n\n\ndef f(a, b):\n    for x in range(a):\n        print(x, b[x])\n    return os.path.join(a, b)\n" * 4
)


def many_answers(lm):
    """To 30 likelihoods, of which some share a context, 6 texts longer than the context, and 9 prompts."""
    pairs = [(CODE[: 7 * i + 5], answer) for i in range(10) for answer in (" a", " b", "\n    return")]
    prompts = [(CODE[: 9 * i + 1], {"until": ["\n"], "max_gen_toks": 2 + i % 2}) for i in range(9)]
    texts = [(CODE[i:],) for i in range(6)]
    asked = {"loglikelihood": pairs, "loglikelihood_rolling": texts, "generate_until": prompts}
    return {
        kind: getattr(lm, kind)([Instance(kind, {}, given, i) for i, given in enumerate(all_given)], disable_tqdm=True)
        for kind, all_given in asked.items()
    }


def divided_and_alone(run, folder, logits_cache):
    lm = LowRankLM(f"{run}@10", batch_size=4, device="cpu", logits_cache=logits_cache)
    alone = many_answers(lm)
    sequences = []
    lm.model.register_forward_pre_hook(lambda _, inputs: sequences.append(len(inputs[0]) if inputs else 1))
    whole = (many_answers(lm), len(sequences))[1]
    lm.replicas = Replicated(torch.device("cpu")).replicas
    divided = many_answers(lm)
    rank = lm.replicas.rank
    shares = {"equal": divided == alone, "share": (len(sequences) - whole) / whole}
    (folder / f"{rank}.json").write_text(json.dumps(shares))


@pytest.mark.parametrize("logits_cache", [True, False])
def test_processes_that_divide_items_answer_as_one(run, tmp_path, logits_cache):
    in_two(functools.partial(divided_and_alone, run, tmp_path, logits_cache))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["equal"]
        assert 0.3 < found["share"] < 0.7


def sampled_divided_and_alone(run, folder):
    lm = LowRankLM(f"{run}@10", batch_size=4, device="cpu")
    options = {"until": ["\n"], "max_gen_toks": 6, "temperature": 0.9}
    asked = [Instance("generate_until", {}, (CODE[: 9 * i + 1], options), i) for i in range(9)]

    def sampled(seed):
        torch.manual_seed(seed)
        return lm.generate_until(asked, disable_tqdm=True)

    alone, other = sampled(0), sampled(1)
    lm.replicas = Replicated(torch.device("cpu")).replicas
    rank = lm.replicas.rank
    (folder / f"{rank}.json").write_text(json.dumps([sampled(0) == alone, alone != other]))


def test_what_is_sampled_is_sampled_as_by_one_process(run, tmp_path):
    """Also where a temperature alone says so."""
    in_two(functools.partial(sampled_divided_and_alone, run, tmp_path))
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[True, True]] * 2
