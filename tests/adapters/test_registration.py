"""`import hf_lowrank` makes transformers and PEFT know this package's types, whichever is imported first."""

import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_lowrank import CoLAConfig, LowRankConfig, LowRankForCausalLM, SLTrainConfig
from hf_lowrank.compat import LazyObject

LOAD_MODEL = """
config = AutoConfig.from_pretrained(sys.argv[1])
assert type(config).__name__ == "LowRankConfig", config
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__name__ == "LowRankForCausalLM", model
"""
LOAD_ADAPTER = """
config = PeftConfig.from_pretrained(sys.argv[2])
assert type(config).__name__ == "SLTrainConfig", config
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[3]), sys.argv[2])
assert type(model.base_model).__name__ == "SLTrainModel", model.base_model
"""
TRANSFORMERS = "from transformers import AutoConfig, AutoModelForCausalLM\n"
PEFT = "from peft import PeftConfig, PeftModel\n"
OURS = "import hf_lowrank\n"
ORDERS = {
    "ours-transformers": OURS + TRANSFORMERS + LOAD_MODEL,
    "transformers-ours": TRANSFORMERS + OURS + LOAD_MODEL,
    "ours-peft": OURS + PEFT + TRANSFORMERS + LOAD_ADAPTER + LOAD_MODEL,
    "peft-ours": PEFT + TRANSFORMERS + OURS + LOAD_ADAPTER + LOAD_MODEL,
    "transformers-ours-peft": TRANSFORMERS + OURS + PEFT + LOAD_MODEL + LOAD_ADAPTER,
    "room-first": "import hf_lowrank.adapters.configuration\n" + TRANSFORMERS + PEFT + LOAD_MODEL + LOAD_ADAPTER,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a LowRankForCausalLM, of a PEFT adapter, and of the dense model that it belongs to."""
    folder = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LowRankForCausalLM(LowRankConfig(base_config=config, adapter_config=CoLAConfig(r=2))).save_pretrained(
        folder / "model"
    )
    dense = AutoModelForCausalLM.from_config(config)
    dense.save_pretrained(folder / "dense")
    get_peft_model(dense, SLTrainConfig(r=2)).save_pretrained(folder / "adapter")
    return [str(folder / name) for name in ("model", "adapter", "dense")]


@pytest.mark.parametrize("order", ORDERS)
def test_checkpoints_load_in_every_order_of_imports(order, saved):
    command = [sys.executable, "-c", "import sys\n" + ORDERS[order], *saved]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_entry_is_the_class_itself_once_it_is_loaded():
    assert CONFIG_MAPPING["lowrank"] is LowRankConfig


def test_a_lazy_object_is_used_like_the_object():
    lazy = LazyObject("hf_lowrank.adapters.tuners:CoLAConfig")
    assert lazy.__name__ == "CoLAConfig"
    assert lazy(r=3) == CoLAConfig(r=3)
    assert pickle.loads(pickle.dumps(lazy)).path == lazy.path
    with pytest.raises(AttributeError):
        lazy.no_such_attribute  # noqa: B018


def test_lazy_imports(tmp_path, monkeypatch):
    (tmp_path / "lazy_package").mkdir()
    (tmp_path / "lazy_package" / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "from hf_lowrank.compat import lazy_imports\n"
        "if TYPE_CHECKING:\n"
        "    from hf_lowrank.compat import LazyObject as LazyObject\n"
        "own = 1\n"
        "__getattr__, __dir__, __all__ = lazy_imports(__name__)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("lazy_package")
    with pytest.raises(AttributeError, match="module 'lazy_package' has no attribute 'nothing'"):
        package.nothing  # noqa: B018
    assert "LazyObject" not in vars(package)
    assert package.LazyObject is LazyObject
    assert package.__all__ == ["LazyObject"]
    assert {"LazyObject", "own"} <= set(dir(package))
    assert vars(package)["LazyObject"] is LazyObject


def test_trainer_shifts_the_labels_that_it_smooths(tmp_path):
    """Of models whose class it finds in a table of names."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LowRankForCausalLM.from_dense(
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2)), CoLAConfig(r=4)
    ).eval()
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    ids = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(1))
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    log_p = torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
    by_hand = -0.9 * log_p.gather(-1, ids[:, 1:, None]).mean() - 0.1 * log_p.mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
