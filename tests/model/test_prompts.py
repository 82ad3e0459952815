"""Packed prompts are an optimisation: they must equal one sequence per class through CLIP's own text model."""

import pytest
import torch

from denseclip_hf import DenseCLIPConfig
from denseclip_hf.model.text_encoder_denseclip import (
    TextTower,
    encode_prompts,
    pack_prompts,
    tokenize_classes,
)
from helpers.models import EOS, SOS, embeddings_one_by_one, tiny_config, tiny_model


NAMES = {
    "lengths differ": [[SOS, 1, EOS], [SOS, 2, 3, 4, EOS], [SOS, 5, 6, EOS]],
    "one class": [[SOS, 1, 2, EOS]],
    "a name begins another": [[SOS, 1, EOS], [SOS, 1, 2, EOS], [SOS, 1, 2, 3, EOS]],
    "common first words": [[SOS, 7, 8, 1, EOS], [SOS, 7, 8, 2, EOS]],
    "the same name twice": [[SOS, 1, EOS], [SOS, 1, EOS]],
    "empty names": [[SOS, EOS], [SOS, 1, EOS]],
}


def packed_embeddings(model):
    return encode_prompts(model.tower, model.clip, model.prompts.layout(model.device), model.prompts)


@pytest.mark.parametrize(("contexts", "most"), [(0, 512), (4, 3), (4, 1)])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_packed_equals_embeddings_one_by_one(names, most, contexts, monkeypatch):
    monkeypatch.setattr("denseclip_hf.model.text_encoder_denseclip.pack_prompts.__defaults__", (most,))
    model = tiny_model(num_labels=len(names), class_token_ids=names, num_context_tokens=contexts)
    with torch.no_grad():
        torch.testing.assert_close(packed_embeddings(model), embeddings_one_by_one(model, names), atol=1e-5, rtol=0)


def test_packed_gradients_equal_embeddings_one_by_one():
    names = NAMES["lengths differ"]
    model = tiny_model(class_token_ids=names)
    gradients = []
    for embeddings in (packed_embeddings(model), embeddings_one_by_one(model, names)):
        model.zero_grad()
        embeddings.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-3)


def test_text_work_grows_with_distinct_tokens():
    names = [[SOS, i, EOS] for i in range(90)]
    assert pack_prompts(names, num_context_tokens=8).token_ids.numel() == 9 + 2 * 90


def as_letters(text):
    """A tokenizer that reads every letter as a token."""
    return {"input_ids": (SOS, *map(ord, text), EOS)}


def test_a_name_may_fill_every_place_beside_the_contexts():
    config = tiny_config(num_context_tokens=4)  # of 16 places
    ten = "a" * 10
    assert tokenize_classes([ten], as_letters, TextTower, config) == [[SOS, *[97] * 10, EOS]]
    with pytest.raises(ValueError, match=f"{ten}a"):
        tokenize_classes([ten, ten + "a"], as_letters, TextTower, config)


def test_names_are_put_into_the_template():
    config = tiny_config(prompt_template="a {}.")
    assert tokenize_classes(["b"], as_letters, TextTower, config) == [[SOS, *map(ord, "a b."), EOS]]
    config = tiny_config(prompt_template="{c}{{}}")  # no format string: only {} stands for something
    assert tokenize_classes(["b"], as_letters, TextTower, config) == [[SOS, *map(ord, "{c}{b}"), EOS]]


@pytest.mark.parametrize("ids", [[5, EOS], [SOS, 5], [SOS, EOS, 5, EOS]])
def test_prompts_go_from_sos_to_their_only_eos(ids):
    with pytest.raises(ValueError, match="EOS"):
        tiny_model(class_token_ids=[ids] * 3)


def test_legacy_special_tokens_are_clips_own():
    """OpenAI's configs on the Hub say bos 0 and eos 2, though the vocabulary ends with the real ones."""
    config = DenseCLIPConfig(clip_config={"text_config": {"bos_token_id": 0, "eos_token_id": 2}})
    assert TextTower.special_token_ids(config.clip_config.text_config) == (49406, 49407)
