"""Targets, the table of methods, the evaluation set, and files that are written whole."""

import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lowrank.adapters.methods import ReLoraSettings, SLTrainSettings
from hf_lowrank.errors import UserError, nearest
from hf_lowrank.methods import (
    KINDS,
    METHODS,
    SPARE_LOOKS,
    Method,
    MethodTable,
    check_options,
    setting_sections,
    settings_of,
    spare_look,
)
from hf_lowrank.optim.methods import FiraSettings, FrugalSettings, FullRankSettings, MuonSettings
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.storage.files import whole_file, write_text
from hf_lowrank.targets import target_modules


class TestTargets:
    def test_auto_takes_block_linears_only(self, tiny_llama):
        names = set(target_modules(tiny_llama))
        assert len(names) == 2 * 7
        assert "lm_head" not in names
        assert all(name.startswith("model.layers.") for name in names)

    def test_auto_finds_conv1d(self):
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16))
        assert len(target_modules(model)) == 2 * 4

    def test_names_and_regular_expressions(self, tiny_llama):
        assert len(target_modules(tiny_llama, ["q_proj", "mlp.down_proj"])) == 4
        assert list(target_modules(tiny_llama, r"model\.layers\.0\..*q_proj")) == ["model.layers.0.self_attn.q_proj"]
        assert set(target_modules(tiny_llama, "all-linear")) == set(target_modules(tiny_llama))

    @pytest.mark.parametrize("patterns", ["no_such_.*", ["q_proj", "wrong"], [], "("])
    def test_a_pattern_that_matches_nothing_stops(self, tiny_llama, patterns):
        with pytest.raises(UserError, match="target_modules"):
            target_modules(tiny_llama, patterns)

    def test_the_message_gives_names_that_exist(self, tiny_llama):
        with pytest.raises(UserError, match=r"'wrong' matches no linear.*q_proj"):
            target_modules(tiny_llama, ["wrong"])

    def test_a_model_without_blocks(self):
        with pytest.raises(UserError, match="matches no linear"):
            target_modules(nn.Sequential(nn.Linear(2, 2)))


class TestEvaluationSet:
    def test_round_trip(self, tmp_path):
        ids = torch.arange(12).reshape(3, 4)
        saved = EvaluationSet(ids, torch.ones_like(ids))
        saved.save(tmp_path)
        loaded = EvaluationSet.load(tmp_path)
        assert torch.equal(loaded.input_ids, ids)
        assert loaded.fingerprint == saved.fingerprint
        assert len(loaded) == 3

    def test_the_fingerprint_sees_ids_mask_and_shape(self):
        ids = torch.arange(12).reshape(3, 4)
        ones = torch.ones_like(ids)
        masked = ones.clone()
        masked[0, 3] = 0
        sets = [(ids, ones), (ids + 1, ones), (ids, masked), (ids.reshape(4, 3), ones.reshape(4, 3))]
        assert len({EvaluationSet(*pair).fingerprint for pair in sets}) == 4

    def test_a_part_is_another_set(self):
        ids = torch.arange(12).reshape(3, 4)
        whole = EvaluationSet(ids, torch.ones_like(ids))
        assert whole.first(None) is whole
        assert whole.first(9) is whole
        assert whole.first(2).fingerprint != whole.fingerprint

    def test_shapes_must_agree(self):
        with pytest.raises(UserError, match="have the same shape"):
            EvaluationSet(torch.zeros(2, 3), torch.zeros(3, 2))

    def test_missing_damaged_and_changed_files(self, tmp_path):
        with pytest.raises(UserError, match="no such evaluation set"):
            EvaluationSet.load(tmp_path)
        ids = torch.arange(12).reshape(3, 4)
        path = EvaluationSet(ids, torch.ones_like(ids)).save(tmp_path)
        tensors = load_file(path)
        save_file({**tensors, "input_ids": tensors["input_ids"] + 1}, path, metadata={"fingerprint": "0" * 64})
        with pytest.raises(UserError, match="damaged"):
            EvaluationSet.load(path)
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(UserError, match="not a readable evaluation set"):
            EvaluationSet.load(path)


class TestWholeFiles:
    def test_written_whole(self, tmp_path):
        write_text(tmp_path / "new" / "file.txt", "é")
        assert (tmp_path / "new" / "file.txt").read_text(encoding="utf-8") == "é"

    def test_an_error_leaves_what_was_there(self, tmp_path):
        target = tmp_path / "file.txt"
        write_text(target, "old")

        def write_half():
            with whole_file(target) as temporary:
                temporary.write_text("half")
                raise RuntimeError("interrupted")

        with pytest.raises(RuntimeError, match="interrupted"):
            write_half()
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]


