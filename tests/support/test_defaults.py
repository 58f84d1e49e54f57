"""`torch.set_default_dtype` and `torch.set_default_device` change nothing in what the library computes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reduced_families
import torch
from described_files import described, place_described
from import_graph import FILES, PACKAGE
from kinds_of_adapters import EMBEDDINGS, KINDS, PEFT, small_places
from kinds_of_controls import control_states, target
from tiny_exemplars import tiny_exemplar_model
from tiny_latent_diffusion import tiny_model
from tiny_trainings import configs, unclip_configs, write
from tiny_unclip import E, tiny_kandinsky, tiny_kandinsky21, tiny_karlo, tiny_stable
from torch import Tensor

import ldm
from ldm.catalog.control_cards import CONTROL_CARDS
from ldm.diffusion.edm import EDMSchedule
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import cfg
from ldm.diffusion.noise import brownian_noise, initial_noise, keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.spacings import SPACINGS
from ldm.models.unclip.prior import Prior, PriorConfig
from ldm.samplers import SAMPLERS
from ldm.support.defaults import as_tensor
from ldm.training.recipe import find_stage
from ldm.weights.adapters.files import read_adapter
from ldm.weights.adapters.matching import match_places
from ldm.weights.controls.building import IP_ADAPTER_KIND, build_control, control_kind
from ldm.weights.controls.files import read_control
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import build_network, randomise

Case = Callable[[], Any]
DEFAULTS = ("float64", "bfloat16", "meta")
FAST: dict[str, Any] = {"steps": 2, "progress": False, "n": 2}
UNCLIP: dict[str, Any] = {**FAST, "prior_steps": 2}
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 8:20, 8:20] = 1


@contextmanager
def other_default(name: str) -> Iterator[None]:
    """Set PyTorch's default device "meta", or a default dtype, inside a `with` block."""
    try:
        if name == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def flat(value: Any) -> list[Any]:
    """Return all tensors, numbers and texts of a result."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [part for each in value.values() for part in flat(each)]
    if isinstance(value, tuple | list):
        return [part for each in value for part in flat(each)]
    return flat(value.tensor) if isinstance(value, ldm.Images) else [value]


def same(a: list[Any], b: list[Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if not isinstance(x, Tensor):
            return bool(x == y)
        return x.dtype == y.dtype and x.device == y.device and bool(torch.equal(x, y))

    return len(a) == len(b) > 0 and all(map(equal, a, b))


def check(cases: dict[str, Case]) -> None:
    """Compare the result of every case with that under each of the other defaults."""
    plain = {name: flat(case()) for name, case in cases.items()}
    wrong = []
    for default in DEFAULTS:
        for name, case in cases.items():
            with other_default(default):
                try:
                    result = flat(case())
                except Exception as error:  # reported with the case
                    wrong.append(f"{default}: {name}: {type(error).__name__}: {str(error)[:300]}")
                    continue
            if not same(plain[name], result):
                wrong.append(f"{default}: {name} differs")
    assert not wrong, "\n".join(wrong)


def grid_values(schedule: NoiseSchedule, spacing: str) -> Any:
    steps = 10 if spacing.startswith("ays") else 5
    grid = TimeGrid.make(schedule, steps, spacing=spacing)
    return grid.t, grid.alpha, grid.sigma, schedule.alpha_sigma(3), schedule.alpha_sigma(2.5)


def test_schedules_grids_and_noise() -> None:
    schedules = {name: NoiseSchedule.make(name) for name in ("linear", "scaled_linear", "cosine")}
    cases: dict[str, Case] = {
        f"{name} {spacing}": lambda name=name, spacing=spacing: grid_values(
            NoiseSchedule.make(name, 1000), spacing
        )
        for name in schedules
        for spacing in SPACINGS
        if not (name == "cosine" and spacing.startswith("ays"))
    }
    grid, like = TimeGrid.make(schedules["linear"], 5), torch.zeros(2, 4, 8, 8)
    cases |= {
        "edm": lambda: EDMSchedule.between(0.1, 9, sigma_data=0.5, T=50).alpha_sigma(as_tensor([3.0, 7.5])),
        "explicit": lambda: TimeGrid.explicit(schedules["linear"], [900, 500.5, 3]).sigma,
        "levels": lambda: TimeGrid.from_log_ratio(schedules["linear"], [1.0, -1.0, -2.0]).t,
        "written": lambda: TimeGrid.from_dict(schedules["linear"], grid.to_dict()).t,
        "rescaled": lambda: schedules["linear"].zero_terminal_snr().alphas_cumprod,
        "initial": lambda: initial_noise([3, 4], (4, 8, 8)),
        "keyed": lambda: keyed_noise([3, 4])(1, like),
        "brownian": lambda: brownian_noise([3, 4], grid)(1, like),
    }
    check(cases)


def test_samplers() -> None:
    pipe = tiny_model()
    cond, uncond = pipe.text(["a cat", "red apple"]), pipe.text(["", ""])
    fn, x = cfg(pipe.denoiser, cond, uncond, 2.0), initial_noise([0, 1], (4, 8, 8))

    def solve(name: str) -> Tensor:
        grid = TimeGrid.make(pipe.denoiser.schedule, 4, spacing="karras")
        return SAMPLERS[name](fn, x * grid.sigma[0].float(), grid, noise=keyed_noise([0, 1]))

    with torch.no_grad():
        check({name: lambda name=name: solve(name) for name in SAMPLERS})


def test_tasks_of_latent_diffusion() -> None:
    pipe, things = tiny_model(), tiny_exemplar_model()
    same_noise = pipe.decode(torch.zeros(1, 4, 8, 8))
    cases: dict[str, Case] = {
        sampler: lambda sampler=sampler: pipe.text_to_image("a red cat", sampler=sampler, **FAST)
        for sampler in ("ddim", "dpmpp_2m", "euler_a", "dpmpp_2m_sde", "unipc", "dpm_adaptive")
    }
    cases |= {
        "weights": lambda: pipe.text_to_image("a (red:1.4) cat", negative="blue", guidance=3.0, **FAST),
        "image": lambda: pipe.image_to_image("a cat", IMAGE, strength=0.6, **FAST),
        "inpaint": lambda: pipe.inpaint("a cat", IMAGE, MASK, **FAST),
        "outpaint": lambda: pipe.outpaint("a cat", IMAGE, left=8, **FAST),
        "edit": lambda: pipe.edit("a red cat", "a blue cat", **FAST),
        "reconstruct": lambda: pipe.reconstruct(IMAGE, prompt="a cat", steps=2, progress=False),
        "interpolate": lambda: pipe.interpolate("a cat", "red apple", n=3, steps=2, progress=False),
        "seeds": lambda: pipe.interpolate(1, 2, n=3, steps=2, progress=False),
        "encode": lambda: pipe.encode(IMAGE),
        "decode": lambda: pipe.decode(pipe.encode(IMAGE)),
        "condition": lambda: vars(pipe.text(["a red cat"])),
        "exemplars": lambda: things.text_to_image("a cat", **FAST),
    }
    assert not same(flat(same_noise), flat(cases["encode"]()))
    check(cases)


def test_tasks_of_published_families(tmp_path: Path) -> None:
    bases = ("sd-v1-5", "sd-v2-depth", "instruct-pix2pix", "sd-x4-upscaler", "lcm-sd-v1-5", "sdxl-base")
    pipes = {base: reduced_families.load(reduced_families.register(base, tmp_path).name) for base in bases}
    near, options = torch.linspace(0, 9, 600).view(20, 30), {"steps": 2, "progress": False}
    check(
        {
            "plms": lambda: pipes["sd-v1-5"].text_to_image("a cat", sampler="plms", **options),
            "depth": lambda: pipes["sd-v2-depth"].depth_to_image("a cat", IMAGE, near, **options),
            "instruct": lambda: pipes["instruct-pix2pix"].instruct("red", IMAGE, **options),
            "upscale": lambda: pipes["sd-x4-upscaler"].upscale(IMAGE[..., :8, :8], "a cat", **options),
            "lcm": lambda: pipes["lcm-sd-v1-5"].text_to_image("a cat", guidance=8.0, **options),
            "sdxl": lambda: pipes["sdxl-base"].text_to_image("a cat", **options),
        }
    )


@pytest.mark.parametrize("make", [tiny_karlo, tiny_stable, tiny_kandinsky, tiny_kandinsky21])
def test_tasks_of_unclip(make: Callable[[], Any]) -> None:
    pipe, small = make(), IMAGE[..., :16, :16]
    image = IMAGE if make is not tiny_karlo else small
    cases: dict[str, Case] = {
        "text": lambda: pipe.text_to_image("a cat", **UNCLIP),
        "variations": lambda: pipe.variations(image, **FAST),
        "imagine": lambda: pipe.imagine("a cat", prior_steps=2, candidates=2, progress=False).vector,
        "interpolate": lambda: pipe.interpolate("a cat", "dog", n=3, steps=2, prior_steps=2, progress=False),
    }
    if make is tiny_kandinsky:
        difference = {"steps": 2, "n": 2, "progress": False}
        cases["difference"] = lambda: pipe.text_difference(image, "a cat", "a dog", **difference)
    check(cases)


def test_networks_that_are_loaded_and_saved(tmp_path: Path) -> None:
    ldm.save(tiny_model(), tmp_path / "model")

    def load() -> Any:
        pipe = ldm.load("emoji-ldm", weights=tmp_path / "model", device="cpu", dtype="float32")
        ldm.save(pipe, tmp_path / "again")
        again = ldm.load("emoji-ldm", weights=tmp_path / "again", device="cpu", dtype="float32")
        return pipe.state_dict(), again.text_to_image("a cat", **FAST)

    def random() -> Any:
        kinds: dict[str, dict[str, Any]] = {"plain": {}, "cosine": {"blocks": "cosine", "normalize": "unit"}}
        shapes = {
            "embed_dim": E,
            "text_dim": E,
            "length": 8,
            "width": E,
            "layers": 1,
            "heads": 2,
            "head_dim": 16,
        }
        nets = [randomise(build_network(PriorConfig(**{**shapes, **kind}))) for kind in kinds.values()]
        assert all(isinstance(net, Prior) for net in nets)
        return [net.state_dict() for net in nets]

    def embedded() -> Any:
        pipe = ldm.load("emoji-ldm", device="cpu", dtype="float32")
        return pipe.text_to_image("a cat", height=32, width=32, steps=2, progress=False)

    check({"load": load, "random": random, "embedded": embedded})


def test_adapters_and_controls(tmp_path: Path) -> None:
    def changed(path: Path) -> Any:
        adapter = match_places(read_adapter(path), small_places(), model="small")
        weights = [torch.ones(each.site.shape, dtype=torch.float32, device="cpu") for each in adapter.edits]
        vectors = [dict(each.vectors) for each in adapter.learned]
        return vectors, [edit.delta.apply(x, 0.7) for edit, x in zip(adapter.edits, weights, strict=True)]

    def built(path: Path) -> Any:
        file = read_control(path)
        vision = control_kind(file) == IP_ADAPTER_KIND
        return build_control(file, target(vision=vision), CONTROL_CARDS["canny"]).network.state_dict()

    cases: dict[str, Case] = {}
    files: dict[str, bytes] = {name: described(shapes) for name, shapes in {**KINDS, **EMBEDDINGS}.items()}
    files |= {
        f"peft {name}": described(shapes, "peft", config={"peft_type": name}) for name, shapes in PEFT.items()
    }
    for i, (name, description) in enumerate(files.items()):
        (tmp_path / str(i)).mkdir()
        path = place_described(description, tmp_path / str(i))
        cases[name] = lambda path=path: changed(path)
    for name, state in control_states().items():
        path = tmp_path / f"{name}.safetensors"
        write_safetensors(path, {key: value.contiguous() for key, value in state.items()})
        cases[name] = lambda path=path: built(path)
    target(vision=True)
    check(cases)


def test_a_network_of_the_user_follows_the_defaults() -> None:
    config = PriorConfig(embed_dim=8, text_dim=8, length=8, width=16, layers=1, heads=2, head_dim=8)
    with other_default("float64"):
        assert {p.dtype for p in Prior(config).parameters()} == {torch.float64}
    with other_default("meta"):
        assert {p.device.type for p in Prior(config).parameters()} == {"meta"}


def test_trainings(shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {**configs(shared_folder), **unclip_configs(shared_folder)}
    made["unet"]["text"] = {"folder": "runs/draft/export"}
    order = ("vae", "clip", "draft", "unet", "clip-text", "prior", "prior-ar", "decoder")

    def train(name: str) -> list[Any]:
        config = {**made[name], "run": {**made[name]["run"], "steps": 2}}
        run = find_stage(write(config, Path(f"{name}.yaml"))).open("cpu")
        run.train(progress=False)
        run.export(Path(f"runs/{name}/export"))
        return flat(run.part.model.state_dict())

    results: dict[str, dict[str, list[Any]]] = {}
    for default in ("float32", "float64", "meta"):
        (tmp_path / default).mkdir()
        monkeypatch.chdir(tmp_path / default)
        with other_default(default):
            results[default] = {name: train(name) for name in (*order, "upsampler")}
    for default in ("float64", "meta"):
        assert [] == [
            name for name, value in results[default].items() if not same(value, results["float32"][name])
        ]


FLOATING = {"empty", "zeros", "ones", "eye", "rand", "randn", "linspace", "logspace"}
CONSTRUCTORS = FLOATING | {"tensor", "as_tensor", "full", "arange", "randint", "randperm"}


def parameters_and_buffers(tree: ast.AST) -> set[ast.AST]:
    """Return all nodes inside calls of `nn.Parameter` and `register_buffer`."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    of_modules = [call for call in calls if ast.unparse(call.func).endswith(("Parameter", "register_buffer"))]
    return {node for call in of_modules for node in ast.walk(call)}


def unnamed(path: Path) -> Iterator[str]:
    """Yield the constructors of tensors in a file that name no device, or that leave the dtype to PyTorch."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_modules = parameters_and_buffers(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or node in of_modules:
            continue
        module, _, name = ast.unparse(node.func).rpartition(".")
        if module == "torch" and name in CONSTRUCTORS:
            named = {keyword.arg for keyword in node.keywords}
            if not named >= ({"device", "dtype"} if name in FLOATING else {"device"}):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"


def test_constructors_name_their_device_and_dtype() -> None:
    """Those whose dtype follows their values, as `torch.tensor`, need a device only."""
    wrong = [found for path in FILES for found in unnamed(path)]
    assert not wrong, "\n".join(wrong)
