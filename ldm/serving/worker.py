"""The worker: a bounded queue, and a thread that draws what waits in it, several requests in one batch."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TextIO

from torch import Tensor

from ldm.diffusion.interfaces import Denoised
from ldm.images.result import Images
from ldm.pipelines.call import Call
from ldm.pipelines.conditions import Pair
from ldm.pipelines.tasks.deferred import Deferred, deferred
from ldm.pipelines.together import Unwanted
from ldm.serving.counters import Counters
from ldm.serving.encoding import encoded_images
from ldm.serving.errors import ApiError, refused_by_model, server_failed
from ldm.serving.fleet import Fleet, Seat
from ldm.serving.jobs import Job, Stopped
from ldm.serving.orders import FIELD_NAMES, Drawn, ImageOrder, draw_order, final_size_of
from ldm.support.calls import interruptible

OVERFLOW = "an image has NaN or infinite values"  # begins the library's error
_logger = logging.getLogger(__name__)


class Follower:
    """A watcher of the pipeline that shows each job its own rows of the states, and the library's warnings.

    Args:
        pipe: The pipeline.
        jobs: The jobs that are drawn.

    Attributes:
        rows: The jobs whose images are drawn at present.
        calls: The call of each job, as far as they are known.
    """

    def __init__(self, pipe: Any, jobs: Sequence[Job]) -> None:
        self.pipe, self.jobs, self.rows = pipe, jobs, list(jobs)
        self.calls: list[tuple[Job, Call]] = []
        self.thread = threading.get_ident()

    def begin(self, call: Call) -> None:
        """Note whose rows the states of a run are: one job's, or those of all jobs without an answer."""
        own = [job for job, each in self.calls if each is call]
        self.rows = own or [job for job, _ in self.calls if not job.answered]

    def conditioned(self, pair: Pair) -> None:
        """Nothing depends on the conditions."""

    def step(self, i: int, x: Tensor, d: Denoised) -> None:
        """Keep the estimate of each job's images, unless a safety checker is to look at the finished ones."""
        if self.pipe.safety is not None or sum(job.order.n for job in self.rows) != len(d.x0):
            return
        for job, x0 in zip(self.rows, d.x0.split([job.order.n for job in self.rows]), strict=True):
            job.estimate = job.latest = partial(decoded_estimate, self.pipe, job.order, x0)

    def end(self, images: Images) -> None:
        """Nothing depends on the images."""

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Keep a warning for the jobs that are drawn at present, in place of `warnings.showwarning`.

        The module `warnings` has one such function for all threads; others' warnings are logged.
        """
        if threading.get_ident() != self.thread:
            _logger.warning("%s", message)
            return
        for job in self.rows:
            job.warnings.append(str(message))

    def check(self, done: int, total: int) -> None:
        """Tell the jobs of a step; raise `Stopped` if none of them is wanted any more."""
        if all(job.gone for job in self.jobs):
            raise Stopped
        for job in self.rows:
            job.progress = (done, total)
            if job.on_step is not None and not job.gone:
                job.on_step(done, total, job.estimate)
            job.estimate = None


def decoded_estimate(pipe: Any, order: ImageOrder, x0: Tensor) -> Images:
    """Return the estimate of an order's images, of clean states (B, C, h, w)."""
    pixels = pipe.stage.images.decode(x0).nan_to_num(0.5)
    seeds = tuple(range(order.seed, order.seed + len(pixels)))
    return Images(tensor=pixels, seeds=seeds, prompts=(order.prompt,) * len(pixels))


