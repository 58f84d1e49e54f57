"""Every option of every task: wrong values are refused before any network runs, numbers of all kinds work.

What an option takes is read from the signatures, so a new task or option is tested too.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_latent_diffusion import tiny_model
from tiny_unclip import tiny_karlo, tiny_stable

from ldm.pipelines.unclip_options import SHARED
from ldm.samplers import SAMPLERS

IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
HALF = torch.cat([torch.zeros(32, 16), torch.ones(32, 16)], dim=1)

Model = functools.cache(lambda make: make())
NAN, INFINITE = math.nan, math.inf
WRONG: dict[str, list[Any]] = {
    "int": [NAN, INFINITE, 2.5, -1, True, "x", [1], 10**30, object()],
    "float": [NAN, INFINITE, -INFINITE, True, "x", [0.5], 1e300, 10**400, np.float64("nan"), object()],
    "bool": [2, 0.5, "x", [], NAN],
    "str": [3.5, b"x", ["a"], object()],
}


class Task(NamedTuple):
    """A task of a tiny model with valid arguments."""

    make: Callable[[], Any]
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"{self.make.__name__}.{self.name}" + ("-invert" if "invert" in self.options else "")

    def run(self, **options: Any) -> Any:
        pipe = Model(self.make)
        fast = {"steps": 2, "progress": False, **self.options, **options}
        return getattr(pipe, self.name)(*self.arguments, **fast)

    def kinds(self) -> dict[str, str]:
        """Return the annotations of the task's own options."""
        parameters = inspect.signature(getattr(type(Model(self.make)), self.name)).parameters.values()
        return {each.name: str(each.annotation) for each in parameters if each.kind is each.KEYWORD_ONLY}


TASKS = [
    Task(tiny_model, "text_to_image", ("red apple",)),
    Task(tiny_model, "image_to_image", ("red apple", IMAGE)),
    Task(tiny_model, "inpaint", ("red apple", IMAGE, HALF)),
    Task(tiny_model, "outpaint", ("red apple", IMAGE), {"left": 8}),
    Task(tiny_model, "variations", (IMAGE,)),
    Task(tiny_model, "interpolate", ("red apple", "cat"), {"n": 2}),
    Task(tiny_model, "edit", ("red apple", "blue apple")),
    Task(tiny_model, "reconstruct", (IMAGE,)),
    Task(tiny_model, "upscale", (IMAGE,)),
    Task(tiny_karlo, "text_to_image", ("red apple",), {"n": 1}),
    Task(tiny_karlo, "variations", (SMALL,), {"n": 1}),
    Task(tiny_karlo, "interpolate", ("red apple", "cat"), {"n": 2}),
    Task(tiny_karlo, "inpaint", ("red apple", SMALL, HALF[:16, 8:24]), {"n": 1}),
    Task(tiny_karlo, "rerank", ("red apple",), {"of": 2, "keep": 1}),
    Task(tiny_stable, "text_to_image", ("red apple",), {"n": 1}),
    Task(tiny_stable, "variations", (IMAGE,), {"n": 1, "invert": True}),
    Task(tiny_stable, "reconstruct", (IMAGE,)),
    Task(tiny_stable, "interpolate", (IMAGE, 1 - IMAGE), {"n": 2, "invert": True}),
    Task(tiny_stable, "text_difference", (IMAGE, "cat", "red apple"), {"n": 2}),
]
# options of every call, which the tasks pass on
CALL = {
    "n": "int",
    "steps": "int",
    "guidance": "float",
    "height": "int",
    "width": "int",
    "sampler": "str",
    "progress": "bool",
    "keep_steps": "bool",
}
OTHERS: dict[str, list[Any]] = {
    "seed": [-1, 2.7, NAN, True, "x", 2**63, [1.5] * 2, [-1], object()],
    "negative": [3, 3.5, b"x", [3], {"a": "b"}, ["a"] * 5, "a\ud800", "a" * 20_000],
    "latents": [3, [1.0], np.zeros(3), torch.zeros(3), torch.full((1, 4, 8, 8), NAN)],
    "on_step": [3, "x"],
    "grid": [
        3,
        "abc",
        [],
        [NAN],
        [INFINITE],
        [500.0, 600.0],
        [-1.0],
        [10**9],
        [[1.0]],
        {"t": [1.0]},
        object(),
    ],
}
PRIOR = {"prior_steps": "int", "prior_guidance": "float", "prior_sampler": "str", "candidates": "int"}
UPSAMPLER = {"upsampler_steps": "int", "upsampler_sampler": "str", "upsampler_height": "int"}


