"""Contexts that the image makes (pre-model prompting): the text tower runs for every image."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSemanticSegmentation

from denseclip_hf.model.text_encoder_denseclip import pack_prompts
from denseclip_hf.optimization import optimize_for_inference
from denseclip_hf.sharing.export import export_program
from helpers.models import Tokenizer, tiny_config, tiny_model


def prompted(kind="vit", **options):
    return tiny_model(kind, prompting="pre_model", **options)


def test_gradients_reach_queries_decoder_and_image():
    model = prompted().train()
    model(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {name for name in without if "k_proj.bias" not in name}
    assert model.gamma is None


def test_classes_follow_the_image_and_images_of_a_batch_are_alone():
    model, images = prompted(), torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        together = model(images)
        for index in range(3):
            alone = model(images[index : index + 1])
            torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(together.text_embeds[index], alone.text_embeds[0], atol=1e-5, rtol=0)
    assert (together.text_embeds[0] - together.text_embeds[1]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_prompts_equal_prompts_one_by_one(attention, monkeypatch):
    """Each class of each image as a sequence `[SOS, contexts, name, EOS]` through the CLIP's own text tower."""
    model, images = prompted(), torch.randn(2, 3, 64, 64)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        packed = model(images).text_embeds
        context = model.encode_image(images).context
        contexts = model.context_decoder(model.prompts.context_vectors.expand(2, -1, -1), context)
        text = model.clip.text_model
        for image in range(2):
            for index, ids in enumerate(model.config.class_token_ids):
                words = text.embeddings.token_embedding(torch.tensor(ids))
                hidden = torch.cat([words[:1], contexts[image], words[1:]])[None]
                hidden = text.embeddings(inputs_embeds=hidden)
                length = hidden.shape[1]
                mask = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
                last = text.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state[:, -1]
                alone = model.clip.text_projection(text.final_layer_norm(last))[0]
                torch.testing.assert_close(packed[image, index], alone, atol=1e-5, rtol=0)
        # in several sequences for each image, too
        monkeypatch.setattr(
            model.text_tower, "lay_out", staticmethod(lambda ids, n: pack_prompts(ids, n, max_tokens=4))
        )
        model.prompts.set_token_ids(model.config.class_token_ids)
        assert len(model.prompts.token_ids) > 1
        torch.testing.assert_close(model(images).text_embeds, packed, atol=1e-5, rtol=0)


@torch.no_grad()
def test_saved_model_loads_bit_equal(tmp_path):
    model, images = prompted("resnet", inference_mode="slide", stride=32), torch.randn(1, 3, 64, 96)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_new_classes_and_other_words():
    model, images = prompted(), torch.randn(1, 3, 64, 64)
    words = model.encode_texts(["a tree", "road"], Tokenizer())
    assert model.predict_from_scores(images, words).score_maps.shape == (1, 2, 4, 4)
    assert model.predict_from_scores(images).score_maps.shape == (1, 3, 4, 4)
    model.set_classes(["a tree", "road"], Tokenizer())
    assert model(images).logits.shape == (1, 2, 16, 16)


@pytest.mark.slow
def test_optimized_and_exported_with_its_text_tower():
    model, images = prompted(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images).logits
        torch.testing.assert_close(optimize_for_inference(model)(images).logits, expected)
        torch.testing.assert_close(export_program(model).module()(images), expected)


def test_what_cannot_work_is_refused():
    model = prompted()
    for call in (
        model.encode_classes,
        model.freeze_classes,
        lambda: model.encode_texts(["road"], Tokenizer(), use_contexts=True),
    ):
        with pytest.raises(ValueError, match="pre_model"):
            call()
    for options in ({"num_context_tokens": 0}, {"context_decoder_num_layers": 0}, {"use_text_guidance": False}):
        with pytest.raises(StrictDataclassError, match="pre_model"):
            tiny_config(prompting="pre_model", **options)
