"""`pipeline("zero-shot-image-segmentation")`: words in, masks out, with a CLIP as it is or a trained model."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel, pipeline

from denseclip_hf import DenseCLIPForSemanticSegmentation, DenseCLIPModel
from denseclip_hf.example import draw_scene, example_clip_model, example_tokenizer, make_example_clip
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from denseclip_hf.model.modeling_denseclip import ZERO_SHOT_TEMPLATES, sliding_window_logits
from denseclip_hf.model.words_denseclip import class_probabilities, color_affinity, refine_scores
from helpers.models import COST_AGGREGATION


TASK = "zero-shot-image-segmentation"
WORDS = ["sky", "road", ["person", "tree"], "car", "house", "mountain"]


def make_clip(folder, vision: str) -> str:
    """The example's CLIP with random weights, which tells places and words apart, each somehow."""
    make_example_clip(folder, vision)
    clip = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if "embedding" in name or "q_proj" in name or "k_proj" in name:
                parameter.mul_(20)
    clip.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["vit", "resnet"])
def clip_dir(request, tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / request.param, request.param)


@pytest.fixture(scope="module")
def vit_dir(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "vit", "vit")


@pytest.fixture(scope="module")
def segment(vit_dir):
    return pipeline(TASK, model=vit_dir)


@pytest.fixture(scope="module")
def image():
    return draw_scene(0).image


@pytest.fixture(scope="module")
def whole(segment, image):
    """The map of WORDS on that image."""
    return segment(image, candidate_labels=WORDS, return_map=True)


def scenes() -> list[Image.Image]:
    drawn = [draw_scene(index).image for index in range(3)]
    return [drawn[0], drawn[1].resize((100, 80)), drawn[2]]


def equal(found: list[dict], expected: list[dict], atol: float = 1e-5) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(one["segmentation"], other["segmentation"])
        and torch.allclose(one["confidence"], other["confidence"], atol=atol)
        for one, other in zip(found, expected, strict=True)
    )


@torch.no_grad()
def cosines(folder: str, image: Image.Image, window: int = 224, stride: int = 112) -> tuple[torch.Tensor, ...]:
    """Cosines of an untrained CLIP's places and WORDS at the image's size, the class of each word, the pixels."""
    clip, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 336, "longest_edge": 2048})
    words = [(word, k) for k, names in enumerate(WORDS) for word in ([names] if isinstance(names, str) else names)]
    queries = []
    for word, _ in words:
        sentences = tokenizer([t.format(word) for t in ZERO_SHOT_TEMPLATES], padding=True, return_tensors="pt")
        queries.append(F.normalize(clip.get_text_features(**sentences).pooler_output, dim=-1).mean(0))
    queries, model = F.normalize(torch.stack(queries), dim=-1), DenseCLIPModel.from_clip(clip).eval()
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    scores = sliding_window_logits(
        lambda crops: torch.einsum("bdhw,qd->bqhw", F.normalize(model.get_dense_features(crops), dim=1), queries),
        pixel_values, [window] * 2, [stride] * 2,
    )  # fmt: skip
    size = (image.height, image.width)
    scores, pixel_values = (F.interpolate(x, size, mode="bilinear") for x in (scores, pixel_values))
    return scores, torch.tensor([k for _, k in words]), pixel_values


def test_an_untrained_clip_is_read_as_published(vit_dir, image, whole):
    scores, owners, _ = cosines(vit_dir, image)
    confidence, segmentation = class_probabilities(scores, owners)[0].max(0)
    assert equal([whole], [{"segmentation": segmentation, "confidence": confidence}])


