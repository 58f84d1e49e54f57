"""Features of images, whole evaluations, and their reports."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from image_sets import Listed, Means, random_images
from PIL import Image

from ldm.analysis.metrics.bootstrap import Bootstrap
from ldm.analysis.metrics.evaluation import METRICS, evaluate
from ldm.analysis.metrics.features import (
    ClipFeatures,
    DinoFeatures,
    InceptionFeatures,
    embedded_clip,
    extract,
    open_features,
    resized_positions,
)
from ldm.analysis.metrics.frechet import frechet_distance
from ldm.analysis.metrics.report import write_report
from ldm.analysis.metrics.sets import read_prompts
from ldm.catalog.lookup import ASSETS
from ldm.conditioning.exemplar_index import on_white
from ldm.weights.formats.exemplar_file import read_library

FEW = Bootstrap(resamples=20)


# Features


def test_images_of_any_sizes_keep_their_order():
    images = [*random_images(3, 8), *random_images(2, 12, seed=1), *random_images(5, 8, seed=2)]
    found = extract(images, Means(), batch=2)
    expected = torch.cat([Means()(image[None]) for image in images])
    torch.testing.assert_close(found, expected)
    assert extract([], Means()).shape == (0, 12)


def test_torchmetrics_takes_an_extractor():
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = random_images(30), random_images(30, seed=1, light=0.2)
    metric = FrechetInceptionDistance(feature=Means(), normalize=True).set_dtype(torch.float64)
    metric.update(torch.stack(a), real=True)
    metric.update(torch.stack(b), real=False)
    own = frechet_distance(extract(b, Means()), extract(a, Means()))
    assert own == pytest.approx(float(metric.compute()), rel=1e-6)


def test_the_embedded_clip_tells_captions_apart():
    from ldm.catalog.lookup import ASSETS
    from ldm.weights.formats.ldm_folder import read_network

    clip = open_features("emoji-clip")
    assert isinstance(clip, ClipFeatures) and clip.is_clip and clip.num_features == 256
    vision, _ = read_network(ASSETS / "emoji-clip", "vision")
    pixels = torch.stack(random_images(2, 80))
    torch.testing.assert_close(clip(pixels), vision(vision.prepare(pixels)).pooled)
    texts = clip.text_features(["a red apple", "a red apple " * 40, "a rocket"])
    assert texts.shape == (3, 256) and bool(torch.isfinite(texts).all())


def test_the_clip_score_equals_torchmetrics():
    """torchmetrics computes the score by the same features, of a CLIP wrapped as a model of transformers."""
    from types import SimpleNamespace

    from torchmetrics.functional.multimodal import clip_score

    clip = embedded_clip()
    library = read_library(ASSETS / "emoji-ldm")
    images, captions = [], []
    for name in ("red-apple", "cat", "rocket"):
        shown = [exemplar for exemplar in library if exemplar.name == name][:4]
        images += on_white(torch.stack([library.pixels(exemplar) for exemplar in shown]), 64)
        captions += [f"a {name.replace('-', ' ')}"] * len(shown)

    class Model(torch.nn.Module):
        config = SimpleNamespace()

        def get_image_features(self, pixels):
            return clip(pixels).double()

        def get_text_features(self, ids, mask):
            return clip.text(ids).pooled.double()

    def processor(*, text=None, images=None, **options):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        ids = clip.tokenizer(text)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    found = evaluate(Listed("a", images, captions), None, [clip], bootstrap=FEW)
    theirs = clip_score(images, captions, lambda: (Model(), processor))
    # torchmetrics cuts a negative mean at 0
    assert found.estimates[0].value > 0.1
    assert found.estimates[0].value == pytest.approx(float(theirs), rel=1e-6)
    plain = 100 * torch.cosine_similarity(clip(torch.stack(images)), clip.text_features(captions)).mean()
    assert found.estimates[0].value == pytest.approx(float(plain), rel=1e-5)


@pytest.fixture
def inception_file(tmp_path):
    """Return a file of random weights in the layout of torch-fidelity."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Blank(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    torch.manual_seed(0)
    buffer = tmp_path / "empty.pth"
    torch.save({}, buffer)
    net = Blank("inception-v3-compat", ["2048"], str(buffer))
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.mark.slow
def test_inception_equals_torch_fidelity(inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_file))
    own = InceptionFeatures(inception_file)
    levels = (torch.rand(2, 3, 40, 40) * 255).round()
    torch.testing.assert_close(own(levels / 255), theirs(levels.byte())[0], rtol=0, atol=0)


