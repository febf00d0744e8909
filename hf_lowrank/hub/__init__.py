"""Publishing: checkpoints as revisions of a Hub repository, and cards that carry the measurements."""

from hf_lowrank.hub.callback import PushRevisionsCallback
from hf_lowrank.hub.cards import metric_card, model_card, render_cards
from hf_lowrank.hub.push import PushedRevision, push

__all__ = ["PushRevisionsCallback", "PushedRevision", "metric_card", "model_card", "push", "render_cards"]
