"""Cards: valid metadata, harmless text whatever the names, a person's own words kept."""

import json
from html import unescape
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results

from hf_lowrank.errors import UserError
from hf_lowrank.hub import metric_card, model_card, push
from hf_lowrank.hub.cards import OWN_BEGIN, OWN_END
from hf_lowrank.hub.markdown import escape, fenced, inline_code
from hf_lowrank.metrics import METRICS, reference_of
from hf_lowrank.runs.measurements import Measurement, append_measurements

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "| a | b |\n|---|---|",
    "---\nlicense: evil\n---",
    "name: {{ 7*7 }} {% raw %}",
    "```\n# out of the fence\n```",
    "`code` **bold** _it_ ~~gone~~ $x$ @somebody #1",
    "https://evil.example www.evil.example",
    "<!-- … to here is kept when the card is written anew. -->",
    "a\u202eb\u200bc\x00\x1b[31m",
    "'\"\\: - !!python/object/apply:os.system ['x'] &anchor *alias %",
]


SCORE = {
    "run": "nano-galore", "method": "galore", "seed": 0, "step": 30, "task": "pylib_syntax", "metric": "acc",
    "value": 0.5, "stderr": None, "ci_low": None, "ci_high": None, "n": 500, "chance": 0.5, "higher_is_better": True,
    "group": None, "task_version": "1", "lm_eval_version": "0.4.9", "items": "abc",
}  # fmt: skip


