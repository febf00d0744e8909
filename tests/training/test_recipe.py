"""Recipes: what they mean, and the errors of wrong ones."""

from pathlib import Path

import pytest
import torch

from hf_lowrank.errors import UserError
from hf_lowrank.runs.run_files import write_facts
from hf_lowrank.storage.parsing import dump_yaml, parse_yaml
from hf_lowrank.training import load_recipe
from hf_lowrank.training.blocks import build_config
from hf_lowrank.training.start import check_belongs

RECIPES = Path(__file__).parents[2] / "recipes"
# accelerate's own configurations and the studies are next to the trees of recipes.
REPOSITORY_RECIPES = sorted(file for tree in ("nano", "llama_*") for file in RECIPES.glob(f"{tree}/[!_]*.yaml"))


def test_resolved_recipe_is_plain_and_reads_back(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe(), seed=3)
    assert recipe.seed == 3
    assert recipe.method.name == "full_rank"
    assert recipe.name == f"{tmp_path.name}-tiny"
    again = parse_yaml(dump_yaml(recipe.plain()))
    assert again == recipe.plain()
    (tmp_path / "again.yaml").write_text(dump_yaml(again))
    assert load_recipe(tmp_path / "again.yaml").plain() == recipe.plain()


# The digests that runs of earlier versions recorded in facts.json.
DIGESTS = {
    "galore": "0e1154bd31c5fc37a4a5b6b88b60eec57671e68ec82e8c3ba65f112da50e9442",
    "fira": "2edde1ed43a92d0123cbc035f7d5ae0b49f26872d156634229cf91825c48f47a",
    "apollo": "ac2831f1a85deef76dba3e9ffb949b7351046116867559d9360f0abfdb98ff1a",
    "frugal": "4c32d5b0908cddb00bdb76f9f5d4e0cc4e6158adff360fc0186f88def73b62ba",
}


@pytest.mark.parametrize("method", DIGESTS)
def test_a_run_of_an_earlier_version_is_recognised_without_its_recipe_file(tmp_path, method):
    (tmp_path / "recipe.yaml").write_text(
        f"name: before\nmethod: {{name: {method}, rank: 4, update_proj_gap: 3}}\n"
        "model: {architecture: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,"
        " num_attention_heads: 2}\n"
        "data: {source: python-library, sequence_length: 16}\n"
        "training: {max_steps: 6, learning_rate: 1.0e-3}\n"
    )
    write_facts(tmp_path / "run", {"recipe": DIGESTS[method]})
    assert check_belongs(tmp_path / "run", load_recipe(tmp_path / "recipe.yaml"))
    with pytest.raises(UserError, match="must be a run directory or empty"):
        check_belongs(tmp_path / "run", load_recipe(tmp_path / "recipe.yaml", ["method.rank=3"]))


