"""Pushes under fire: seeded fault plans against real processes."""

import pytest

from tests.hub.drill import main


def test_a_short_drill():
    figures = main(6)
    assert figures["breaches"] == []
    assert sum(figures["processes_until_whole"].values()) == 6
    assert figures["with_bucket"] == 3


@pytest.mark.drill
@pytest.mark.timeout(7200)
def test_the_whole_drill():
    figures = main(240, sweep=True)
    assert figures["breaches"] == []
    assert figures["plans"] >= 300