class TestMethods:
    def test_an_unknown_name_gets_the_nearest(self):
        with pytest.raises(UserError, match="unknown method 'full_rnak'; did you mean 'full_rank'"):
            METHODS["full_rnak"]

    def test_names_are_taken_once(self):
        method = Method(name="one", title="One", summary="", kind="baseline", settings=FullRankSettings)
        table = MethodTable([method])
        with pytest.raises(ValueError, match="already registered"):
            table.register(method)

    def test_every_entry_describes_itself(self):
        for name, method in METHODS.items():
            assert method.name == name
            assert method.summary.endswith(".")
            assert name in ("full_rank", "low_rank") or method.source.startswith("arXiv ")

    def test_entries_load_when_the_table_is_read_and_in_the_order_of_kinds(self):
        table = MethodTable(modules=("hf_lowrank.adapters.methods", "hf_lowrank.optim.methods"))
        kinds = [method.kind for method in table.values()]
        assert kinds == sorted(kinds, key=KINDS.index)
        assert list(table) == list(METHODS)

    def test_every_method_is_drawn_differently(self):
        looks = [method.look for method in METHODS.values()]
        assert len({look.light for look in looks}) == len({look.dark for look in looks}) == len(looks)

    def test_a_method_without_a_look_always_gets_the_same_one(self):
        def made(name):
            return Method(name=name, title=name, summary="", kind="optimizer", settings=FullRankSettings)

        assert made("mine").look == made("mine").look == spare_look("mine")
        assert len({made(f"method {i}").look for i in range(50)}) == len(SPARE_LOOKS)

    def test_every_setting_says_what_it_means_and_allows(self):
        for method in METHODS.values():
            for setting in settings_of(method.settings).values():
                assert setting.description, f"{method.name}.{setting.name}"
                assert not setting.description.endswith(".")
                assert set(setting.choices) == set(setting.choices) & set(re.findall(r"\w+", setting.allowed))
                check_options(method.settings, {setting.name: setting.default}, method.name)

    def test_nearest(self):
        assert nearest("galor", ["galore", "fira"]) == "did you mean 'galore'?"
        assert nearest("zzz", ["galore", "fira"]) == "allowed: fira, galore"


class TestOptions:
    @pytest.mark.parametrize(
        ("settings", "options", "message"),
        [
            (FiraSettings, {"rank": 0}, "rank of Fira must be an integer of at least 1, got 0"),
            (FiraSettings, {"rank": True}, "rank of Fira must be an integer of at least 1, got True"),
            (FiraSettings, {"rank": 2.0}, "rank of Fira must be an integer of at least 1, got 2.0"),
            (FiraSettings, {"scale": 0}, "scale of Fira must be a number above 0, got 0"),
            (FiraSettings, {"scale": float("nan")}, "scale of Fira must be a number above 0, got nan"),
            (FiraSettings, {"stagger": 1}, "stagger of Fira must be True or False, got 1"),
            (FiraSettings, {"residual": "mine"}, "residual of Fira must be one of official, paper, got 'mine'"),
            (
                FiraSettings,
                {"proj_type": "full"},
                "of Fira must be one of std, reverse_std, right, left, got",
            ),
            (
                FiraSettings,
                {"target_modules": 3},
                "_modules of Fira must be a string or a list of strings, got 3",
            ),
            (MuonSettings, {"momentum": 1}, r"momentum of Fira must be a number in \[0, 1\), got 1"),
            (MuonSettings, {"seed": "x"}, "seed of Fira must be an integer or None, got 'x'"),
            (SLTrainSettings, {"sparsity": 1}, r"sparsity of Fira must be a number in \(0, 1\), got 1"),
            (ReLoraSettings, {"prune_ratio": 2}, r"prune_ratio of Fira must be a number in \[0, 1\], got 2"),
        ],
    )
    def test_a_wrong_value_is_named_with_what_is_allowed(self, settings, options, message):
        with pytest.raises(UserError, match=message):
            check_options(settings, options, "Fira")

    def test_other_options_and_subsets_pass(self):
        check_options(FiraSettings, {"lr": -1.0, "rank": 4, "scale": 1}, "Fira")
        check_options(FiraSettings, {}, "Fira")

    def test_shared_settings_are_listed_once(self):
        sections = dict(setting_sections(METHODS))
        assert len(sections) == len(METHODS) + 5
        listed = [setting.name for settings in sections.values() for setting in settings]
        assert listed.count("update_proj_gap") == listed.count("rank_pattern") == listed.count("layerwise") == 1
        (fira,) = [settings for heading, settings in sections.items() if heading.startswith("fira: Fira (arXiv")]
        assert [setting.name for setting in fira] == [
            "scale", "proj_type", "subspace", "residual", "norm_growth_limit"
        ]  # fmt: skip
        (frugal,) = [settings for heading, settings in sections.items() if heading.startswith("frugal:")]
        (subspace,) = [setting for setting in frugal if setting.name == "subspace"]
        assert subspace.choices == {"blocks": settings_of(FrugalSettings)["subspace"].choices["blocks"]}


def test_import_is_light():
    code = (
        "import sys, hf_lowrank\n"
        "hf_lowrank.METHODS, hf_lowrank.METRICS, hf_lowrank.__version__\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "from hf_lowrank import *\n"
        "heavy |= {'datasets', 'evaluate', 'lm_eval', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'import hf_lowrank loaded {sorted(heavy)}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
