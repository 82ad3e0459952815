"""A model with the decoder that knows no classes: new words, many words, batches, saving, freezing, refusals."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CLIPModel

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.model.cost_aggregation_denseclip import LEFT_OUT, CostAggregationHead
from helpers.models import COST_AGGREGATION, Tokenizer, tiny_config, tiny_model


def words_model(**options) -> DenseCLIPForSemanticSegmentation:
    return tiny_model(**{**COST_AGGREGATION, **options})


def images(count: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_words_never_seen_get_channels_of_their_own():
    model = words_model()
    before = {key: value.clone() for key, value in model.decode_head.state_dict().items()}
    names = ["river", "class 1", "boat", "bridge"]
    embeds = model.encode_texts(names, Tokenizer())
    asked = model(images(), text_embeds=embeds)
    assert asked.logits.shape == (2, 4, 16, 16)
    model.set_classes(names, Tokenizer())
    for key, value in model.decode_head.state_dict().items():
        assert torch.equal(value, before[key])
    torch.testing.assert_close(model(images()).logits, asked.logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_more_words_than_are_kept_lose_the_least_likely_ones():
    model = words_model()
    embeds = torch.randn(9, 12, generator=torch.Generator().manual_seed(2))
    outputs = model(images(), text_embeds=embeds)
    for logits, scores in zip(outputs.logits, outputs.score_maps, strict=True):
        kept = set(scores.amax(dim=(1, 2)).topk(6).indices.tolist())
        assert {k for k in range(9) if (logits[k] != LEFT_OUT).all()} == kept
        assert {k for k in range(9) if (logits[k] == LEFT_OUT).all()} == set(range(9)) - kept


@torch.no_grad()
def test_chunks_change_nothing():
    model = words_model(aggregator={**COST_AGGREGATION["aggregator"], "max_classes": 0})
    embeds = torch.randn(9, 12, generator=torch.Generator().manual_seed(2))
    whole = model(images(), text_embeds=embeds).logits
    model.decode_head.chunk_size = 2
    torch.testing.assert_close(model(images(), text_embeds=embeds).logits, whole, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["slide", "slide_and_whole"])
def test_each_image_has_its_own_result_at_any_size(mode):
    model = words_model(inference_mode=mode, slide_size=[96, 80] if mode == "slide_and_whole" else None)
    batch = images(2, 70, 90)
    together = model(batch).logits
    for index in range(2):
        torch.testing.assert_close(model(batch[index : index + 1]).logits[0], together[index], rtol=0, atol=1e-5)
    if mode == "slide_and_whole":
        assert together.shape[-2:] == (96, 80)
        assert together.min() >= 0 and together.max() <= 1


def test_labels_beside_other_words():
    model = words_model().train()
    embeds = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    labels = torch.full((2, 64, 64), 255)
    labels[:, :32] = 4
    outputs = model(images(), labels=labels, text_embeds=embeds)
    wanted = nn.functional.one_hot(torch.where(labels == 255, 5, labels), 6)[..., :5].permute(0, 3, 1, 2).float()
    resized = nn.functional.interpolate(outputs.logits, size=(64, 64), mode="bilinear")
    expected = nn.functional.binary_cross_entropy_with_logits(resized, wanted)
    torch.testing.assert_close(outputs.loss, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="labels"):
        model(images(), labels=labels.clamp(max=5).where(labels != 255, 5), text_embeds=embeds)


def test_fresh_weights_and_saved_ones(tmp_path):
    model = words_model()
    for layer in model.decode_head.layers:
        assert not layer.class_block.padding_token.any() and not layer.class_block.padding_guidance.any()
    weight = model.decode_head.text_projection.weight  # uniform within one over the root of its inputs
    assert 0.6 < weight.abs().max() * weight.shape[1] ** 0.5 <= 1
    with torch.no_grad():
        model.decode_head.layers[0].class_block.padding_token += 1
        expected = model(images()).logits
        model.save_pretrained(tmp_path)
        loaded = DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path)
        assert torch.equal(loaded(images()).logits, expected)
        model.freeze_classes()
        model.save_pretrained(tmp_path / "frozen")
        frozen = DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path / "frozen")
        assert torch.equal(frozen(images()).logits, expected)
        embeds = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
        assert frozen(images(), text_embeds=embeds).logits.shape[1] == 5


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = words_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(images(), labels=torch.zeros(2, 64, 64, dtype=torch.long)).loss.backward()
        gradients.append([p.grad for p in model.decode_head.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_half_precision_leaves_classes_out_too():
    head = CostAggregationHead(12, 16, **COST_AGGREGATION["aggregator"]).to(torch.bfloat16)
    given = [torch.randn(1, 12, 4, 4), torch.randn(1, 9, 1, 12), *[torch.randn(1, 16, 4, 4) for _ in range(2)]]
    features, texts, *skips = (tensor.to(torch.bfloat16) for tensor in given)
    logits = head(features, texts, skips)
    assert logits.isfinite().all() and (logits == LEFT_OUT).all(dim=(2, 3)).sum() == 3


@pytest.mark.parametrize(
    ("kind", "options", "keyword"),
    [
        ("resnet", COST_AGGREGATION, "ViT"),
        ("vit", {**COST_AGGREGATION, "use_text_guidance": False}, "use_text_guidance"),
        ("vit", {"inference_mode": "slide_and_whole"}, "cost_aggregation"),
        ("vit", {**COST_AGGREGATION, "out_indices": [0, 1, 2, 3]}, "out_indices"),
    ],
)
def test_configs_that_cannot_work(kind, options, keyword):
    with pytest.raises((ValueError, StrictDataclassError), match=keyword):
        tiny_config(kind, **options)


def test_calls_that_cannot_work():
    with pytest.raises(ValueError, match="window"):  # which the grid does not hold
        words_model(tower_image_size=80)(images())
    with pytest.raises(ValueError, match="predict_from_scores"):  # a decoder of trained classes takes no words
        tiny_model()(images(), text_embeds=torch.zeros(2, 12))


def test_from_clip_follows_cat_seg():
    clip = CLIPModel(tiny_config().clip_config)
    model = DenseCLIPForSemanticSegmentation.from_clip(
        clip, ["sky", "road"], tokenizer=Tokenizer(), image_size=96,
        decode_head="cost_aggregation", aggregator=COST_AGGREGATION["aggregator"],
    )  # fmt: skip
    assert model.config.prompt_template == "A photo of a {} in the scene"
    assert (model.config.image_size, model.config.tower_image_size, model.config.crop_size) == (64, 96, [96, 96])
    assert torch.equal(
        model.clip.vision_model.embeddings.position_embedding.weight,
        clip.vision_model.embeddings.position_embedding.weight,
    )
    assert model(images()).logits.shape == (2, 2, 24, 24)
