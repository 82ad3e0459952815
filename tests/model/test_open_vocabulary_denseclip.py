import pytest
import torch
from torch.nn import functional as F

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.example import example_clip_model, example_tokenizer
from denseclip_hf.model.modeling_denseclip import ZERO_SHOT_TEMPLATES, sliding_window_logits
from helpers.models import Tokenizer, tiny_model


SIZES = {"context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2, "neck_hidden_size": 8}
NAMES = ["sky", "house", "a tree with yellow leaves"]


@pytest.fixture(scope="module")
def tokenizer():
    return example_tokenizer()


@pytest.fixture(scope="module")
def clip(tokenizer):
    return example_clip_model(tokenizer, "vit")


@pytest.fixture(params=[0, 4], ids=["fixed prompt", "contexts"])
def model(request, clip, tokenizer):
    torch.manual_seed(0)
    options = {"num_context_tokens": request.param, "image_size": 64, **SIZES}
    return DenseCLIPForSemanticSegmentation.from_clip(clip, NAMES, tokenizer, **options).eval()


def dense_embeddings(model, images):
    with torch.no_grad():
        _, context, (height, width) = model.encode_image(images)
    return context[:, 1:].unflatten(1, (height, width))


# Embeddings of texts


def test_without_templates_texts_are_read_as_the_models_own_classes(model, tokenizer):
    torch.testing.assert_close(model.encode_texts(NAMES, tokenizer), model.encode_classes(), atol=1e-5, rtol=0)


def test_templates_are_averaged_as_clip_does_and_keep_their_length(model, clip, tokenizer):
    expected = []
    for name in NAMES:
        sentences = [template.format(name) for template in ZERO_SHOT_TEMPLATES]
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        with torch.no_grad():
            vectors = clip.get_text_features(**tokens).pooler_output
        expected.append(F.normalize(F.normalize(vectors, dim=-1).mean(0), dim=0) * vectors.norm(dim=-1).mean())
    embeds = model.encode_texts(NAMES, tokenizer, ZERO_SHOT_TEMPLATES)
    torch.testing.assert_close(embeds, torch.stack(expected), atol=1e-5, rtol=0)


def test_several_sentences_describe_one_class(model, tokenizer):
    both, first, second = (
        model.encode_texts([words], tokenizer)[0] for words in (["sky", "blue heaven"], "sky", "blue heaven")
    )
    expected = F.normalize(F.normalize(first, dim=0) + F.normalize(second, dim=0), dim=0)
    expected *= (first.norm() + second.norm()) / 2
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=0)


def test_contexts_go_before_templates_only_when_asked(model, tokenizer):
    plain, asked = (model.encode_texts(NAMES, tokenizer, ["a {}."], use_contexts=c) for c in (None, True))
    assert torch.allclose(plain, asked) == (model.config.num_context_tokens == 0)


def test_many_prompts_go_in_passes(model, tokenizer, monkeypatch):
    at_once = model.encode_texts(NAMES, tokenizer, ZERO_SHOT_TEMPLATES)
    monkeypatch.setattr("denseclip_hf.model.modeling_denseclip.PROMPTS_PER_PASS", 4)
    torch.testing.assert_close(model.encode_texts(NAMES, tokenizer, ZERO_SHOT_TEMPLATES), at_once, atol=1e-5, rtol=0)


def test_each_pixel_goes_to_the_nearest_embedding(kind, images):
    model = tiny_model(kind)
    z = dense_embeddings(model, images)[0]
    rows, columns = z.shape[:2]
    places = [(0, 0), (rows - 1, columns - 1), (0, columns - 1)]
    classes = torch.stack([3.0 * z[place] for place in places])  # length does not matter
    found = model.predict_from_scores(images[:1], classes, [(rows, columns)], use_context_decoder=False)
    assert [found.segmentation[0][place].item() for place in places] == [0, 1, 2]
    expected = torch.einsum("hwd,kd->khw", F.normalize(z, dim=-1), F.normalize(classes, dim=-1))
    torch.testing.assert_close(found.score_maps[0], expected, atol=1e-5, rtol=0)


def test_own_classes_have_the_score_maps_of_forward(kind, images):
    model = tiny_model(kind)
    with torch.no_grad():
        score_maps = model(images).score_maps
    found = model.predict_from_scores(images)
    assert torch.equal(found.score_maps, score_maps)
    upsampled = F.interpolate(score_maps, (64, 64), mode="bilinear").argmax(1)
    assert torch.equal(torch.stack(found.segmentation), upsampled)


@pytest.mark.parametrize("sliding", [False, True])
def test_pictures_of_mixed_sizes_have_the_results_they_have_alone(sliding):
    model = tiny_model(**({"inference_mode": "slide", "crop_size": 48, "stride": 32} if sliding else {}))
    pictures = [torch.randn(3, 64, 96), torch.randn(1, 3, 96, 64), torch.randn(3, 64, 96)]
    classes, sizes = torch.randn(5, 12), [(10, 20), (30, 20), (64, 96)]
    for targets in (None, sizes):
        found = model.predict_from_scores(pictures, classes, targets)
        for index, picture in enumerate(pictures):
            pixels = picture.reshape(1, *picture.shape[-3:])
            alone = model.predict_from_scores(pixels, classes, targets and targets[index : index + 1])
            torch.testing.assert_close(found.score_maps[index], alone.score_maps[0], atol=1e-5, rtol=0)
            assert found.segmentation[index].shape == alone.segmentation[0].shape


def test_sliding_models_slide_over_scores(images):
    model = tiny_model(inference_mode="slide", crop_size=48, stride=32)
    classes = torch.randn(5, 12)
    sliding = model.predict_from_scores(images, classes).score_maps
    model.config.inference_mode = "whole"
    by_hand = sliding_window_logits(
        lambda crops: model.predict_from_scores(crops, classes).score_maps, images, (48, 48), (32, 32), 1
    )
    torch.testing.assert_close(sliding, by_hand, atol=1e-5, rtol=0)


def test_model_stays_as_it_was(model, tokenizer, images):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.predict_from_scores(images, model.encode_texts(["car", "road"], tokenizer))
    assert model.training and model.config.num_labels == 3
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_set_classes_serves_scores_without_training(model, tokenizer, images):
    words = ["car", "road", "a person on a bicycle", "sky"]
    by_embedding = model.predict_from_scores(images, model.encode_texts(words, tokenizer))
    model.set_classes(words, tokenizer)
    found = model.predict_from_scores(images)
    torch.testing.assert_close(found.score_maps, by_embedding.score_maps, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no text guidance"):
        tiny_model(use_text_guidance=False).predict_from_scores(images)


@pytest.mark.parametrize(
    ("texts", "templates", "keyword"),
    [
        ([], None, "class name"),
        (["sky", " "], None, "class name"),
        (["sky", []], None, "class name"),
        (["sky", "Sky "], None, "twice"),
        ([["a", "b"], ["b", "a"]], None, "twice"),
        (["sky", None], None, "class name"),
        ("sky", None, "class name"),
        (["word " * 20], None, "tokens"),
        (["sky"], ["{} and {}"], "template"),
    ],
)
def test_words_that_say_nothing_or_do_not_fit_are_refused(texts, templates, keyword):
    with pytest.raises(ValueError, match=keyword):
        tiny_model().encode_texts(texts, Tokenizer(), templates)
