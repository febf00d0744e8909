"""The page is whole, self-contained, safe and says what the runs allow to be said."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from hf_lowrank.errors import UserError
from hf_lowrank.hub.study_card import render_study_card
from hf_lowrank.report import terminal_table, write_report
from hf_lowrank.report.payload import script_json, short, thinned

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028"
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """Reads a page: its elements, the text of each kind, and whether what was opened was closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.faults, self.texts = [], [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page_of(tmp_path):
    def read(runs, study=None):
        path = write_report(runs, tmp_path / "report", study=study)
        assert path == tmp_path / "report" / "report.html"
        text = path.read_text(encoding="utf-8")
        return text, Page(text)

    return read


def data_of(page):
    return json.loads(page.texts["script"][0])


def test_a_page_is_well_formed_and_loads_nothing(make_run, page_of):
    text, page = page_of([make_run("a", "full_rank"), make_run("b", "galore", activations=True)])
    assert page.faults == []
    assert page.open == []
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith("#") or value == "data:,"
    assert "@import" not in text
    assert "url(" not in text
    assert not re.search(r"(fetch|XMLHttpRequest|importScripts|WebSocket)\s*\(", text)
    policy = next(m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    script = page.texts["script"][1]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_structure_serves_readers_of_every_kind(make_run, page_of):
    _, page = page_of([make_run("a", "full_rank"), make_run("b", "galore")])
    tags = [tag for tag, _ in page.elements]
    assert {"header", "nav", "main", "footer", "caption"} <= set(tags)
    assert tags.count("h1") == 1
    assert page.of("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {label["for"] for label in page.of("label") if "for" in label} <= set(ids)
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.of("th"))
    headings = [attributes for attributes in page.of("th") if attributes["scope"] == "col"]
    assert [h["data-id"] for h in headings if h.get("aria-sort")] == ["perplexity", "validation_loss"]


def test_hostile_names_stay_text(make_run, make_study, page_of, tmp_path):
    run = make_run("plain", HOSTILE, tasks=(HOSTILE, "org/name<b>"))
    rows = run / "measurements.jsonl"
    line = json.loads(rows.read_text().splitlines()[0])
    line |= {"metric": HOSTILE, "scope": "model", "reason": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    rows.write_text(rows.read_text() + json.dumps(line) + "\n" + json.dumps(line | {"scope": HOSTILE}) + "\n")
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps(facts | {HOSTILE: HOSTILE, "evaluation_fingerprint": HOSTILE}))
    study = make_study(tmp_path / "study", [HOSTILE, "user/repo<i>"], word=HOSTILE)
    text, page = page_of([run], study)
    assert page.faults == []
    assert page.open == []
    assert len(page.of("script")) == 2
    for tag in ("i", "b"):
        assert not any(set(attributes) - {"class"} for attributes in page.of(tag))
    assert page.of("img") == []
    assert "<img" not in text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert data_of(page)["methods"][0]["name"] == HOSTILE
    assert HOSTILE in data_of(page)["metrics"]
    assert {task["task"] for task in data_of(page)["tasks"]} == {HOSTILE, "org/name<b>", "bits"}
    seen = " ".join("".join(texts) for tag, texts in page.texts.items() if tag != "script")
    for where in ("directions (", "Paired by seed (", "All comparisons agree (", "no memory ", "left out: "):
        assert where + HOSTILE.splitlines()[0] in seen


def test_script_json_round_trips_and_cannot_end_its_element():
    value = {HOSTILE: [HOSTILE, 1.5, None, "<!--"]}
    text = script_json(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)
    with pytest.raises(ValueError, match="JSON"):
        script_json(float("nan"))


def test_numbers_are_cut_but_not_bent():
    assert short(3.14159265) == 3.1416
    assert short(1234567.0) == 1234600
    assert short(float("inf")) is None
    assert short(None) is None
    points = [(step, float(step)) for step in range(10_000)]
    few = thinned(points)
    assert len(few) <= 400
    assert few[-1] == points[-1]
    assert all(x == y for x, y in few)
    assert thinned(points[:7]) == points[:7]


def test_data_hold_curves_trends_and_layers(make_run, page_of):
    _, page = page_of([make_run("b", "galore", blocks=3)])
    (run,) = data_of(page)["runs"]
    curve = run["curves"]["random_curve"][-1]
    assert curve["step"] == 200
    assert curve["t"][0] == -0.3
    assert curve["t"][6] == 0
    assert len(curve["lo"]) == len(curve["hi"]) == len(curve["y"]) == 13
    assert curve["relative"] == 1
    assert run["metrics"]["random_sharpness"]["x"] == [0, 50, 100, 150, 200]
    assert run["metrics"]["update_norm"]["x"] == [50, 100, 150, 200]
    layers = run["metrics"]["weight_stable_rank"]["layers"]
    assert len(layers["scopes"]) == 21
    assert len(layers["values"]) == 5
    scopes = data_of(page)["scopes"]
    assert scopes[layers["scopes"][0]] == "model.layers.0.self_attn.q_proj"
    mean = run["metrics"]["weight_stable_rank"]["y"][-1]
    assert mean == pytest.approx(sum(layers["values"][-1]) / 21, rel=1e-3)


def test_sections_follow_what_was_measured(make_run, page_of):
    text, _ = page_of([make_run("bare", "galore", measured=False)])
    for section in ("h-landscape", "h-spectra", "h-activations", "h-layers", "fig-barriers"):
        assert f'id="{section}"' not in text
    assert "hf-lowrank measure" in text
    text, _ = page_of([make_run("full", "galore", activations=True, barriers=("x", "y"))])
    for section in ("h-landscape", "h-interpolation", "h-spectra", "h-activations", "h-layers", "fig-barriers"):
        assert f'id="{section}"' in text
    assert 'data-heat="activation_cka"' in text
    assert 'id="fig-planes"' in text
    assert 'data-trend="random_plane"' not in text
    assert 'data-id="random_plane"' not in text


def test_a_study_is_shown_and_its_failures_said(make_run, make_study, page_of, tmp_path):
    methods = ["full_rank", "galore"]
    runs = [make_run(f"runs/{m}-seed{s}", m, s, tasks=("syntax", "cloze")) for m in methods for s in range(3)]
    text, page = page_of(runs, make_study(tmp_path, methods, word="oddity"))
    for section in ("claims", "prediction", "sweep", "failures", "fig-tasks", "fig-scatter"):
        assert f'id="{section}"' in text
    badges = [" ".join(a["class"].split()[1:]) for tag, a in page.elements if a.get("class", "").startswith("badge")]
    assert badges == ["reproduced", "contradicted", "undecided", "undecided", "small reproduced"]
    assert "1 part of this study failed" in " ".join(" ".join(text.split()).replace("<strong>", "").split())
    assert "It rises by so much (oddity). All comparisons agree (oddity).</p>" in text
    assert "Geometry and spectra are not shown" in text
    data = data_of(page)
    assert {entry["method"] for entry in data["sweep"]} == {0, 1, 2}
    assert [(found["question"], len(found["rows"])) for found in data["predictions"]] == [("unseen_method", 40)]
    assert "40 checkpoints of 8 runs of 8 methods" in text
    assert "Not tested: too few runs of oddity." in text
    order = [text.index(f'id="{name}"') for name in ("answer", "pictures", "claims", "runs", "made")]
    assert order == sorted(order)
    without, _ = page_of(runs)
    assert 'id="claims"' not in without


def test_folders_without_a_loss_have_no_empty_chart_of_it(make_run, page_of):
    runs = [make_run("theirs"), make_run("ours")]
    assert 'id="fig-loss"' in page_of(runs)[0]
    for run in runs:
        (run / "recipe.yaml").unlink()
        for state in run.glob("checkpoint-*/trainer_state.json"):
            state.unlink()
    assert 'id="fig-loss"' not in page_of(runs)[0]


def test_the_answer_is_in_the_page_without_its_script(make_run, page_of):
    text, page = page_of(
        [make_run(f"{m}{s}", m, s, loss=x) for m, x in (("fira", 3.0), ("cola", 4.0)) for s in range(3)]
    )
    table = text[text.index('<table class="methods') : text.index("</table>")]
    assert "20.1" in table
    assert "54.6" in table
    assert "95 % interval" in table
    ranks = [a.get("data-rank") for a in page.of("td") if a.get("data-id") == "perplexity"]
    assert ranks[:2] == ["1", "2"]
    text, _ = page_of([make_run("a", "fira"), make_run("b", "cola")])
    table = text[text.index('<table class="methods') : text.index("</table>")]
    assert "no verdict" in table
    assert "rank 1" not in table
    assert "One seed per method, so there are no intervals" in text


def test_evaluation_sets_are_never_ranked_together(make_run, page_of):
    text, page = page_of(
        [make_run("a", loss=3.0), make_run("b", loss=2.0, fingerprint="cd" * 32), make_run("c", "fira")]
    )
    assert "2 different sets" in text
    assert 'id="group"' in text
    assert len(page.of("table")) == 4
    assert {run["name"]: run["group"] for run in data_of(page)["runs"]} == {"a": 0, "c": 0, "b": 1}


def test_mixed_settings_are_said(make_run, page_of):
    run = make_run("b", "fira")
    rows = run / "measurements.jsonl"
    rows.write_text(rows.read_text().replace('"draws": 8', '"draws": 4'))
    text, _ = page_of([make_run("a"), run])
    assert "different settings or at different steps" in text
    text, _ = page_of([make_run("c"), make_run("d", "fira")])
    assert "different settings" not in text


def test_nothing_is_written_when_a_run_is_bad(make_run, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(UserError, match="no such run folder"):
        write_report([make_run("a"), tmp_path / "absent"], output)
    assert not output.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output must be a folder"):
        write_report([make_run("b")], tmp_path / "file")


def test_a_page_is_replaced_whole(make_run, page_of, tmp_path):
    page_of([make_run("a")])
    text, _ = page_of([make_run("b", "fira")])
    assert "Fira" in text
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.html"]


def test_fifty_runs_stay_small(make_run, page_of):
    steps = tuple(range(0, 1001, 100))[1:]
    runs = [make_run(f"run{i}", ("galore", "fira", "cola")[i % 3], i, steps=steps, blocks=8) for i in range(5)]
    text, _ = page_of(runs)
    shared = len(page_of([make_run("bare", measured=False)])[0])
    # Ten times the runs: 50 runs of 10 steps stay below 10 MB.
    assert shared + 10 * (len(text) - shared) < 10e6


def test_what_is_not_of_dense_weights_is_marked_and_explained(page_of, make_run):
    said = "† moves the model's own parameters instead of dense weights: not comparable with the others."
    runs = [make_run("full_rank-0", "full_rank", 0), make_run("cola-0", "cola", 0, barriers=("full_rank-0",))]
    _, page = page_of(runs)
    assert sum(said in text for text in page.texts["p"]) == 3  # landscape, paths, table of runs
    cells = [text for text in page.texts["td"] if text.endswith("†")]
    assert cells
    titled = [c["title"] for c in page.of("td") if c.get("data-id") == "random_sharpness"]
    assert [title.partition("; ")[2] for title in titled] == ["", "not dense: moves the model's own parameters"]
    text, page = page_of(runs[:1])
    assert said not in text
    assert not any("†" in cell for cell in page.texts["td"])


def test_page_terminal_and_card_begin_with_the_caution(make_run, page_of, tmp_path):
    runs = [
        make_run(f"runs/{name}-seed{seed}", name, seed, loss=loss)
        for name, loss in (("full_rank", 3.3), ("fira", 3.2))
        for seed in range(3)
    ]
    study = runs[0].parent.parent
    rows = [
        {"member": member, "values": {"training.learning_rate": rate, "method.scale": 0.5}, "loss": 3.0,
         "ranges": {"training.learning_rate": [0.001, 0.002], "method.scale": {"uniform": [0.1, 1]}},
         "chosen": rate == 0.001, "edges": {"training.learning_rate": 0, "method.scale": 2} if rate == 0.001 else {}}
        for member in ("full_rank", "fira") for rate in (0.001, 0.002)
    ]  # fmt: skip
    (study / "sweep.json").write_text(json.dumps(rows))
    caution = "Full-rank, the baseline, may be behind because of its tuning: its best learning rate is at the edge of"
    text, page = page_of(runs, study)
    assert page.texts["h1"][0].startswith(caution)
    assert text.index(caution) < text.index("Fira has a lower perplexity than Full-rank")
    flat = " ".join(" ".join(page.texts[tag]) for tag in ("td",))
    assert "learning rate 0.001, 0.002; scale 0.1 to 1" in flat
    assert "learning rate 0.001, scale 0.5" in flat
    assert "yes: learning rate; better may lie beyond" in flat
    shown = io.StringIO()
    Console(file=shown, width=200).print(terminal_table(runs, width=200, study=study))
    said = " ".join(shown.getvalue().split())
    assert said.startswith(caution)
    assert "Fira has a lower perplexity than Full-rank" in said
    card = render_study_card(study, tmp_path / "card").read_text()
    body = card.partition("\n---\n")[2]  # after the metadata
    assert (
        body.strip()
        .splitlines()[2]
        .startswith(f"**{caution} the values tried.** Fira has a lower perplexity than Full-rank")
    )
    assert "| Fira | 2 | learning rate 0.001, 0.002; scale 0.1 to 1 | learning rate 0.001, scale 0.5 | 3.000 |" in card
