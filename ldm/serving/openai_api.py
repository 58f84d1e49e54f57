"""OpenAI's images API: generations, edits, variations, and the list of models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ldm.images.result import Images
from ldm.serving.bodies import one_file, read_form, read_json_body
from ldm.serving.encoding import (
    EVENT_STREAM,
    FILE_SUFFIXES,
    as_base64,
    event_lines,
    flagged_warnings,
    preview_files,
)
from ldm.serving.errors import ApiError, bad_field
from ldm.serving.fields import EDITS, GENERATIONS, MEDIA, VARIATIONS, checked_fields
from ldm.serving.jobs import Job
from ldm.serving.orders import Drawn, ImageOrder
from ldm.serving.service import ClientGone, Service, random_seed
from ldm.serving.uploads import SourceImage, source_of, uploaded_image
from ldm.support.text import escaped

OPTION_FIELDS = ("steps", "guidance", "sampler", "strength")  # fields with the names of the library's options
EVENTS = {GENERATIONS: "image_generation", EDITS: "image_edit", VARIATIONS: "image_variation"}
FILES_PATH = "/v1/images/files/"
REST_AFTER_ESTIMATE = 0.02  # seconds; between them, OpenMP's threads occupy all processors without sleeping
NO_TOKENS = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A request, checked.

    Attributes:
        order: What the worker is asked for.
        fields: The values of all fields that were given.
        strangers: Names that are no fields.
        base: Start of the urls of images.
    """

    order: ImageOrder
    fields: Mapping[str, Any]
    strangers: Sequence[str]
    base: str

    @property
    def kind(self) -> str:
        """The format of the files: "png", "jpeg" or "webp"."""
        return str(self.fields.get("output_format", "png"))

    @property
    def facts(self) -> dict[str, Any]:
        """What responses state besides the images."""
        return {
            "background": "opaque",
            "output_format": self.kind,
            "quality": self.fields.get("quality", "auto"),
        }

    def job(self) -> Job:
        """Return the job of the request."""
        return Job(self.order, kind=self.kind, quality=self.fields.get("output_compression"))

    def warnings(self, drawn: Drawn) -> list[str]:
        """Return what a client is warned of."""
        unknown = [f"unknown field {escaped(name, 100)}: ignored" for name in self.strangers[:20]]
        return [*unknown, *drawn.warnings, *flagged_warnings(drawn.images)]


def images_endpoint(service: Service, endpoint: str) -> Callable[[Request], Any]:
    """Return the function that answers the requests of an endpoint."""

    async def answer(request: Request) -> Response:
        asked = await read_request(service, endpoint, request)
        if asked.fields.get("stream"):
            return await stream_images(service, request, asked)
        drawn = await service.draw(request, asked.job())
        urls = asked.fields.get("response_format", "url") == "url"
        data = [
            {**url_or_content(service, asked, content, urls=urls), "seed": seed}
            for seed, content in drawn.files
        ]
        body = {"created": int(time.time()), "data": data, "size": size_text(drawn), **asked.facts}
        if noted := asked.warnings(drawn):
            body["warnings"] = noted
        return JSONResponse({**body, "model": asked.order.model})

    return answer


async def read_request(service: Service, endpoint: str, request: Request) -> Asked:
    """Return a request, checked.

    Raises:
        ApiError: If it is damaged, or a field is wrong.
    """
    files: dict[str, list[bytes]] = {}
    if endpoint == GENERATIONS:
        given: Mapping[str, Any] = await read_json_body(request)
    else:
        texts, files = await read_form(request)
        images = {name: one_file(files, texts, name) for name in ("image", "mask")}
        given = {**texts, **images}
    fields, strangers = checked_fields(endpoint, given, text=endpoint != GENERATIONS)
    strangers = (*strangers, *(name for name in files if name not in ("image", "mask")))
    if fields.get("background") == "transparent":
        raise bad_field("background", "the models make opaque images; expected opaque or auto")
    if fields.get("partial_images") and not fields.get("stream"):
        raise bad_field("partial_images", "expected stream: true with it")
    source = None
    if endpoint != GENERATIONS:
        source = await asyncio.to_thread(read_source, endpoint, fields)
    order = ImageOrder(
        endpoint=endpoint,
        model=service.fleet.name_of(fields.get("model")),
        seed=random_seed() if "seed" not in fields else fields["seed"],
        n=fields.get("n", 1),
        prompt=fields.get("prompt", ""),
        negative=fields.get("negative_prompt", ""),
        options={name: fields[name] for name in OPTION_FIELDS if name in fields},
        source=source,
        size=fields.get("size"),
        strict=service.strict_sizes,
    )
    base = f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}"
    return Asked(order=order, fields=fields, strangers=strangers, base=base)


