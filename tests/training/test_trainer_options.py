"""Options that change how a model is computed: attention, packing, Liger's kernels, compilation."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from trainer_options import OPTIONS, Matrix, Option
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from hf_lowrank.compat import attention_of
from hf_lowrank.errors import UserError
from hf_lowrank.memory import memory_recorder
from hf_lowrank.methods import METHODS
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.run_files import read_facts
from hf_lowrank.storage.layers import Layers
from hf_lowrank.training import kernels, load_recipe, pretrain
from hf_lowrank.training.blocks import build_arguments, build_config
from hf_lowrank.training.corpus import prepare_corpus
from hf_lowrank.training.kernels import apply_liger, attention_of_any_device, check_kernels
from hf_lowrank.training.sequences import collate, document_positions, sequence
from hf_lowrank.training.trial import check_documents_apart, try_model
from tests.training.test_pretrain import same, trained, weights_of

END = 0
LLAMA = {
    "architecture": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"architecture": "gpt2", "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
MISTRAL = {**LLAMA, "architecture": "mistral", "num_key_value_heads": 1, "sliding_window": 4}
MIXTRAL = {**MISTRAL, "architecture": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
MAMBA = {"architecture": "mamba", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
BLOOM = {"architecture": "bloom", "vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 2}
ADAPTED = {
    "cola": {"r": 4},
    "sltrain": {"r": 4},
    "structured": {"r": 4, "blocks": 2},
    "sst": {"r": 4},
    "relora": {"r": 4},
}


def model_of(section, method="full_rank", **settings):
    torch.manual_seed(0)
    config = build_config({**section, "bos_token_id": None, "eos_token_id": END, "pad_token_id": None})
    return METHODS[method].build_model(config, METHODS[method].settings(**settings), 0)


def documents(lengths, seed=0):
    """Documents of so many tokens, the last of which ends each."""
    generator = np.random.default_rng(seed)
    return [np.append(generator.integers(1, 40, length - 1), END) for length in lengths]


# Two sequences: several documents, one of a single token, and one that goes on in the next sequence.
ROWS = [documents([5, 1, 9, 1]), documents([7, 2, 7], seed=1)]


def batch_of(rows):
    return collate([sequence(np.concatenate(row), 16, END) for row in rows])


def test_positions_restart_after_each_end():
    assert document_positions(np.array([4, 5, 0, 6, 0, 0, 7, 8]), END).tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert document_positions(np.array([4, 5, 6]), END).tolist() == [0, 1, 2]


def test_a_packed_batch_is_that_of_transformers_flattening():
    """The same tokens, labels and positions, in rows."""
    batch = batch_of(ROWS)
    flat = DataCollatorWithFlattening()([{"input_ids": document.tolist()} for row in ROWS for document in row])
    assert batch.keys() == flat.keys() == {"input_ids", "labels", "position_ids"}
    for name, values in flat.items():
        assert torch.equal(batch[name].reshape(1, -1), values), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("section", "method"),
    [(LLAMA, "full_rank"), (GPT2, "full_rank"), (MISTRAL, "full_rank"), (MIXTRAL, "full_rank")]
    + [(LLAMA, name) for name in ADAPTED],
    ids=lambda value: value if isinstance(value, str) else value["architecture"],
)
def test_packed_documents_are_computed_as_if_alone(section, method, attention):
    model = model_of({**section, "attn_implementation": attention}, method, **ADAPTED.get(method, {})).eval()
    outputs = model(**batch_of(ROWS))
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = [[model(input_ids=torch.tensor(document)[None]).logits[0] for document in row] for row in ROWS]
    for row, expected in zip(outputs.logits, alone, strict=True):
        torch.testing.assert_close(row, torch.cat(expected), rtol=0, atol=1e-5 * float(row.detach().abs().max()))
    pairs = [pair for row, found in zip(ROWS, alone, strict=True) for pair in zip(row, found, strict=True)]
    total = sum(
        torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(document[1:]), reduction="sum")
        for document, logits in pairs
        if len(document) > 1
    )
    loss = total / sum(len(document) - 1 for document, _ in pairs)
    assert outputs.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    assert gradients
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            largest = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-5 * largest + 1e-9)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("galore", "eager"),
        ("cola", "eager"),
        ("galore", "packed_documents"),
        ("cola", "packed_documents"),
        ("relora", "packed_documents"),
    ],
)
def test_ten_steps_are_those_of_the_reference(matrix, method, option):
    found = matrix.attempt(method, OPTIONS[option])
    assert found["outcome"] == "equal", found


def test_compiled_steps_are_those_of_the_plain_run(matrix):
    """With a backend that generates no code."""
    overrides = ("training.torch_compile=true", "training.torch_compile_backend=aot_eager")
    found = matrix.attempt("cola", Option(overrides, 1e-6, 1e-4))
    assert found["outcome"] == "equal", found


def test_attention_across_documents_would_be_seen(matrix, monkeypatch):
    """Without positions, documents attend to each other."""
    matrix.reference("cola", alone=True)
    monkeypatch.setattr("hf_lowrank.training.sequences.document_positions", lambda ids, end: np.arange(len(ids)))
    assert matrix.attempt("cola", OPTIONS["packed_documents"])["outcome"] == "different"


def texts_with_documents(texts):
    for number in range(6):
        words = ["alpha", "beta", "gamma", "delta"][: 2 + number % 3]
        lines = [json.dumps({"text": " ".join(words * (1 + place % 3))}) for place in range(30)]
        (texts / f"{'held' if number > 4 else 'train'}{number}.jsonl").write_text("\n".join(lines) + "\n")
    files = {"train_files": [str(texts / "train*.jsonl")], "held_out_files": [str(texts / "held*.jsonl")]}
    return {"source": "files", **files, "sequence_length": 16, "vocabulary_size": 300, "evaluation_sequences": 8}


def test_a_packed_run_evaluates_documents_one_by_one_and_resumes_to_the_same_bits(write_recipe, texts, tmp_path):
    path = write_recipe(data={**texts_with_documents(texts), "shape": "packed_documents"})
    corpus = prepare_corpus(load_recipe(path).data)
    batch = collate([corpus.training_set(8, 0)[index] for index in range(8)])
    ends = batch["input_ids"][:, :-1] == corpus.tokenizer.eos_token_id
    assert ends.any()
    assert torch.equal(batch["position_ids"][:, 1:] == 0, ends)
    assert "attention_mask" not in batch
    run = pretrain(load_recipe(path), tmp_path / "run", recorder=memory_recorder)
    memory = read_facts(run)["memory"]
    assert memory["estimated_peak"] == pytest.approx(memory["measured_peak"], rel=0.1)
    held_out = EvaluationSet.load(run)
    end = corpus.tokenizer.eos_token_id
    for ids, mask in zip(held_out.input_ids, held_out.attention_mask, strict=True):
        assert end not in ids[mask.bool()][:-1]
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    whole = weights_of(run, 6)
    trained(path, run)
    assert same(whole, weights_of(run, 6))


def test_an_adapted_model_has_the_attention_of_the_recipe():
    for name in ("eager", "sdpa"):
        model = model_of({**LLAMA, "attn_implementation": name, "layernorm_scaling": True}, "cola", r=4)
        assert attention_of(model.lm.config) == attention_of(model.config) == name
        assert "attn_implementation" not in json.dumps(model.config.to_dict())
    assert attention_of(model_of(LLAMA, "cola", r=4).lm.config) == "sdpa"


def test_a_checkpoint_says_nothing_of_its_attention(write_recipe, tmp_path):
    run = trained(write_recipe(model__attn_implementation="eager"), tmp_path / "run", "training.max_steps=3")
    assert "attn" not in (run / "checkpoint-3" / "config.json").read_text()
    assert attention_of(AutoModelForCausalLM.from_pretrained(run / "checkpoint-3").config) == "sdpa"


REFUSED = [
    (["model.attn_implementation=flex_attention"], "must be one of eager, sdpa on a CPU, where torch cannot train"),
    (["model.attn_implementation=flash"], "must be one of eager, sdpa, got 'flash'"),
    (["model.attn_implementation=[eager]"], "must be one of eager, sdpa, got"),
    (["training.use_liger_kernel=true"], "training.use_liger_kernel must be left out on a CPU: Liger's kernels are"),
]


@pytest.mark.parametrize(("overrides", "part"), REFUSED, ids=[overrides[0] for overrides, _ in REFUSED])
def test_what_cannot_run_on_a_cpu_is_refused_by_name(write_recipe, overrides, part):
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(), [*overrides, "training.use_cpu=true"])
    assert part in str(error.value)
    assert str(error.value).startswith("--set")


def test_compilation_for_a_cpu_without_a_compiler_is_refused(write_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    path = write_recipe(training__torch_compile=True, training__use_cpu=True)
    with pytest.raises(
        UserError, match=r"training\.torch_compile must be left out without .* install no-such-compiler"
    ):
        pretrain(load_recipe(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    recipe = load_recipe(path, ["training.torch_compile_backend=aot_eager"])
    check_kernels(None, "packed", recipe.arguments(tmp_path), lambda key: key, here=True)


def test_a_recipe_for_an_accelerator_is_read_anywhere_and_trained_there_alone(write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.torch.accelerator, "is_available", lambda: False)
    path = write_recipe()
    for override in ("model.attn_implementation=flex_attention", "training.use_liger_kernel=true"):
        recipe = load_recipe(path, [override, "training.use_cpu=false"])
        with pytest.raises(UserError, match="on a CPU"):
            pretrain(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.fixture
def accelerator(monkeypatch):
    """Lets checks believe in an accelerator and in Liger."""
    monkeypatch.setattr(kernels.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: True)


def arguments(tmp_path, **training):
    args = build_arguments({"use_cpu": True, **training}, seed=0, output_dir=tmp_path)
    args.use_cpu = False
    return args


def test_with_an_accelerator_flex_and_flash_are_allowed_but_flash_not_with_packed_documents(tmp_path, accelerator):
    args, layers = arguments(tmp_path), Layers(tmp_path / "recipe.yaml")
    for name in ("eager", "sdpa", "flex_attention"):
        check_kernels(name, "packed_documents", args, layers.origin, here=True)
    check_kernels("flash_attention_2", "packed", args, layers.origin, here=True)
    with pytest.raises(UserError, match="must be eager, sdpa or flex_attention with data"):
        check_kernels("flash_attention_2", "packed_documents", args, layers.origin, here=True)


def test_liger_is_refused_where_it_is_missing_or_smoothing_needs_logits(tmp_path, accelerator, monkeypatch):
    layers = Layers(tmp_path / "recipe.yaml")
    smoothed = {"use_liger_kernel": True, "label_smoothing_factor": 0.1}
    with pytest.raises(UserError, match=r"training\.label_smoothing_factor must be left out with"):
        check_kernels(None, "packed", arguments(tmp_path, **smoothed), layers.origin, here=True)
    separate = {"liger_kernel_config": {"fused_linear_cross_entropy": False}}
    check_kernels(None, "packed", arguments(tmp_path, **smoothed, **separate), layers.origin, here=True)
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match=r"needs liger-kernel; pip install liger-kernel"):
        check_kernels(None, "packed", arguments(tmp_path, use_liger_kernel=True), layers.origin, here=True)


@pytest.fixture
def liger(monkeypatch):
    """In place of Liger's module, one that takes the models that it is given."""
    module = ModuleType("liger_kernel.transformers.monkey_patch")
    module.given = []
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    module._apply_liger_kernel_to_instance = lambda model, **options: module.given.append((model, options))
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_liger_is_given_the_architecture_inside_an_adapted_model(liger):
    args = SimpleNamespace(use_liger_kernel=True, liger_kernel_config={"rope": False})
    adapted, dense = model_of(LLAMA, "cola", r=4), model_of(LLAMA)
    apply_liger(adapted, args, "recipe.yaml")
    apply_liger(dense, args, "recipe.yaml")  # Trainer's work
    apply_liger(adapted, SimpleNamespace(use_liger_kernel=False), "recipe.yaml")
    assert liger.given == [(adapted.lm, {"rope": False})]


