"""Checkpoints of adapted models stand alone: saved, loaded, sharded, tied, resized, generated from, made dense."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lowrank.adapters import (
    CoLAConfig,
    LowRankConfig,
    LowRankForCausalLM,
    SLTrainConfig,
    dense_weight_from_tensors,
    dense_weight_kind,
    low_rank_factors_from_tensors,
    target_layers,
)
from hf_lowrank.errors import UserError
from hf_lowrank.runs.export import export
from hf_lowrank.storage.checksums import write_checksums
from hf_lowrank.targets import target_modules

ADAPTERS = {
    "cola": lambda: CoLAConfig(r=4),
    "low_rank": lambda: CoLAConfig(r=4, bottleneck_act="linear"),
    "sltrain": lambda: SLTrainConfig(r=4, sparsity=0.1),
    "relora": lambda: LoraConfig(r=4, lora_alpha=12),
}
EXACT = ("low_rank", "sltrain", "relora")


@pytest.fixture(params=sorted(ADAPTERS))
def method(request):
    return request.param


@pytest.fixture
def adapted(stir):
    """Builds an adapted model away from its start, in eval mode."""

    def build(config, method):
        torch.manual_seed(0)
        model = LowRankForCausalLM(LowRankConfig(base_config=config, adapter_config=ADAPTERS[method]()))
        return stir(model).eval()

    return build


def logits(model, ids):
    # Tensors read from a file lie where the file has them; products of unaligned memory may differ in the last bit.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_what_is_no_target_starts_as_in_the_dense_model(base_config, method):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(base_config)
    after_plain = torch.rand(1)
    torch.manual_seed(0)
    model = LowRankForCausalLM(LowRankConfig(base_config=base_config, adapter_config=ADAPTERS[method]()))
    assert torch.equal(torch.rand(1), after_plain)  # the adapters draw from generators of their own
    ours = dict(model.lm.named_parameters())
    targets = target_modules(plain)
    shared = [name for name, _ in plain.named_parameters() if name.rpartition(".")[0] not in targets]
    assert len(shared) > 3
    assert all(torch.equal(ours[name], plain.get_parameter(name)) for name in shared)
    assert set(target_layers(model)) == set(targets)


def test_everything_but_frozen_dense_weights_trains(base_config, method, adapted, ids):
    model = adapted(base_config, method)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.endswith("base_layer.weight")}
    assert bool(frozen) == (method == "relora")
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if method != "relora":
        assert not [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]


@pytest.mark.parametrize("shards", ["1GB", "8KB"])
def test_round_trip_is_bit_equal(base_config, method, adapted, ids, tmp_path, shards):
    model = adapted(base_config, method)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "8KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LowRankForCausalLM
    assert type(loaded.lm) is type(model.lm)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    wanted = dict(model.state_dict())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    again = tmp_path / "again"
    loaded.save_pretrained(again, max_shard_size=shards)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, again))
    assert second["base_config"].pop("dtype") == "float32"  # which loading adds
    assert first == second


FALCON_H1 = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "ssm_multipliers": [0.5, 0.25, 2.0, 1.5, 0.75],
}
# The first has a module that fills its children's buffers; the second initialises a layer from the module around it.
INITIALISED_FROM_OUTSIDE = {
    "falcon_h1": FALCON_H1,
    "gpt_bigcode": {"vocab_size": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
}


@pytest.fixture
def poisoned_memory():
    """Fills new memory with NaN, so that what is left uninitialised shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("architecture", INITIALISED_FROM_OUTSIDE)
