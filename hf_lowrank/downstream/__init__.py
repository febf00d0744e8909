"""Downstream: lm-eval's tasks on every checkpoint of a run, and what predicts the scores."""