class Worker:
    """One thread that draws the images of jobs, in the order in which they came.

    All that PyTorch computes in parallel is computed in this thread: each thread that does so has threads of
    its own, and OpenMP lets threads wait without sleeping only as long as there are no more of them than
    processors. With a second such thread an image of emoji-ldm takes twice as long.

    A second thread makes the files of a batch and then answers all of its requests, so that few threads wake
    while the next batch is drawn.

    Args:
        fleet: The models.
        counters: What is counted.
        waiting: Number of jobs that may wait. Default: 64.
        batch: Largest number of images in one batch of several jobs. Default: 8.
    """

    def __init__(self, fleet: Fleet, counters: Counters, *, waiting: int = 64, batch: int = 8) -> None:
        self.fleet, self.counters, self.waiting, self.batch = fleet, counters, waiting, batch
        self.queue: deque[Job] = deque()
        self.running: tuple[Job, ...] = ()
        self._changed = threading.Condition()
        self._closed = False
        self._began = 0.0  # when the work that is not yet counted began
        self._prepared: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="ldm-worker", daemon=True)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="ldm-encoder")

    def start(self, prepare: Callable[[], object] = lambda: None) -> None:
        """Start the thread unless it runs, and wait until it has called `prepare`, whose error is raised."""
        if self.alive:
            return
        self._prepare = prepare
        self._thread.start()
        self._prepared.result()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            ApiError: 429 if the queue is full, 503 if the server stops.
        """
        with self._changed:
            if self._closed:
                raise ApiError(503, "the server is stopping", kind="server_error", code="server_stopping")
            waiting = [each for each in self.queue if not each.gone]
            if len(waiting) >= self.waiting:
                self.counters.refused += 1
                seconds = self.counters.expected_seconds(sum(each.order.n for each in waiting))
                raise ApiError(
                    429,
                    f"the queue is full: {self.waiting} requests wait",
                    kind="rate_limit_error",
                    code="rate_limit_exceeded",
                    retry_after=seconds,
                )
            self.queue.append(job)
            self._changed.notify_all()

    def stop(self, *, now: bool = False) -> None:
        """Take no more jobs; end those that wait, and with `now` also those in work, within one step."""
        with self._changed:
            self._closed = True
            waiting, running = list(self.queue), self.running
            self.queue.clear()
            self._changed.notify_all()
        for job in waiting:
            job.finish(ApiError(503, "the server is stopping", kind="server_error", code="server_stopping"))
        if now:
            for job in running:
                job.cancel()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended, and all is answered; return whether it has."""
        self._thread.join(timeout)
        ended = not self.alive
        if ended:  # it makes no more batches
            self._encoder.shutdown()
        return ended

    def _take(self) -> tuple[Job, ...]:
        """Wait for a job and return it with others of its kind; empty when the worker is stopped."""
        with self._changed:
            while True:
                while self.queue and self.queue[0].gone:
                    self._drop(self.queue.popleft())
                if self.queue:
                    break
                if self._closed:
                    return ()
                self._changed.wait()
            first = self.queue.popleft()
            taken, images = [first], first.order.n
            key = first.order.key if self.fleet.joins(first.order.model) else None
            for job in list(self.queue) if key is not None else ():
                if job.order.key == key and not job.gone and images + job.order.n <= self.batch:
                    self.queue.remove(job)
                    taken.append(job)
                    images += job.order.n
            self.running = tuple(taken)
            return self.running

    def _drop(self, job: Job) -> None:
        self.counters.cancelled += 1
        job.finish(Stopped())

    def _run(self) -> None:
        try:
            self._prepare()
        except BaseException as error:
            self._prepared.set_exception(error)
            return
        self._prepared.set_result(None)
        while jobs := self._take():
            self._began = time.perf_counter()
            for job in jobs:
                job.began = self._began
            try:
                self._draw(jobs)
            except BaseException as error:  # the thread goes on whatever a request leads to
                failure = self._failure(error)
                self._answer({job: failure for job in jobs if not job.answered})
            self.running = ()

    def _answer(self, results: Mapping[Job, Drawn | Exception]) -> None:
        """Count the results of a batch, and have its jobs answered."""
        now = time.perf_counter()
        images = sum(len(result.images) for result in results.values() if isinstance(result, Drawn))
        if images:
            self.counters.batch(images)
            self.counters.drew(images, now - self._began)
        self._began = now
        self.counters.cancelled += sum(isinstance(result, Stopped) for result in results.values())
        for job in results:
            job.answered = True
        self._encoder.submit(self._finish, results)

    def _finish(self, results: Mapping[Job, Drawn | Exception]) -> None:
        """Make the files of a batch, in the encoder's thread, and answer its jobs."""
        answers = {job: self._with_files(job, result) for job, result in results.items()}
        for job, answer in answers.items():
            job.finish(answer)

    def _with_files(self, job: Job, result: Drawn | Exception) -> Drawn | Exception:
        if isinstance(result, Exception) or job.gone:
            return result
        try:
            return replace(result, files=encoded_images(result, job.kind, job.quality))
        except Exception as error:
            return self._failure(error)

    def _failure(self, error: BaseException) -> Exception:
        """Return the error that a request is answered with."""
        if isinstance(error, Unwanted):
            return Stopped()
        if isinstance(error, ApiError | Stopped):
            return error
        if isinstance(error, ValueError) and not str(error).startswith(OVERFLOW):
            return refused_by_model(error, FIELD_NAMES)
        _logger.error("a request failed", exc_info=error)
        self.counters.failed += 1
        return server_failed()

    def _seat(self, name: str) -> Seat:
        try:
            return self.fleet.seat(name)
        except Exception as error:
            _logger.error("%s cannot be loaded", name, exc_info=error)
            self.counters.failed += 1
            raise server_failed(
                f"the model {name!r} cannot be loaded; the server's log has the reason"
            ) from error

    def _draw(self, jobs: Sequence[Job]) -> None:
        """Draw the images of jobs and answer them."""
        seat = self._seat(jobs[0].order.model)
        follower = Follower(seat.pipe, jobs)
        with (
            warnings.catch_warnings(),
            seat.pipe.watched_by(follower),
            interruptible(follower.check),
        ):
            warnings.simplefilter("always")
            warnings.showwarning = follower.warn
            drawings = self._begun(seat, jobs, follower)
            if not drawings:
                return
            ready = list(drawings)
            assert seat.together is not None
            seat.together.draw(
                list(drawings.values()),
                lambda i: not ready[i].gone,
                lambda made: self._answer({ready[i]: self._result(seat, ready[i], made[i]) for i in made}),
            )

    def _begun(self, seat: Seat, jobs: Sequence[Job], follower: Follower) -> dict[Job, Deferred]:
        """Run the task of each job up to its drawing; answer the jobs that end before it.

        These are jobs that fail, and those of pipelines that draw at once.
        """
        drawings = dict[Job, Deferred]()
        for job in jobs:
            follower.rows = [job]
            try:
                if job.gone:
                    raise Stopped
                made = deferred(partial(draw_order, seat.pipe, job.order))
            except Exception as error:
                made = error
            if isinstance(made, Deferred):
                drawings[job] = made
                follower.calls.append((job, made.call))
            else:
                self._answer({job: self._result(seat, job, made)})
        return drawings

    def _result(self, seat: Seat, job: Job, made: Images | Exception) -> Drawn | Exception:
        """Return what a job is answered with."""
        if isinstance(made, Exception):
            return self._failure(made)
        order = job.order
        return Drawn(
            images=made,
            size=final_size_of(seat.pipe, order, made),
            source=order.source if order.endpoint == "edits" else None,
            warnings=tuple(dict.fromkeys(job.warnings)),
        )
