"""Cards with the report's pictures, rendered from runs whose weights are not published, and hostile names in both."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from hf_lowrank.errors import UserError
from hf_lowrank.hub import model_card, push, render_cards
from hf_lowrank.hub.cards import OWN_BEGIN, OWN_END
from hf_lowrank.hub.pictures import PICTURES, draw, most_compared
from hf_lowrank.metrics import reference_of
from hf_lowrank.report import write_report
from hf_lowrank.report.plots import interpolation_paths
from hf_lowrank.runs.measurements import Measurement, append_measurements
from hf_lowrank.runs.records import read_run
from tests.hub.runs import make_run
from tests.hub.test_cards import HOSTILE, as_html

BASELINE = "nano-full_rank-seed0"
SPECTRA = ("weight_effective_rank", "weight_stable_rank", "update_norm")


def measure_everything(run, baseline=BASELINE, others=("aaa-run", "zzz-run")):
    """Rows of all that is drawn, at steps 20 and 30; paths are parabolas over a sloping chord."""
    rows = []

    def row(step, metric, value, **more):
        more = {"ci_low": value - 0.01, "ci_high": value + 0.01, "n": 4, "settings": reference_of(metric), **more}
        rows.append(Measurement(run="r", method="galore", seed=0, step=step, metric=metric, value=value, **more))

    for step in (20, 30):
        row(step, "perplexity", 40.0)
        for metric in SPECTRA:
            row(step, metric, 0.5 + step / 100)
            for block in range(2):
                row(step, metric, 0.4 + block / 10, scope=f"model.layers.{block}.mlp.up_proj")
        for layer in range(3):
            row(step, "activation_cka", 1 - layer / 10, scope=f"hidden_states.{layer}", baseline=baseline)
        row(step, "activation_cka", 0.9, baseline=baseline)
        for t in (-0.1, -0.05, 0.0, 0.05, 0.1):
            row(step, "random_curve", 3 + t * t, settings={"t": t})
            row(step, "pca1_curve", 3 + 2 * t * t, settings={"t": t})
        for x in (-0.1, 0.0, 0.1):
            for y in (-0.1, 0.0, 0.1):
                row(step, "random_plane", 3 + x * x + y * y, settings={"x": x, "y": y})
        for t in (0.0, 0.5, 1.0):
            row(step, "step_path", 3 + t * (1 - t), settings={"t": t})
            for height, name in enumerate((baseline, *others), start=1):
                row(step, "method_path", 3 + height * t * (1 - t) - 0.7 * t, settings={"t": t}, baseline=name)
        for name in (baseline, *others):
            row(step, "method_barrier", 0.25, baseline=name)
    append_measurements(run / "measurements.jsonl", rows)
    return run


def links(card):
    return re.findall(r"!\[[^]]*\]\(([^)]+)\)", card)


def test_every_picture_is_drawn_and_small(run):
    measure_everything(run)
    pictures = draw(run)
    assert set(pictures) == set(PICTURES)
    for name, data in pictures.items():
        assert data.startswith(b"\x89PNG"), name
        assert len(data) < 80_000, name
    card = model_card(run, "user/tiny", pictures=tuple(pictures))
    assert links(card) == [f"pictures/{name}.png" for name in pictures]
    # A barrier to each of the three, and no point of a plane or of a curve, in the table.
    assert card.count("| Method barrier |") == 3
    assert "plane |" not in card


def test_the_path_is_the_one_to_the_runs_own_baseline(run):
    measure_everything(run)
    assert most_compared(read_run(run)) == BASELINE
    (axes,) = interpolation_paths([run], baseline=BASELINE).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.0, 0.25, 0.0], atol=1e-12)
    (axes,) = interpolation_paths([run], baseline="zzz-run").axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.0, 0.75, 0.0], atol=1e-12)
    with pytest.raises(UserError, match="no method_path"):
        interpolation_paths([run], baseline="nobody")


def test_pages_stand_beside_their_pictures_and_keep_a_persons_words(run, tmp_path):
    other = make_run(tmp_path / "other", method="full_rank", seed=1)
    measure_everything(run)
    # Weights and optimizer states may be gone.
    for file in run.glob("checkpoint-*/*"):
        if file.name not in ("config.json", "trainer_state.json"):
            os.unlink(file)
    folder = tmp_path / "cards"
    pages = render_cards([run, other], folder, license="apache-2.0")
    assert pages == [folder / "galore.md", folder / "full_rank.md"]
    for page, count in zip(pages, (len(PICTURES), 1), strict=True):
        card = page.read_text(encoding="utf-8")
        assert ModelCard(card).data.license == "apache-2.0"
        assert len(links(card)) == count
        files = [folder / unquote(link) for link in links(card)]
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
        assert sorted((folder / page.stem).iterdir()) == sorted(files)
        assert "not published" in card
        assert "from_pretrained" not in card
        assert "step-N" not in card
        assert str(tmp_path) not in card
    words = "A run that I like."
    card = pages[0].read_text(encoding="utf-8")
    pages[0].write_text(card.replace(f"{OWN_BEGIN}\n", f"{OWN_BEGIN}\n{words}\n"), encoding="utf-8")
    (run / "measurements.jsonl").unlink()
    render_cards([run], folder)
    again = pages[0].read_text(encoding="utf-8")
    assert words in again.partition(OWN_BEGIN)[2].partition(OWN_END)[0]
    assert ModelCard(again).data.license == "apache-2.0"
    assert [path.name for path in (folder / "galore").iterdir()] == ["losses.png"]
    assert not list(folder.rglob("*.safetensors"))


def test_names_of_pages(run, tmp_path):
    twin = tmp_path / "galore-seed1"
    shutil.copytree(run, twin)
    folder = tmp_path / "cards"
    assert [page.name for page in render_cards([run, twin], folder)] == ["tiny-run.md", "galore-seed1.md"]
    recipe = yaml.safe_load((twin / "recipe.yaml").read_text())
    for name in ("../../out", "..", "a/b"):
        (twin / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "method": {"name": name}}))
        assert [page.name for page in render_cards([twin], folder)] == ["galore-seed1.md"]
    (tmp_path / "empty").mkdir()
    for runs, said in (([], "at least one"), ([tmp_path / "empty"], "recipe.yaml"), ([run, run], "twice")):
        with pytest.raises(UserError, match=said):
            render_cards(runs, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


@pytest.mark.parametrize("word", [HOSTILE[0], HOSTILE[8], HOSTILE[11]])
def test_hostile_names_from_a_hub_are_harmless_in_card_and_report(run, tmp_path, word):
    """Repository, revision, run and task names that others chose, as they come into rows and files."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    hub_name = f"user/{word}@step-30"
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "method": {"name": word}, "name": hub_name}))
    who = {"run": hub_name, "method": word, "seed": 0, "step": 30}
    rows = [Measurement(**who, metric="activation_cka", value=0.5, scope="hidden_states.1", baseline=hub_name)]
    score = {
        **who, "value": 0.5, "stderr": 0.1, "ci_low": 0.3, "ci_high": 0.7, "n": 3, "chance": None, "limit": None,
        "higher_is_better": True, "group": None, "task_version": word, "lm_eval_version": word, "items": word,
    }  # fmt: skip
    scores = []
    for other in HOSTILE:
        name = f"user/{other}@step-30"
        rows.append(Measurement(**who, metric="method_barrier", value=0.5, baseline=name, reason=other,
                                settings=reference_of("method_barrier")))  # fmt: skip
        rows.append(Measurement(**who, metric="activation_cka", value=0.5, scope=f"$\\frac{other}$", baseline=name))
        scores.append({**score, "task": other, "metric": other})
    append_measurements(run / "measurements.jsonl", rows)
    (run / "downstream.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    (page,) = render_cards([run], tmp_path / "cards")
    card = page.read_text(encoding="utf-8")
    ModelCard(card)
    for tag, attributes in as_html(card):
        assert tag not in ("script", "iframe", "svg")
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert (page.parent / unquote(attributes["src"])).is_file()
        if tag == "a":
            assert attributes["href"].startswith("https://pypi.org/")
    plain = make_run(tmp_path / "plain", method="full_rank")
    clean, found = (
        Page(write_report(runs, tmp_path / name).read_text(encoding="utf-8")).elements
        for name, runs in (("clean", [plain]), ("found", [plain, run]))
    )
    scripts = [[attributes for tag, attributes in elements if tag == "script"] for elements in (clean, found)]
    assert scripts[0] == scripts[1]
    assert not {"img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in found}
    assert not any(name.startswith("on") for _, attributes in found for name in attributes)
    links_there = {attributes.get("href") for tag, attributes in found if tag == "a"}
    assert not [link for link in links_there if link and not link.startswith(("#", "https://arxiv.org/", "data:"))]


ODD_METADATA = [
    "5: x", "null: 3", "true: false", "self: 1", "eval_results: 3", "eval_results: [{a: 1}]\nmodel_name: y",
    "ignore_metadata_errors: true", "model-index:\n- name: <b>\n  results: 7", "license: [a, b]", "tags: {a: b}",
    "a: !!python/object/apply:os.system ['x']", "? [a, b]\n: c",
]  # fmt: skip


def test_a_strange_card_on_the_hub_stops_no_push(hub, run):
    for metadata in ODD_METADATA:
        card = ModelCard(
            model_card(run, "user/tiny", previous=f"---\nlanguage: de\n{metadata}\n---\nWords of mine.\n")
        )
        assert "Words of mine." in card.text
        assert card.data.library_name == "transformers"
        assert "galore" in card.data.tags
    hub.store.create("user/tiny", True)
    readme = f"---\n{ODD_METADATA[0]}\n---\nWords of mine.\n".encode()
    hub.store.commit("user/tiny", "main", [{"key": "file", "path": "README.md", "data": readme}], "mine", "", None)
    push(run, "user/tiny", steps=[30])
    assert b"Words of mine." in hub.store.content(hub.store.files("user/tiny", "main")["README.md"])
