"""What is wrong with plain data is the format's own error, whatever the parser raises."""

import json

import pytest
import yaml

from hf_lowrank.storage.parsing import parse_json, parse_plain_yaml

NO_JSON = ["{", "[" * 100_000, "1" * 5000, '{"a": [-' + "9" * 5000 + "]}", "\x00", ""]


@pytest.mark.parametrize("text", [*NO_JSON, '"\\ud800"', '{"a\\uDFFF": 1}', b'["\\udead"]', '"\ud800"'])
def test_json(text):
    with pytest.raises(json.JSONDecodeError):
        parse_json(text)


def test_json_that_is_no_text():
    with pytest.raises(UnicodeDecodeError):
        parse_json(b"\xff")


@pytest.mark.parametrize("text", ["[" * 3000, "1" * 5000, "2001-99-99", "0x_", "!!timestamp x", "&a [*a]: b", "a: *b"])
def test_yaml(text):
    with pytest.raises(yaml.YAMLError):
        parse_plain_yaml(text)


def test_what_is_right_is_read():
    assert parse_json('{"a": [1, 2.5, null]}') == parse_plain_yaml("a: [1, 2.5, null]") == {"a": [1, 2.5, None]}
    assert parse_json('"\\ud83d\\ude00"') == parse_json(b'"\\uD83D\\uDE00"') == "\U0001f600"
    assert parse_json("1" * 4000) == int("1" * 4000)
