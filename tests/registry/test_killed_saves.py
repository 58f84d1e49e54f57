"""Saving and assembling over another model, killed: the old model, the new one, or a refusal by name."""

from __future__ import annotations

import functools
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reduced_families
import torch
import yaml
from killing import in_fresh_process, kill_at_each_step, kill_at_random
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.conditioning.conditioner import TextConditioner
from ldm.registry.bundling import gather
from ldm.support import files
from ldm.support.config import to_dict
from ldm.weights.formats.diffusers_folder import read_component
from ldm.weights.formats.ldm_folder import read_network, write_part, write_text

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CARD = "tiny-sd-v1-5"
DIFFUSION = {"schedule": "cosine", "timesteps": 1000, "drop": 0.1, "prediction": "v"}


def own_model() -> Any:
    """Return a small model of no published family."""
    return tiny_model("mine")


def published_model() -> Any:
    """Return a small model of a published family."""
    return reduced_families.load(CARD)


def changed(pipe: Any) -> Any:
    """Return a model with other weights, guidance, known words, and scale of the latents."""
    with torch.no_grad():
        for network in pipe.networks().values():
            for parameter in network.parameters():
                parameter.add_(1.0)
    pipe.card = replace(pipe.card, defaults=replace(pipe.card.defaults, guidance=9.0))
    pipe.latent_scale *= 3
    pipe.text.known_words = frozenset(["other"])
    return pipe


def save_as(layout: str, pipe: Any, path: Path) -> None:
    """Save a model."""
    ldm.save(pipe, path, layout=layout)


def assemble(pipe: Any, path: Path) -> None:
    """Assemble a model of the exports of its trainings, which are written once."""
    place = path.parent / f"exports-{pipe.card.defaults.guidance}"
    if not place.is_dir():
        write_exports(pipe, place)
    gather(place / "card.yaml", path)


def write_exports(pipe: Any, place: Path) -> None:
    """Write the parts of a model as a training exports them, and its card."""
    write_part(place / "vae", "vae", pipe.vae, pipe.vae.config, latent_scale=pipe.latent_scale, dtype=None)
    net = pipe.denoiser.net
    write_part(place / "unet", "unet", net, net.config, diffusion=DIFFUSION, dtype=None)
    assert isinstance(pipe.text, TextConditioner)
    write_text(place / "text", pipe.text, words=sorted(pipe.text.known_words or ()), dtype=None)
    folders = {"vae": "vae", "unet": "unet", "text": "text", "draft": "text"}
    exports = {part: str(place / folder) for part, folder in folders.items()}
    (place / "card.yaml").write_text(
        yaml.safe_dump({**to_dict(pipe.card), "exports": exports}), encoding="utf-8"
    )


# Name: the model, how the old one is written, and how the new one is.
SAVES: dict[str, tuple[Callable[[], Any], Callable[..., None], Callable[..., None]]] = {
    "ldm over ldm": (own_model, functools.partial(save_as, "native"), functools.partial(save_as, "native")),
    "assembled over assembled": (own_model, assemble, assemble),
    "original over original": (
        published_model,
        functools.partial(save_as, "original"),
        functools.partial(save_as, "original"),
    ),
    "diffusers over diffusers": (
        published_model,
        functools.partial(save_as, "diffusers"),
        functools.partial(save_as, "diffusers"),
    ),
    "ldm over diffusers": (
        published_model,
        functools.partial(save_as, "diffusers"),
        functools.partial(save_as, "native"),
    ),
    "diffusers over ldm": (
        published_model,
        functools.partial(save_as, "native"),
        functools.partial(save_as, "diffusers"),
    ),
}