def cases() -> Iterator[Any]:
    for task in TASKS:
        own = {
            **CALL,
            **({} if task.make is tiny_model else {**PRIOR, **UPSAMPLER, **SHARED}),
            **task.kinds(),
        }
        if task.name == "edit":
            own |= {"cross": "float", "within": "float"}
        if task.make is tiny_stable:
            own = {name: kind for name, kind in own.items() if not name.startswith("upsampler")}
        for name, kind in own.items():
            kinds = kind.split(" | ")
            if kinds[0] in WRONG and name not in OTHERS:
                for value in WRONG["float" if "float" in kinds else kinds[0]]:
                    yield task, name, value
        for name, values in OTHERS.items():
            for value in values:
                yield task, name, value


def refused(task: Task, name: str, value: Any) -> bool:
    """Return whether the value is wrong for the task; some are one meaning of several."""
    return not (
        (name == "guidance" and value == -1)
        or (name == "keep_steps" and value in ([], 2) and task.make is not tiny_model)
        or (name == "n" and task.name == "rerank")
        or (name == "prompt" and value == ["a"])
    )


@pytest.fixture
def idle() -> Iterator[None]:
    """Make networks fail when they are run."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was run")

    patch = pytest.MonkeyPatch()
    for make in (tiny_model, tiny_karlo, tiny_stable):
        for module in Model(make).modules():
            patch.setattr(module, "forward", fail, raising=False)
    yield
    patch.undo()


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_wrong_values_are_refused_by_name_before_a_network_runs(task: Task, idle: None) -> None:
    accepted = []
    for case, name, value in cases():
        if case is not task or not refused(task, name, value):
            continue
        try:
            task.run(**{name: value})
            accepted.append((name, value, "made images"))
        except (ValueError, TypeError) as error:
            if name.split("_")[-1] not in str(error) or len(str(error)) > 1000:
                accepted.append((name, value, f"{type(error).__name__}: {error}"))
        except Exception as error:
            accepted.append((name, value, f"{type(error).__name__}: {error}"))
    assert not accepted, "\n".join(f"{name}={value!r}: {what}" for name, value, what in accepted)


def numbers(convert: Callable[[Any], Any], options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: convert(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        for name, value in options.items()
    }


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_numbers_of_numpy_and_torch_are_those_of_python(task: Task) -> None:
    usual = {"n": 2, "steps": 2, "guidance": 1.5, "seed": 3, **task.options}
    usual |= {"strength": 0.5} if "strength" in task.kinds() and task.name != "edit" else {}
    if task.name in ("reconstruct", "rerank"):
        del usual["n"]
    expected = task.run(**usual)
    for convert in (np.asarray, torch.tensor):
        made = task.run(**numbers(convert, usual))
        assert torch.equal(made.tensor, expected.tensor)
        assert json.dumps(made.recipe) == json.dumps(expected.recipe)


@pytest.mark.parametrize("convert", [np.bool_, np.asarray, torch.tensor])
def test_flags_of_numpy_and_torch_are_those_of_python(convert: Callable[[bool], Any]) -> None:
    made = TASKS[0].run(keep_steps=convert(True), progress=convert(False))
    assert made.steps is not None and TASKS[0].run(keep_steps=convert(False)).steps is None
    with pytest.raises(ValueError, match="keep_steps: expected True or False"):
        TASKS[0].run(keep_steps=np.int64(2))


def sampler_cases() -> Iterator[tuple[str, str, Any]]:
    for sampler, function in SAMPLERS.items():
        for name, each in inspect.signature(function).parameters.items():
            if str(each.annotation) in WRONG:
                for value in WRONG[str(each.annotation)]:
                    if each.default != INFINITE or value not in (INFINITE, 1e300):
                        yield sampler, name, value
            elif str(each.annotation).startswith("Literal"):
                for value in ("x", 3, None, ["midpoint"]):
                    yield sampler, name, value
    for value in (
        5,
        "ab",
        [()],
        [("a", 2, 1, 1)],
        [(0.1, 2, 1.5, 2)],
        [(0.1, NAN, 1, 2)],
        [(0.1, 2, 10**9, 1)],
    ):
        yield "restart", "restarts", value


def test_wrong_options_of_samplers_are_refused_by_name_before_a_network_runs(idle: None) -> None:
    task, accepted = TASKS[0], []
    pipe = Model(tiny_model)
    for sampler, name, value in sampler_cases():
        try:
            pipe.settle("cat", sampler=sampler, **{name: value})
            call = pipe.settle("cat", sampler=sampler, **{name: value})
            call.solve(lambda x, t: pytest.fail("run"), IMAGE[:, :1], call.grid, noise=None, **call.options)
        except (ValueError, TypeError) as error:
            if name not in str(error) and "needs" not in str(error):
                accepted.append((sampler, name, value, str(error)))
        except BaseException as error:
            accepted.append((sampler, name, value, repr(error)))
    assert task and not accepted, "\n".join(map(str, accepted))