@pytest.mark.parametrize("path", REPOSITORY_RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_repositorys_recipes_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.name == f"{path.parent.name}-{path.stem}"
    steps, every = recipe.training["max_steps"], recipe.training["save_steps"]
    assert steps % every == 0
    assert 6 <= steps // every <= 10


def test_the_published_setting_is_the_papers():
    recipe = load_recipe(RECIPES / "llama_60m" / "galore.yaml")
    training = recipe.training
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 512
    assert (recipe.data.sequence_length, recipe.data.shape, recipe.data.dataset) == (256, "documents", "allenai/c4")
    assert training["warmup_steps"] == training["max_steps"] / 10
    with torch.device("meta"):
        model = recipe.method.build_model(recipe.config(), recipe.settings, 0)
    # 8 blocks of 4 d² + 3 d m and two norms, the last norm, and two matrices of the vocabulary.
    dimension, mlp = 512, 1376
    block = 4 * dimension**2 + 3 * dimension * mlp + 2 * dimension
    assert sum(p.numel() for p in model.parameters()) == 8 * block + dimension + 2 * 32000 * dimension


def test_extends_merges_deeply_and_overrides_come_last(write_recipe, tmp_path):
    write_recipe("base.yaml")
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\ntraining: {learning_rate: 5e-4, warmup_steps: 2}\n")
    (tmp_path / "top.yaml").write_text("extends: middle.yaml\ntraining: {learning_rate: 1e-4}\n")
    recipe = load_recipe(tmp_path / "top.yaml", ["training.max_steps=9", "model.hidden_size=64", "name=mine"])
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.training["warmup_steps"] == 2
    assert recipe.training["max_steps"] == 9
    assert recipe.training["save_steps"] == 3
    assert recipe.model["hidden_size"] == 64
    assert recipe.name == "mine"


def test_numbers_that_yaml_1_1_reads_as_text_are_numbers(write_recipe):
    path = write_recipe()
    for text, value in (("1e-3", 1e-3), ("2E+1", 20.0), (".5e-2", 0.005), ("1.e-1", 0.1), ("'1e-3'", 1e-3)):
        assert load_recipe(path, [f"training.learning_rate={text}"]).training["learning_rate"] == value
    assert load_recipe(path, ["training.run_name=1e-x"]).training["run_name"] == "1e-x"


def test_training_arguments_carry_the_recipe(write_recipe, tmp_path):
    arguments = load_recipe(write_recipe(training__adam_beta2=0.98), seed=5).arguments(tmp_path / "run")
    assert (arguments.seed, arguments.adam_beta2, arguments.max_steps) == (5, 0.98, 6)
    assert arguments.report_to == []
    assert arguments.eval_steps == arguments.save_steps == 3
    assert not (tmp_path / "run").exists()


def test_paths_are_relative_to_the_recipe_and_in_overrides_to_the_current_folder(write_recipe, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = write_recipe()
    assert load_recipe(path).data.train_files == [str(tmp_path / "texts" / "train*.txt")]
    recipe = load_recipe(path, ["data.train_files=[a.txt]"])
    assert recipe.data.train_files == [str(elsewhere / "a.txt")]


WRONG = [
    # overrides, and what the one line must hold
    (["method.name=galor"], ["method.name", "unknown method 'galor'"]),
    (["method.rank=4"], ["'method.rank'"]),
    (["metod.name=x"], ["'metod'", "did you mean 'method'"]),
    (["training.learning_rat=1"], ["'training.learning_rat'", "did you mean 'learning_rate'"]),
    (["training.learning_rate=fast"], ["training.learning_rate must be float", "'fast'"]),
    (["training.max_steps=1.5"], ["training.max_steps must be int", "1.5"]),
    (["training.max_steps=0"], ["training.max_steps must be at least 1"]),
    (["training.output_dir=x"], ["training.output_dir must be left out; give --output"]),
    (["training.lr_scheduler_type=cosin"], ["training.lr_scheduler_type", "cosin"]),
    (["training.lr_scheduler_type=warmup_stable_decay"], ["training.lr_scheduler_type", "num_decay_steps"]),
    (["training.lr_scheduler_type=cosine_with_min_lr"], ["training.lr_scheduler_type", "min_lr"]),
    (["training.lr_scheduler_kwargs={num_cycle: 2}"], ["training.lr_scheduler_kwargs", "linear", "num_cycle"]),
    (["training.optim=adamw_8bit"], ["training.optim", "adamw_8bit", "bitsandbytes"]),
    (["training.optim=lomo"], ["training.optim", "lomo"]),
    (["training.report_to=wandb"], ["training.report_to", "wandb"]),
    (["training.num_train_epochs=0"], ["training.num_train_epochs must be a number above 0, got 0"]),
    (["training.save_strategy=best"], ["training.save_strategy must be steps, epoch or no", "'best'"]),
    (
        ["training.accelerator_config={gradient_accumulation_kwargs: {num_steps: 4}}"],
        ["training.accelerator_config.gradient_accumulation_kwargs.num_steps", "training.gradient_accumulation_steps"],
    ),
    (["training.accelerator_config={split_batches: true}"], ["training.accelerator_config.split_batches"]),
    (["training.per_device_train_batch_size=0"], ["training.per_device_train_batch_size must be at least 1, got 0"]),
    (["training.per_device_eval_batch_size=-1"], ["training.per_device_eval_batch_size must be at least 1, got -1"]),
    (["training.gradient_accumulation_steps=0"], ["training.gradient_accumulation_steps must be at least 1, got 0"]),
    (["training.dataloader_num_workers=-1"], ["training.dataloader_num_workers must be at least 0, got -1"]),
    (["training.dataloader_persistent_workers=true"], ["training.dataloader_num_workers"]),
    (["training.weight_decay=-1"], ["training.weight_decay must be at least 0, got -1"]),
    (["training.torch_compile_backend=nonsense"], ["torch_compile_backend must be one that accelerate"]),
    (["training.eval_strategy=often"], ["training.eval_strategy", "often"]),
    (["model.architecture=lama"], ["model.architecture", "'lama'", "did you mean 'llama'"]),
    (["model.hiden_size=8"], ["'model.hiden_size'", "did you mean 'hidden_size'"]),
    (["model.num_attention_heads=0"], ["model.num_attention_heads", "at least 1", "0"]),
    (["model.hidden_size=large"], ["model.hidden_size", "expected int", "large"]),
    (["data.source=web"], ["data.source", "'python-library', 'hub' or 'files'", "'web'"]),
    (["data.sequence_lenght=8"], ["'data.sequence_lenght'", "did you mean 'sequence_length'"]),
    (["data.sequence_length=1"], ["data.sequence_length", "greater than or equal to 2"]),
    (["data.shape=cut"], ["data.shape", "'packed', 'packed_documents' or 'documents'"]),
    (["data.dataset=allenai/c4"], ["data.dataset must be left out with data.source files"]),
    (["seed=-1"], ["seed must be an integer"]),
    (["name=a/b"], ["name must be a file name"]),
    (["method=galore"], ["method must be a mapping"]),
    (["training"], ["--set must be key=value"]),
    (["training.=3"], ["--set must be key=value"]),
    (["training.max_steps=[1"], ["not valid YAML"]),
]


@pytest.mark.parametrize(("overrides", "parts"), WRONG, ids=[wrong[0][0] for wrong in WRONG])
def test_wrong_keys_and_values_are_named(write_recipe, tmp_path, overrides, parts):
    path = write_recipe()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    for part in [*parts, "--set"]:
        assert part in message
    assert sorted(tmp_path.rglob("*")) == before


def test_the_file_of_a_wrong_key_is_named(write_recipe, tmp_path):
    base = write_recipe("base.yaml", training__max_step=5)
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nseed: 1\n")
    with pytest.raises(UserError, match="did you mean 'max_steps'") as error:
        load_recipe(tmp_path / "top.yaml")
    assert str(error.value).startswith(str(base))


@pytest.mark.parametrize("missing", ["method", "model", "data", "training", "data__source", "data__sequence_length"])
def test_missing_keys_are_named(write_recipe, missing):
    with pytest.raises(UserError, match=missing.replace("__", ".")):
        load_recipe(write_recipe(**{missing: None}))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n", "must be a mapping"),
        ("seed: [\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key 'seed' in line 2"),
        ("extends: nowhere.yaml\n", "no such recipe file"),
        ("name: a\nmembers: {galore: galore.yaml}\n", "must be a recipe, got a study; run it with hf-lowrank study"),
        ("extends: [a.yaml]\n", "extends must be one file name"),
        ("extends: bad.yaml\n", "extends must not lead back to itself: bad.yaml -> bad.yaml"),
        ("\xff", "mapping"),
    ],
)
def test_unreadable_files_are_named(tmp_path, text, part):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=part) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


