"""The options and the components that the model_index.json of a pipeline of diffusers names."""

from __future__ import annotations

from ldm.weights.fields.judge import Fields, by_card, fixed, followed, ignored

# The release that ldm's upscaler follows restricts the noise to 350 levels.
PIPELINE_OPTIONS: Fields = {
    "force_zeros_for_empty_prompt": followed(None, "whether an empty negative prompt is encoded as zeros"),
    "requires_aesthetics_score": by_card(False),
    "add_watermarker": ignored(None, "images carry no watermark"),
    "requires_safety_checker": ignored(True, "the option `safety` decides"),
    "max_noise_level": fixed(350),
    "is_cosxl_edit": fixed(False),
    "_load_connected_pipes": ignored(False, "every folder is given by the user"),
}
COMPONENTS = frozenset(
    (
        *(
            "unet",
            "vae",
            "vqvae",
            "movq",
            "text_encoder",
            "text_encoder_2",
            "bert",
            "tokenizer",
            "tokenizer_2",
        ),
        *("scheduler", "low_res_scheduler", "feature_extractor", "safety_checker", "image_encoder"),
        *("depth_estimator", "watermarker"),
    )
)


def is_xl(class_name: str) -> bool:
    """Return whether a pipeline's class has the option that zeroes an empty negative prompt."""
    return class_name.startswith("StableDiffusionXL")
