"""A second door: the part of AUTOMATIC1111's web API that the engine has options for."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ldm.samplers import SAMPLERS
from ldm.serving.bodies import read_json_body
from ldm.serving.encoding import as_base64, preview_files, preview_grid
from ldm.serving.errors import ApiError, bad_field
from ldm.serving.fields import MOST_IMAGES, STEP_LIMIT, SWITCHES, RequestField, checked_value
from ldm.serving.jobs import Job
from ldm.serving.orders import Drawn, ImageOrder
from ldm.serving.service import ClientGone, Service, random_seed
from ldm.serving.uploads import SourceImage, base64_content, base64_image, opaque, reduced
from ldm.support.config import nearest
from ldm.support.text import escaped, shown

# A1111's names of samplers, in small letters without spaces and signs → ours.
SAMPLER_NAMES = {
    "eulera": "euler_a",
    "dpm2a": "dpm2_a",
    "dpm++2sa": "dpmpp_2s_a",
    "dpm++2m": "dpmpp_2m",
    "dpm++sde": "dpmpp_sde",
    "dpm++2msde": "dpmpp_2m_sde",
    "dpm++3msde": "dpmpp_3m_sde",
    "dpmadaptive": "dpm_adaptive",
    **{name.replace("_", ""): name for name in SAMPLERS},
}
SPACING_NAMES = ("karras", "exponential")  # A1111's "schedule types" with the meaning of our spacings
MOST_ITERATIONS = 10

SDAPI_FIELDS: dict[str, RequestField] = {
    field.name: field
    for field in (
        RequestField(name="prompt", kind="text", about="what the images show; default: nothing"),
        RequestField(name="negative_prompt", kind="text", about="what they do not show; default: nothing"),
        RequestField(
            name="seed", kind="whole", about="−1, the default: a random one", least=-1, most=2**63 - 1 - 100
        ),
        RequestField(name="steps", kind="whole", about="default: the model's", least=1, most=STEP_LIMIT),
        RequestField(name="cfg_scale", kind="number", about="default: the model's", most=100),
        RequestField(name="width", kind="whole", about="in pixels; default: the model's", least=8, most=2048),
        RequestField(
            name="height", kind="whole", about="in pixels; default: the model's", least=8, most=2048
        ),
        RequestField(name="batch_size", kind="whole", about="default: 1", least=1, most=MOST_IMAGES),
        RequestField(name="n_iter", kind="whole", about="default: 1", least=1, most=MOST_ITERATIONS),
        RequestField(name="sampler_name", kind="text", about="default: the model's"),
        RequestField(name="sampler_index", kind="text", about="another name of sampler_name"),
        RequestField(name="scheduler", kind="text", about="Automatic, the default, Karras or Exponential"),
        RequestField(name="denoising_strength", kind="number", about="default: 0.75", most=1),
        RequestField(name="inpainting_mask_invert", kind="whole", about="default: 0", most=1),
        RequestField(name="send_images", kind="switch", about="default: true"),
    )
}
STRUCTURED = ("override_settings", "init_images", "mask")
# Options that change nothing: their values are those that the engine has in any case.
WITHOUT_EFFECT = (
    "save_images",
    "do_not_save_samples",
    "do_not_save_grid",
    "override_settings_restore_afterwards",
)


def sdapi_endpoint(service: Service, *, from_image: bool) -> Callable[[Request], Awaitable[Response]]:
    """Return the function that answers `txt2img`, or with `from_image` `img2img`."""

    async def answer(request: Request) -> Response:
        given = {name: value for name, value in (await read_json_body(request)).items() if value is not None}
        fields = {
            name: checked_value(SDAPI_FIELDS[name], name, value, text=False)
            for name, value in given.items()
            if name in SDAPI_FIELDS
        }
        known = {*SDAPI_FIELDS, *STRUCTURED, *WITHOUT_EFFECT}
        unknown = [name for name in given if name not in known]
        order = await asyncio.to_thread(sdapi_order, service, fields, given, from_image)
        job = Job(order)
        service.jobs.append(job)
        try:
            drawn = await service.draw(request, job)
        except ClientGone:
            if not job.interrupted:
                raise
            return JSONResponse(await asyncio.to_thread(unfinished_body, job, given))
        finally:
            service.jobs.remove(job)
        images = [as_base64(content) for _, content in drawn.files] if fields.get("send_images", True) else []
        info = sdapi_info(service, order, drawn, [seed for seed, _ in drawn.files], unknown)
        return JSONResponse(
            {"images": images, "parameters": known_parameters(given), "info": json.dumps(info)}
        )

    return answer


def unfinished_body(job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the response to a request that `interrupt` has ended: the last estimate of its images."""
    files = [] if job.latest is None else preview_files(job.latest(), job.order.size)
    info = {"seed": job.order.seed, "prompt": job.order.prompt, "interrupted": True}
    return {
        "images": [as_base64(content) for content in files],
        "parameters": known_parameters(given),
        "info": json.dumps(info),
    }


