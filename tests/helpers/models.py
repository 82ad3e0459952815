"""Tiny models of either image tower that build in well under a second, and what stands in for a tokenizer."""

import torch
from transformers import AutoModelForSemanticSegmentation
from transformers.modeling_layers import GradientCheckpointingLayer

from denseclip_hf import DenseCLIPConfig, DenseCLIPForSemanticSegmentation
from denseclip_hf.inference import Segmenter
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil


SOS, EOS = 98, 99
# Of a config whose decoder knows no classes, as tiny as the others.
COST_AGGREGATION = {
    "decode_head": "cost_aggregation",
    "last_block": "class_token",
    "position_interpolation": "bicubic",
    "num_context_tokens": 0,
    "context_decoder_num_layers": 0,
    "drop_path_rate": 0.0,
    "aggregator": {
        "hidden_size": 8, "num_heads": 2, "window_size": 2, "max_classes": 6, "image_guidance_size": 4,
        "text_guidance_size": 4, "skip_sizes": [6, 4], "skip_projection_sizes": [4, 2], "upsampling_sizes": [8, 4],
    },
}  # fmt: skip


def tiny_config(kind: str = "vit", num_labels: int = 3, **options) -> DenseCLIPConfig:
    """A config of either image tower whose model has some ten thousand parameters."""
    text = {
        "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "projection_dim": 12,
        "bos_token_id": SOS, "eos_token_id": EOS,
    }  # fmt: skip
    if kind == "vit":
        vision = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16, "projection_dim": 12,
        }  # fmt: skip
        clip = {"model_type": "clip", "text_config": text, "vision_config": vision, "projection_dim": 12}
    else:
        vision = {
            "embedding_size": 4, "depths": [1, 1, 1, 1], "num_attention_heads": 4, "image_size": 64,
            "projection_dim": 12,
        }  # fmt: skip
        clip = {"model_type": "clip_resnet", "text_config": text, "vision_config": vision}
    sizes = {
        "num_context_tokens": 4, "context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2,
        "context_decoder_num_layers": 1, "neck_hidden_size": 8, "decode_head_hidden_size": 8, "crop_size": 64,
    }  # fmt: skip
    token_ids = [[SOS, *range(2 + i, 3 + i + i % 3), EOS] for i in range(num_labels)]
    names = {"id2label": {i: f"class {i}" for i in range(num_labels)}, "class_token_ids": token_ids}
    return DenseCLIPConfig(**{"clip_config": clip, **sizes, **names, **options})


def tiny_model(kind: str = "vit", seed: int = 0, **options) -> DenseCLIPForSemanticSegmentation:
    """A tiny model in eval mode with seeded weights."""
    torch.manual_seed(seed)
    return DenseCLIPForSemanticSegmentation(tiny_config(kind, **options)).eval()


def varied(model, pixel_values: torch.Tensor | None = None):
    """`model`, now with predictions of every class on pictures like these, which random weights seldom give."""
    if pixel_values is None:
        pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.decode_head.classifier.bias -= model.window_logits(pixel_values).mean((0, 2, 3))
    return model


class Tokenizer:
    """Words as single ids, for tests that need no real vocabulary."""

    def __call__(self, text):
        return {"input_ids": [SOS, *(sum(map(ord, word)) % 90 for word in text.split()), EOS]}


def forward(model, images, labels=None):
    with torch.no_grad():
        return model(images, labels)


def calls_in_checkpointed_layers(model):
    """A list that grows with each run of a layer of the image tower that checkpointing runs twice."""
    calls = []
    for layer in model.clip.vision_model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    return calls


def segmenter(model=None, **options):
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    return Segmenter(tiny_model() if model is None else model, processor, **options)


def embeddings_one_by_one(model, class_token_ids):
    """Every prompt alone through the text tower: embeddings, causal mask, encoder, norm at EOS, projection."""
    text, contexts = model.clip.text_model, model.prompts.context_vectors
    embeddings = []
    for ids in class_token_ids:
        tokens = text.embeddings.token_embedding(torch.tensor([ids]))
        if contexts is not None:
            tokens = torch.cat([tokens[:, :1], contexts[None], tokens[:, 1:]], dim=1)
        length = tokens.shape[1]
        hidden = text.embeddings(inputs_embeds=tokens)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        hidden = text.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        embeddings.append(model.clip.text_projection(text.final_layer_norm(hidden[:, -1])))
    return torch.cat(embeddings)


CLASSES = ["sky", "road", "tree"]  # of the model in the fixture `word_model_dir`
WORDS = ["a cat on grass", "house", "<b>{{dog}}</b> ${1}"]  # awkward on a page


@torch.no_grad()
def saved_frozen_and_loaded(model, folder):
    """`model` with frozen classes as it loads again, once it was seen to compute the same bits at each step."""
    images = torch.randn(1, 3, 80, 64)
    model.save_pretrained(folder)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert torch.equal(loaded(images).logits, model(images).logits)
    model.freeze_classes()
    model.save_pretrained(folder)
    frozen = AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert torch.equal(frozen(images).logits, loaded(images).logits)
    return frozen
