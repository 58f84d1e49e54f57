"""What images are compared by: CLIP's embeddings, Inception's pooled features, or DINOv2's class token.

A `FeatureExtractor` is a module from images in [0, 1] to features, so that `torchmetrics` takes it too.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.catalog.lookup import ASSETS
from ldm.models.clip.pixels import prepare
from ldm.models.clip.towers import CLIP, TextTower, VisionTower
from ldm.models.text.bpe import Tokenizer
from ldm.support.config import nearest
from ldm.support.device import computing_dtype
from ldm.support.text import errors_of, escaped, shown
from ldm.weights.formats.ldm_folder import read_network, read_text
from ldm.weights.formats.single_file import read_tensors
from ldm.weights.hugging_face_clip import load_hugging_face_clip
from ldm.weights.open_clip import load_open_clip

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of the channels
DINO_WIDTHS = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
DINO_SIDE = 224  # pixels


class FeatureExtractor(nn.Module):
    """Images to features.

    Args:
        name: Name of the features.
        preprocessing: What is done to an image before the network, for the report.
        num_features: D, the width of a feature; torchmetrics reads it.
        is_clip: Whether the features are CLIP's image embeddings. Default: False.
    """

    def __init__(self, name: str, preprocessing: str, num_features: int, *, is_clip: bool = False) -> None:
        super().__init__()
        self.name, self.preprocessing = name, preprocessing
        self.num_features, self.is_clip = num_features, is_clip

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features (B, D) float32 of images (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def text_features(self, captions: Sequence[str]) -> Tensor | None:
        """Return the embeddings (B, D) of captions in the space of the features; None if there is none."""
        return None


class ClipFeatures(FeatureExtractor):
    """The embeddings of a CLIP, as long as its towers make them.

    Args:
        name: Name of the CLIP.
        vision: The vision tower.
        text: The text tower with its tokenizer; None if absent. Captions are cut to its length.
    """

    def __init__(self, name: str, vision: VisionTower, text: tuple[TextTower, Tokenizer] | None) -> None:
        side, width = vision.config.image_size, vision.config.embed_dim or vision.config.width
        about = f"shorter side to {side} pixels, bicubic with antialiasing, centre crop, CLIP's mean and"
        super().__init__(name, f"{about} standard deviation", width, is_clip=True)
        self.vision = vision
        self.text = None if text is None else text[0]
        self.tokenizer = None if text is None else text[1]

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (B, D) float32 of images (B, 3, H, W) in [0, 1]."""
        prepared = self.vision.prepare(pixels.to(self.vision.conv1.weight.device))  # (B, 3, S, S)
        return self.vision(prepared.to(computing_dtype(self.vision))).pooled.float()

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor | None:
        """Return the embeddings (B, D) float32 of captions; None if there is no text tower."""
        if self.text is None or self.tokenizer is None:
            return None
        length = self.text.config.context_length
        ids = self.tokenizer(list(captions), context_length=length, truncate=True)
        pooled = self.text(ids.to(self.text.positional_embedding.device)).pooled
        assert pooled is not None
        return pooled.float()

    def similarity(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image (B, 3, H, W) in [0, 1] and its prompt, shape (B,).

        Raises:
            ValueError: If there is no text tower.
        """
        texts = self.text_features(prompts)
        if texts is None:
            raise ValueError(f"{self.name!r} has no text tower: it cannot compare images with prompts")
        images = self(pixels)
        return F.cosine_similarity(images, texts.to(images.device), dim=-1)


class InceptionFeatures(FeatureExtractor):
    """The 2048 pooled features of the Inception v3 by which FID is defined, as torch-fidelity computes them.

    Args:
        weights: The file weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases. Nothing in
            it is executed.
    """

    def __init__(self, weights: str | Path) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        about = "8 bits, 299×299 by TensorFlow 1's bilinear interpolation without antialiasing, to [−1, 1]"
        super().__init__("inception", about, 2048)
        file = io.BytesIO()  # what torch-fidelity unpickles has been read by the restricted reader
        torch.save(read_tensors(weights)[0], file)
        file.seek(0)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features (B, 2048) float32 of images (B, 3, H, W) in [0, 1]."""
        levels = (pixels.float() * 255).round().clamp(0, 255).byte()
        features: Tensor = self.network(levels.to(self.network.fc.weight.device))[0]
        return features


class DinoFeatures(FeatureExtractor):
    """The normed class token of DINOv2 (Oquab et al. 2023), computed by timm.

    Args:
        weights: A file dinov2_vits14_pretrain.pth, …vitb14…, …vitl14… or …vitg14… as Meta publishes them.

    Raises:
        ValueError: If the file holds something else.
    """

    def __init__(self, weights: str | Path) -> None:
        import timm
        from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

        state, _ = read_tensors(weights)
        token = state.get("cls_token")
        width = 0 if token is None else token.shape[-1]
        if width not in DINO_WIDTHS or "pos_embed" not in state:
            raise ValueError(
                f"{str(weights)!r}: expected DINOv2 of width {', '.join(map(str, DINO_WIDTHS))} without"
                f" registers, got keys such as {', '.join(sorted(state)[:3])}"
            )
        about = f"shorter side to {DINO_SIDE} pixels, bicubic with antialiasing, centre crop, ImageNet's mean"
        super().__init__(f"dinov2-{DINO_WIDTHS[width]}", f"{about} and standard deviation", width)
        arch = f"vit_{DINO_WIDTHS[width]}_patch14_dinov2"
        network = timm.create_model(arch, pretrained=False, img_size=DINO_SIDE, num_classes=0)
        assert isinstance(network, VisionTransformer)
        state["pos_embed"] = resized_positions(state["pos_embed"].float(), DINO_SIDE // 14)
        network.load_state_dict(checkpoint_filter_fn(state, network))
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the class tokens (B, D) float32 of images (B, 3, H, W) in [0, 1]."""
        device = next(self.network.parameters()).device
        tokens: Tensor = self.network(prepare(pixels.to(device), DINO_SIDE, *IMAGENET))
        return tokens.float()


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Return DINOv2's positional embedding (1, 1 + M², D) for side × side patches, as Meta's code does.

    It interpolates by the factor (side + 0.1)/M rather than to a size.
    """
    own = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((side + 0.1) / own,) * 2, mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def embedded_clip() -> ClipFeatures:
    """Return the CLIP of the embedded models, which was trained on emoji."""
    vision, _ = read_network(ASSETS / "emoji-clip", "vision")
    text = read_text(ASSETS / "emoji-unclip")
    assert isinstance(vision, VisionTower)
    return ClipFeatures("emoji-clip", vision, (text.tower, text.tokenizer))


def folder_clip(folder: str | Path) -> ClipFeatures:
    """Return the CLIP in a folder: in Hugging Face layout, or with an ldm export of vision and text."""
    name = f"clip {Path(folder).name}"
    if (Path(folder) / "vision.yaml").is_file():
        vision, _ = read_network(folder, "vision")
        assert isinstance(vision, VisionTower)
        text = read_text(folder) if (Path(folder) / "text.yaml").is_file() else None
        return ClipFeatures(name, vision, None if text is None else (text.tower, text.tokenizer))
    return clip_features(name, load_hugging_face_clip(folder))


def clip_features(name: str, model: nn.Module) -> ClipFeatures:
    """Return the features of a CLIP, or of a vision tower alone.

    Raises:
        ValueError: If the model has no vision tower.
    """
    if isinstance(model, CLIP):
        return ClipFeatures(name, model.visual, (model.text_tower(), Tokenizer()))
    if not isinstance(model, VisionTower):
        raise ValueError(f"{name}: expected a CLIP with a vision tower, got a {type(model).__name__}")
    return ClipFeatures(name, model, None)


FEATURE_KINDS: dict[str, tuple[Callable[[str], FeatureExtractor], str]] = {
    "clip": (folder_clip, "a folder with a CLIP in Hugging Face layout, or exported by ldm"),
    "inception": (InceptionFeatures, "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"),
    "dinov2": (DinoFeatures, "Meta's dinov2_vit{s,b,l,g}14_pretrain.pth"),
}


def open_features(spec: str, *, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Return the extractor that a text names.

    Args:
        spec: "emoji-clip", the embedded CLIP; or "KIND=PATH" with the kinds of `FEATURE_KINDS`; or
            "NAME=PATH" with open_clip's name of an architecture, such as "ViT-L-14-quickgelu=ViT-L-14.pt",
            and a file of its weights (or a tag, which open_clip downloads).
        device: Where it computes. Default: "cpu".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the kind is unknown, or the file does not fit.
    """
    name, _, path = spec.partition("=")
    if name == "emoji-clip" and not path:
        found: FeatureExtractor = embedded_clip()
    elif not path:
        choices = nearest(name, ("emoji-clip", *FEATURE_KINDS))
        raise ValueError(f"features {shown(spec)}: expected 'emoji-clip' or NAME=PATH; {choices}")
    else:
        try:
            with errors_of(path):
                kind = FEATURE_KINDS.get(name)
                found = clip_features(name, load_open_clip(name, path)) if kind is None else kind[0](path)
        except (RuntimeError, LookupError, AttributeError) as error:  # of the libraries that build networks
            raise ValueError(f"{shown(path)} does not fit {name}: {escaped(error, 300)}") from None
    return found.to(device).eval().requires_grad_(False)


def extract(images: Iterable[Tensor], extractor: FeatureExtractor, *, batch: int = 32) -> Tensor:
    """Return the features (n, D) float32 of images, on the CPU.

    Args:
        images: Images (3, H, W) in [0, 1], of any sizes; neighbours of one size share a batch.
        extractor: The features.
        batch: Images per call of the network. Default: 32.
    """
    parts: list[Tensor] = []
    held: list[Tensor] = []

    def flush() -> None:
        if held:
            parts.append(extractor(torch.stack(held)).cpu())
            held.clear()

    for image in images:
        if held and (len(held) == batch or held[0].shape != image.shape):
            flush()
        held.append(image)
    flush()
    return (
        torch.cat(parts)
        if parts
        else torch.empty(0, extractor.num_features, device="cpu", dtype=torch.float32)
    )
