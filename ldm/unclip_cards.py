"""Cards of unCLIP models: how each of their stages wants to be sampled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ldm.cards import Defaults, ScheduleCard
from ldm.conventions import Convention, get_convention
from ldm.samplers import get_sampler
from ldm.types import Prediction


@dataclass(frozen=True, kw_only=True)
class StageCard:
    """One diffusion of several: its schedule, what its network predicts, and how it is sampled.

    ``learned_var``: the network gives a variance too. ``clip_x0``: what x0 is clamped to, ± this; None for nothing. ``defaults``: height and
    width mean nothing to a prior, and are the picture's for a decoder, in pixels.
    """

    schedule: ScheduleCard
    prediction: Prediction
    learned_var: bool = False
    clip_x0: float | None = None
    convention: str | Convention = "diffusers"
    defaults: Defaults

    def __post_init__(self) -> None:
        get_sampler(self.defaults.sampler)
        self.grids()
        if self.clip_x0 is not None and self.clip_x0 <= 0:
            raise ValueError(f"clip_x0: expected a positive limit or None, got {self.clip_x0}")

    def grids(self) -> Convention:
        """The grid of every sampler."""
        return get_convention(self.convention) if isinstance(self.convention, str) else self.convention


@dataclass(frozen=True, kw_only=True)
class UnCLIPCard:
    """An unCLIP model. ``clip``: the CLIP whose embeddings it runs on; ``prior`` None where it has none, ``upsamplers`` from small to large.

    ``condition``: how the embedding reaches the decoder: "tokens" (a vector and tokens of context) or "noised" (Stable unCLIP). ``no_image``: what
    stands for no image in guidance: a "learned" embedding, that of a "black" picture (zeros as the tower's input), or "zeros" for the condition.
    ``concat``: what inpainting models have beside the latent: the known latent and the mask of what is known.
    """

    name: str
    summary: str
    licence: str
    clip: str
    decoder: StageCard
    prior: StageCard | None = None
    upsamplers: tuple[StageCard, ...] = ()
    condition: Literal["tokens", "noised"] = "tokens"
    no_image: Literal["learned", "black", "zeros"] = "learned"
    concat: Literal["known"] | None = None
    pictures: int = 4

    def __post_init__(self) -> None:
        if (self.condition == "noised") != (self.no_image == "zeros"):
            raise ValueError(f'no_image: "zeros" belongs to condition "noised", got {self.no_image!r} with {self.condition!r}')


COSINE = ScheduleCard(kind="cosine")
# the grid of Karlo and Kandinsky 2.1: whole timesteps from T − 1 to 0 in equal parts
RESPACED = Convention(grids={"*": {"spacing": "linspace"}}, quantize=True)
LEARNED = replace(RESPACED, options={"ddpm": {"variance": "learned"}})
KANDINSKY_BETAS = ScheduleCard(kind="linear", beta_start=0.00085, beta_end=0.012)
OPENAI_L, LAION_H, LAION_BIGG = "openai/ViT-L-14", "laion2b_s32b_b79k/ViT-H-14", "laion2b_s39b_b160k/ViT-bigG-14"


def defaults(steps: int, guidance: float, side: int, sampler: str = "ddpm") -> Defaults:
    """What a stage does where its caller says nothing, for square pictures."""
    return Defaults(sampler=sampler, steps=steps, guidance=guidance, height=side, width=side)


KARLO_PRIOR = StageCard(schedule=COSINE, prediction="x0", clip_x0=5.0, convention=RESPACED, defaults=defaults(25, 4.0, 64))
KARLO = UnCLIPCard(
    name="karlo-v1-alpha", summary="Karlo 1.0 alpha: unCLIP to 64×64 pixels, and to 256×256", licence="CreativeML OpenRAIL-M", clip=OPENAI_L,
    prior=KARLO_PRIOR,
    decoder=StageCard(schedule=COSINE, prediction="eps", learned_var=True, clip_x0=1.0, convention=LEARNED, defaults=defaults(25, 8.0, 64)),
    upsamplers=(StageCard(schedule=COSINE, prediction="eps", clip_x0=1.0, convention=RESPACED, defaults=defaults(7, 1.0, 256)),),
)  # fmt: skip
UNCLIP_L = UnCLIPCard(
    name="sd-v2-1-unclip-l", summary="Stable Diffusion 2.1 unCLIP on ViT-L/14, with Karlo's prior", licence="CreativeML Open RAIL++-M", clip=OPENAI_L,
    prior=replace(KARLO_PRIOR, convention=Convention(grids={"*": {"spacing": "leading"}}, quantize=True)), condition="noised", no_image="zeros",
    decoder=StageCard(
        schedule=ScheduleCard(kind="scaled_linear", beta_start=0.00085, beta_end=0.012), prediction="v", defaults=defaults(20, 10.0, 768, "ddim")
    ),
)  # fmt: skip
UNCLIP_H = replace(
    UNCLIP_L, name="sd-v2-1-unclip-h", summary="Stable Diffusion 2.1 unCLIP on ViT-H/14: variations of pictures", clip=LAION_H, prior=None
)  # fmt: skip
KANDINSKY21 = UnCLIPCard(
    name="kandinsky-2-1", summary="Kandinsky 2.1", licence="Apache-2.0", clip=OPENAI_L, prior=replace(KARLO_PRIOR, clip_x0=10.0), no_image="black",
    decoder=StageCard(
        schedule=KANDINSKY_BETAS, prediction="eps", learned_var=True, clip_x0=2.0, convention=LEARNED, defaults=defaults(100, 4.0, 512)
    ),
)  # fmt: skip
LEADING_LEARNED = replace(LEARNED, grids={"*": {"spacing": "leading"}})
KANDINSKY22 = replace(
    KANDINSKY21, name="kandinsky-2-2", summary="Kandinsky 2.2", clip=LAION_BIGG,
    decoder=replace(KANDINSKY21.decoder, convention=LEADING_LEARNED),
)  # fmt: skip
UNCLIP_CARDS: dict[str, UnCLIPCard] = {
    card.name: card
    for card in (
        KARLO, UNCLIP_H, UNCLIP_L, KANDINSKY21, replace(KANDINSKY21, name="kandinsky-2-1-inpaint", concat="known"),
        KANDINSKY22, replace(KANDINSKY22, name="kandinsky-2-2-inpaint", concat="known"),
    )
}  # fmt: skip
