"""The application: routes, what answers errors, and the guard around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ldm.serving.errors import ApiError, server_failed
from ldm.serving.fields import EVERY
from ldm.serving.guard import Guard
from ldm.serving.openai_api import (
    FILES_PATH,
    file_endpoint,
    images_endpoint,
    model_endpoint,
    models_endpoint,
)
from ldm.serving.schema import openapi_document
from ldm.serving.sdapi import (
    sdapi_endpoint,
    sdapi_interrupt,
    sdapi_models,
    sdapi_options,
    sdapi_png_info,
    sdapi_progress,
    sdapi_samplers,
)
from ldm.serving.service import ClientGone, Service

PAGE = Path(__file__).parent / "page"
STOP_SECONDS = 60.0  # for the last step
READERS = 2  # threads that read and write images
MOST_BODY = 2**26


def application(
    service: Service,
    *,
    host: str = "127.0.0.1",
    origins: Sequence[str] = (),
    key: str | None = None,
    most: int = MOST_BODY,
) -> Guard:
    """Return the ASGI application of a service; its worker runs from startup to shutdown.

    Args:
        service: The service.
        host: The address that it is bound to. Default: "127.0.0.1".
        origins: See `Guard`. Default: none.
        key: See `Guard`. Default: None.
        most: Largest number of bytes of a body. Default: 64 MiB.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        # each thread has a heap of its own, and more of them would take processors from the worker
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(READERS))
        try:
            yield
        finally:
            service.worker.stop(now=True)
            service.worker.join(STOP_SECONDS)

    app = Starlette(
        routes=routes(service),
        lifespan=lifespan,
        exception_handlers={
            ApiError: answer_error,
            ClientGone: answer_error,
            ClientDisconnect: lambda request, error: ClientGone().response(),
            HTTPException: answer_http_error,
            Exception: lambda request, error: server_failed().response(),
        },
    )
    return Guard(app, counters=service.counters, host=host, origins=origins, key=key, most=most)


def routes(service: Service) -> list[Route | Mount]:
    """Return the routes of the application."""
    sdapi: dict[str, tuple[str, Callable[..., Any]]] = {
        "txt2img": ("POST", sdapi_endpoint(service, from_image=False)),
        "img2img": ("POST", sdapi_endpoint(service, from_image=True)),
        "progress": ("GET", partial(sdapi_progress, service)),
        "interrupt": ("POST", partial(sdapi_interrupt, service)),
        "samplers": ("GET", partial(sdapi_samplers, service)),
        "sd-models": ("GET", partial(sdapi_models, service)),
        "options": ("GET", partial(sdapi_options, service)),
        "png-info": ("POST", partial(sdapi_png_info, service)),
    }
    return [
        *(Route(f"/v1/images/{name}", images_endpoint(service, name), methods=["POST"]) for name in EVERY),
        Route(f"{FILES_PATH}{{name}}", file_endpoint(service)),
        Route("/v1/models", models_endpoint(service)),
        Route("/v1/models/{model}", model_endpoint(service)),
        *(Route(f"/sdapi/v1/{name}", run, methods=[method]) for name, (method, run) in sdapi.items()),
        Route("/health", partial(health, service)),
        Route("/metrics", partial(metrics, service)),
        Route("/openapi.json", partial(openapi, service)),
        Route("/", front_page),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]


async def front_page(request: Request) -> Response:
    """Answer with the page."""
    return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})


async def health(service: Service, request: Request) -> Response:
    """Answer whether the worker runs, what waits, and which models are in memory."""
    well = service.worker.alive
    body = {
        "status": "ok" if well else "failed",
        "waiting": len(service.worker.queue),
        "running": len(service.worker.running),
        "loaded": list(service.fleet.loaded),
    }
    return JSONResponse(body, status_code=200 if well else 503)


async def metrics(service: Service, request: Request) -> Response:
    """Answer with the counts, as Prometheus reads them."""
    worker = service.worker
    text = service.counters.text(
        waiting=len(worker.queue), running=len(worker.running), loaded=len(service.fleet.loaded)
    )
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def openapi(service: Service, request: Request) -> Response:
    """Answer with the OpenAPI document."""
    return JSONResponse(openapi_document())


def answer_error(request: Request, error: Exception) -> Response:
    """Return the response to a request that is refused, or whose client has gone."""
    assert isinstance(error, ApiError | ClientGone)
    return error.response()


def answer_http_error(request: Request, error: Exception) -> Response:
    """Return the response to a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return ApiError(
            405, f"{request.method}: not a method of this path", code="method_not_allowed"
        ).response()
    if error.status_code == 404:
        return ApiError(404, "there is nothing at this path", code="not_found").response()
    return ApiError(error.status_code, str(error.detail), code="invalid_body").response()