@pytest.fixture
def measured_run(run):
    rows = []
    for step in (20, 30):
        for metric in METRICS:
            value, reason = 1.0 / (1 + len(metric)), None
            if metric == "method_barrier":
                value, reason = float("nan"), "CoLA has no dense weight"
            rows.append(
                Measurement(
                    run="nano-galore", method="galore", seed=0, step=step, metric=metric, value=value, reason=reason,
                    ci_low=value - 0.01, ci_high=value + 0.01, n=8, baseline="nano-full_rank",
                    settings={"sequences": 4, **reference_of(metric)},
                )
            )  # fmt: skip
    append_measurements(run / "measurements.jsonl", rows)
    scores = [
        {**SCORE, "task": "pylib_syntax", "value": 0.71, "stderr": 0.02},
        {**SCORE, "task": "pylib_copy", "value": 0.55},
    ]
    (run / "downstream.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores) + '{"torn')
    return run


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def as_html(card: str) -> list:
    """The card's body through a CommonMark renderer with tables, raw HTML let through; the tags that come out."""
    from markdown_it import MarkdownIt

    body = card.split("---\n", 2)[2]
    parser = Tags()
    parser.feed(MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").render(body))
    return parser.found


def test_metadata_is_what_the_hub_reads(measured_run):
    text = model_card(measured_run, "user/tiny", license="mit")
    card = ModelCard(text)
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert {"hf_lowrank", "galore"} <= set(data.tags)
    results = {(r.dataset_name, r.metric_type): r for r in data.eval_results}
    assert all(isinstance(result, EvalResult) for result in data.eval_results)
    assert results[("pylib_syntax", "acc")].metric_value == 0.71
    assert ("held-out sequences of this run", "perplexity") in results
    name, again = model_index_to_eval_results(yaml.safe_load(text.split("---\n")[1])["model-index"])
    assert name == "nano-galore"
    assert len(again) == len(data.eval_results)
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()


def test_datasets_and_base_model(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] = {"source": "hub", "dataset": "allenai/c4", "subset": "en", "sequence_length": 256}
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads((run / "checkpoint-30/config.json").read_text())
    (run / "checkpoint-30/config.json").unlink()
    (run / "checkpoint-30/config.json").write_text(json.dumps({**config, "_name_or_path": "meta/base-model"}))
    data = ModelCard(model_card(run, "user/tiny")).data
    assert data.datasets == ["allenai/c4"]
    assert data.base_model == "meta/base-model"
    assert data.license == "unknown"


def test_the_sixteen_are_there_with_intervals_and_baseline(measured_run):
    text = model_card(measured_run, "user/tiny")
    for metric in METRICS.values():
        if not metric.extra:
            assert escape(metric.title) in text
    assert text.count("| nano-full\\_rank |") >= 16
    assert "CoLA has no dense weight" in text
    assert "At step 30" in text
    assert "0.7100" in text
    assert "123 k" in text


def test_hostile_strings_come_out_harmless(measured_run):
    recipe = yaml.safe_load((measured_run / "recipe.yaml").read_text())
    clean_tags = as_html(model_card(measured_run, "user/tiny"))
    for word in HOSTILE:
        recipe |= {"name": word, "method": {"name": word}, "model": {"note": word}, "data": {"source": "hub"}}
        recipe["data"]["dataset"] = word
        (measured_run / "recipe.yaml").unlink()
        (measured_run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        row = {**SCORE, "run": word, "method": word, "step": 99, "task": word, "metric": word, "lm_eval_version": word}
        (measured_run / "downstream.jsonl").write_text(json.dumps(row) + "\n")
        text = model_card(measured_run, "user/tiny", name=word)
        metadata = yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---\n"))
        assert metadata["license"] == "unknown"
        assert ModelCard(text).data.license == "unknown"
        assert text.splitlines().count(OWN_END) == 1
        assert model_card(measured_run, "user/tiny", name=word, previous=text) == text
        allowed = {tag for tag, _ in clean_tags} | {"table", "thead", "tbody", "tr", "th", "td"}
        for tag, attributes in as_html(text):
            assert tag in allowed, (word, tag)
            assert tag not in ("script", "img", "iframe")
            if tag == "a":
                assert attributes["href"].startswith("https://pypi.org/")
        assert "\u202e" not in text


def test_a_damaged_score_is_named_and_not_left_out(measured_run):
    with open(measured_run / "downstream.jsonl", "w") as table:
        table.write(json.dumps({**SCORE, "n": "<b>"}) + "\n")
    with pytest.raises(UserError, match="line 1 is not a valid score: n must be int"):
        model_card(measured_run, "user/tiny")


def test_hostile_names_in_commits_and_step_cards(hub, run):
    for number, word in enumerate(HOSTILE):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"name": word}
        (run / "recipe.yaml").unlink()
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        push(run, f"user/hostile-{number}", steps=[30])
        history = hub.store.history(f"user/hostile-{number}", "step-30")
        assert "\n" not in history[0]["title"]
        assert history[0]["title"].startswith("Step 30, loss 3.8000")
        files = hub.store.files(f"user/hostile-{number}", "step-30")
        ModelCard(hub.store.content(files["README.md"]).decode())
        assert yaml.safe_load(hub.store.content(files["recipe.yaml"]))["name"] == word


@pytest.mark.parametrize("word", HOSTILE)
def test_escaping(word):
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": True}).render(f"before {escape(word)} after")
    parser = Tags()
    parser.feed(html)
    assert [tag for tag, _ in parser.found] == ["p"]
    code = MarkdownIt("commonmark", {"html": True}).render(f"{fenced(word)}\n\nend\n\n{inline_code(word)}")
    parser = Tags()
    parser.feed(code)
    assert [tag for tag, _ in parser.found] == ["pre", "code", "p", "p", "code"]


def test_own_words_survive_and_the_rest_is_new(hub, run):
    push(run, "user/tiny", license="mit")
    readme = hub.store.content(hub.store.files("user/tiny", "main")["README.md"]).decode()
    words = "## About me\n\nTrained on a *Sunday*, <b>by hand</b>.\n\n| my | table |\n|---|---|"
    edited = readme.replace(f"{OWN_BEGIN}\n", f"{OWN_BEGIN}\n{words}\n").replace(
        "tags:", "language:\n- de\nmy_key: 5\ntags:\n- sunday"
    )
    hub.store.commit(
        "user/tiny", "main", [{"key": "file", "path": "README.md", "data": edited.encode()}], "mine", "", None
    )
    append_measurements(
        run / "measurements.jsonl",
        [Measurement(run="x", method="galore", seed=0, step=30, metric="perplexity", value=43.21)],
    )
    push(run, "user/tiny")
    again = hub.store.content(hub.store.files("user/tiny", "main")["README.md"]).decode()
    assert words in again
    assert "43.2" in again
    assert "43.2" not in readme
    data = ModelCard(again).data.to_dict()
    assert data["license"] == "mit"
    assert data["language"] == ["de"]
    assert data["my_key"] == 5
    assert "sunday" in data["tags"]
    assert b'"perplexity"' in hub.store.content(hub.store.files("user/tiny", "main")["measurements.jsonl"])
    hub.requests.clear()
    push(run, "user/tiny")
    assert not [r for r in hub.requests if "/commit/" in r.path]


def test_numbers_of_own_parameters_are_marked(run):
    why = "not dense: moves the model's own parameters, as its layers have no dense equivalent"
    (run / "measurements.jsonl").unlink(missing_ok=True)
    common = {"run": "x", "method": "cola", "seed": 0, "step": 30}
    rows = [
        Measurement(**common, metric="random_sharpness", value=0.25, settings={"space": "parameters"}, reason=why),
        Measurement(**common, metric="weight_stable_rank", value=4.5),
    ]
    append_measurements(run / "measurements.jsonl", rows)
    card = model_card(run, "user/x")
    assert "| Random sharpness | 0.250 † |" in card
    assert f"Random sharpness †: {why}" in unescape(card)
    assert "| Weight stable rank | 4.50 |" in card


def test_a_card_without_our_marks_is_kept_whole(run):
    text = model_card(run, "user/tiny", previous="---\nlicense: mit\n---\n# Mine\n\nAll of it.\n")
    assert "# Mine\n\nAll of it." in text.partition(OWN_BEGIN)[2].partition(OWN_END)[0]
    assert model_card(run, "user/tiny", previous=text) == text
    assert "broken" in model_card(run, "user/tiny", previous="---\n: [\n---\nbroken yaml")


def test_pictures_are_drawn_pushed_and_the_same_each_time(hub, measured_run):
    from hf_lowrank.hub.pictures import draw

    append_measurements(
        measured_run / "measurements.jsonl",
        [
            Measurement(run="x", method="galore", seed=0, step=30, metric="random_curve", value=3 + t * t,
                        ci_low=3 + t * t / 2, ci_high=3 + 2 * t * t, settings={"t": t})
            for t in (-0.1, -0.05, 0.0, 0.05, 0.1)
        ],
    )  # fmt: skip
    pictures = draw(measured_run)
    assert set(pictures) == {"losses", "landscape", "spectra"}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert draw(measured_run) == pictures
    push(measured_run, "user/tiny")
    files = hub.store.files("user/tiny", "main")
    assert hub.store.content(files["pictures/losses.png"]) == pictures["losses"]
    card = hub.store.content(files["README.md"]).decode()
    assert "](pictures/losses.png)" in card
    assert "](pictures/landscape.png)" in card


def test_a_card_of_next_to_nothing(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    ModelCard(model_card(bare, "user/bare"))
    ModelCard(model_card(None, "user/bare"))


def test_the_metric_card():
    text = metric_card(
        title="Low-rank geometry: <b>sixteen</b>",
        summary="How two runs differ beyond their perplexity.",
        usage='import evaluate\nmodule = evaluate.load("lowrank_geometry")',
        metrics=list(METRICS.values()),
        limits=["Numbers of different evaluation sets are not comparable."],
    )
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["sdk"] == "gradio"
    assert "evaluate" in metadata["tags"]
    assert all(f"`{name}`" in text for name in METRICS)
    assert "<b>" not in text.split("---\n", 2)[2]