@pytest.mark.slow
def test_dino_reads_the_layout_of_meta(tmp_path):
    import timm
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
    for block in net.blocks:  # else the blocks have no effect
        torch.nn.init.ones_(block.ls1.gamma), torch.nn.init.ones_(block.ls2.gamma)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 384, 4, 4), (37, 37), mode="bicubic")
    net.pos_embed.data[:, 1:] = 0.1 * smooth.flatten(2).transpose(1, 2)
    state = {**net.state_dict(), "mask_token": torch.zeros(1, 384)}
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    own = open_features(f"dinov2={tmp_path / 'dinov2_vits14_pretrain.pth'}")
    assert isinstance(own, DinoFeatures) and (own.name, own.num_features) == ("dinov2-small", 384)
    theirs = dino_of_transformers(Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6)), state)
    pixels = torch.rand(2, 3, 224, 224)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs((pixels - mean) / std).pooler_output
    torch.testing.assert_close(own(pixels), expected, rtol=1e-3, atol=1e-4)


def dino_of_transformers(model, state):
    """Load weights in the layout of Meta into transformers' model, with the positions of Meta's code."""
    positions = resized_positions(state["pos_embed"], 16)
    model.embeddings.position_embeddings = torch.nn.Parameter(state["pos_embed"])
    sized = model.embeddings.interpolate_pos_encoding(torch.empty(1, 257, 384), 224, 224)
    # transformers resizes the positions to a size, Meta by a factor
    assert 0 < (sized - positions).std() < 0.05 * positions.std()
    model.embeddings.interpolate_pos_encoding = lambda *_: positions
    own = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"],
        "embeddings.position_embeddings": model.embeddings.position_embeddings,
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    new = "encoder.layer.0.attention.q_proj.weight" in model.state_dict()  # of transformers 5
    names = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names["attn.proj"] = "attention.o_proj" if new else "attention.output.dense"
    inputs = ("q_proj", "k_proj", "v_proj") if new else ("query", "key", "value")
    place = "attention" if new else "attention.attention"
    for i in range(12):
        for mine, yours in names.items():
            for kind in ("weight", "bias"):
                own[f"encoder.layer.{i}.{yours}.{kind}"] = state[f"blocks.{i}.{mine}.{kind}"]
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(inputs, parts, strict=True):
                own[f"encoder.layer.{i}.{place}.{name}.{kind}"] = part
        for k in (1, 2):
            own[f"encoder.layer.{i}.layer_scale{k}.lambda1"] = state[f"blocks.{i}.ls{k}.gamma"]
    model.load_state_dict(own)
    return model.eval()


@pytest.mark.parametrize(
    "spec, message",
    [
        ("emoji-clp", "did you mean 'emoji-clip'|emoji-clip"),
        ("inception", "NAME=PATH"),
        ("ViT-L-13=x.pt", "unknown open_clip model"),
    ],
)
def test_unknown_features_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        open_features(spec)