def test_windows_scale_and_refinement_are_options_of_a_call(vit_dir, segment, image, whole):
    scores, owners, pixel_values = cosines(vit_dir, image, 112, 56)
    scores = refine_scores(scores, color_affinity(pixel_values, [1, 2]), 3, [1, 2])
    confidence, segmentation = class_probabilities(scores, owners, 20)[0].max(0)
    options = {"crop_size": 112, "stride": 56, "scale": 20, "refine": 3, "dilations": [1, 2]}
    found = segment(image, candidate_labels=WORDS, return_map=True, **options)
    assert equal([found], [{"segmentation": segmentation, "confidence": confidence}])
    assert not equal([found], [whole])
    assert equal([segment(image, candidate_labels=WORDS, return_map=True)], [whole]), "a call changes no other"
    other = segment(image, candidate_labels=WORDS, return_map=True, last_block="sfp", short_side=224)
    assert other["confidence"].isfinite().all() and not equal([other], [whole])


def test_templates_are_read_from_a_file(segment, image, whole, tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of a {}.\na {} there.\n")
    asked = {"candidate_labels": WORDS, "return_map": True}
    listed = segment(image, templates=["a photo of a {}.", "a {} there."], **asked)
    assert equal([segment(image, templates=str(tmp_path / "templates.txt"), **asked)], [listed])
    assert not equal([whole], [listed])


def test_every_kind_of_call_gives_the_same(clip_dir, tmp_path):
    segment, images = pipeline(TASK, model=clip_dir), scenes()
    options = {"candidate_labels": WORDS, "return_map": True}
    expected = [segment(image, **options) for image in images]
    assert any(len(one["segmentation"].unique()) > 1 for one in expected)
    assert [tuple(one["segmentation"].shape) for one in expected] == [image.size[::-1] for image in images]
    images[0].save(tmp_path / "scene.png")
    assert equal([segment(str(tmp_path / "scene.png"), **options)], expected[:1])
    assert equal(segment(images, **options), expected)
    assert equal(segment(images, batch_size=2, **options), expected)
    assert equal(list(segment((image for image in images), batch_size=3, **options)), expected)
    own_words = [{"image": image, "candidate_labels": WORDS} for image in images]
    assert equal(segment(own_words, batch_size=3, return_map=True), expected)
    tokenizer, clip = segment.tokenizer, segment.model
    clip.save_pretrained(tmp_path)
    for model in (clip, str(tmp_path)):
        assert equal(pipeline(TASK, model=model, tokenizer=tokenizer)(images, **options), expected)


def test_images_of_a_batch_may_have_words_of_their_own(segment):
    images = scenes()
    asked = [
        {"image": image, "candidate_labels": words}
        for image, words in zip(images, (WORDS, ["car"], WORDS), strict=True)
    ]
    alone = [segment(one, return_map=True) for one in asked]
    assert equal(segment(asked, batch_size=3, return_map=True), alone)
    assert [len(one["labels"]) for one in alone] == [len(WORDS), 1, len(WORDS)]


def test_masks_are_the_maps_parts(segment, image, whole):
    found = segment(image, candidate_labels=WORDS)
    assert {one["label"] for one in found} == {whole["labels"][k] for k in whole["segmentation"].unique()}
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    for one in found:
        here = whole["segmentation"] == whole["labels"].index(one["label"])
        assert one["mask"].mode == "L" and one["mask"].size == image.size
        assert np.array_equal(np.asarray(one["mask"]), here.numpy() * np.uint8(255))
        assert one["score"] == pytest.approx(whole["confidence"][here].mean().item())


def test_what_is_unsure_or_background_has_no_label(segment, image, whole):
    threshold = whole["confidence"].median().item()
    sure = segment(image, candidate_labels=WORDS, threshold=threshold, return_map=True)
    is_void = whole["confidence"] < threshold
    assert torch.equal(sure["segmentation"], whole["segmentation"].masked_fill(is_void, -1)) and is_void.any()
    here = whole["segmentation"].unique().tolist()
    asked = [word for k, word in enumerate(WORDS) if k not in here[1:]]  # one of those that are there, and absent ones
    others = [WORDS[k] for k in here[1:]]
    both = segment(image, candidate_labels=[*asked, *others], return_map=True)
    found = segment(image, candidate_labels=asked, background=others, return_map=True)
    is_void = both["segmentation"] >= len(asked)
    assert torch.equal(found["segmentation"], both["segmentation"].masked_fill(is_void, -1)) and is_void.any()
    assert segment(image, candidate_labels=WORDS, threshold=1.0) == []


def test_words_are_encoded_once(vit_dir, monkeypatch):
    segment, images = pipeline(TASK, model=vit_dir), scenes()[:2]
    calls, encode = [], segment.model.encode_texts
    monkeypatch.setattr(segment.model, "encode_texts", lambda *args: calls.append(args) or encode(*args))
    segment(images, candidate_labels=WORDS)
    segment(images[0], candidate_labels=WORDS)
    assert len(calls) == 1
    segment(images[0], candidate_labels=["car"])
    assert len(calls) == 2


@torch.no_grad()
def test_a_trained_model_answers_with_its_score_maps(word_model_dir, image):
    segment = pipeline(TASK, model=str(word_model_dir))
    assert isinstance(segment.model, DenseCLIPForSemanticSegmentation)
    words = ["sky", "road", "car"]
    model = DenseCLIPForSemanticSegmentation.from_pretrained(word_model_dir)
    embeds = model.encode_texts(words, AutoTokenizer.from_pretrained(word_model_dir))
    inputs = AutoImageProcessor.from_pretrained(word_model_dir)(image, return_tensors="pt")
    expected = model.predict_from_scores(inputs["pixel_values"], embeds, [(image.height, image.width)])
    found = segment(image, candidate_labels=words, return_map=True)
    assert torch.equal(found["segmentation"], expected.segmentation[0])


@torch.no_grad()
def test_a_decoder_for_any_words_answers_itself(tmp_path, image):
    tokenizer, words = example_tokenizer(), ["sky", "road", "car", "tree"]
    torch.manual_seed(0)
    model = DenseCLIPForSemanticSegmentation.from_clip(
        example_clip_model(tokenizer, "vit"), ["sky", "road"], tokenizer, image_size=96, **COST_AGGREGATION
    ).eval()
    processor = DenseCLIPImageProcessorPil(size={"height": 96, "width": 96})
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    inputs = processor(image, return_tensors="pt")
    logits = model(**inputs, text_embeds=model.encode_texts(words, tokenizer)).logits
    best = F.interpolate(logits, (image.height, image.width), mode="bilinear")[0].sigmoid().max(0)
    found = pipeline(TASK, model=str(tmp_path))(image, candidate_labels=words, return_map=True)
    assert equal([found], [{"segmentation": best.indices, "confidence": best.values}])


@pytest.mark.parametrize(
    ("options", "keyword"),
    [
        ({}, "at least one"),
        ({"candidate_labels": []}, "at least one"),
        ({"candidate_labels": ["car", " "]}, "empty"),
        ({"candidate_labels": ["car", "Car"]}, "twice"),
        ({"candidate_labels": ["a red car " * 40]}, "tokens"),
        ({"candidate_labels": ["car"], "background": ["sky", ""]}, "empty"),
        ({"candidate_labels": ["car"], "threshold": 40}, "threshold"),
        ({"candidate_labels": ["car"], "templates": ["a photo"]}, "templates"),
        ({"candidate_labels": ["car"], "last_block": "unknown"}, "last_block"),
        ({"candidate_labels": ["car"], "inference_mode": "whole", "stride": 56}, "sliding window"),
    ],
)
def test_words_that_cannot_be_asked_for_are_refused(segment, image, options, keyword):
    with pytest.raises(ValueError, match=keyword):
        segment(image, **options)


def test_a_model_that_reads_no_texts_is_refused(vit_dir, image):
    clip, tokenizer = CLIPModel.from_pretrained(vit_dir), AutoTokenizer.from_pretrained(vit_dir)
    model = DenseCLIPModel.from_clip(clip, ["sky", "road"], tokenizer)
    with pytest.raises(ValueError, match="tokenizer"):
        pipeline(TASK, model=model)(scenes()[0], candidate_labels=["sky"])
    model.freeze_classes()
    with pytest.raises(ValueError, match="frozen"):
        pipeline(TASK, model=model, tokenizer=tokenizer)(image, candidate_labels=["sky"])
