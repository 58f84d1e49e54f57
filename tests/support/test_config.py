"""Configurations are checked strictly when they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from ldm.support.config import build, filled, nearest, read_yaml, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate: expected at least 0, got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    sizes: tuple[int, ...] = (1,)
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    heads: int | tuple[int, ...] | None = None


def test_a_mapping_becomes_a_dataclass_and_back():
    mapping = {"name": "x", "sizes": [1, 2], "kind": "b", "inner": {"rate": 1}, "heads": [3, 4]}
    made = build(Outer, mapping)
    assert made == Outer(name="x", sizes=(1, 2), kind="b", inner=Inner(rate=1.0), heads=(3, 4))
    assert build(Outer, to_dict(made)) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, "unknown key 'nam'; did you mean 'name'"),
        ({"name": 3}, "name: expected str, got 3"),
        ({"sizes": 3}, "sizes: expected a list"),
        ({"sizes": [1, "2"]}, r"sizes\[1\]: expected int, got '2'"),
        ({"sizes": [True]}, "expected int, got True"),
        ({"kind": "c"}, "kind: 'c'"),
        ({"inner": {"rate": "fast"}}, "inner.rate: expected float"),
        ({"inner": {"rate": -1}}, "inner: rate: expected at least 0"),
        ({"heads": "many"}, "heads: expected int, got 'many'"),
    ],
)
def test_errors_name_the_value_and_its_path(change, message):
    with pytest.raises(ValueError, match=message):
        build(Outer, {"name": "x", **change})


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="missing key 'name'"):
        build(Outer, {})


def test_yaml_is_read_strictly(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-4\nname: x\n", encoding="utf-8")
    assert read_yaml(path) == {"lr": 1e-4, "name": "x"}
    wrong = {
        "a: 1\na: 2\n": "given twice",
        "- 1\n": "expected a mapping",
        "a: [": "not valid YAML",
        "a: !!python/name:os.system": "YAML",
    }
    for text, message in wrong.items():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_yaml(path)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")


def test_the_nearest_choice_is_offered():
    assert nearest("dimm", ["ddim", "euler"]).startswith("did you mean 'ddim'? Choices: ddim, euler")
    assert nearest("zzz", ["ddim"]) == "Choices: ddim"


@dataclass(frozen=True, kw_only=True)
class Square:
    kind: Literal["square"] = "square"
    side: int = 1


@dataclass(frozen=True, kw_only=True)
class Disc:
    kind: Literal["disc", "ball"]
    radius: float


@dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Square | Disc


def test_the_kind_of_a_mapping_chooses_the_class():
    assert build(Drawing, {"shape": {"side": 2}}).shape == Square(side=2)
    assert build(Drawing, {"shape": {"kind": "ball", "radius": 2}}).shape == Disc(kind="ball", radius=2.0)
    for change, message in (
        ({"kind": "cube"}, "^shape.kind: 'cube'; .*Choices: ball, disc, square"),
        ({"kind": "disc", "side": 2}, "^shape: unknown key 'side'; "),
        ({"radius": 2}, "^shape: unknown key 'radius'; "),
    ):
        with pytest.raises(ValueError, match=message):
            build(Drawing, {"shape": change})


def test_a_record_is_filled_with_the_defaults_of_later_fields():
    assert filled(Drawing, {"shape": {"side": 3}}) == {"shape": {"kind": "square", "side": 3}}
    assert filled(Drawing, {"shape": {"edge": 3}}) == {"shape": {"edge": 3}}
