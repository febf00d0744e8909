"""Two sizes side by side: orders by scipy, verdicts of each, and refusals."""

import pytest
import scipy.stats
import yaml

from hf_lowrank.errors import UserError
from hf_lowrank.hub.study_card import render_study_card
from hf_lowrank.report import write_report
from hf_lowrank.report.sizes import read_size, sizes_view
from tests.report.conftest import fake_run, fake_study
from tests.report.test_report_page import HOSTILE, Page

LARGE = {"full_rank": 3.4, "galore": 3.2, "fira": 3.3, "apollo": 3.6}
SMALL = {"full_rank": 4.4, "galore": 4.3, "fira": 4.1, HOSTILE: 4.6}


def study(folder, losses, width, seeds=3):
    fake_study(folder, list(losses))
    (folder / "study.yaml").write_text(yaml.safe_dump({"name": folder.name, "baseline": "full_rank"}))
    for number, (method, loss) in enumerate(losses.items()):
        for seed in range(seeds):
            fake_run(
                folder / "runs" / f"m{number}-seed{seed}", method, seed, loss=loss + 0.01 * seed * (1 + number),
                width=width, fingerprint="ab" * 32,
            )  # fmt: skip
    return folder


@pytest.fixture
def two(tmp_path):
    return study(tmp_path / "large", LARGE, 128), study(tmp_path / "small", SMALL, 64)


def test_orders_are_compared_over_the_common_methods(two):
    large, small = map(read_size, two)
    view = sizes_view(large, [small])
    assert [row["method"] for row in view["rows"]] == ["galore", "fira", "full_rank", "apollo", HOSTILE]
    assert [cell is None for cell in view["rows"][3]["cells"]] == [False, True]
    common = [method for method in LARGE if method in SMALL]
    tau = scipy.stats.kendalltau([LARGE[m] for m in common], [SMALL[m] for m in common]).statistic
    (sentence,) = view["sentences"]
    assert f"of 3 methods here and at {small.group.scale} is {tau:.3f} (95 % interval " in sentence
    assert sentence.endswith("Significantly in the opposite order: GaLore – Fira.")
    for size, cells in zip((large, small), zip(*(row["cells"] for row in view["rows"]), strict=True), strict=True):
        table = {row.method: row.standings[0] for row in size.group.standings.rows}
        assert {row["method"]: cell["text"] for row, cell in zip(view["rows"], cells, strict=True) if cell} == {
            method: standing.text for method, standing in table.items()
        }
    assert {row["statement"] for row in view["claims"]} == {claim.statement for claim in large.results.claims}
    assert sizes_view(large, []) is None


def test_two_seeds_give_no_significance(tmp_path):
    large, small = (read_size(study(tmp_path / name, LARGE, width, 2)) for name, width in (("a", 128), ("b", 64)))
    (sentence,) = sizes_view(large, [small])["sentences"]
    assert sentence.endswith("is 1.00; 2 common seeds are too few to say which differences in order are not chance.")


def test_page_and_card_show_both(two, tmp_path):
    large, small = two
    path = write_report(sorted((large / "runs").iterdir()), tmp_path / "report", study=large, others=[small])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.faults == page.open == page.of("img") == []
    assert '<a href="#sizes">Sizes</a>' in text
    shown = " ".join("".join(texts) for tag, texts in page.texts.items() if tag != "script")
    assert HOSTILE.splitlines()[0] in shown
    assert "4 blocks of width 64" in shown
    card = render_study_card(large, tmp_path / "card", others=[small]).read_text()
    assert "## At several sizes" in card
    assert "| GaLore | " in card.partition("## At several sizes")[2]
    assert "<script>" not in card
    assert "## At several sizes" not in render_study_card(large, tmp_path / "card").read_text()


def test_what_is_no_study_of_one_size_is_refused(two, tmp_path):
    large, small = two
    with pytest.raises(UserError, match="nothing: must be a study's folder, but there are no runs in"):
        write_report([large / "runs/m0-seed0"], tmp_path / "report", others=[tmp_path / "nothing"])
    fake_run(small / "runs" / "wide-seed0", "wide", 0, width=256)
    with pytest.raises(UserError, match="its runs have 2 sizes or evaluation sets; they must have one"):
        write_report([large / "runs/m0-seed0"], tmp_path / "report", study=large, others=[small])
    assert not (tmp_path / "report").exists()
