"""A DALL·E Mini of tiny networks with random weights, and its files in every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_exemplars import CELL, SIZE, SLOTS, WIDTH, tiny_conditioner
from torch import Tensor

from ldm.catalog.dalle_cards import DalleCard, DalleNetworks, TokenDefaults
from ldm.catalog.lookup import REGISTERED
from ldm.models.dalle.decoder import DalleDecoder, DalleDecoderConfig
from ldm.models.dalle.dvae import DVAE, DVAEConfig
from ldm.models.dalle.encoder import DalleEncoder, DalleEncoderConfig, StateEncoder, StateEncoderConfig
from ldm.models.dalle.layers import UNIT_SCALES
from ldm.models.patch_vq import PatchVQ, PatchVQConfig
from ldm.models.text.bpe import byte_symbols
from ldm.models.text.byte_bpe import SPECIAL_TOKENS, ByteTokenizer
from ldm.models.vq import VQConfig, VQModel
from ldm.pipelines.dalle.pipeline import DalleMini
from ldm.weights.parts import build_network, randomise, to_layout

ENCODER = DalleEncoderConfig(vocabulary=300, length=12, width=32, layers=2, heads=4, inner=24)
DECODER = DalleDecoderConfig(vocabulary=64, length=16, width=32, layers=2, heads=4, inner=24)
VQ = VQConfig(channels=(8, 8, 16, 16, 16), blocks=1, latent_channels=8, codes=64, attention_levels=(4,))
TINY_DVAE = DVAEConfig(width=64, first=8, blocks=1, codes=512)
CARD = DalleCard(
    name="tiny-dalle",
    summary="tiny networks",
    licence="none",
    side=64,
    start=64,
    networks=DalleNetworks(encoder=ENCODER, decoder=DECODER, vae=VQ),
)
MERGES = ("Ġ a", "p p", "l e", "pp le", "Ġa pple", "r e", "Ġ re")


def vocabulary() -> dict[str, int]:
    """Return the ids of the special tokens, the bytes and the merged symbols."""
    symbols = [*SPECIAL_TOKENS, *byte_symbols(), *(pair.replace(" ", "") for pair in MERGES)]
    return {symbol: i for i, symbol in enumerate(symbols)}


def tiny_dalle(card: DalleCard = CARD, **changes: Any) -> DalleMini:
    """Return the pipeline; `changes` are fields of the card."""
    card = replace(card, **changes)
    assert card.networks is not None
    parts = {
        part: randomise(build_network(config), i) for i, (part, config) in enumerate(card.shapes().items())
    }
    encoder, decoder, vae = parts["encoder"], parts["decoder"], parts["vae"]
    assert (
        isinstance(encoder, DalleEncoder) and isinstance(decoder, DalleDecoder) and isinstance(vae, VQModel)
    )
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.5)
    tokenizer = ByteTokenizer(vocabulary(), MERGES)
    return DalleMini(encoder=encoder, decoder=decoder, vae=vae, tokenizer=tokenizer, card=card).eval()


def tiny_token_exemplars() -> DalleMini:
    """Return a pipeline with exemplars, whose images have 16 pixels and 4×4 tokens.

    Its networks copy what is shown, as they do before training.
    """
    text = tiny_conditioner()
    torch.manual_seed(0)
    vae = PatchVQ(PatchVQConfig(codes=64, factor=CELL, latent_channels=8, channels=(8, 16)))
    shown = text(["cat", "a dog and a cat"] * 8, seeds=range(16)).exemplars
    assert shown is not None
    canvas = shown.sum(1)  # (B, 4, H, W)
    vae.fit(2 * (canvas[:, :3] + 1 - canvas[:, 3:]).clamp(0, 1) - 1, iterations=2)
    encoder = StateEncoder(StateEncoderConfig(text_width=WIDTH, width=64, slots=SLOTS, cell=CELL))
    decoder = DalleDecoder(replace(DECODER, width=64))
    codes = vae.quantize.embedding.weight.detach()
    encoder.use_basis(vae.project.weight.detach(), vae.project.bias.detach(), decoder.use_codes(codes))
    card = DalleCard(
        name="tiny-token-exemplars",
        family="tokens",
        summary="tiny networks",
        licence="none",
        start=64,
        signed=True,
        side=SIZE,
        pictures=2,
        sampling=TokenDefaults(guidance=1.0, top_k=64),
    )
    return DalleMini(encoder=encoder, decoder=decoder, vae=vae, text=text, card=card).eval()


def register_tiny(card: DalleCard = CARD) -> DalleCard:
    """Make the card known to `ldm.load`; the tests' fixture forgets it."""
    REGISTERED[card.name] = card
    return card


def write_tokenizer_files(folder: Path, suffix: str = "") -> None:
    """Write vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"vocab{suffix}.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *MERGES, ""])
    (folder / f"merges{suffix}.txt").write_text(text, encoding="utf-8")


def without_scales(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without the norms' scales that published files do not have."""
    names = tuple(f"{name}.weight" for name in UNIT_SCALES)
    return {key: value for key, value in state.items() if not key.endswith(names)}


def unit_scales(pipe: DalleMini) -> DalleMini:
    """Set the scales that files leave out to one, and return the pipeline."""
    with torch.no_grad():
        for network in (pipe.encoder, pipe.decoder):
            for name, p in network.named_parameters():
                if name.endswith(tuple(f"{each}.weight" for each in UNIT_SCALES)):
                    p.fill_(1.0)
    return pipe


def write_min_dalle(pipe: DalleMini, folder: Path, *, suffix: str = "") -> Path:
    """Write min-dalle's files: encoder.pt, decoder.pt, detoker.pt, vocab.json, merges.txt."""
    write_tokenizer_files(folder, suffix)
    for part, network in (("encoder", pipe.encoder), ("decoder", pipe.decoder)):
        torch.save(without_scales(to_layout(network, "original")), folder / f"{part}{suffix}.pt")
    torch.save(detokenizer_state(pipe), folder / "detoker.pt")
    return folder


def detokenizer_state(pipe: DalleMini) -> dict[str, Tensor]:
    """Return the detokenizer's tensors under the names of min-dalle's detoker.pt."""
    state = to_layout(pipe.vae, "original")
    kept = {key: value for key, value in state.items() if not key.startswith(("encoder.", "quant_conv."))}
    return {key.removeprefix("quantize."): value for key, value in kept.items()}


def tiny_dvae(config: DVAEConfig = TINY_DVAE) -> DVAE:
    """Return DALL·E's autoencoder with random weights."""
    network = randomise(build_network(config), 5)
    assert isinstance(network, DVAE)
    return network
