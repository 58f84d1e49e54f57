"""Single files of every family with changed names and shapes: recognised, or refused with a reason."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from fuzzing import Target, check
from mutations import changed_tree, odd_value
from sparse_files import sparse_file

from ldm.registry.inspection import Candidate, inspect
from ldm.weights.detection import Detection
from ldm.weights.formats.single_file import read_single

UNET = "model.diffusion_model."
FILES: dict[str, dict[str, list[int]]] = {
    "sd1": {
        f"{UNET}input_blocks.0.0.weight": [320, 4, 3, 3],
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
        f"{UNET}out.2.bias": [4],
        "first_stage_model.decoder.conv_in.weight": [512, 4, 3, 3],
        "cond_stage_model.transformer.text_model.embeddings.position_ids": [1, 77],
        "betas": [1000],
        "ztsnr": [0],
        "alphas_cumprod": [1000],
    },
    "sdxl": {
        "conv_in.weight": [320, 4, 3, 3],
        "add_embedding.linear_1.weight": [1280, 2816],
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": [640, 2048],
    },
    "x4": {f"{UNET}input_blocks.0.0.weight": [256, 7, 3, 3], f"{UNET}label_emb.weight": [1000, 1024]},
    "unclip": {f"{UNET}input_blocks.0.0.weight": [320, 4, 3, 3], f"{UNET}label_emb.0.0.weight": [1280, 2048]},
    "markers": {
        f"{UNET}input_blocks.0.0.weight": [320, 4, 3, 3],
        "edm_mean": [4],
        "edm_std": [4],
        "edm_vpred.sigma_max": [],
        "scale_factor": [1],
    },
    "averages": {
        "model.d.a.b": [2],
        "model.d.c": [2],
        "model_ema.dab": [2],
        "model_ema.dc": [2],
        "model_ema.decay": [],
    },
    "added": {"a.lora_down.weight": [4, 8], "string_to_param.*": [1, 768], "emb_params": [2, 768]},
    "prior": {"model.prd_emb": [1, 1, 2048], "model.cf_param": [], "net.learned_query": [512]},
    "vae": {
        "decoder.up.0.block.0.conv1.weight": [128, 128, 3, 3],
        "quantize.embedding.weight": [8192, 3],
        "decoder.up_blocks.0.resnets.0.conv1.weight": [512, 512, 3, 3],
    },
    "clip": {"transformer.resblocks.0.attn.in_proj_weight": [2304, 768], "concept_embeds": [17, 768]},
}


def place(mutant: bytes, folder: Path) -> Path:
    """Write a file of zeros with the names and shapes of a mutant, which take no space on the disk."""
    return sparse_file(folder / "mutant", json.loads(mutant))


def recognise(path: Path) -> None:
    """Inspect a file; then read its parts."""
    report = inspect(path, candidates=no_cards, digest=False)
    assert all(line.isprintable() for line in report.text().split("\n"))
    read_single(path)


def look(path: Path) -> None:
    """Inspect a file, without a comparison with cards, which takes a second."""
    inspect(path, candidates=no_cards, digest=False).text()


def no_cards(found: Detection) -> tuple[Candidate, ...]:
    """Return no cards."""
    return ()


def mutated_shapes(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return names and shapes of a file with one to three of them changed."""
    tree = json.loads(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(5)
        name = rng.choice(list(tree)) if tree else "a"
        if kind == 0:
            tree[name] = [rng.choice((0, 1, 2, 320, 1000)) for _ in range(rng.randrange(6))]
        elif kind == 1:
            tree |= json.loads(rng.choice(seeds))
        elif kind == 2:
            tree[name.replace(rng.choice(name.split(".")), rng.choice(("", "model", "0", "*", "[a")))] = [2]
        elif kind == 3:
            tree[str(odd_value(rng))[:2000]] = [2]
        else:
            changed_tree(tree, rng)
    good = {name: shape for name, shape in tree.items() if _is_shape(shape)}
    return json.dumps({key.encode(errors="replace").decode(): shape for key, shape in good.items()}).encode()


def _is_shape(value: object) -> bool:
    """Return whether a value is a shape of at most ten million entries."""
    return (
        isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) and math.prod(value) < 10**7
    )


def test_files_with_changed_names_and_shapes(tmp_path: Path) -> None:
    seeds = [json.dumps(shapes).encode() for shapes in FILES.values()]
    target = Target(name="single files", read=look, place=place, short=100)
    check(target, seeds, mutated_shapes, tmp_path)


def test_reading_files_with_changed_names_and_shapes(tmp_path: Path) -> None:
    seeds = [json.dumps(FILES["sd1"]).encode()]
    check(Target(name="parts of single files", read=recognise, place=place), seeds, mutated_shapes, tmp_path)
