"""Tiny image-text models of every family, with random weights, and tokenizers that end and pad texts as theirs do."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from denseclip_hf import DenseCLIPForSemanticSegmentation


NAMES = ["cat", "wet road", "tall green tree"]
SIZES = {
    "num_context_tokens": 4, "context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2,
    "context_decoder_num_layers": 1, "neck_hidden_size": 8, "decode_head_hidden_size": 8, "image_size": 64,
}  # fmt: skip
TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
# Family -> options of its config, what tokenizers put around a text, and their padding.
FAMILIES = {
    "MetaClip2": (
        {"text_config": {**TEXT, "eos_token_id": 2, "projection_dim": 12},
         "vision_config": {**VISION, "intermediate_size": 32, "projection_dim": 12}, "projection_dim": 12},
        "<s> $A </s>", "<pad>",
    ),
    "Siglip": (
        {"text_config": {**TEXT, "projection_size": 16}, "vision_config": {**VISION, "intermediate_size": 32}},
        "$A </s>", "</s>",
    ),
    # The fixed-size checkpoints of SigLIP 2 are SigLIPs whose tokenizer pads with another token than the config names.
    "Siglip 2": (
        {"text_config": {**TEXT, "projection_size": 16}, "vision_config": {**VISION, "intermediate_size": 32}},
        "$A </s>", "<pad>",
    ),
    "Tipsv2": (
        {"text_config": TEXT, "vision_config": {**VISION, "mlp_ratio": 2, "num_register_tokens": 1}},
        "$A", "<pad>",
    ),
}  # fmt: skip


def image_text_model(family, **vision):
    """A tiny model of the family's own class, every weight random."""
    options = FAMILIES[family][0]
    name = family.removesuffix(" 2")
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"{name}Model is not in transformers {transformers.__version__}, but in 5.23")
    options = {**options, "vision_config": {**options["vision_config"], **vision}}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # many start at zero or one, where a forgotten one makes no difference
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokenizer_of(family):
    """A tokenizer of a few words that ends, and pads, its texts as the family's does."""
    _, template, pad = FAMILIES[family]
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "photo", "of", *" ".join(NAMES).split()]
    tokens = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, tokens[word]) for word in ("<s>", "</s>") if word in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    ends = {"<s>": "bos_token", "</s>": "eos_token"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token="<unk>", model_max_length=16,
        **{ends[word]: word for word, _ in special},
    )  # fmt: skip


def segmenter_of(family, **options):
    """A tiny segmenter in eval mode around `image_text_model(family)`, which is returned too."""
    clip = image_text_model(family)
    options = {**SIZES, **options}
    model = DenseCLIPForSemanticSegmentation.from_clip(clip, NAMES, tokenizer=tokenizer_of(family), **options)
    return model.eval(), clip
