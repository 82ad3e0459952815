"""Words on an untrained CLIP, equal to the authors' programs. Cases, shapes and bounds come from the files' JSON."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from denseclip_hf import DenseCLIPModel
from denseclip_hf.model.dense_attention_denseclip import (
    LAST_BLOCKS,
    _heads,
    _unit_rows,
    attention_maps,
    dense_features,
    embed_patches,
    find_outliers,
    last_block,
    neighbor_gaussian,
    patch_attention,
    purify,
    repaired_attention,
    similarity,
    spread_values,
    word_positions,
)
from denseclip_hf.model.resizing_denseclip import fit_within, resize_image
from denseclip_hf.model.words_denseclip import (
    choose_classes,
    class_probabilities,
    color_affinity,
    color_std,
    encode_queries,
    encode_words,
    refine_scores,
    window_scores,
    word_scores,
)


FIXTURES = Path(__file__).parents[1] / "fixtures"


@cache
def case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((FIXTURES / f"{name}.json").read_text()), load_file(FIXTURES / f"{name}.safetensors")


@cache
def clip(name: str) -> CLIPModel:
    description, tensors = case(name)
    model = CLIPModel(CLIPConfig(**description["clip_config"]))
    state = {k.removeprefix("state_dict/"): v for k, v in tensors.items() if k.startswith("state_dict/")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing)
    return model.eval()


def outputs(name: str) -> list[str]:
    return [key for key in case(name)[0]["tensors"] if key.startswith("out/")]


def check(name: str, key: str, ours: torch.Tensor) -> None:
    description, tensors = case(name)
    expected, meaning = tensors[key], description["tensors"][key]
    if "atol" in meaning:
        torch.testing.assert_close(ours, expected, rtol=0, atol=meaning["atol"])
    else:
        assert torch.equal(ours.to(expected.dtype), expected)


def before_last(model: CLIPModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    x, grid = embed_patches(model, pixel_values)
    for layer in model.vision_model.encoder.layers[:-1]:
        x = layer(x, attention_mask=None)
    return x, grid


@torch.no_grad()
def vit_output(key: str) -> torch.Tensor:
    _, tensors = case("words_vit")
    model = clip("words_vit")
    if key == "out/text/embeds":
        ids = tensors["in/text/input_ids"].long()
        return model.get_text_features(ids.flatten(0, 1)).pooler_output.unflatten(0, ids.shape[:2])
    if key == "out/text/queries":
        return encode_queries(model, tensors["in/text/input_ids"])
    _, image, what = key.split("/")
    pixel_values = tensors[f"in/image_{image}"]
    if what.startswith("naclip_std"):
        std = float(what.removeprefix("naclip_std"))
        return dense_features(model, pixel_values, "naclip", std).flatten(2).transpose(1, 2)
    if what in LAST_BLOCKS:
        return dense_features(model, pixel_values, what).flatten(2).transpose(1, 2)
    x, grid = before_last(model, pixel_values)
    layer = model.vision_model.encoder.layers[-1]
    if what.startswith("gauss"):
        return neighbor_gaussian(grid, float(what.removeprefix("gauss")))
    if what == "plain_class":
        token = last_block(layer, x, grid, LAST_BLOCKS["plain"])[:, 0]
        return model.visual_projection(model.vision_model.post_layernorm(token))
    q, k, v = _heads(layer.self_attn, layer.layer_norm1(x))
    if what == "naclip_weights":
        return attention_maps(q, k, LAST_BLOCKS["naclip"], neighbor_gaussian(grid, 5.0))[0][0]
    if what == "csa_weights_head0":
        return sum(attention_maps(q, k, LAST_BLOCKS["sclip"]))[0, :1]
    return {
        "tokens": lambda: x,
        "positions": lambda: word_positions(model.vision_model.embeddings.position_embedding.weight, grid),
        "values": lambda: v.transpose(1, 2).flatten(2)[:, 1:],
    }[what]()


@pytest.mark.parametrize("key", outputs("words_vit"))
def test_last_block_positions_and_queries(key):
    check("words_vit", key, vit_output(key))


@torch.no_grad()
def protocol_output(key: str) -> torch.Tensor:
    description, tensors = case("words_protocol")
    vit = case("words_vit")[1]
    model, protocol, notes = clip("words_vit"), description["protocol"], description["notes"]
    queries, class_of_query = vit["out/text/queries"], vit["in/text/class_of_query"].long()
    window, stride, scale = protocol["window"], protocol["stride"], protocol["logit_scale"]
    _, group, what = key.split("/")
    if group == "post":
        logits = tensors["out/slide_two/logits"]
        if what == "pred_area":
            rule = notes["post/area: settings"]
            probabilities = class_probabilities(logits, class_of_query, rule["logit_scale"])
            return choose_classes(probabilities, rule["prob_thd"], rule["area_thd"])[0]
        probabilities = class_probabilities(logits, class_of_query, scale)
        if what == "class_probs":
            return probabilities[0]
        return choose_classes(probabilities, float(what.removeprefix("pred_thd")))[0]
    if group == "e2e":
        return photo_output(what, model, protocol, queries, class_of_query, tensors["in/e2e/image"])
    pixel_values = tensors[f"in/{group}"]
    if what == "whole":
        return word_scores(model, pixel_values, queries)
    if what == "logits":
        return window_scores(model, pixel_values, queries, window, stride)
    top, left, bottom, right = notes[f"{group}/windows (top, left, bottom, right)"][int(what.removeprefix("window"))]
    return word_scores(model, pixel_values[..., top:bottom, left:right], queries)


def photo_output(what, model, protocol, queries, class_of_query, image) -> torch.Tensor:
    settings, size = protocol["e2e"], tuple(protocol["e2e"]["ori"])
    resized = resize_image(image.permute(2, 0, 1), fit_within(*size, settings["short"], 2048))
    if what == "resized":
        return resized.permute(1, 2, 0)
    mean, std = (torch.tensor(protocol[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    pixel_values = ((resized.float() - mean) / std)[None]
    if what == "pixel_values":
        return pixel_values
    if what == "pred_whole":
        scores = word_scores(model, pixel_values, queries)
        scores = F.interpolate(F.interpolate(scores, pixel_values.shape[-2:], mode="bilinear"), size, mode="bilinear")
    else:
        scores = window_scores(model, pixel_values, queries, protocol["window"], protocol["stride"])
        scores = F.interpolate(scores, size, mode="bilinear")
    if what.endswith("pamr"):
        colors = F.interpolate(pixel_values, size, mode="bilinear")
        scores = refine_scores(colors, scores, settings["steps"], settings["dilations"])
    if what.startswith("logits"):
        return scores
    threshold = 0.0 if what == "pred_whole" else settings["prob_thd"]
    return choose_classes(class_probabilities(scores, class_of_query, protocol["logit_scale"]), threshold)[0]


@pytest.mark.parametrize("key", outputs("words_protocol"))
def test_windows_thresholds_and_photos(key):
    check("words_protocol", key, protocol_output(key))


@pytest.mark.parametrize("size", case("words_protocol")[0]["short_side_sizes"])
def test_sizes(size):
    old = [int(side) for side in size.split(" x ")]
    for rule, expected in case("words_protocol")[0]["short_side_sizes"][size].items():
        short, longest = (int(part.split()[-1]) for part in rule.split(","))
        assert list(fit_within(*old, short, longest)) == expected


@pytest.mark.parametrize("key", outputs("words_pamr"))
def test_refinement(key):
    description, tensors = case("words_pamr")
    _, run, what = key.split("/")
    settings = description["runs"][run]
    image = tensors["in/flat_image" if run == "flat" else "in/image"]
    mask = tensors.get(f"in/{run}_mask", tensors["in/mask"])
    std = color_std(image, settings["dilations"])
    if what == "mask":
        ours = refine_scores(image, mask, settings["iterations"], settings["dilations"])
    else:
        ours = std if what == "std" else color_affinity(image, std, settings["dilations"])
    check("words_pamr", key, ours)


@torch.no_grad()
def repair_steps(image: str) -> dict[str, torch.Tensor]:
    model, pixel_values = clip("words_sfp"), case("words_sfp")[1][f"in/{image}"]
    layers = model.vision_model.encoder.layers
    x, grid = embed_patches(model, pixel_values)
    states = [x]
    for layer in layers[:-1]:
        states.append(layer(states[-1], attention_mask=None))
    cls_attention, self_attention = patch_attention(layers[-2], states[-2])
    outliers = find_outliers(cls_attention, self_attention)
    similar = similarity(purify(states[-3][:, 1:], outliers, grid))
    purified = purify(states[-1][:, 1:], outliers, grid)
    ranked = cls_attention.masked_fill(~outliers, -1).sort(1, descending=True)
    settings = case("words_sfp")[0]["settings"]
    count, early, share = settings["keep"], len(layers) // 3, settings["class_token"]
    smooth = _unit_rows(similarity(states[early][:, 1:]))
    main = repaired_attention(layers[-1], _unit_rows(similar) @ purified, similar)
    total = sum(states[early:-1], start=torch.zeros_like(x))
    second = spread_values(layers[-1], total[:, 1:], similar)
    return {
        "main": main,
        "main_smoothed": smooth @ (main + share * states[-1][:, :1]),
        "second_smoothed": smooth @ (second + share * total[:, :1]),
        "cls_attention": cls_attention,
        "self_attention": self_attention,
        "outliers": ranked.indices.masked_fill(ranked.values < 0, -1)[:, :count],
        "block11": states[-1][:, 1:],
        "purified": purified,
        "S": similar,
        "T": similarity(states[early][:, 1:]),
        "aggregated": _unit_rows(similar) @ purified,
        "features": dense_features(model, pixel_values, "sfp").flatten(2).transpose(1, 2),
    }


@pytest.mark.parametrize("key", outputs("words_sfp"))
def test_outlier_repair(key):
    _, image, what = key.split("/")
    check("words_sfp", key, repair_steps(image)[what])


def test_images_without_good_neighbors_stay_finite():
    outliers = torch.zeros(1, 12, dtype=torch.bool)
    outliers[0, [0, 1, 4, 5]] = True  # the corner of a 3 x 4 grid, all of whose neighbors are outliers
    patches = purify(torch.ones(1, 12, 5), outliers, (3, 4))
    assert patches[0, 0].eq(0).all() and similarity(patches).isfinite().all()


class Scores(torch.nn.Module):
    def __init__(self, model: CLIPModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        return word_scores(self.model, pixel_values, queries)


@torch.no_grad()
def test_an_exported_model_takes_other_words():
    _, tensors = case("words_vit")
    queries, images = tensors["out/text/queries"], tensors["in/image_b"].repeat(2, 1, 1, 1)
    model = Scores(clip("words_vit"))
    shapes = {"pixel_values": {0: torch.export.Dim("images")}, "queries": {0: torch.export.Dim("queries")}}
    exported = torch.export.export(model, (images, queries), dynamic_shapes=shapes).module()
    images, queries = images.repeat(2, 1, 1, 1)[:3], queries[:4]
    torch.testing.assert_close(exported(images, queries), model(images, queries))


@pytest.mark.parametrize(
    ("classes", "keyword"),
    [
        ([], "empty"),
        ([""], "empty"),
        (["cat", ["dog", " "]], "empty"),
        (["cat", []], "empty"),
        (["cat", "cat"], "twice"),
    ],
)
def test_words_that_ask_nothing_are_refused(classes, keyword):
    with pytest.raises(ValueError, match=keyword):
        encode_words(clip("words_vit"), None, classes)


@pytest.mark.parametrize(
    "key", [key for key in outputs("words_vit") if key.rpartition("/")[2] in (*LAST_BLOCKS, "plain_class")]
)
@torch.no_grad()
def test_the_models_dense_features_are_those_of_its_last_block(key):
    _, image, method = key.split("/")
    # by default an untrained CLIP's last block attends as NACLIP's
    options = {} if method == "naclip" else {"last_block": method.removesuffix("_class")}
    model = DenseCLIPModel.from_clip(clip("words_vit"), **options).eval()
    pixel_values = case("words_vit")[1][f"in/image_{image}"]
    if method == "plain_class":
        check("words_vit", key, model.get_image_features(pixel_values).pooler_output)
    else:
        check("words_vit", key, model.get_dense_features(pixel_values).flatten(2).transpose(1, 2))


@torch.no_grad()
def test_whole_images_keep_clips_own_embedding(tmp_path):
    model, pixel_values = clip("words_vit"), case("words_vit")[1]["in/image_a"]
    DenseCLIPModel.from_clip(model).save_pretrained(tmp_path)
    loaded = DenseCLIPModel.from_pretrained(tmp_path).eval()
    assert loaded.config.last_block == "naclip"
    ours = loaded.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(ours, model.get_image_features(pixel_values).pooler_output)
    naclip = dense_features(model, pixel_values)
    torch.testing.assert_close(loaded.get_dense_features(pixel_values), naclip)
