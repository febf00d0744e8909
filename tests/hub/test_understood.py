"""What the Hub's client raises, as the caller needs it."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError

from hf_lowrank.errors import UserError
from hf_lowrank.hub.repository import UnreachedError, understood


def refused(status):
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"{status} error")
    error.response = SimpleNamespace(status_code=status)
    return error


def wrapped(cause):
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped])
@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        (refused(401), UserError, "rejected the token"),
        (refused(403), UserError, "no write access"),
        (ConnectionError("cut off"), UnreachedError, "cut off"),
    ],
)
def test_a_failed_upload_is_understood_by_its_cause(wrap, cause, kind, words):
    known = understood(wrap(cause), "user/repo")
    assert type(known) is kind
    assert words in str(known)


def test_a_fault_of_our_own_stays_what_it_is():
    fault = RuntimeError("a bug")
    assert understood(fault, "user/repo") is fault