def read_source(endpoint: str, fields: Mapping[str, Any]) -> SourceImage:
    """Return the image that a request starts from; ApiError if it cannot be read."""
    image = uploaded_image("image", fields["image"])
    mask = uploaded_image("mask", fields["mask"]) if fields.get("mask") is not None else None
    source = source_of(image, mask)
    return SourceImage(image=source.image) if endpoint == VARIATIONS else source


def url_or_content(service: Service, asked: Asked, content: bytes, *, urls: bool) -> dict[str, str]:
    """Return an item of a response: a file's url, or its content."""
    if not urls:
        return {"b64_json": as_base64(content)}
    name = service.store.put(content, MEDIA[asked.kind], FILE_SUFFIXES[asked.kind].removeprefix("."))
    return {"url": f"{asked.base}{FILES_PATH}{name}"}


def size_text(drawn: Drawn) -> str:
    """Return the size of images as requests state it."""
    return f"{drawn.size[0]}x{drawn.size[1]}"


# Streams


async def stream_images(service: Service, request: Request, asked: Asked) -> Response:
    """Return the response to a request with `stream`; it begins with the first event."""
    job = asked.job()
    job.on_step = step_teller(job, asked)
    events = service.follow(request, job)
    try:
        first = await anext(events)
    except StopAsyncIteration:
        raise ClientGone from None

    async def lines() -> AsyncIterator[bytes]:
        event = first
        partial = 0
        try:
            while True:
                for content in await asyncio.to_thread(stream_events, asked, event, partial):
                    partial += content["type"].endswith("partial_image") and content["index"] == 0
                    yield event_lines(content)
                event = await anext(events)
        except (StopAsyncIteration, ClientGone):
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield event_lines({"type": "error", **error.body()})
        finally:
            await events.aclose()

    return StreamingResponse(lines(), media_type=EVENT_STREAM, headers={"x-accel-buffering": "no"})


def step_teller(job: Job, asked: Asked) -> Callable[[int, int, Callable[[], Images] | None], None]:
    """Return the function that tells of a step: of the progress, and of estimates where they are wanted.

    Estimates are not shown where a safety checker looks at the finished images only. The worker rests for
    `REST_AFTER_ESTIMATE` after each, so that a browser on the same machine can show it.
    """
    every, wanted = asked.fields.get("preview_every"), asked.fields.get("partial_images", 0)

    def tell(done: int, total: int, preview: Callable[[], Images] | None) -> None:
        if asked.fields.get("progress"):
            job.deliver({"type": "progress", "step": done, "steps": total})
        at = {round(total * (k + 1) / (wanted + 1)) for k in range(wanted)}
        if preview is not None and done < total and (done in at if every is None else done % every == 0):
            job.deliver(preview())
            time.sleep(REST_AFTER_ESTIMATE)

    return tell


def stream_events(asked: Asked, event: Any, partial: int) -> list[dict[str, Any]]:
    """Return the server-sent events for an event of a job.

    Args:
        asked: The request.
        event: A finished event, estimates of the images, or the images.
        partial: Number of the estimate.
    """
    if isinstance(event, dict):
        return [event]
    name, now = EVENTS[asked.order.endpoint], int(time.time())
    common = {"created_at": now, **asked.facts}
    if isinstance(event, Images):
        height, width = event.tensor.shape[-2:]
        return [
            {
                "type": f"{name}.partial_image",
                "partial_image_index": partial,
                "index": i,
                "seed": event.seeds[i],
                "b64_json": as_base64(content),
                "size": f"{width}x{height}",
                **common,
            }
            for i, content in enumerate(preview_files(event, None, asked.kind))
        ]
    noted = asked.warnings(event)
    return [
        {
            "type": f"{name}.completed",
            "index": event.images.seeds.index(seed),
            "seed": seed,
            "b64_json": as_base64(content),
            "size": size_text(event),
            "usage": NO_TOKENS,
            **({"warnings": noted} if noted else {}),
            **common,
        }
        for seed, content in event.files
    ]


# Models and files


def models_endpoint(service: Service) -> Callable[[Request], Any]:
    """Return the function that lists the models."""

    async def answer(request: Request) -> Response:
        data = [service.fleet.describe(name) for name in service.fleet.models]
        return JSONResponse({"object": "list", "data": data})

    return answer


def model_endpoint(service: Service) -> Callable[[Request], Any]:
    """Return the function that describes one model."""

    async def answer(request: Request) -> Response:
        asked = request.path_params["model"]
        found = service.fleet.describe(service.fleet.name_of(asked), nouns=True)
        return JSONResponse({**found, "id": asked})

    return answer


def file_endpoint(service: Service) -> Callable[[Request], Any]:
    """Return the function that gives the files of images."""

    async def answer(request: Request) -> Response:
        found = service.store.get(request.path_params["name"])
        if found is None:
            raise ApiError(404, "there is no image of this name, or it has expired", code="not_found")
        return Response(found.content, media_type=found.media, headers={"cache-control": "private, no-store"})

    return answer
