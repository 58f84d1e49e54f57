"""Jobs: requests in the queue of the worker, or in its work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from ldm.images.result import Images
from ldm.serving.orders import Drawn, ImageOrder

OnJobStep = Callable[[int, int, Callable[[], Images] | None], None]  # (steps done, steps, preview)


class Stopped(Exception):
    """The work on a request was ended because nobody waits for it."""


class Job:
    """A request in the queue or in work.

    Args:
        order: What is asked for.
        on_step: Called in the worker's thread after every step as (steps done, steps, preview), where
            `preview()` decodes the present estimate of the images; it is None where there is none. Default:
            None.
        kind: Format of the files: "png", "jpeg" or "webp". Default: "png".
        quality: Quality of jpeg and webp, 0 to 100. Default: None, 95.

    Attributes:
        future: The images with their files, or the error.
        answered: Whether the worker is done with it; its future is then set as soon as the files are made.
        progress: Steps done, and steps, of the stage that runs.
        estimate: Decodes the estimate of the images after the last step; None between steps.
        latest: Decodes the last estimate that there was; None before the first.
        began: When the work on it began, in seconds of `time.perf_counter`; None while it waits.
        warnings: What the library warned of.
        interrupted: Whether a client has asked for the end of the work, and waits for what there is.
        deliver: Takes events of the job to whoever waits for it, from any thread.
    """

    def __init__(
        self,
        order: ImageOrder,
        on_step: OnJobStep | None = None,
        *,
        kind: str = "png",
        quality: int | None = None,
    ) -> None:
        self.order, self.on_step, self.kind, self.quality = order, on_step, kind, quality
        self.deliver: Callable[[Any], None] = lambda event: None
        self.future: Future[Drawn] = Future()
        self.progress = (0, 0)
        self.estimate: Callable[[], Images] | None = None
        self.latest: Callable[[], Images] | None = None
        self.began: float | None = None
        self.warnings: list[str] = []
        self.interrupted = self.answered = False
        self._gone = threading.Event()

    @property
    def gone(self) -> bool:
        """Whether nobody waits for the images any more."""
        return self._gone.is_set()

    def cancel(self) -> None:
        """End the work within one step."""
        self._gone.set()

    def finish(self, result: Drawn | Exception) -> None:
        """Set the result, unless there is one already."""
        try:
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)
        except InvalidStateError:  # it was cancelled
            pass
