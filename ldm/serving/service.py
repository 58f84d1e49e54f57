"""What the endpoints share: the models, the worker, and waiting for it while the client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ldm.serving.counters import Counters
from ldm.serving.fleet import Fleet
from ldm.serving.jobs import Job, Stopped
from ldm.serving.orders import Drawn
from ldm.serving.store import ImageStore
from ldm.serving.worker import Worker

CLIENT_GONE = 499  # the status that nginx gives to a request whose client has closed the connection


class ClientGone(Exception):
    """The client has closed the connection."""

    def response(self) -> Response:
        """Return a response, which nobody reads."""
        return Response(status_code=CLIENT_GONE)


@dataclass(kw_only=True, eq=False)
class Service:
    """A server's parts.

    Attributes:
        fleet: The models.
        worker: Draws images.
        counters: What is counted.
        store: Images that are given as urls.
        strict_sizes: Whether sizes that a model does not make are refused.
        jobs: The jobs of A1111's door, which `/interrupt` ends.
    """

    fleet: Fleet
    worker: Worker
    counters: Counters
    store: ImageStore = field(default_factory=ImageStore)
    strict_sizes: bool = False
    jobs: list[Job] = field(default_factory=list)

    async def draw(self, request: Request, job: Job) -> Drawn:
        """Return the images of a job.

        Raises:
            ApiError: What the request is answered with.
            ClientGone: If the client goes first; the work is then ended.
        """
        async with aclosing(self.follow(request, job)) as events:
            async for event in events:
                if isinstance(event, Drawn):
                    return event
        raise ClientGone

    async def follow(self, request: Request, job: Job) -> AsyncGenerator[Any, None]:
        """Submit a job; yield what it puts into its queue of events, and last its images.

        Raises:
            ApiError: What the request is answered with.
            ClientGone: If the client goes first; the work is then ended.
        """
        events: asyncio.Queue[Any] = asyncio.Queue()
        job.deliver = events_to(events)
        self.worker.submit(job)
        job.future.add_done_callback(job.deliver)  # without a reference to the job, which would be a cycle
        gone = asyncio.create_task(until_gone(request))
        try:
            while True:
                event = asyncio.create_task(events.get())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    raise ClientGone
                found = event.result()
                if found is not job.future:
                    yield found
                    continue
                try:
                    yield job.future.result()
                except Stopped:
                    raise ClientGone from None
                return
        finally:
            job.cancel()
            gone.cancel()


def events_to(events: asyncio.Queue[Any]) -> Callable[[Any], None]:
    """Return a function that puts events into a queue of the running event loop from any thread."""
    loop = asyncio.get_running_loop()

    def deliver(event: Any) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the loop is closed
            pass

    return deliver


async def until_gone(request: Request) -> None:
    """Wait until the client closes the connection; the request's body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def random_seed() -> int:
    """Return a random seed below 2**32."""
    import secrets

    return secrets.randbelow(2**32)