def test_a_longer_circle_of_extends_is_found(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match=r"a\.yaml -> b.yaml -> a.yaml"):
        load_recipe(tmp_path / "a.yaml")


def test_a_missing_and_a_binary_file(tmp_path):
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not readable"):
        load_recipe(tmp_path / "binary.yaml")


HUB = {"data__train_files": None, "data__held_out_files": None, "data__source": "hub", "data__dataset": "a/b"}


@pytest.mark.parametrize(
    ("split", "held_out", "fits"),
    [
        ("train", "train", False),
        ("train", "validation", True),
        ("train+test", "test", False),
        ("train[:90%]", "train[90%:]", True),
        ("train", "train[90%:]", False),
        ("all", "test", False),
    ],
)
def test_the_held_out_split_must_not_be_trained_on(write_recipe, split, held_out, fits):
    path = write_recipe(**HUB, data__split=split, data__held_out_split=held_out)
    if fits:
        assert load_recipe(path).data.held_out_split == held_out
    else:
        with pytest.raises(UserError, match=r"data\.held_out_split must not be what data\.split trains on"):
            load_recipe(path)


@pytest.mark.parametrize("key", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_a_stream_has_no_epochs(write_recipe, key):
    path = write_recipe(**HUB, data__streaming=True, data__tokenizer="a/b", **{f"training__{key}": "epoch"})
    with pytest.raises(UserError, match=rf"training\.{key} must be steps or no with data\.streaming"):
        load_recipe(path)


RELORA = {"name": "relora", "r": 4, "restart_every": 2, "restart_warmup_steps": 1}


@pytest.mark.parametrize(
    ("kind", "given", "part"),
    [
        ("constant", None, "lr_scheduler_type must be left out or cosine_with_min_lr with ReLoRA.*'constant'"),
        ("linear", None, "lr_scheduler_type must be left out; the method brings its own schedule"),
        ("reduce_lr_on_plateau", None, "lr_scheduler_type must be left out or"),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, r"lr_scheduler_kwargs must .* {'min_lr_rate': 0\.1}"),
        ("cosine", {"num_cycle": 3}, "lr_scheduler_kwargs must be left out"),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, None),
        ("cosine", None, None),
        (None, None, None),
    ],
)
def test_relora_refuses_another_schedule_than_its_own(write_recipe, kind, given, part):
    path = write_recipe(method=RELORA, training__lr_scheduler_type=kind, training__lr_scheduler_kwargs=given)
    if part is None:
        assert load_recipe(path).method.name == "relora"
    else:
        with pytest.raises(UserError, match=part):
            load_recipe(path)