def known_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a response repeats of a request: all but its images."""
    return {name: value for name, value in given.items() if name in SDAPI_FIELDS}


def sdapi_order(
    service: Service, fields: Mapping[str, Any], given: Mapping[str, Any], from_image: bool
) -> ImageOrder:
    """Return what a request asks for; ApiError if an option is wrong."""
    options: dict[str, Any] = sampler_options(fields)
    for name, own in (("steps", "steps"), ("cfg_scale", "guidance")):
        if name in fields:
            options[own] = fields[name]
    seed = fields.get("seed", -1)
    n = fields.get("batch_size", 1) * fields.get("n_iter", 1)
    if n > MOST_IMAGES:
        raise bad_field("n_iter", f"batch_size times n_iter is {n}, expected at most {MOST_IMAGES}")
    source = None
    if from_image:
        source = sdapi_source(fields, given)
        options["strength"] = fields.get("denoising_strength", 0.75)
    size = (fields["width"], fields["height"]) if {"width", "height"} <= fields.keys() else None
    if size is None and {"width", "height"} & fields.keys():
        raise bad_field("width", "expected width and height together")
    return ImageOrder(
        endpoint="edits" if from_image else "generations",
        model=service.fleet.name_of(sdapi_model(service, given)),
        seed=random_seed() if seed == -1 else seed,
        n=n,
        prompt=fields.get("prompt", ""),
        negative=fields.get("negative_prompt", ""),
        options=options,
        source=source,
        size=size,
        strict=service.strict_sizes,
    )


def sdapi_model(service: Service, given: Mapping[str, Any]) -> str | None:
    """Return the model that `override_settings` names; None for the default."""
    settings = given.get("override_settings", {})
    if not isinstance(settings, Mapping):
        raise bad_field("override_settings", f"expected a mapping, got {shown(settings)}", "invalid_type")
    name = settings.get("sd_model_checkpoint")
    if name is not None and not isinstance(name, str):
        raise bad_field("sd_model_checkpoint", f"expected a text, got {shown(name)}", "invalid_type")
    return name


def sdapi_source(fields: Mapping[str, Any], given: Mapping[str, Any]) -> SourceImage:
    """Return the image of `img2img`, with its mask, white where to repaint."""
    images = given.get("init_images")
    if not isinstance(images, list) or len(images) != 1:
        raise bad_field("init_images", f"expected a list of one image in base64, got {shown(images)}")
    image = opaque(base64_image("init_images", images[0]))
    if "mask" not in given:
        return reduced(SourceImage(image=image))
    mask = opaque(base64_image("mask", given["mask"])).convert("L")
    if mask.size != image.size:
        expected, got = (f"{each.width}×{each.height}" for each in (image, mask))
        raise bad_field("mask", f"expected the image's size {expected}, got {got}", "invalid_image_size")
    inverted = bool(fields.get("inpainting_mask_invert", 0))
    hole = mask.point([255 if (value >= 128) != inverted else 0 for value in range(256)])
    if hole.getbbox() is None:
        raise bad_field("mask", "it marks nothing to repaint", "invalid_mask")
    return reduced(SourceImage(image=image, hole=hole))


def sampler_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampler and the spacing that A1111's names state; ApiError for unknown ones."""
    options: dict[str, Any] = {}
    name = fields.get("sampler_name", fields.get("sampler_index"))
    spacing = str(fields.get("scheduler", "automatic")).lower()
    if name:
        words = str(name).lower()
        for each in SPACING_NAMES:  # as earlier versions named them: "DPM++ 2M Karras"
            if words.endswith(f" {each}"):
                words, spacing = words.removesuffix(each), each
        own = SAMPLER_NAMES.get(re.sub(r"[\s_]", "", words))
        if own is None:
            raise bad_field(
                "sampler_name",
                f"unknown sampler {shown(name)}; {nearest(str(name), SAMPLERS)}",
                "invalid_value",
            )
        options["sampler"] = own
    if spacing in SPACING_NAMES:
        options["spacing"] = spacing
    elif spacing not in ("automatic", ""):
        raise bad_field("scheduler", f"unknown scheduler {shown(spacing)}; {nearest(spacing, SPACING_NAMES)}")
    return options