def test_liger_is_refused_for_architectures_that_it_has_no_kernels_for(liger):
    args = SimpleNamespace(use_liger_kernel=True, liger_kernel_config=None)
    for model in (model_of(GPT2), model_of(GPT2, "cola", r=4)):
        with pytest.raises(UserError, match=r"Liger has no kernels for model\.architecture gpt2"):
            apply_liger(model, args, "recipe.yaml")
    assert liger.given == []


def test_a_new_model_is_tried_by_the_attention_of_its_device():
    model = model_of({**LLAMA, "attn_implementation": "flex_attention"}, "cola", r=4)
    sequences = torch.arange(1, 33).view(2, 16)
    assert try_model(model, EvaluationSet(sequences, torch.ones_like(sequences)), "recipe.yaml") == "plain"
    assert attention_of(model.lm.config) == "flex_attention"
    with attention_of_any_device(model):
        assert attention_of(model.lm.config) == "sdpa"


@pytest.mark.parametrize("section", [MAMBA, BLOOM], ids=lambda section: section["architecture"])
def test_architectures_that_mix_documents_are_refused(section):
    sequences = torch.arange(1, 33).view(2, 16)
    evaluation = EvaluationSet(sequences, torch.ones_like(sequences))
    check_documents_apart(model_of(LLAMA), evaluation, "recipe.yaml")
    check_documents_apart(model_of(LLAMA).bfloat16(), evaluation, "recipe.yaml")
    with pytest.raises(UserError, match=f"data.shape must be .* with model.architecture {section['architecture']}"):
        check_documents_apart(model_of(section), evaluation, "recipe.yaml")


def test_packed_documents_need_a_tokenizer_with_an_end(write_recipe, texts, tmp_path):
    path = write_recipe(data={**texts_with_documents(texts), "shape": "packed_documents"})
    data = load_recipe(path).data
    tokenizer = prepare_corpus(data).tokenizer
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"data\.shape packed_documents must have a tokenizer with an end-of-text"):
        prepare_corpus(data, tokenizer)