def test_a_field_that_only_the_architectures_code_reads_is_allowed(write_recipe):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    mixture = {"architecture": "qwen3_moe", **sizes, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 16}
    path = write_recipe(model=mixture)
    with torch.device("meta"):
        recipe = load_recipe(path)
        model = recipe.method.build_model(recipe.config(), recipe.settings, 0)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (4 * 16, 32)
    with pytest.raises(UserError, match=r"unknown key 'model\.head_dimm'"):
        load_recipe(path, ["model.head_dimm=16"])


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("gpt2", "classifier_dropout"),  # of another head
        ("mamba", "intermediate_size"),  # computed from other fields
        ("qwen3_5_text", "depth"),  # of the images' part
        ("gemma3", "head_dim"),  # of the text's own configuration
        ("llama", "to_dict"),
        ("llama", "_attn_implementation"),
    ],
)
def test_a_field_that_the_architectures_code_merely_mentions_is_unknown(write_recipe, architecture, key):
    path = write_recipe(model={"architecture": architecture})
    with pytest.raises(UserError, match=rf"unknown key 'model\.{key}'"):
        load_recipe(path, [f"model.{key}=16"])


def test_hub_needs_a_dataset_and_a_stream_a_tokenizer(write_recipe):
    files = {"data__train_files": None, "data__held_out_files": None, "data__source": "hub"}
    path = write_recipe(**files)
    with pytest.raises(UserError, match=r"data\.dataset must name"):
        load_recipe(path)
    with pytest.raises(UserError, match=r"data\.tokenizer must be given with data\.streaming"):
        load_recipe(path, ["data.dataset=a/b", "data.streaming=true"])
    with pytest.raises(UserError, match=r"training\.max_steps must be given"):
        load_recipe(
            write_recipe(training__max_steps=None, training__num_train_epochs=1),
            ["data.dataset=a/b", "data.streaming=true", "data.tokenizer=a/b"],
        )


def test_inconsistent_keys_are_named(write_recipe):
    path = write_recipe()
    with pytest.raises(UserError, match=r"tiny.yaml: model: .* multiple of the number of attention heads"):
        load_recipe(path, ["model.num_attention_heads=5"])
    with pytest.raises(
        UserError, match=r"tiny.yaml: data.train_files must be left out with data.source python-library"
    ):
        load_recipe(path, ["data.source=python-library"])


@pytest.mark.parametrize("method", ["galore", "fira"])
def test_a_rank_above_a_target_matrix_is_found_before_training(write_recipe, method):
    path = write_recipe(method={"name": method, "rank": 32})
    assert load_recipe(path).settings.rank == 32
    with pytest.raises(UserError, match=r"^--set method.rank=33: method.rank must be .* got 33"):
        load_recipe(path, ["method.rank=33"])
    with pytest.raises(UserError, match=r"tiny.yaml: method.rank|--set method.rank=0: method.rank"):
        load_recipe(path, ["method.rank=0"])
    with pytest.raises(UserError, match=r"target_modules.*matches no linear module"):
        load_recipe(path, ["method.target_modules=[no_such_proj]"])


def test_loading_draws_nothing_from_torchs_generator(write_recipe):
    path = write_recipe()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load_recipe(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_is_a_strategy_although_yaml_reads_false(write_recipe):
    recipe = load_recipe(write_recipe(), ["training.eval_strategy=no"])
    assert recipe.arguments("out").eval_strategy == "no"


def test_defaults_reach_the_text_part_of_a_configuration():
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    defaults = {"vocab_size": 300, "pad_token_id": 7, "eos_token_id": 1, "bos_token_id": 1}
    config = build_config({"architecture": "gemma3", "text_config": {**text, "bos_token_id": 2}}, **defaults)
    inner = config.get_text_config()
    assert (inner.vocab_size, inner.pad_token_id, inner.eos_token_id, inner.use_cache) == (300, 7, 1, False)
    assert (inner.bos_token_id, inner.hidden_size) == (2, 32)
