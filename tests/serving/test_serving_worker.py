"""The worker: batches, cancellation, the bounded queue, several models, failures, and the end."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from running_server import Running, running_server
from tiny_dalle import tiny_dalle
from tiny_latent_diffusion import tiny_model
from tiny_unclip import tiny_karlo
from tiny_worker import PIPE, PROMPTS, order, running_worker, submitted

from ldm.serving.counters import Counters
from ldm.serving.encoding import plain_file
from ldm.serving.errors import ApiError
from ldm.serving.fleet import Fleet, Seat, ServedModel
from ldm.serving.jobs import Job, Stopped
from ldm.serving.orders import ImageOrder, draw_order
from ldm.serving.uploads import SourceImage
from ldm.serving.worker import Follower, Worker


class Gate:
    """Holds the worker at a step until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 1) -> None:
        self.reached, self.opened, self.steps = threading.Event(), threading.Event(), list[int]()
        check = Follower.check

        def held(follower: Follower, done: int, total: int) -> None:
            self.steps.append(done)
            if done == at and not self.opened.is_set():
                self.reached.set()
                assert self.opened.wait(30)
            check(follower, done, total)

        monkeypatch.setattr(Follower, "check", held)


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


@pytest.mark.parametrize("exact", [True, False])
def test_what_waits_is_drawn_in_one_batch(gate, exact):
    with running_worker(exact=exact) as worker:
        (first,) = submitted(worker, order())
        assert gate.reached.wait(30)
        jobs = submitted(worker, *(order(prompt, seed=i, n=1 + i % 2) for i, prompt in enumerate(PROMPTS)))
        other = submitted(worker, order("other", options={"steps": 3}))[0]
        gate.opened.set()
        for i, job in enumerate(jobs):
            images = job.future.result(30).images
            own = PIPE.text_to_image(PROMPTS[i], seed=i, n=1 + i % 2, steps=2, progress=False)
            if exact:
                assert torch.equal(images.tensor, own.tensor)
            assert torch.allclose(images.tensor, own.tensor, atol=1e-4) and images.recipe == own.recipe
        assert first.future.result(30) and other.future.result(30).images.recipe["steps"] == 3
        if not exact:
            assert worker.counters.batches.counts == [2, 0, 0, 1, 0, 0]  # 1, 7 and 1 images
        assert worker.counters.images == 9


def source(seed: int, *, hole: bool = False) -> SourceImage:
    values = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (4 + seed, 4, 20, 20))
    return SourceImage(image=Image.fromarray(values), hole=mask if hole else None)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["edits", "inpainting", "variations"])
def test_edits_and_variations_of_the_same_shape_are_drawn_in_one_batch(gate, kind, exact):
    def wanted(i: int) -> ImageOrder:
        prompt = "" if kind == "variations" else PROMPTS[i]
        endpoint = "variations" if kind == "variations" else "edits"
        image = source(i, hole=kind == "inpainting")
        return order(prompt, endpoint=endpoint, source=image, seed=i, n=1 + i % 2, options={"strength": 0.8})

    with running_worker(exact=exact) as worker:
        submitted(worker, order())
        assert gate.reached.wait(30)
        jobs = submitted(worker, *(wanted(i) for i in range(4)))
        gate.opened.set()
        for i, job in enumerate(jobs):
            images, own = job.future.result(30).images, draw_order(PIPE, wanted(i))
            assert torch.allclose(images.tensor, own.tensor, atol=1e-4) and images.recipe == own.recipe
            assert not exact or torch.equal(images.tensor, own.tensor)
        if not exact:
            assert worker.counters.batches.counts == [1, 0, 0, 1, 0, 0]  # 1 and 6 images


def test_unclip_requests_of_the_same_options_are_drawn_in_one_batch(gate):
    karlo = tiny_karlo()
    model = ServedModel(name="tiny", card=karlo.card, load=lambda: karlo)
    worker = Worker(Fleet([model], exact=False), Counters())
    worker.fleet.seat("tiny")
    worker.start()
    jobs = submitted(worker, order(n=1))
    assert gate.reached.wait(30)
    jobs += submitted(worker, *(order(prompt, seed=i) for i, prompt in enumerate(PROMPTS[:3])))
    gate.opened.set()
    assert [len(job.future.result(60).images) for job in jobs] == [1, 1, 1, 1]
    assert worker.counters.batches.counts == [1, 0, 1, 0, 0, 0]  # 1 and 3 images
    worker.stop()
    assert worker.join(30)