def test_files_that_do_not_fit_are_refused(tmp_path):
    torch.save({"cls_token": torch.zeros(1, 1, 10)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="expected DINOv2 of width 384"):
        open_features(f"dinov2={tmp_path / 'x.pth'}")
    with pytest.raises(FileNotFoundError):
        open_features(f"inception={tmp_path / 'none.pth'}")
    wrong = {
        "inception": {"fc.weight": torch.zeros(3)},
        "dinov2": {"cls_token": torch.zeros(1, 1, 384), "pos_embed": torch.zeros(1, 5)},
        "ViT-B-32": {"x": torch.zeros(3)},
    }
    for kind, state in wrong.items():
        torch.save(state, tmp_path / f"{kind}.pth")
        with pytest.raises(ValueError, match=f"{kind}.pth") as caught:
            open_features(f"{kind}={tmp_path / f'{kind}.pth'}")
        assert len(str(caught.value)) < 1500


def test_prompts_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"a cat\n\xff\n")
    with pytest.raises(ValueError, match="prompts.txt' is not UTF-8, at byte 6"):
        read_prompts(tmp_path / "prompts.txt")


# Evaluations


@pytest.fixture
def sets():
    """Return generated images, two of which are copies of reference images, and the reference images."""
    reference = random_images(40)
    generated = [*random_images(30, seed=1), reference[7], reference[31], torch.ones(3, 8, 8)]
    return Listed("made <by> a model", generated, [f"caption {i}" for i in range(33)]), Listed("r", reference)


def test_an_evaluation_has_every_metric_with_its_interval(sets):
    found = evaluate(*sets, [Means(is_clip=True)], bootstrap=FEW)
    assert [each.metric for each in found.estimates] == list(METRICS[:-1])  # no text tower, no score
    for each in found.estimates:
        assert each.low <= each.value <= each.high
        assert (each.generated, each.reference, each.features) == (33, 40, "means")
    assert json.loads(json.dumps(found.to_dict()))["generated"] == sets[0].name
    assert all(each.metric in found.table() for each in found.estimates)
    plain = evaluate(*sets, [Means()], metrics=["kid", "cmmd", "recall"], bootstrap=FEW)
    assert [each.metric for each in plain.estimates] == ["kid", "recall"]


def test_copies_and_outliers_are_found(sets):
    (found,) = evaluate(*sets, [Means()], metrics=["kid"], bootstrap=FEW).comparisons
    assert [(match.generated, match.reference) for match in found.best[:2]] == [(30, 7), (31, 31)]
    assert found.best[0].distance == 0 and found.best[0].realism == float("inf")
    assert found.worst[0].generated == 32 and 2 / 33 <= found.closer < 0.9
    assert len(found.best) == len(found.worst) == 8


def test_an_html_report_is_one_file(sets, tmp_path):
    found = evaluate(*sets, [Means()], bootstrap=FEW)
    path = write_report(tmp_path / "report.html", found, *sets)
    text = path.read_text(encoding="utf-8")
    assert "made &lt;by&gt; a model" in text and "made <by>" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text
    assert text.count("data:image/png;base64,") == 1 + 2 * 2 * 8
    for each in found.estimates:
        assert f"{each.value:.5g}" in text and each.warnings[0] in text


def test_a_png_report_and_one_without_reference(sets, tmp_path):
    found = evaluate(*sets, [Means()], metrics=["kid"], bootstrap=FEW)
    image = np.asarray(Image.open(write_report(tmp_path / "report.png", found, *sets)))
    assert image.shape[0] > 400 and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    alone = evaluate(sets[0], None, [embedded_clip()], bootstrap=FEW)
    text = write_report(tmp_path / "alone.html", alone, sets[0], None).read_text(encoding="utf-8")
    assert "clip_score" in text and "emoji-clip" in text


def test_impossible_evaluations_are_refused(sets, tmp_path):
    with pytest.raises(ValueError, match="metric 'fidd'"):
        evaluate(*sets, [Means()], metrics=["fidd"])
    with pytest.raises(ValueError, match="no metric of fid can be computed"):
        evaluate(sets[0], None, [Means()], metrics=["fid"])
    with pytest.raises(ValueError, match=r"\.html or \.png"):
        write_report(tmp_path / "report.pdf", evaluate(*sets, [Means()], metrics=["kid"]), *sets)
