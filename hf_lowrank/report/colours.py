"""How each method is drawn: its title with the look of its entry in METHODS, and the colours of the backgrounds.

The line style shows the family (solid: the dense weights are trained; dashed: the layers are replaced; dash-dotted:
restarts); marker and colour show the method, so that methods are distinguishable without colour vision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_lowrank.claims.study import in_order, registered
from hf_lowrank.methods import SPARE_LOOKS, Look

LIGHT_GROUND = "#fdfcf9"
DARK_GROUND = "#15171a"


@dataclass(frozen=True)
class TitledLook(Look):
    """A method's look with its title in tables and pictures."""

    title: str


def looks(methods: Iterable[str]) -> dict[str, TitledLook]:
    """The look of each of `methods`, in the order of legends and tables.

    Names that are not registered, such as the members of a study, take the spare looks in alphabetical order.
    """
    chosen, unknown = {}, 0
    for name in in_order(methods):
        entry = registered(name)
        look = entry.look if entry else SPARE_LOOKS[unknown % len(SPARE_LOOKS)]
        unknown += entry is None
        chosen[name] = TitledLook(**vars(look), title=entry.title if entry else name)
    return chosen
