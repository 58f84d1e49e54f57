"""What belongs to one call of a pipeline: it is kept with the call, and not on the modules that calls share.

Threads, and calls inside calls, may therefore use one pipeline.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

_T = TypeVar("_T")
_S = TypeVar("_S")
_N = TypeVar("_N", bound=nn.Module)
_P = ParamSpec("_P")


class CallState:
    """State of one call.

    Attributes:
        checked: What was compared with its sources, contents included, in this call (`ldm.support.derived`).
        kept: What layers and networks keep until the call ends.
    """

    def __init__(self) -> None:
        self.checked: set[object] = set()
        self.kept: WeakKeyDictionary[object, Any] = WeakKeyDictionary()  # values of any class


_CALL: ContextVar[CallState | None] = ContextVar("call", default=None)
_CHECK: ContextVar[Callable[[int, int], None] | None] = ContextVar("check", default=None)
_THREAD = threading.local()


class Turns:
    """Lock that calls of a pipeline hold if its networks take turns in memory; a copy has none.

    A thread may take it again, for a call inside a call.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()


@contextmanager
def separate_call(pipe: nn.Module) -> Iterator[None]:
    """Give a call its own state, inside a `with` block.

    Inside the block the contents of the weights are compared once with those that packed weights were made
    of, and later changes are recognised by the version counters of the parameters alone
    (`ldm.support.derived`). All tasks of a pipeline are such calls; a sampling loop of one's own may be one.

    Args:
        pipe: The pipeline or network. If its networks take turns in memory (`ldm.optimize` with memory=True),
            calls of other threads wait until the block ends.
    """
    turns = pipe.__dict__.get("turns")
    with turns.lock if isinstance(turns, Turns) else nullcontext():
        token = _CALL.set(CallState())
        try:
            yield
        finally:
            _CALL.reset(token)


def in_separate_call(method: Callable[Concatenate[_N, _P], _T]) -> Callable[Concatenate[_N, _P], _T]:
    """Make each call of a pipeline's method a `separate_call`."""

    @functools.wraps(method)
    def run(pipe: _N, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with separate_call(pipe):
            return method(pipe, *args, **kwargs)

    return run


def current_call() -> CallState | None:
    """Return the state of the call that runs in this thread; None outside `separate_call`."""
    return _CALL.get()


@contextmanager
def interruptible(check: Callable[[int, int], None]) -> Iterator[None]:
    """Let `check` follow, and end, the calls of pipelines that this thread makes inside a `with` block.

    Args:
        check: Called after every step of every stage as (number of steps done, number of steps of the stage).
            What it raises ends the call. The check of an outer block is called first.
    """
    outer = _CHECK.get()

    def both(done: int, total: int) -> None:
        if outer is not None:
            outer(done, total)
        check(done, total)

    token = _CHECK.set(both)
    try:
        yield
    finally:
        _CHECK.reset(token)


def checkpoint(done: int, total: int) -> None:
    """Call the checks of `interruptible`, where there are any; they may raise."""
    if (check := _CHECK.get()) is not None:
        check(done, total)


def own_state(owner: object, make: Callable[[], _S]) -> _S:
    """Return what a layer or network keeps for this call, or outside of calls for this thread.

    Args:
        owner: The layer or network. Its state ends with it.
        make: Makes the state where there is none; the state must not refer to the owner.
    """
    call = _CALL.get()
    if call is None:
        if not hasattr(_THREAD, "kept"):
            _THREAD.kept = WeakKeyDictionary()
        kept = _THREAD.kept
    else:
        kept = call.kept
    if owner not in kept:
        kept[owner] = make()
    state: _S = kept[owner]
    return state