def test_a_pipeline_that_draws_at_once_is_served():
    dalle = tiny_dalle()
    with running_server({"dalle": lambda: dalle}) as running:
        body = {"prompt": "a cat", "n": 2, "seed": 3, "response_format": "b64_json"}
        made = running.http.post("/v1/images/generations", json=body)
        assert made.status_code == 200, made.text
        own = dalle.text_to_image("a cat", n=2, seed=3, progress=False)
        for item, expected in zip(made.json()["data"], own.pil(), strict=True):
            found = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
            assert found.tobytes() == expected.tobytes()
        about = running.http.get("/v1/models/dalle").json()["ldm"]
        assert about["size"] == "64x64" and about["steps"] is None and about["samplers"] == []
        refused = running.http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 3})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "steps"
        content = base64.b64decode(made.json()["data"][0]["b64_json"])
        varied = running.http.post("/v1/images/variations", files={"image": content})
        mask = plain_file(Image.new("RGBA", (64, 64), (0, 0, 0, 0)))
        edited = running.http.post(
            "/v1/images/edits", files={"image": content, "mask": mask}, data={"prompt": "a cat"}
        )
        whole = running.http.post("/v1/images/edits", files={"image": content}, data={"prompt": "a cat"})
        assert varied.status_code == edited.status_code == 200, (varied.text, edited.text)
        assert whole.status_code == 400 and whole.json()["error"]["param"] == "mask"
        worker = running.service.worker
        gone = Job(ImageOrder(endpoint="generations", model="dalle", seed=0), lambda *_: gone.cancel())
        worker.submit(gone)
        with pytest.raises(Stopped):
            gone.future.result(30)
        assert gone.progress == (1, 16)


def test_a_warning_reaches_only_the_request_that_it_is_about(gate):
    with running_worker(exact=False) as worker:
        (first,) = submitted(worker, order())
        assert gate.reached.wait(30)
        known, unknown = submitted(worker, order("a red cat"), order("a zebra"))
        warnings.warn("of another thread", stacklevel=1)
        gate.opened.set()
        assert first.future.result(30).warnings == known.future.result(30).warnings == ()
        (text,) = unknown.future.result(30).warnings
        assert "zebra" in text


def test_a_batch_has_at_most_so_many_images(gate):
    with running_worker(batch=4, exact=False) as worker:
        submitted(worker, order())
        assert gate.reached.wait(30)
        jobs = submitted(worker, *(order(seed=i, n=2) for i in range(4)))
        gate.opened.set()
        assert all(len(job.future.result(30).images) == 2 for job in jobs)
        assert worker.counters.batches.counts == [1, 0, 2, 0, 0, 0]


def test_a_wrong_option_ends_only_its_own_request(gate):
    with running_worker() as worker:
        submitted(worker, order())
        assert gate.reached.wait(30)
        wrong, right = submitted(worker, order("((((" * 5000), order())
        gate.opened.set()
        assert right.future.result(30)
        with pytest.raises(ApiError, match="16384") as refused:
            wrong.future.result(30)
        assert refused.value.param == "prompt" and refused.value.status == 400


def test_unclip_models_generate_and_vary():
    karlo = tiny_karlo()
    with running_server({"karlo": lambda: karlo}) as running:
        body = {"prompt": "a cat", "n": 2, "seed": 3, "response_format": "b64_json", "negative_prompt": "red"}
        made = running.http.post("/v1/images/generations", json=body)
        assert made.status_code == 200 and made.json()["size"] == "32x32"
        own = karlo.text_to_image("a cat", n=2, seed=3, negative="red", progress=False)
        import io

        for item, expected in zip(made.json()["data"], own.pil(), strict=True):
            found = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
            assert found.tobytes() == expected.tobytes()
        image = running.http.post(
            "/v1/images/edits",
            files={"image": base64.b64decode(made.json()["data"][0]["b64_json"])},
            data={"prompt": "a cat"},
        )
        assert image.status_code == 400 and image.json()["error"]["param"] == "mask"
        varied = running.http.post(
            "/v1/images/variations",
            files={"image": base64.b64decode(made.json()["data"][0]["b64_json"])},
            data={"strength": "0.5"},
        )
        assert varied.status_code == 200, varied.text


# Clients that go


