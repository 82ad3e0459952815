"""Words on an untrained CLIP, equal to the authors' programs. Cases, shapes and bounds come from the files' JSON."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from denseclip_hf import DenseCLIPModel
from denseclip_hf.model.dense_attention_denseclip import (
    LAST_BLOCKS,
    OutlierRepair,
    _heads,
    attention_maps,
    find_outliers,
    last_block,
    neighbor_gaussian,
    patch_attention,
    purify,
    repaired_attention,
    repaired_features,
    similarity,
    spread_values,
    spread_weights,
    unit_rows,
    word_positions,
)
from denseclip_hf.model.modeling_denseclip import cosine_score_maps, sliding_window_logits
from denseclip_hf.model.resizing_denseclip import fit_within, resize_image
from denseclip_hf.model.words_denseclip import (
    class_probabilities,
    color_affinity,
    color_std,
    refine_scores,
)
from denseclip_hf.words import WordOptions, WordReader
from helpers.golden import fixture as case


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


@cache
def word_model(name: str) -> DenseCLIPModel:
    return DenseCLIPModel.from_clip(clip(name)).eval()


@cache
@torch.no_grad()
def block_inputs(name: str, image: str) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """What goes into each block, and the grid."""
    model, pixel_values = word_model(name), case(name)[1][f"in/{image}"]
    states = [model.tower.embed_patches(model.clip.vision_model, pixel_values)]
    for layer in model.clip.vision_model.encoder.layers[:-1]:
        states.append(layer(states[-1], attention_mask=None))
    patch = model.config.embedding_stride
    return states, (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)


class RecordedTokenizer:
    """Gives the recorded token ids, one sentence for each word and template."""

    def __call__(self, text):
        word, template = map(int, text.split())
        ids = case("words_vit")[1]["in/text/input_ids"][word, template].long().tolist()
        return {"input_ids": ids[: ids.index(max(ids)) + 1]}


def recorded_queries() -> torch.Tensor:
    """Unit embeddings of the recorded words."""
    words, templates = case("words_vit")[1]["in/text/input_ids"].shape[:2]
    sentences = [f"{{}} {number}" for number in range(templates)]
    embeds = word_model("words_vit").encode_texts([str(n) for n in range(words)], RecordedTokenizer(), sentences)
    return F.normalize(embeds, dim=-1)


@torch.no_grad()
def vit_output(key: str) -> torch.Tensor:
    _, tensors = case("words_vit")
    model = clip("words_vit")
    if key == "out/text/embeds":
        ids = tensors["in/text/input_ids"].long()
        return model.get_text_features(ids.flatten(0, 1)).pooler_output.unflatten(0, ids.shape[:2])
    if key == "out/text/queries":
        return recorded_queries()
    _, image, what = key.split("/")
    states, grid = block_inputs("words_vit", f"image_{image}")
    x, layer = states[-1], model.vision_model.encoder.layers[-1]
    if what.startswith("gauss"):
        return neighbor_gaussian(grid, float(what.removeprefix("gauss")))
    name, _, std = what.partition("_std")
    if name in LAST_BLOCKS or name == "plain_class":
        features = last_block(layer, x, grid, LAST_BLOCKS[name.removesuffix("_class")], float(std or 5))
        features = model.visual_projection(model.vision_model.post_layernorm(features))
        return features[:, 0] if name == "plain_class" else features[:, 1:]
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


def word_scores(pixel_values: torch.Tensor) -> torch.Tensor:
    """Cosines of places and recorded queries, of images taken whole."""
    model = word_model("words_vit")
    _, context, grid = model.encode_image(pixel_values)
    queries = case("words_vit")[1]["out/text/queries"]
    return cosine_score_maps(context, queries.expand(len(context), -1, -1), grid)


def window_scores(pixel_values: torch.Tensor) -> torch.Tensor:
    protocol = case("words_protocol")[0]["protocol"]
    return sliding_window_logits(word_scores, pixel_values, [protocol["window"]] * 2, [protocol["stride"]] * 2)


def class_of_query() -> torch.Tensor:
    return case("words_vit")[1]["in/text/class_of_query"].long()


def choose(scores: torch.Tensor, size, pixel_values: torch.Tensor, **options) -> torch.Tensor:
    """The class of each pixel by [`WordReader`]; class 0 is the background."""
    reader = WordReader(word_model("words_vit"), RecordedTokenizer())
    owners = class_of_query() - 1
    scores = scores * case("words_protocol")[0]["protocol"]["logit_scale"]
    return 1 + reader.choose(scores[0], owners, size, pixel_values[0], WordOptions(**options))[0]


@torch.no_grad()
def protocol_output(key: str) -> torch.Tensor:
    description, tensors = case("words_protocol")
    protocol, notes = description["protocol"], description["notes"]
    _, group, what = key.split("/")
    if group == "post":
        logits = tensors["out/slide_two/logits"]
        size, pixel_values = tuple(logits.shape[-2:]), tensors["in/slide_two"]
        if what == "class_probs":
            return class_probabilities(logits, class_of_query(), protocol["logit_scale"])[0]
        if what != "pred_area":
            return choose(logits, size, pixel_values, threshold=float(what.removeprefix("pred_thd")))
        rule = notes["post/area: settings"]
        scale = rule["logit_scale"] / protocol["logit_scale"]
        options = {"threshold": rule["prob_thd"], "area_threshold": rule["area_thd"]}
        return choose(logits * scale, size, pixel_values, **options)
    if group == "e2e":
        return photo_output(what)
    pixel_values = tensors[f"in/{group}"]
    if what == "whole":
        return word_scores(pixel_values)
    if what == "logits":
        return window_scores(pixel_values)
    top, left, bottom, right = notes[f"{group}/windows (top, left, bottom, right)"][int(what.removeprefix("window"))]
    return word_scores(pixel_values[..., top:bottom, left:right])


@cache
def photo() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The photo resized, its pixel values, and what all windows say about it."""
    description, tensors = case("words_protocol")
    protocol, settings = description["protocol"], description["protocol"]["e2e"]
    size = fit_within(*settings["ori"], settings["short"], settings.get("long", 2048))
    resized = resize_image(tensors["in/e2e/image"].permute(2, 0, 1), size)
    mean, std = (torch.tensor(protocol[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    pixel_values = ((resized.float() - mean) / std)[None]
    return resized, pixel_values, window_scores(pixel_values)


def photo_output(what: str) -> torch.Tensor:
    settings = case("words_protocol")[0]["protocol"]["e2e"]
    size = tuple(settings["ori"])
    resized, pixel_values, scores = photo()
    if what == "resized":
        return resized.permute(1, 2, 0)
    if what == "pixel_values":
        return pixel_values
    if what == "pred_whole":
        scores = F.interpolate(word_scores(pixel_values), pixel_values.shape[-2:], mode="bilinear")
        return choose(scores, size, pixel_values)
    refine = {"refine": settings["steps"], "dilations": settings["dilations"]} if what.endswith("pamr") else {}
    if not what.startswith("logits"):
        return choose(scores, size, pixel_values, threshold=settings["prob_thd"], **refine)
    scores = F.interpolate(scores, size, mode="bilinear")
    if refine:
        colors = F.interpolate(pixel_values, size, mode="bilinear")
        affinity = color_affinity(colors, settings["dilations"])
        scores = refine_scores(scores, affinity, settings["steps"], settings["dilations"])
    return scores


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
    if what == "std":
        ours = color_std(image, settings["dilations"])
    else:
        ours = color_affinity(image, settings["dilations"])
        if what == "mask":
            ours = refine_scores(mask, ours, settings["iterations"], settings["dilations"])
    check("words_pamr", key, ours)


@cache
@torch.no_grad()
def repair_steps(image: str) -> dict[str, torch.Tensor]:
    model = clip("words_sfp")
    settings = case("words_sfp")[0]["settings"]
    share, floor = settings["class_token"], settings["threshold"]
    how = OutlierRepair(settings["factor"], settings["keep"], floor, share, settings["sharpness"])
    layers = model.vision_model.encoder.layers
    states, grid = block_inputs("words_sfp", image)
    cls_attention, self_attention = patch_attention(layers[-2], states[-2])
    outliers = find_outliers(cls_attention, self_attention, how)
    similar = similarity(purify(states[-3][:, 1:], outliers, grid), floor)
    spread = spread_weights(similar, how.sharpness)
    purified = purify(states[-1][:, 1:], outliers, grid)
    ranked = cls_attention.masked_fill(~outliers, -1).sort(1, descending=True)
    early = len(layers) // 3
    smooth = unit_rows(similarity(states[early][:, 1:], floor))
    main = repaired_attention(layers[-1], unit_rows(similar) @ purified, spread)
    total = sum(states[early:-1], start=torch.zeros_like(states[0]))
    second = spread_values(layers[-1], total[:, 1:], spread)
    features = repaired_features(layers, states, grid, how)
    return {
        "main": main,
        "main_smoothed": smooth @ (main + share * states[-1][:, :1]),
        "second_smoothed": smooth @ (second + share * total[:, :1]),
        "cls_attention": cls_attention,
        "self_attention": self_attention,
        "outliers": ranked.indices.masked_fill(ranked.values < 0, -1)[:, : how.count],
        "block11": states[-1][:, 1:],
        "purified": purified,
        "S": similar,
        "T": similarity(states[early][:, 1:], floor),
        "aggregated": unit_rows(similar) @ purified,
        "features": model.visual_projection(model.vision_model.post_layernorm(features)),
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
def test_outliers_are_repaired_where_the_config_says_so():
    model, pixel_values = clip("words_sfp"), case("words_sfp")[1]["in/a"]
    features = repaired_features(model.vision_model.encoder.layers, *block_inputs("words_sfp", "a"))
    expected = model.visual_projection(model.vision_model.post_layernorm(features))
    ours = DenseCLIPModel.from_clip(model, last_block="sfp").eval().get_dense_features(pixel_values)
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), expected)


@torch.no_grad()
def test_whole_images_keep_clips_own_embedding(tmp_path):
    model, pixel_values = clip("words_vit"), case("words_vit")[1]["in/image_a"]
    DenseCLIPModel.from_clip(model).save_pretrained(tmp_path)
    loaded = DenseCLIPModel.from_pretrained(tmp_path).eval()
    assert loaded.config.last_block == "naclip"
    ours = loaded.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(ours, model.get_image_features(pixel_values).pooler_output)
