"""The rule engine: patterns, changes of tensors and their inverses, and error messages."""

from __future__ import annotations

import pytest
import torch

from ldm.weights.keymap import (
    IDENTITY,
    Change,
    Rule,
    Section,
    Table,
    below,
    file_shapes,
    fit_table,
    from_file,
    rename,
    to_file,
)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def test_patterns_and_the_longest_prefix() -> None:
    table = Table(
        (
            Section("", "", (Rule(("a.{i}.x_{leaf}",), ("b.{leaf}.{i}",)), *rename(("deep", "low")))),
            Section("deep.down", "up", IDENTITY),
        )
    )
    names = ["a.3.x_w", "deep.k.l", "deep.down.m.n"]
    assert [step.file for step in table.plan(names)] == [("b.w.3",), ("low.k.l",), ("up.m.n",)]
    with pytest.raises(ValueError, match=r"no rule for 'a.3.4.x_w'"):
        table.plan(["a.3.4.x_w"])


def test_two_names_for_one_key_is_a_wrong_table() -> None:
    with pytest.raises(ValueError, match="both mapped to 'z.w'"):
        Table((Section("", "", rename(("x", "z"), ("y", "z"))),)).plan(["x.w", "y.w"])


def test_interleaved_rows_by_hand() -> None:
    """Two heads of one channel: rows are q0 k0 v0 q1 k1 v1."""
    rule = Rule(("q", "k", "v"), ("qkv",), Change(heads=2))
    state = {"qkv": torch.tensor([[1.0], [2], [3], [4], [5], [6]])}
    native = from_file(
        Table((Section("", "", (rule,)),)), state, {"q": (2, 1), "k": (2, 1), "v": (2, 1)}, source="x"
    )
    assert [native[x].flatten().tolist() for x in "qkv"] == [[1, 4], [2, 5], [3, 6]]
    plain = Rule(("q", "k", "v"), ("qkv",))
    native = from_file(
        Table((Section("", "", (plain,)),)), state, {"q": (2, 1), "k": (2, 1), "v": (2, 1)}, source="x"
    )
    assert [native[x].flatten().tolist() for x in "qkv"] == [[1, 2], [3, 4], [5, 6]]


CHANGES = [
    Change(),
    Change(heads=4),
    Change(head_dim=3),
    Change(ones=2),
    Change(ones=1, heads=2),
    Change(transpose=True),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("many", ["native", "file", "neither"])
def test_changes_are_undone_exactly(change: Change, many: str) -> None:
    one, three = ("w.{leaf}",), ("q.{leaf}", "k.{leaf}", "v.{leaf}")
    native, file = {"native": (three, one), "file": (one, three), "neither": (one, one)}[many]
    table = Table((Section("", "", (Rule(native, file, change),)),))
    names = [pattern.replace("{leaf}", leaf) for pattern in native for leaf in ("weight", "bias")]
    rows = 12 if many != "file" else 36
    state = {name: torch.randn(rows, 5) if name.endswith("weight") else torch.randn(rows) for name in names}
    there = to_file(table, state)
    assert shapes(there) == file_shapes(table, shapes(state))
    back = from_file(table, there, shapes(state), source="x")
    assert all(torch.equal(back[name], state[name]) for name in names)
    assert len(there) == 2 * len(file)


def test_one_error_lists_missing_unexpected_and_misshapen_in_the_files_names() -> None:
    table = Table((Section("", "", rename(("a", "A"), ("b", "B"), ("c", "C"))),), ignore=("junk.*",))
    have = {
        "A.w": torch.zeros(2, 3),
        "B.w": torch.zeros(4),
        "stray": torch.zeros(1),
        "junk.x": torch.zeros(1),
    }
    with pytest.raises(ValueError, match="model.ckpt") as error:
        from_file(table, have, {"a.w": (2, 3), "b.w": (5,), "c.w": (1,)}, source="model.ckpt")
    for words in ("1 missing (C.w)", "1 unexpected (stray)", "1 misshapen (B.w: (4,), expected (5,))"):
        assert words in str(error.value)
    assert "junk" not in str(error.value)


def test_a_transposed_shape_is_misshapen() -> None:
    table = Table((Section("", "", (Rule(("p",), ("P",), Change(transpose=True)),)),))
    assert fit_table(table, {"P": (3, 2)}, {"p": (2, 3)})
    assert fit_table(table, {"P": (2, 3)}, {"p": (2, 3)}).misshapen == ("P: (2, 3), expected (3, 2)",)


def test_reading_makes_views() -> None:
    state = {"qkv.weight": torch.randn(12, 4, 1)}
    table = Table((Section("", "", (Rule(("q.{l}", "k.{l}", "v.{l}"), ("qkv.{l}",), Change(ones=1)),)),))
    native = from_file(table, state, {f"{x}.weight": (4, 4) for x in "qkv"}, source="x")
    assert native["k.weight"].untyped_storage().data_ptr() == state["qkv.weight"].untyped_storage().data_ptr()


def test_other_spellings_are_read_whole_or_not_at_all() -> None:
    table = Table((Section("", "", (Rule(("a", "b"), ("A", "B"), also=(("x", "y"),)),)),))
    wanted = {"a": (1,), "b": (1,)}
    assert fit_table(table, {"x": (1,), "y": (1,)}, wanted)
    half = fit_table(table, {"A": (1,), "y": (1,)}, wanted)
    assert half.missing == ("B",)
    assert half.extra == ("y",)


def test_below() -> None:
    assert below("vae.", {"vae.a": 1, "unet.b": 2, "vae": 3}) == {"a": 1}
    assert below("", {"a": 1}) == {"a": 1}