@pytest.mark.parametrize("kept", ["cola", "sltrain", "eight_bit"])
def test_what_no_checkpoint_holds_is_computed_when_it_is_loaded(architecture, kept, ids, tmp_path):
    base = AutoConfig.for_model(architecture, **INITIALISED_FROM_OUTSIDE[architecture])
    own = {"eight_bit_modules": "auto"} if kept == "eight_bit" else {"adapter_config": ADAPTERS[kept]()}
    model = LowRankForCausalLM(LowRankConfig(base_config=base, **own)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_config_is_small_and_reads_through(llama_config, method, adapted, tmp_path):
    adapted(llama_config, method).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["model_type"] == "lowrank"
    assert entries["architectures"] == ["LowRankForCausalLM"]
    assert entries["base_config"]["model_type"] == "llama"
    assert len(entries["adapter_config"]) <= 4
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LowRankConfig
    assert config.hidden_size == config.base_config.hidden_size == 16
    assert config.get_text_config() is config.base_config
    config.use_cache = False
    assert config.base_config.use_cache is False
    assert not hasattr(config, "no_such_field")
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_tied_weights(adapted, method, ids, tmp_path):
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = adapted(config, method)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lm_head" in name]  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_resized_embeddings(base_config, method, adapted, ids, tmp_path):
    model = adapted(base_config, method)
    before = logits(model, ids)
    model.resize_token_embeddings(53)
    assert model.config.vocab_size == model.lm.config.vocab_size == 53
    assert torch.allclose(logits(model, ids)[..., :48], before)
    model(input_ids=ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape[0] == 53
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_generation_with_and_without_cache(base_config, method, adapted, ids):
    model = adapted(base_config, method)
    cached = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert cached.shape == (2, 12)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
    assert model.can_generate()


def test_gradient_checkpointing(base_config, method, adapted, ids):
    model = adapted(base_config, method).train()

    def step():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    wanted = step()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert all(torch.allclose(g, w, atol=1e-6) for g, w in zip(step(), wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(llama_config, method, adapted, ids, tmp_path, dtype):
    model = adapted(llama_config, method)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert logits(loaded, ids).dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(logits(loaded, ids).float(), logits(model, ids), atol=tolerance)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == dtype
    assert torch.equal(logits(again, ids), logits(loaded, ids))


def test_device_map_and_attention(llama_config, method, adapted, ids, tmp_path):
    model = adapted(llama_config, method)
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, attn_implementation="eager")
    assert placed.lm.config._attn_implementation == "eager"
    assert torch.allclose(logits(placed, ids), logits(model, ids), atol=1e-5)
    default = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert default.lm.config._attn_implementation == "sdpa"
    assert "LlamaDecoderLayer" in default._no_split_modules


def test_offloading_to_disk(llama_config, method, adapted, ids, tmp_path):
    model = adapted(llama_config, method)
    wanted = logits(model, ids)
    places = {"lm.model.embed_tokens": "cpu", "lm.model.layers.0": "cpu", "lm.model.layers.1": "disk"}
    places |= {"lm.model.norm": "cpu", "lm.model.rotary_emb": "cpu", "lm.lm_head": "cpu"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert torch.equal(logits(model, ids), wanted)


def test_accepts_what_trainer_and_measuring_pass(llama_config, method, adapted, ids):
    model = adapted(llama_config, method)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.allclose(embedded, output.logits)
    loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(12)).loss
    assert torch.allclose(loss, model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("method", EXACT)
def test_to_dense(base_config, method, adapted, ids):
    model = adapted(base_config, method)
    wanted = logits(model, ids)
    plain = model.to_dense()
    assert type(plain) is type(model.lm)
    assert not target_layers(plain)
    assert torch.allclose(logits(plain, ids), wanted, atol=1e-5)
    assert torch.equal(logits(model, ids), wanted)
    reference = AutoModelForCausalLM.from_config(base_config)
    assert {n: t.shape for n, t in plain.state_dict().items()} == {
        n: t.shape for n, t in reference.state_dict().items()
    }
    assert all(parameter.requires_grad for parameter in plain.parameters())
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not [name for name, parameter in plain.named_parameters() if parameter.data_ptr() in ours]
    plain(input_ids=ids, labels=ids).loss.backward()


def test_cola_has_no_dense_equivalent(llama_config, adapted):
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: CoLA has no dense equivalent"):
        adapted(llama_config, "cola").to_dense()


def test_from_dense(base_config, method, dense, ids):
    plain = dense(base_config)
    wanted = logits(plain, ids)
    before = copy.deepcopy(plain.state_dict())
    model = LowRankForCausalLM.from_dense(plain, ADAPTERS[method]())
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    if method == "relora":
        assert torch.equal(logits(model, ids), wanted)
    for name, layer in target_layers(model).items():
        weight = plain.get_submodule(name).weight.detach()
        weight = weight if weight.shape == (layer.out_features, layer.in_features) else weight.T
        if method in ("cola", "low_rank") and layer.out_features != layer.in_features:
            u, s, vt = torch.linalg.svd(weight)
            best = u[:, :4] @ torch.diag(s[:4]) @ vt[:4]
            assert torch.allclose(layer.dense_weight(), best, atol=1e-6)
    full = LowRankForCausalLM.from_dense(plain, CoLAConfig(r=16, bottleneck_act="linear"))
    assert torch.allclose(logits(full, ids), wanted, atol=1e-5)


def test_from_dense_stands_alone_as_well(llama_config, method, dense, ids, tmp_path):
    model = LowRankForCausalLM.from_dense(dense(llama_config), ADAPTERS[method]())
    model.save_pretrained(tmp_path)
    assert "init" not in json.loads((tmp_path / "config.json").read_text())["adapter_config"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))
    model.train()(input_ids=ids, labels=ids).loss.backward()


def test_dense_weights_tensor_by_tensor(base_config, method, adapted, tmp_path):
    model = adapted(base_config, method)
    model.save_pretrained(tmp_path)
    adapter = AutoConfig.from_pretrained(tmp_path).adapter_config
    assert dense_weight_kind(adapter) == ("surrogate" if method == "cola" else "exact")
    plain = None if method == "cola" else model.to_dense()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        there = set(file.keys())

        def get_tensor(name):
            if name not in there:
                raise KeyError(name)
            return file.get_tensor(name)

        for name, layer in target_layers(model).items():
            weight = dense_weight_from_tensors(name, get_tensor, adapter)
            assert weight.dtype == torch.float32
            if plain is None:
                assert torch.allclose(weight, layer.dense_weight(), atol=1e-6)
            else:
                dense_layer = plain.get_submodule(name)
                shown = dense_layer.weight if isinstance(dense_layer, torch.nn.Linear) else dense_layer.weight.T
                assert torch.allclose(weight, shown, atol=1e-6)
            B, A, scaling = low_rank_factors_from_tensors(name, get_tensor, adapter)
            assert B.shape[1] == A.shape[0] == 4
            assert scaling == {"sltrain": 8.0, "relora": 3.0}.get(method, 1.0)
        first = next(iter(target_layers(model)))
        with pytest.raises(UserError, match=rf"{first}: the \w+ checkpoint lacks the tensor lm\.{first}"):
            dense_weight_from_tensors(first, {}.__getitem__, adapter)


LOADS_ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_lowrank":
            raise ImportError("hf_lowrank is not installed here")
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert "hf_lowrank" not in sys.modules
ids = torch.arange(3, 10)[None]
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[2])
print(type(model).__name__, tokenizer("a").input_ids)
"""


def tokenizer():
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


@pytest.mark.parametrize("method", EXACT)
def test_export(llama_config, method, adapted, ids, tmp_path):
    model = adapted(llama_config, method)
    model.save_pretrained(tmp_path / "checkpoint-7")
    folder = export(f"{tmp_path}@step-7", tmp_path / "plain")
    plain = LlamaForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(plain, ids), logits(model, ids), atol=1e-5)


def test_export_loads_where_the_package_is_not(llama_config, adapted, tmp_path):
    model = adapted(llama_config, "sltrain")
    run = tmp_path / "run"
    model.save_pretrained(run / "checkpoint-7")
    tokenizer().save_pretrained(run / "tokenizer")
    folder = export(f"{run}@7", tmp_path / "plain")
    script = tmp_path / "alone.py"
    script.write_text(LOADS_ALONE)
    done = subprocess.run(
        [sys.executable, script, folder, tmp_path / "logits.pt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "LlamaForCausalLM [0]"
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.allclose(theirs, logits(model, torch.arange(3, 10)[None]), atol=1e-5)
    assert "adapter" not in (folder / "config.json").read_text()


def test_export_of_a_dense_checkpoint_and_by_folder(llama_config, dense, tmp_path, ids):
    model = dense(llama_config)
    model.save_pretrained(tmp_path / "checkpoint-3")
    folder = export(tmp_path / "checkpoint-3", tmp_path / "out")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(folder), ids), logits(model, ids))


@pytest.mark.parametrize("kind", ["empty", "link", "current", "left"])
def test_export_into_a_folder_that_is_there(llama_config, dense, tmp_path, ids, kind, monkeypatch):
    model, target = dense(llama_config), tmp_path / "out"
    model.save_pretrained(tmp_path / "checkpoint-3")
    place = tmp_path / "empty" if kind == "link" else target
    place.mkdir()
    if kind == "link":
        target.symlink_to(place)
    elif kind == "current":
        monkeypatch.chdir(target)
        target = "."
    elif kind == "left":  # by an export that was killed
        (target / ".making").mkdir()
        (target / ".making" / "model.safetensors").write_bytes(b"torn")
    before = place.stat().st_ino  # as of a mount, which cannot be replaced
    export(tmp_path / "checkpoint-3", target)
    assert place.stat().st_ino == before
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(place), ids), logits(model, ids))
    assert not (place / ".making").exists()


def test_export_says_what_is_wrong(llama_config, adapted, tmp_path):
    run = tmp_path / "run"
    adapted(llama_config, "cola").save_pretrained(run / "checkpoint-7")
    cases = {
        f"{run}@8": r"run: no checkpoint of step 8; there are: 7",
        f"{tmp_path}/none@8": r"none: no such folder",
        f"{tmp_path}/none": r"none: no such folder",
        f"{run}@7": r"q_proj: CoLA has no dense equivalent",
    }
    for source, message in cases.items():
        with pytest.raises(UserError, match=message):
            export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match=r"full: the output must be a new or empty folder"):
        export(f"{run}@7", tmp_path / "full")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "zeroed", "gone"])
def test_export_refuses_a_damaged_checkpoint_by_name(llama_config, adapted, tmp_path, file, how):
    folder = tmp_path / "checkpoint-7"
    adapted(llama_config, "sltrain").save_pretrained(folder)
    write_checksums(folder)
    content = bytearray((folder / file).read_bytes())
    if how == "flipped":
        content[-20] ^= 1
    damaged = {"flipped": content, "cut": content[:-9], "zeroed": bytes(len(content))}
    if how == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(damaged[how])
    with pytest.raises(UserError, match=re.escape(file)):
        export(folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_missing_tensor_is_an_error_that_names_it(llama_config, method, adapted, tmp_path):
    adapted(llama_config, method).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in sorted(tensors) if "up_proj" in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"checkpoint of LlamaForCausalLM lacks the tensor {gone}; the file is inc"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_method_is_an_error(llama_config, adapted, dense, tmp_path):
    adapted(llama_config, "cola").save_pretrained(tmp_path / "cola")
    adapted(llama_config, "sltrain").save_pretrained(tmp_path / "sltrain")
    weights = (tmp_path / "sltrain" / "model.safetensors").read_bytes()
    (tmp_path / "cola" / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        UserError, match=r"a COLA checkpoint.*lacks the tensor lm\.model\.layers\.0.*cola_A\.default and"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cola")
    dense(llama_config).save_pretrained(tmp_path / "dense")
    (tmp_path / "cola" / "model.safetensors").write_bytes((tmp_path / "dense" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"lacks the tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cola")


def test_a_checkpoint_of_another_rank_is_an_error(llama_config, method, adapted, tmp_path):
    adapted(llama_config, method).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["adapter_config"]["r"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lm\.model\.layers\.0\S+ has shape \(\S+, \S+\), the config requires"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("adapter", [SLTrainConfig(r=4, sparsity=0.1), CoLAConfig(r=4, checkpoint_activations=True)])
def test_compiles_whole_and_with_the_same_numbers(llama_config, adapter, ids):
    torch.manual_seed(0)
    llama_config.num_hidden_layers = 1
    model = LowRankForCausalLM(LowRankConfig(base_config=llama_config, adapter_config=adapter)).train()

    def step(forward):
        model.zero_grad()
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    wanted = step(model)
    got = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(g, w, atol=1e-6) for g, w in zip(got, wanted, strict=True))


def test_state_dict_of_sltrain_is_compact(llama_config, adapted):
    model = adapted(llama_config, "sltrain")
    supports = {name: tensor for name, tensor in model.state_dict().items() if "support" in name}
    assert len(supports) == 14
    assert {tensor.dtype for tensor in supports.values()} == {torch.int32}
    assert not [name for name in model.state_dict() if "placement" in name]
