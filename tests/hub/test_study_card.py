"""A study's card: the page's own answer as Markdown, with its tables and pictures beside it and no weights."""

import csv
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_lowrank.errors import UserError
from hf_lowrank.hub.cards import OWN_BEGIN
from hf_lowrank.hub.study_card import PICTURES, render_study_card
from hf_lowrank.report.answer import groups
from hf_lowrank.runs.records import load_runs
from tests.hub.test_cards import as_html
from tests.report.conftest import fake_run, fake_study

LOSSES = {"full_rank": 3.4, "galore": 3.2, "fira": 3.3}
HOSTILE = "<script>alert(1)</script> | [x](http://evil) `code`"


@pytest.fixture
def study(tmp_path):
    folder = fake_study(tmp_path / "some_study", list(LOSSES), word=HOSTILE)
    (folder / "study.yaml").write_text(yaml.safe_dump({"name": "some", "baseline": "full_rank"}))
    for method, loss in LOSSES.items():
        for seed in range(3):
            fake_run(
                folder / "runs" / f"{method}-seed{seed}", method, seed, loss=loss + 0.01 * seed, activations=True,
                barriers=[] if method == "full_rank" else [f"full_rank-seed{seed}"], tasks=("pylib_syntax", "b"),
            )  # fmt: skip
    return folder


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_studys_card_holds_what_its_page_holds(study, tmp_path):
    card = render_study_card(study, tmp_path / "card", command="hf-lowrank study some.yaml")
    text = card.read_text()
    (group,) = groups(load_runs(sorted((study / "runs").iterdir())))
    assert group.headline in text
    assert "hf-lowrank study some.yaml" in text
    answer = table(card.parent / "answer.csv")
    assert [row["method"] for row in answer] == [row.method for row in group.standings.rows]
    for row, line in zip(group.standings.rows, answer, strict=True):
        assert float(line["perplexity"]) == pytest.approx(row.standings[0].value, rel=1e-5)
        assert f"| {row.title} | 3 | {row.standings[0].text} [{row.standings[0].interval}]" in text
    drawn = {path.stem for path in (card.parent / "pictures").iterdir()}
    assert drawn == set(re.findall(r"\(pictures/([\w-]+)\.png\)", text)) == set(PICTURES) - {"pca-direction"}
    names = {path.name for path in card.parent.iterdir()}
    assert {"report.html", "claims.json", "prediction.json", "scores.csv", "measurements.csv"} <= names
    assert (card.parent / "claims.json").read_bytes() == (study / "claims.json").read_bytes()
    rows = table(card.parent / "measurements.csv")
    assert {row["run"] for row in rows} == {path.name for path in (study / "runs").iterdir()}
    assert {"random_sharpness", "method_barrier"} <= {row["metric"] for row in rows}
    assert not {"random_curve", "method_path"} & {row["metric"] for row in rows}
    assert len(table(card.parent / "scores.csv")) == 9 * 5 * 3


def test_names_from_outside_are_text(study, tmp_path):
    text = render_study_card(study, tmp_path / "card").read_text()
    assert set(ModelCard(text).data.tags) == {"hf_lowrank", "low-rank", "pre-training", *LOSSES}
    tags = as_html(text)
    kept = "h1 h2 h3 p strong em code pre img ul li table thead tbody tr th td"
    assert {tag for tag, _ in tags} <= set(kept.split())
    assert HOSTILE not in text


def test_own_words_stay(study, tmp_path):
    card = render_study_card(study, tmp_path)
    card.write_text(card.read_text().replace(OWN_BEGIN, f"{OWN_BEGIN}\nWhat I think of it.", 1))
    assert "What I think of it." in render_study_card(study, tmp_path).read_text()


def test_what_is_no_study_is_refused(study, tmp_path):
    with pytest.raises(UserError, match=r"nothing: must be a study's folder, but there are no runs in"):
        render_study_card(tmp_path / "nothing", tmp_path / "card")
    fake_run(study / "runs" / "wide-seed0", "wide", 0, width=256)
    with pytest.raises(UserError, match="its runs have 2 sizes or evaluation sets"):
        render_study_card(study, tmp_path / "card")
    assert not (tmp_path / "card").exists()