def sdapi_info(
    service: Service, order: ImageOrder, drawn: Drawn, seeds: list[int], unknown: list[str]
) -> dict[str, Any]:
    """Return the `info` of a response, which names the options that were not known."""
    recipe = drawn.images.recipe
    facts = [
        f"{name}: {recipe.get(key)}"
        for name, key in (("Steps", "steps"), ("Sampler", "sampler"), ("CFG scale", "guidance"))
    ]
    size = f"Size: {drawn.size[0]}x{drawn.size[1]}, Model: {order.model}"
    negative = f"\nNegative prompt: {order.negative}" if order.negative else ""
    return {
        "prompt": order.prompt,
        "negative_prompt": order.negative,
        "seed": order.seed,
        "all_seeds": seeds,
        "all_prompts": [order.prompt] * len(seeds),
        "steps": recipe.get("steps"),
        "sampler_name": recipe.get("sampler"),
        "cfg_scale": recipe.get("guidance"),
        "width": drawn.size[0],
        "height": drawn.size[1],
        "sd_model_name": order.model,
        "infotexts": [
            f"{order.prompt}{negative}\n{', '.join(facts)}, Seed: {seed}, {size}" for seed in seeds
        ],
        "unknown_options": [escaped(name, 100) for name in unknown[:100]],
        "warnings": list(drawn.warnings),
    }


async def sdapi_progress(service: Service, request: Request) -> Response:
    """Answer `progress`: the part that is done of the job in work, with its present estimate."""
    skip = request.query_params.get("skip_current_image", "false").lower()
    if skip not in SWITCHES:
        raise bad_field("skip_current_image", f"expected true or false, got {shown(skip)}", "invalid_type")
    running = [job for job in service.jobs if job in service.worker.running]
    done, total = running[0].progress if running else (0, 0)
    part = done / total if total else 0.0
    state = {
        "job": "generation" if running else "",
        "job_count": len(service.jobs),
        "job_no": 0,
        "sampling_step": done,
        "sampling_steps": total,
        "interrupted": bool(running and running[0].gone),
        "skipped": False,
        "waiting": len(service.jobs) - len(running),
    }
    left = 0.0
    if part and running[0].began is not None:
        left = (time.perf_counter() - running[0].began) * (1 / part - 1)
    image = None
    if running and running[0].latest is not None and not SWITCHES[skip]:
        image = as_base64(await asyncio.to_thread(preview_grid, running[0].latest))
    return JSONResponse(
        {"progress": part, "eta_relative": left, "state": state, "current_image": image, "textinfo": None}
    )


async def sdapi_interrupt(service: Service, request: Request) -> Response:
    """Answer `interrupt`: end the jobs of this door within one step."""
    for job in service.jobs:
        job.interrupted = True
        job.cancel()
    return JSONResponse({})


async def sdapi_samplers(service: Service, request: Request) -> Response:
    """Answer `samplers`."""
    names: dict[str, list[str]] = {name: [] for name in SAMPLERS}
    for alias, name in SAMPLER_NAMES.items():
        names[name].append(alias)
    return JSONResponse(
        [{"name": name, "aliases": aliases, "options": {}} for name, aliases in names.items()]
    )


async def sdapi_models(service: Service, request: Request) -> Response:
    """Answer `sd-models`; no path is named."""
    return JSONResponse(
        [
            {
                "title": name,
                "model_name": name,
                "hash": None,
                "sha256": None,
                "filename": name,
                "config": None,
            }
            for name in service.fleet.models
        ]
    )


async def sdapi_options(service: Service, request: Request) -> Response:
    """Answer `options`, which many clients read first: the default model."""
    return JSONResponse({"sd_model_checkpoint": service.fleet.default, "samples_format": "png"})


async def sdapi_png_info(service: Service, request: Request) -> Response:
    """Answer `png-info`: the recipe inside an image."""
    from ldm.images.files import read_recipe

    content = base64_content("image", (await read_json_body(request)).get("image"))
    try:
        recipe = await asyncio.to_thread(read_recipe, content)
    except ValueError as error:
        if "has no recipe" not in str(error):
            raise ApiError(400, str(error), param="image", code="invalid_image") from None
        recipe = {}
    info = json.dumps(recipe) if recipe else ""
    return JSONResponse({"info": info, "items": {"ldm": info} if info else {}, "parameters": recipe})
