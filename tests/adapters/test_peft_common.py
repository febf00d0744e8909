"""What PEFT's common tests ask and a replaced layer cannot do: refused by name, and listed in the documentation."""

import re
from pathlib import Path

import pytest
import torch
from peft import get_base_model_state_dict, get_peft_model
from peft.utils import PeftType

from hf_lowrank.errors import UserError
from hf_lowrank.targets import target_modules
from tests.adapters.conftest import REPLACING

PAGE = Path(__file__).parents[2] / "docs" / "peft_common_tests.md"
ROW = re.compile(r"^\| (?P<tests>.+?) \| (?P<who>`\w+`|all) \| (?P<why>.+?) \| (?P<instead>.+?) \|$", re.M)


def merge(model, ids):
    model.merge_and_unload(safe_merge=True)


def merge_in_place(model, ids):
    model.merge_adapter()
    model.merge_adapter()


def merge_two(model, ids):
    model.merge_and_unload(adapter_names=["default", "second"])


def disable(model, ids):
    with model.disable_adapter():
        model(input_ids=ids)


def unload(model, ids):
    model.unload()


def delete_all(model, ids):
    model.delete_adapter("second")
    model.delete_adapter("default")
    model.base_model(input_ids=ids)


def mix_in_a_batch(model, ids):
    model(input_ids=ids, adapter_names=["default", "second", "__base__"][: len(ids)])


def mix_in_generation(model, ids):
    model.generate(input_ids=ids, adapter_names=["default", "second"][: len(ids)], num_beams=2, max_new_tokens=2)


def read_base_weights(model, ids):
    missing = {f"{name}.weight" for name in model.base_model.targeted_module_names}
    assert missing
    assert not missing & set(get_base_model_state_dict(model))


def choose_blocks(model, ids):
    with pytest.raises(TypeError, match="layers_to_transform"):
        type(model.peft_config["default"])(r=4, layers_to_transform=[0])


def convert(model, ids):
    assert not model.supports_lora_conversion()


def use_two(model, ids):
    model.base_model.set_adapter(["default", "second"])
    model(input_ids=ids)


# By the name in the documentation: what is done, and what is said.
REFUSALS = {
    "merge_layers": (merge, "cannot be merged: its non-linearity"),
    "merge_layers_fp16": (lambda model, ids: merge(model.half(), ids), "cannot be merged: its non-linearity"),
    "merge_layers_nan": (merge, "cannot be merged: its non-linearity"),
    "merge_layers_is_idempotent": (merge_in_place, "cannot be merged: its non-linearity"),
    "safe_merge": (merge, "cannot be merged: its non-linearity"),
    "merge_layers_multi": (merge_two, "only the active adapter 'default' can be merged|cannot be merged: its non-lin"),
    "disable_adapter": (disable, "keeps no dense weight, so it cannot be disabled"),
    "unload_adapter": (unload, "keeps no dense weight, so it cannot be unloaded"),
    "delete_adapter": (delete_all, "exactly one adapter must be active .* got none"),
    "delete_inactive_adapter": (delete_all, "exactly one adapter must be active .* got none"),
    "mixed_adapter_batches": (mix_in_a_batch, "adapter_names must be left out"),
    "generate_with_mixed_adapter_batches_and_beam_search": (mix_in_generation, "adapter_names must be left out"),
    "test_custom_models.py": (use_two, "exactly one adapter must be active"),
}
# What no layer refuses, as there is nothing to refuse: each checks what the documentation says of it.
ABSENT = {
    "get_base_model_state_dict": read_base_weights,
    "training_layer_indexing": choose_blocks,
    "lora_conversion": convert,
}


def documented():
    """The tests in the documentation, each with who refuses it."""
    rows = list(ROW.finditer(PAGE.read_text(encoding="utf-8")))
    return {test: row["who"].strip("`") for row in rows for test in re.findall(r"`([\w.]+)`", row["tests"])}


def test_the_list_is_complete():
    assert documented().keys() == REFUSALS.keys() | ABSENT.keys()
    assert {peft_type.lower() for peft_type in PeftType.__members__} >= {"cola", "sltrain", "sst", "structured"}


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.parametrize("test", REFUSALS)
@pytest.mark.parametrize("layer", REPLACING)
def test_what_is_listed_is_refused_and_nothing_else(llama_config, dense, ids, stir, layer, test):
    plain = dense(llama_config)
    assert target_modules(plain)
    model = get_peft_model(plain, REPLACING[layer]())
    model.add_adapter("second", REPLACING[layer](seed=1))
    stir(model)
    action, message = REFUSALS[test]
    if documented()[test] not in ("all", layer):
        action(model, ids)
        return
    with torch.no_grad(), pytest.raises(UserError, match=message):
        action(model, ids)


@pytest.mark.parametrize("test", ABSENT)
@pytest.mark.parametrize("layer", REPLACING)
def test_what_is_listed_as_absent_is(llama_config, dense, ids, layer, test):
    assert documented()[test] == "all"
    ABSENT[test](get_peft_model(dense(llama_config), REPLACING[layer]()), ids)