def raw_request(running: Running, path: str, body: bytes, **headers: str) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    lines = [f"POST {path} HTTP/1.1", f"host: 127.0.0.1:{running.port}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    made.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return made


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_for_a_client_that_goes_ends_within_one_step(gate, stream):
    with running_server({"tiny": lambda: PIPE}) as running:
        body = {"prompt": "a cat", "steps": 200, "stream": stream, "progress": True}
        client = raw_request(
            running, "/v1/images/generations", json.dumps(body).encode(), content_type="application/json"
        )
        assert gate.reached.wait(30)
        (job,) = running.service.worker.running
        client.close()
        if not stream:  # a stream begins with its first event
            wait_for(lambda: job.gone)
            gate.opened.set()
        else:
            gate.opened.set()
            wait_for(lambda: job.gone)
            last = len(gate.steps)
        with pytest.raises(Stopped):
            job.future.result(30)
        if stream:
            assert len(gate.steps) <= last + 1
        else:
            assert gate.steps == [1]
        wait_for(lambda: running.service.counters.cancelled == 1)


def wait_for(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_request_that_waits_leaves_the_queue_with_its_client(gate):
    with running_server({"tiny": lambda: PIPE}, waiting=1) as running:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(post, running, "a cat")
            assert gate.reached.wait(30)
            waiting = raw_request(
                running, "/v1/images/generations", b'{"prompt": "red"}', content_type="application/json"
            )
            wait_for(lambda: len(running.service.worker.queue) == 1)
            (job,) = running.service.worker.queue
            waiting.close()
            wait_for(lambda: job.gone)
            third = pool.submit(lambda: None)
            with ThreadPoolExecutor(1) as other:
                late = other.submit(
                    running.http.post, "/v1/images/generations", json={"prompt": "a", "steps": 2}
                )
                wait_for(lambda: len([each for each in running.service.worker.queue if not each.gone]) == 1)
                gate.opened.set()
                assert late.result(30).status_code == 200
            assert first.result(30).status_code == 200 and third.result(30) is None


def post(running: Running, prompt: str, **fields) -> httpx.Response:
    body = {"prompt": prompt, "steps": 2, **fields}
    return running.http.post("/v1/images/generations", json=body)


def test_a_full_queue_is_refused_with_the_time_to_wait(gate):
    with running_server({"tiny": lambda: PIPE}, waiting=2) as running, ThreadPoolExecutor(8) as pool:
        first = pool.submit(post, running, "a cat")
        assert gate.reached.wait(30)
        others = [pool.submit(post, running, "a cat", seed=i) for i in range(5)]
        wait_for(lambda: sum(each.done() for each in others) == 3)
        refused = [each.result() for each in others if each.done()]
        for response in refused:
            error = response.json()["error"]
            assert response.status_code == 429 and error["code"] == "rate_limit_exceeded"
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert response.headers["x-should-retry"] == "true"
        malformed = post(running, "a cat", n=0)  # is answered so, although the queue is full
        assert malformed.status_code == 400
        gate.opened.set()
        assert first.result(30).status_code == 200
        assert sorted(each.result(30).status_code for each in others) == [200, 200, 429, 429, 429]
        assert running.service.counters.refused == 3


# Models


def test_models_are_loaded_on_first_use_and_the_least_recently_used_is_unloaded():
    loads: list[str] = []

    def loader(name: str):
        def load():
            loads.append(name)
            return tiny_model(name)

        return ServedModel(name=name, card=PIPE.card, load=load)

    size = Seat(PIPE).bytes
    fleet = Fleet([loader(name) for name in "abc"], memory=int(2.5 * size))
    assert fleet.loaded == () and fleet.default == "a"
    for name in "abacab":
        fleet.seat(name)
    assert loads == ["a", "b", "c", "b"] and fleet.loaded == ("a", "b")
    small = Fleet([loader("d"), loader("e")], memory=1)
    small.seat("d")
    small.seat("e")
    assert small.loaded == ("e",)
    with pytest.raises(ValueError, match="different names"):
        Fleet([loader("a"), loader("a")])


def test_a_model_that_cannot_be_loaded_is_the_servers_fault(caplog):
    def broken():
        if loaded:
            raise FileNotFoundError("/secret/path")
        loaded.append(True)
        return PIPE

    loaded: list[bool] = []
    with running_server({"tiny": lambda: PIPE, "broken": broken}) as running:
        made = post(running, "a cat", model="broken")
        assert made.status_code == 500 and made.headers["x-should-retry"] == "false"
        assert "secret" not in made.text and made.json()["error"]["type"] == "server_error"
        assert post(running, "a cat", model="tiny").status_code == 200
        assert [each["ldm"]["loaded"] for each in running.http.get("/v1/models").json()["data"]] == [
            True,
            False,
        ]


def test_a_failure_in_a_request_does_not_end_the_worker(monkeypatch, caplog):
    with running_server({"tiny": lambda: PIPE}) as running:
        with monkeypatch.context() as patch:
            patch.setattr(type(PIPE), "decode", lambda *_: 1 / 0)
            assert post(running, "a cat").status_code == 500
        assert post(running, "a cat").status_code == 200
        assert running.http.get("/health").json()["status"] == "ok"
        text = running.http.get("/metrics").text
        assert "ldm_failed_total 1\n" in text and "ldm_images_total 1\n" in text


# The end


def test_stopping_refuses_what_waits_and_finishes_what_is_in_work(gate):
    with running_worker() as worker:
        (first,) = submitted(worker, order())
        assert gate.reached.wait(30)
        (second,) = submitted(worker, order("other"))
        worker.stop()
        with pytest.raises(ApiError, match="stopping"):
            second.future.result(5)
        with pytest.raises(ApiError, match="stopping"):
            worker.submit(Job(order()))
        gate.opened.set()
        assert first.future.result(30) and worker.join(30)


def test_stopping_at_once_ends_what_is_in_work(gate):
    with running_worker() as worker:
        (first,) = submitted(worker, order(options={"steps": 100}))
        assert gate.reached.wait(30)
        worker.stop(now=True)
        gate.opened.set()
        with pytest.raises(Stopped):
            first.future.result(30)
        assert worker.join(30) and gate.steps == [1]
