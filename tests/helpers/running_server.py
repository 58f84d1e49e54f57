"""A server of tiny models in a thread of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from ldm.serving.application import application
from ldm.serving.counters import Counters
from ldm.serving.fleet import Fleet, ServedModel
from ldm.serving.launch import BoundedProtocol, StoppableServer, bound_socket
from ldm.serving.service import Service
from ldm.serving.worker import Worker


@dataclass
class Running:
    """A server that runs: its address and its parts."""

    port: int
    service: Service
    server: uvicorn.Server
    http: httpx.Client  # a client of it; making one takes longer than a request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


@contextmanager
def running_server(
    pipes: Mapping[str, Callable[[], Any]],
    *,
    key: str | None = None,
    origins: tuple[str, ...] = (),
    most: int = 2**22,
    **options: Any,
) -> Iterator[Running]:
    """Serve pipelines, by the functions that make them, inside a `with` block."""
    worker_options = {name: options.pop(name) for name in ("waiting", "batch") if name in options}
    strict = options.pop("strict_sizes", False)
    models = [ServedModel(name=name, card=make().card, load=make) for name, make in pipes.items()]
    fleet, counters = Fleet(models, **options), Counters()
    service = Service(
        fleet=fleet,
        worker=Worker(fleet, counters, **worker_options),
        counters=counters,
        strict_sizes=strict,
    )
    app = application(service, key=key, origins=origins, most=most)
    config = uvicorn.Config(
        app, http=BoundedProtocol, log_level="error", access_log=False, timeout_graceful_shutdown=5
    )
    listening = bound_socket("127.0.0.1", 0)
    server = StoppableServer(config, service.worker)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        port = listening.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, verify=False) as client:
            yield Running(port, service, server, client)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive() and not service.worker.alive