class Replaced:
    """A model that is replaced by another one, and what is found after that was killed.

    Args:
        name: Key of `SAVES`.
        folder: An empty folder.
    """

    def __init__(self, name: str, folder: Path) -> None:
        make, write_old, self.write_new = SAVES[name]
        if make is published_model:
            reduced_families.register("sd-v1-5", folder)
        self.name, self.new = name, changed(make())
        old = make()
        suffix = ".safetensors" if name.startswith("original") else ""
        self.pristine, self.path = folder / f"pristine{suffix}", folder / "place" / f"model{suffix}"
        self.path.parent.mkdir()
        write_old(old, self.pristine)
        self.states = {"old": contents(old), "new": contents(self.new)}
        self.found, self.parts = Counter[str](), list[dict[str, Any]]()
        self.restore()
        assert self.look() == "old"
        self.parts.append(lone_parts(self.path))
        begin = time.monotonic()
        self.replace()
        self.longest = 1.2 * (time.monotonic() - begin)  # some are killed when all is written
        assert self.look() == "new"
        self.parts.append(lone_parts(self.path))
        self.restore()

    def replace(self) -> None:
        """Write the new model in the place of the old one, as a new process does."""
        files._cleaned.clear()
        self.write_new(self.new, self.path)

    def restore(self) -> None:
        """Put the old model back."""
        if self.pristine.is_file():
            shutil.copyfile(self.pristine, self.path)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
            shutil.copytree(self.pristine, self.path)

    def look(self) -> str:
        """Return which model is there: "old", "new" or "refused"; AssertionError for any other."""
        options = {"device": "cpu", "dtype": "float32", "weights": self.path}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                pipe = ldm.load(CARD if self.new.card.name == CARD else None, **options)
        except (ValueError, FileNotFoundError) as error:
            assert str(self.path) in str(error), error
            return "refused"
        return self.same(contents(pipe))

    def same(self, found: dict[str, Any]) -> str:
        """Return which model has the given contents."""
        for name, state in self.states.items():
            if equal(state, found):
                return name
        raise AssertionError(f"{self.name}: what is loaded is neither of the models")

    def check_parts(self) -> None:
        """Check that each part that can be read alone is that of one model, with its own configuration."""
        for part, found in lone_parts(self.path).items():
            assert any(equal(found, parts.get(part)) for parts in self.parts), f"{self.name}: {part} is mixed"

    def after_kill(self) -> None:
        """Count what is there, and put the old model back; sometimes the new one is saved first."""
        found = self.look()
        self.found[found] += 1
        if found == "refused":
            self.check_parts()
        if self.found.total() % 10 == 0:
            self.replace()
            assert self.look() == "new"
        self.restore()


def contents(pipe: Any) -> dict[str, Any]:
    """Return all that decides the images of a model."""
    networks = {
        f"{part}.{key}": value
        for part, network in pipe.networks().items()
        for key, value in network.state_dict().items()
    }
    about = {"scale": pipe.latent_scale, "prediction": pipe.card.prediction}
    if pipe.card.name != CARD:  # a published layout states neither of them
        about |= {"guidance": pipe.card.defaults.guidance, "words": pipe.text.known_words}
    return {**networks, **about}


def lone_parts(path: Path) -> dict[str, Any]:
    """Return what can be read of the parts of a folder one by one, in either layout."""
    found = dict[str, Any]()
    for file in [*path.glob("*.yaml"), *path.glob("*/*.safetensors")]:
        try:
            if file.suffix == ".yaml":
                network, about = read_network(path, file.stem)
                found[file.stem] = {**network.state_dict(), "about": about}
            else:
                part = read_component(file.parent)
                found[file.parent.name] = {**part.tensors, "about": part.config}
        except (ValueError, FileNotFoundError):
            pass
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def kill_save(name: str, folder: str, kills: int) -> dict[str, int]:
    """Kill the replacement of a model at random moments."""
    replaced = Replaced(name, Path(folder))
    kill_at_random(replaced.replace, kills, replaced.longest, replaced.after_kill)
    return dict(replaced.found)


def kill_each_step(name: str, folder: str) -> dict[str, int]:
    """Kill the replacement of a model before each change of its folder."""
    replaced = Replaced(name, Path(folder))
    steps = kill_at_each_step(replaced.replace, replaced.path, replaced.after_kill)
    return {**replaced.found, "steps": steps}


FEW = [pytest.param("assembled over assembled", 8)]
MANY = [pytest.param(name, 200, marks=pytest.mark.slow) for name in SAVES]


@FORK
@pytest.mark.parametrize(("name", "kills"), FEW + MANY)
def test_kills_leave_the_old_model_the_new_one_or_a_refusal(name: str, kills: int, tmp_path: Path) -> None:
    found = in_fresh_process(Path(__file__), "kill_save", name, str(tmp_path), kills)
    print(f"\n{name}: {found}")
    assert sum(found.values()) == kills and found.keys() <= {"old", "new", "refused"}
    left = [path.name for path in (tmp_path / "place").iterdir() if path.name.startswith(".ldm-")]
    assert len(left) <= 1, left  # that of the last kill, at most


@FORK
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "ldm over ldm" else pytest.mark.slow) for name in SAVES]
)
def test_a_kill_at_each_step_leaves_the_old_model_the_new_one_or_a_refusal(name: str, tmp_path: Path) -> None:
    found = in_fresh_process(Path(__file__), "kill_each_step", name, str(tmp_path))
    print(f"\n{name}: {found}")
    steps = found.pop("steps")
    assert sum(found.values()) == steps and found["old"] >= 1
    assert name == "original over original" or (found["refused"] > 3 and steps > 5)
