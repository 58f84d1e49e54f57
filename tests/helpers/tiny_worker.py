"""A worker of a server whose model is tiny, and jobs for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tiny_latent_diffusion import tiny_model

from ldm.serving.counters import Counters
from ldm.serving.fleet import Fleet, ServedModel
from ldm.serving.jobs import Job
from ldm.serving.orders import ImageOrder
from ldm.serving.worker import Worker

PIPE = tiny_model("tiny")
PROMPTS = ("a red cat", "apple", "a cat on blue background", "red", "blue cat")


def worker_of(**options) -> Worker:
    model = ServedModel(name="tiny", card=PIPE.card, load=lambda: PIPE)
    exact = options.pop("exact", True)
    worker = Worker(Fleet([model], exact=exact), Counters(), **options)
    worker.start()
    return worker


def order(prompt: str = "a cat", **fields) -> ImageOrder:
    options = {"steps": 2, **fields.pop("options", {})}
    return ImageOrder(
        **{"endpoint": "generations", "model": "tiny", "seed": 0, "prompt": prompt, **fields}, options=options
    )


@contextmanager
def running_worker(**options) -> Iterator[Worker]:
    worker = worker_of(**options)
    try:
        yield worker
    finally:
        worker.stop(now=True)
        assert worker.join(30)


def submitted(worker: Worker, *orders: ImageOrder) -> list[Job]:
    jobs = [Job(each) for each in orders]
    for job in jobs:
        worker.submit(job)
    return jobs
