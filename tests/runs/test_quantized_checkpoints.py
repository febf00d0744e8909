"""Checkpoints quantised by compressed-tensors, bitsandbytes and torchao: dequantised to the digit, or refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowrank import Trajectory

# Where the Makefile installs the libraries, outside the environment.
LIBRARIES = Path(sys.prefix) / "quantizers"
KINDS = (
    "int4_groups",
    "fp8",
    "two_types",
    "two_widths",
    "two_formats",
    "bfloat16_scales",
    "bitsandbytes_8bit",
    "bitsandbytes_4bit",
)


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(LIBRARIES), str(Path(__file__).parents[2])])}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    if not LIBRARIES.is_dir():
        pytest.skip("only the pinned environment has these libraries")
    folder = tmp_path_factory.mktemp("quantized")
    done = run("-m", "tests.runs.quantizing", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_the_codes_stand_for(quantized, kind):
    found = load_file(quantized / kind / "found.safetensors")
    names = [name.removeprefix("read.") for name in found if name.startswith("read.")]
    assert len(names) == 7
    stored = load_file(quantized / kind / "checkpoint-1" / "model.safetensors")
    for name in names:
        assert not stored.get(f"{name}.weight", torch.empty(0, dtype=torch.int8)).dtype.itemsize > 1, "is coded"
        read, meant = found[f"read.{name}"], found[f"meant.{name}"]
        assert read.dtype == torch.float32
        assert torch.allclose(read, meant, rtol=1e-5, atol=1e-7), name
        assert 1e-3 < (meant - found[f"source.{name}"]).norm() / meant.norm() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_moved_weights_are_not_quantised_again(quantized, kind):
    found = load_file(quantized / kind / "found.safetensors")
    assert torch.allclose(found["logits.read"], found["logits.meant"], atol=1e-5)


def test_an_adapter_is_merged_into_what_the_codes_of_its_base_stand_for(quantized):
    found = load_file(quantized / "adapter" / "found.safetensors")
    assert torch.allclose(found["read"], found["meant"], rtol=1e-5, atol=1e-7)


def refusal(folder):
    """What measuring says of a checkpoint, in a process that has the libraries."""
    code = (
        "import sys\n"
        "from hf_lowrank.measuring import measure\n"
        "for row in measure(sys.argv[1], metrics=['weight_stable_rank']):\n"
        "    if row.scope == 'model':\n"
        "        print(row.value, row.reason)\n"
    )
    done = run("-c", code, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    return line


def changed(quantized, tmp_path, change):
    shutil.copytree(quantized / "int4_groups", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-1"
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return refusal(folder.parent)


def test_a_tensor_that_the_library_does_not_use_is_a_reason(quantized, tmp_path):
    def reorder(config, tensors):
        tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.arange(64).flip(0)

    said = changed(quantized, tmp_path, reorder)
    assert said.startswith("nan ")
    assert said.endswith("its tensor model.layers.0.mlp.up_proj.weight_g_idx is not used")


def test_scales_of_activations_and_of_the_cache_are_none(quantized, tmp_path):
    def activations(config, tensors):
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
        tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(1)

    value, _, reason = changed(quantized, tmp_path, activations).partition(" ")
    assert float(value) > 1
    assert reason == "None"


def test_a_surplus_buffer_is_as_in_any_checkpoint(quantized, tmp_path):
    def surplus(config, tensors):
        tensors["model.layers.0.self_attn.masked_bias"] = torch.ones(1)

    assert changed(quantized, tmp_path, surplus).endswith(" None")


def test_a_missing_tensor_is_a_reason(quantized, tmp_path):
    def without(config, tensors):
        del tensors["model.layers.0.mlp.up_proj.weight_packed"]

    said = changed(quantized, tmp_path, without)
    assert said.startswith("nan ")
    assert "model.layers.0.mlp.up_proj.weight" in said


def test_transformed_weights_are_refused(quantized, tmp_path):
    def transform(config, tensors):
        config["transform_config"] = {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}

    said = changed(quantized, tmp_path, transform)
    assert said.startswith("nan ")
    assert "transform_config" in said


def test_torchaos_tensors_are_dequantised(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "run" / "checkpoint-1")
    trajectory = Trajectory(tmp_path / "run")
    for name in trajectory.targets:
        weight = model.get_submodule(name).weight
        meant = weight.qdata.float() * weight.scale.float().view(len(weight), -1)
        assert torch.allclose(trajectory.dense_weight(1, name), meant, rtol=1e-6, atol=1e-9)
    assert all(type(parameter.data) is torch.Tensor for parameter in trajectory.model(1).parameters())
