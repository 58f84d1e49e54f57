"""Drawings that tasks ask for, kept back so that several are carried out in one batch."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ldm.images.result import Images

_DEFERRING: ContextVar[bool] = ContextVar("deferring", default=False)


class Deferred(Exception):
    """A drawing that a task has asked for inside `deferred`.

    Args:
        call: The settled options, a `Call`, whose module depends on this one.
        request: What the task asks for besides, a `Request`.
    """

    def __init__(self, call: Any, request: Any) -> None:
        super().__init__(request.task)
        self.call, self.request = call, request
        self._changes: list[Callable[[Images], Images]] = []

    def then(self, change: Callable[[Images], Images]) -> None:
        """Add what is done with the images after the drawing."""
        self._changes.append(change)

    def finished(self, images: Images) -> Images:
        """Return the images as the task returns them."""
        for change in self._changes:
            images = change(images)
        return images


def deferred(task: Callable[[], Any]) -> Any:
    """Run a task of a pipeline up to its drawing.

    The drawing must be the last thing that the task does. What its callers do with the images is kept only if
    they add it by `Deferred.then`, as `replayable` does.

    Args:
        task: Calls the task.

    Returns:
        The drawing, a `Deferred`; or the task's `Images`, if its pipeline draws at once (`ldm.DalleMini`).
    """
    token = _DEFERRING.set(True)
    try:
        return task()
    except Deferred as drawing:
        return drawing.with_traceback(None)
    finally:
        _DEFERRING.reset(token)


def defer(call: Any, request: Any) -> None:
    """Raise `Deferred` inside `deferred`; a pipeline calls this before it draws."""
    if _DEFERRING.get():
        raise Deferred(call, request)
