"""Checkpoints that other libraries quantise, run as a process of its own with these on its path.

    python -m tests.runs.quantizing FOLDER

For each kind a folder `FOLDER/KIND/checkpoint-1`, and in `FOLDER/KIND/found.safetensors` for every target what its
weight stands for, worked out here from codes and scales (`meant.`), what this package reads (`read.`), and what was
quantised (`source.`), with logits of the first two at weights that are moved by the same draw (`logits.meant`,
`logits.read`).
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hf_lowrank import Trajectory

ATTENTION, MLP = ["re:.*self_attn.*"], ["re:.*mlp.*"]
NF4 = [-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))


def scheme(bits, kind="int", group=None):
    strategy = "group" if group else "channel"
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": group}


ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def coded(weight, bits, kind, group, dtype):
    """Scales (rows, groups) of the largest entries in `dtype`, and what the codes stand for."""
    groups = weight.view(len(weight), -1, group or weight.shape[1])
    most = 448 if kind == "float" else 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1, keepdim=True) / most).to(dtype).float()
    codes = groups / scales
    codes = codes.to(torch.float8_e4m3fn).float() if kind == "float" else codes.round().clamp(-most - 1, most)
    return scales.squeeze(-1), (codes * scales).view_as(weight)


def compressed(folder, groups, form=None, dtype=torch.float32):
    """Writes a checkpoint of compressed-tensors; returns the model with what its weights stand for."""
    model, meant = llama(), llama()
    settings = {"config_groups": groups, "ignore": ["lm_head"], "quant_method": "compressed-tensors"}
    apply_quantization_config(model, QuantizationConfig.model_validate(settings))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and getattr(module, "quantization_scheme", None) is not None:
            how = module.quantization_scheme.weights
            scales, stands_for = coded(module.weight.detach(), how.num_bits, how.type, how.group_size, dtype)
            module.weight_scale.data = scales.reshape(module.weight_scale.shape).to(dtype)
            meant.get_submodule(name).weight.data = stands_for
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return meant


def of_bitsandbytes(folder, **options):
    """The same of bitsandbytes."""
    meant = llama()
    meant.save_pretrained(folder.parent / "source")
    given = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(
        folder.parent / "source", quantization_config=given, dtype=torch.float32
    )
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name, module in meant.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.detach()
        if options.get("load_in_8bit"):
            codes, most = stored[f"{name}.weight"], stored[f"{name}.SCB"]
            module.weight.data = codes.float() * most[:, None] / 127
            continue
        blocks = weight.reshape(-1, 64)
        most = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks / most)[..., None].sub(torch.tensor(NF4)).abs().argmin(-1)
        module.weight.data = (torch.tensor(NF4)[nearest] * most).view_as(weight)
    return meant


def moved(model):
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=1e-3)
        return model.eval()(torch.arange(3, 23)[None]).logits


KINDS = {
    "int4_groups": lambda to: compressed(to, {"all": {"targets": ["Linear"], "weights": scheme(4, group=32)}}),
    "fp8": lambda to: compressed(to, {"all": {"targets": ["Linear"], "weights": scheme(8, "float")}}),
    "two_types": lambda to: compressed(
        to,
        {
            "a": {"targets": ATTENTION, "weights": scheme(8, "float")},
            "b": {"targets": MLP, "weights": scheme(4, group=32)},
        },
    ),
    "two_widths": lambda to: compressed(
        to,
        {"a": {"targets": ATTENTION, "weights": scheme(8)}, "b": {"targets": MLP, "weights": scheme(4)}},
        "pack-quantized",
    ),
    "two_formats": lambda to: compressed(
        to,
        {
            "a": {"targets": ATTENTION, "weights": scheme(8), "input_activations": ACTIVATIONS},
            "b": {"targets": MLP, "weights": scheme(8)},
        },
    ),
    "bfloat16_scales": lambda to: compressed(
        to, {"all": {"targets": ["Linear"], "weights": scheme(4, group=32)}}, dtype=torch.bfloat16
    ),
    "bitsandbytes_8bit": lambda to: of_bitsandbytes(to, load_in_8bit=True),
    "bitsandbytes_4bit": lambda to: of_bitsandbytes(to, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def main():
    for kind, write in KINDS.items():
        folder = Path(sys.argv[1]) / kind / "checkpoint-1"
        meant = write(folder)
        trajectory = Trajectory(folder.parent)
        found = {f"read.{name}": trajectory.dense_weight(1, name).contiguous() for name in trajectory.targets}
        found |= {f"meant.{name}": meant.get_submodule(name).weight.detach().clone() for name in trajectory.targets}
        found |= {f"source.{name}": llama().get_submodule(name).weight.detach().clone() for name in trajectory.targets}
        found |= {"logits.read": moved(trajectory.model(1)), "logits.meant": moved(meant)}
        save_file(found, folder.parent / "found.safetensors")
    adapter(Path(sys.argv[1]))


def adapter(folder):
    """A LoRA of a model in four bits: what its merged weight is, and what is read."""
    torch.manual_seed(2)
    base = folder / "bitsandbytes_4bit" / "checkpoint-1"
    meant = load_file(base.parent / "found.safetensors")["meant.model.layers.0.self_attn.q_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(llama(), config)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder / "adapter" / "checkpoint-1")
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    read = Trajectory(folder / "adapter").dense_weight(1, "model.layers.0.self_attn.q_proj")
    found = {"meant": (meant + 2 * product).detach(), "read": read.contiguous()}
    save_file(found, folder / "adapter" / "found.safetensors")


if __name__ == "__main__":
    main()
