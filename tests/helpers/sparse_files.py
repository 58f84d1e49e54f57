"""Files with the size of real checkpoints that use no disk space: a valid header and sparse zeros."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import original_keys
from original_keys import Shapes


def sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """Write a safetensors file of half-precision zeros with the given names and shapes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * 2
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def sd1_shapes(unet: str = "sd1") -> Shapes:
    """Return the keys and shapes of a Stable Diffusion 1.x file; of its text tower only two tensors."""
    text = {"embeddings.position_ids": (1, 77), "embeddings.token_embedding.weight": (49408, 768)}
    return {
        **original_keys.prefixed("model.diffusion_model.", original_keys.unet(original_keys.UNETS[unet][0])),
        **original_keys.prefixed("first_stage_model.", original_keys.vae(original_keys.VAES["kl-f8"][0])),
        **original_keys.prefixed("cond_stage_model.transformer.text_model.", text),
        "betas": (1000,),
        "alphas_cumprod": (1000,),
        "posterior_mean_coef1": (1000,),
        "model_ema.decay": (),
        "model_ema.num_updates": (),
    }
