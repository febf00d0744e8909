"""The tiny run directories of the measuring tests."""

from tests.measuring.conftest import _runs, make_run, two_runs  # noqa: F401
