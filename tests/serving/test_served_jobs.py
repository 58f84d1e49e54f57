"""Jobs of a server: they have their files, and are freed as soon as they are answered."""

from __future__ import annotations

import asyncio
import gc
import weakref

from tiny_worker import PROMPTS, order, running_worker, submitted

from ldm.serving.jobs import Job
from ldm.serving.service import Service


def test_answered_jobs_are_freed_at_once():
    """Cycles of references would keep their tensors until the garbage collector comes."""
    with running_worker() as worker:
        jobs = submitted(worker, *(order(prompt, seed=i) for i, prompt in enumerate(PROMPTS)))
        gone = Job(order("gone", seed=9))
        gone.cancel()
        worker.submit(gone)
        for job in jobs:
            job.future.result(30)
        gc.collect()
        gc.disable()
        try:
            jobs += submitted(worker, *(order(prompt, seed=i) for i, prompt in enumerate(PROMPTS)))
            images = [weakref.ref(job.future.result(30).images) for job in jobs]
            watched = [weakref.ref(job) for job in jobs]
            del job, jobs, gone
            submitted(worker, order())[0].future.result(30)  # the worker has let go of the batch before
            assert not any(ref() for ref in (*watched, *images))
        finally:
            gc.enable()


def test_a_followed_job_is_freed_at_once():
    class Staying:
        async def receive(self) -> dict[str, str]:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

    async def drawn(service: Service) -> weakref.ref[Job]:
        job = Job(order())
        assert (await service.draw(Staying(), job)).files
        return weakref.ref(job)

    with running_worker() as worker:
        service = Service(fleet=worker.fleet, worker=worker, counters=worker.counters)
        gc.collect()
        gc.disable()
        try:
            watched = asyncio.run(drawn(service))
            submitted(worker, order())[0].future.result(30)
            assert watched() is None
        finally:
            gc.enable()


def test_files_are_made_with_the_images():
    with running_worker() as worker:
        jobs = [Job(order(n=2), kind=kind, quality=60) for kind in ("png", "jpeg", "webp")]
        for job in jobs:
            worker.submit(job)
        for job, start in zip(jobs, (b"\x89PNG", b"\xff\xd8", b"RIFF"), strict=True):
            drawn = job.future.result(30)
            assert [seed for seed, _ in drawn.files] == [0, 1]
            assert all(content.startswith(start) for _, content in drawn.files)
