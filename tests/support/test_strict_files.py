"""YAML and JSON are read strictly, in bounded time and memory, and errors name the file and the place."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest

from ldm.support.config import read_yaml
from ldm.support.strict_json import parse_json, read_json
from ldm.support.strict_yaml import MAX_YAML_BYTES, MAX_YAML_VALUES, format_yaml, parse_yaml_text

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    LAUGHS: r"anchors and aliases are not read \(line 1, column 4\)",
    "a: *b": "anchors and aliases",
    "base: {a: 1}\n<<: {a: 2}": "merge keys",
    "a: !!python/name:os.system": "tags are not read",
    "a: !!python/object/apply:os.system [ls]": "tags are not read",
    "a: !!str 5": "tags are not read",
    "a: !x 5": "tags are not read",
    "a: 1\na: 2": r"key 'a' is given twice \(line 2, column 1\)",
    "a: {b: 1, b: 2}": "key 'b' is given twice",
    "1: a\n0x1: b": "key 1 is given twice",
    "[1]: 2": r"expected a text as the key, got \[1\]",
    "{}: 2": "expected a text as the key",
    ".nan: 1": "expected a text as the key, got nan",
    f"a: {'9' * 5000}": "expected a number of at most 40 characters",
    f"a: 0x{'f' * 5000}": "expected a number of at most 40 characters",
    f"a: {':'.join(['1'] * 5000)}": "expected a number of at most 40 characters",
    "a: 0x_": "'0x_' is no number",
    f"%YAML {'9' * 5000}.1\n---\na: 1": "not valid YAML",
    "[" * 5000: "expected at most 32 levels",
    "- " * 5000: "expected at most 32 levels",
    "{a: " * 5000: "expected at most 32 levels",
    f"[{'a,' * MAX_YAML_VALUES}]": "expected at most 10,000 keys and values",
    "a: [": "not valid YAML",
    "a: \0": "not valid YAML",
    "a: 1\n---\nb: 2": "another document",
    '"\\e[31m": 1\n"\\e[31m": 2': r"key '\\x1b\[31m' is given twice",
    "- 1": "expected a mapping at the top, got list",
    "": "expected a mapping at the top, got NoneType",
    "a: " + "x" * MAX_YAML_BYTES: "expected at most 131,072 bytes",
}


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:20])
def test_yaml_that_is_refused(tmp_path, text):
    path = tmp_path / "card.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=YAML[text]) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert "card.yaml" in message and len(message) < 700 and message.isprintable()


def test_yaml_that_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes("\ufeffa: 1e-4\nb: [yes, ~, 0x10, 2.5, 'é']\n2: 2001-99-99\n=: x\n".encode())
    assert read_yaml(path) == {"a": 1e-4, "b": [True, None, 16, 2.5, "é"], 2: "2001-99-99", "=": "x"}
    path.write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.yaml' is not UTF-8, at byte 3"):
        read_yaml(path)


def test_the_time_for_a_large_yaml_file_is_bounded():
    """A search for keys that are given twice, in a list, took two minutes for one megabyte."""
    for text in (
        "".join(f"k{i}: 1\n" for i in range(MAX_YAML_VALUES // 2 - 1)),
        "".join(f"? k{i}\n" for i in range(MAX_YAML_VALUES // 2 - 1)),
        "#\n" * (MAX_YAML_BYTES // 2),
        'a: "' + "\\x41" * (MAX_YAML_BYTES // 5) + '"',
    ):
        begin = time.thread_time()
        parse_yaml_text(text, "a")
        assert time.thread_time() - begin < 5


def test_what_is_written_as_yaml_can_be_read():
    shared = ["x"] * 3
    facts = {"a": shared, "b": shared, "c": {"d": 1e-5, "e": "1e-5", "f": "2001-01-01", "g": None, "<<": 1}}
    assert parse_yaml_text(format_yaml(facts, "facts").decode(), "facts") == facts
    for wrong in (
        {"a": object()},
        {(1, 2): 3},
        {1.5: 2},
        {"a": list(range(20_000))},
        {"a": "x" * 200_000},
        {"a": b"x"},
    ):
        with pytest.raises(ValueError, match=r"^facts"):
            format_yaml(wrong, "facts")


JSON = {
    '{"a": 1, "a": 2}': "key 'a' is given twice",
    '{"a": {"b": 1, "b": 1}}': "key 'b' is given twice",
    '{"a": NaN}': "expected a finite number, got NaN",
    '{"a": -Infinity}': "expected a finite number, got -Infinity",
    '{"a": 1e999}': "expected a finite number, got '1e999'",
    '{"a": ' + "9" * 5000 + "}": "expected a number of at most 40 characters, got 5000",
    '{"a": 0.' + "9" * 5000 + "}": "expected a finite number",
    '{"a":' * 100_000: "not valid JSON",
    '{"a":' * 40 + "1" + "}" * 40: "expected at most 32 levels",
    "[" * 100_000: "not valid JSON",
    "[" * 2_000_000: "expected at most 1,000,000 lists and mappings",
    "[]": "expected a mapping, got list",
    "": "not valid JSON",
    '{"a": 1} {}': "not valid JSON",
    '{"a": "\\ud800"': "not valid JSON",
}


@pytest.mark.parametrize("text", JSON, ids=lambda text: text[:20])
def test_json_that_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=JSON[text]) as caught:
        read_json(path)
    message = str(caught.value)
    assert "config.json" in message and len(message) < 700 and message.isprintable()


def test_json_that_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff{"a": [1, 2.5, null, true, "é"]}'.encode())
    assert read_json(path) == {"a": [1, 2.5, None, True, "é"]}
    path.write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.json' is not UTF-8, at byte 7"):
        read_json(path)
    with pytest.raises(ValueError, match=r"a\.json': expected at most 5 bytes, got 10"):
        read_json(path, 5)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_json(tmp_path / "none.json")
    assert parse_json(json.dumps({"a": float("inf")}), "a", infinite=True) == {"a": float("inf")}
    with pytest.raises(ValueError, match="finite"):
        parse_json('{"a": NaN}', "a", infinite=True)


def test_the_memory_for_json_is_bounded():
    text = '{"a":[' + "[]," * 900_000 + "[]]}"
    tracemalloc.start()
    parse_json(text, "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(text) + 200e6
