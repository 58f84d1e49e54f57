"""Start the server: models, worker, application, and uvicorn."""

from __future__ import annotations

import functools
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.tasks.deferred import deferred
from ldm.registry.loading import load
from ldm.registry.locating import resolve_card
from ldm.serving.application import MOST_BODY, application
from ldm.serving.counters import Counters
from ldm.serving.fleet import Fleet, Seat, ServedModel
from ldm.serving.service import Service
from ldm.serving.worker import Worker
from ldm.speed.optimization import optimize

SWITCH = 0.0005  # seconds until the worker takes the interpreter back from the thread of the connections
WARM_UP = "a red apple"  # names a thing, which models with exemplars are shown
QUICK = 4.0  # seconds; see `warm_up`
MOST_HEAD = 64 * 1024  # bytes of a request's first line and headers that are waited for
GRACE = 600  # seconds that requests in work have after Ctrl-C; a second one ends them within one step


class BoundedProtocol(HttpToolsProtocol):
    """The protocol of a connection; a request whose headers do not end is answered with 400."""

    in_head, head = False, 0

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        self.in_head, self.head = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note that its headers have ended."""
        self.in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Read what the client has sent."""
        super().data_received(data)
        if self.in_head:
            self.head += len(data)
            if self.head > MOST_HEAD:
                self.in_head = False
                self.send_400_response(f"The headers have more than {MOST_HEAD} bytes.")


class StoppableServer(uvicorn.Server):
    """uvicorn, whose first Ctrl-C ends the requests that wait, and the second those in work.

    Args:
        config: uvicorn's configuration.
        worker: The worker.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; uvicorn calls this for SIGINT and SIGTERM."""
        # in a thread of its own: the lock may be held by the code that the signal has interrupted
        import threading

        again = self.should_exit or sig == signal.SIGTERM
        threading.Thread(target=self.worker.stop, kwargs={"now": again}, daemon=True).start()
        self.should_exit = True


def served_models(
    names: Sequence[str], weights: Sequence[str], options: Any, *, fast: bool = False
) -> list[ServedModel]:
    """Return the models that a server offers; their cards are read, their weights are not.

    Args:
        names: Names of models. Empty: that of the weights, else emoji-ldm.
        weights: Files or folders of weights, one for each name or none.
        options: Further options of `ldm.load`.
        fast: Whether to call `ldm.optimize`. Default: False.

    Raises:
        ValueError: If a name is unknown, or there is another number of weights than of names.
        FileNotFoundError: If there are no such weights.
    """
    if weights and names and len(names) != len(weights):
        raise ValueError(
            f"--weights: got {len(weights)} for {len(names)} models; expected one for each, or none"
        )
    count = max(len(names), len(weights), 1)
    made = []
    for i in range(count):
        name = names[i] if names else None
        path = weights[i] if weights else None
        card, _ = resolve_card(name, path)
        card.usual()
        if path is not None and path != "random" and not Path(path).exists():
            raise FileNotFoundError(f"--weights: no such file: {path!r}")
        loader = functools.partial(loaded_pipe, name, path, options, fast=fast)
        made.append(ServedModel(name=card.name, card=card, load=loader))
    return made


def loaded_pipe(name: str | None, weights: str | None, options: Any, *, fast: bool) -> Any:
    """Return a pipeline that is ready to sample; see `served_models`.

    Raises:
        ValueError: If the model is a single network.
    """
    pipe = load(name, weights=weights, **options)
    if not hasattr(pipe, "text_to_image"):
        raise ValueError(f"{name or weights!r} is a single network, which generates no images")
    return optimize(pipe) if fast else pipe


def serve(
    models: Sequence[ServedModel],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    origins: Sequence[str] = (),
    memory: int | None = None,
    waiting: int = 64,
    batch: int = 8,
    exact: bool = True,
    strict_sizes: bool = False,
    most: int = MOST_BODY,
    report: Callable[[str], object] = lambda line: None,
) -> None:
    """Serve models until Ctrl-C.

    Args:
        models: The models; the first is loaded at once, and is the default.
        host: Address to bind to. Default: "127.0.0.1".
        port: Port; 0: any that is free. Default: 8000.
        key: The key that requests must have. Default: None, none.
        origins: Origins besides the server's own whose pages may use it. Default: none.
        memory: Bytes of weights in memory at once. Default: None, any.
        waiting: Requests that may wait. Default: 64.
        batch: Largest number of images in one batch of several requests. Default: 8.
        exact: Whether requests are drawn one after another where a batch would round differently. Default:
            True.
        strict_sizes: Whether sizes that a model does not make are refused. Default: False.
        most: Largest number of bytes of a body. Default: 64 MiB.
        report: Takes the lines that tell of the start. Default: nowhere.

    Raises:
        ValueError, OSError: If the first model cannot be loaded, or the port is taken.
    """
    sys.setswitchinterval(SWITCH)
    fleet = Fleet(models, memory=memory, exact=exact)
    counters = Counters()
    worker = Worker(fleet, counters, waiting=waiting, batch=batch)
    service = Service(fleet=fleet, worker=worker, counters=counters, strict_sizes=strict_sizes)
    app = application(service, host=host, origins=origins, key=key, most=most)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedProtocol,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
    server = StoppableServer(config, worker)
    listening = bound_socket(host, port)
    try:
        worker.start(lambda: warm_up(fleet.seat(fleet.default), batch))
        name = f"[{host}]" if ":" in host else host
        report(f"serving {', '.join(fleet.models)} at http://{name}:{listening.getsockname()[1]}")
        server.run(sockets=[listening])
    finally:
        listening.close()


def warm_up(seat: Seat, batch: int) -> None:
    """Draw images of one step, so that the first requests do not wait for what is made once.

    One image is drawn, and of a model that draws it within `QUICK` seconds batches, from the largest down for
    `QUICK` seconds: the first batch of a size is compared with single drawings (`Together`). unCLIP models
    and models that take an image are not warmed up: one step of them is not all they do.
    """
    pipe = seat.pipe
    if not isinstance(pipe, LatentDiffusion) or pipe.stage.concat is not None:
        return
    assert seat.together is not None

    def drawing(seed: int) -> Any:
        return pipe.text_to_image(WARM_UP, seed=seed, steps=1, progress=False)

    size, begin = batch, time.perf_counter()
    drawing(0)
    while size > 1 and time.perf_counter() - begin < QUICK:
        seat.together.draw([deferred(functools.partial(drawing, seed)) for seed in range(size)])
        size -= 1


def bound_socket(host: str, port: int) -> Any:
    """Return a socket that listens at an address; OSError, which names it, if that cannot be."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small parts at once (TCP_NODELAY) only on sockets that name their protocol
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)  # clients that connect before uvicorn runs wait
    except (OSError, OverflowError) as error:
        made.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{host}:{port}: {reason}") from None
    return made
