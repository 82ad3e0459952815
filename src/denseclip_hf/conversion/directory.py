"""The model directory that every conversion ends with: whole or not at all."""

import os
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from ..data import ClassTable
from ..files import new_directory
from ..model.configuration_denseclip import DenseCLIPConfig
from ..model.loading_denseclip import load_pretrained
from ..model.text_encoder_denseclip import tokenize_classes
from ..model.towers_denseclip import tower_of
from ..sharing import write_card
from .weights import StateDict


Model = TypeVar("Model", bound=PreTrainedModel)


def load_tokenizer(tokenizer: str | os.PathLike | PreTrainedTokenizerBase, vocab_size: int) -> PreTrainedTokenizerBase:
    """
    CLIP's tokenizer, loaded if it is given by name or directory.

    Raises:
        OSError, ValueError: if it cannot be loaded, or has another number of tokens than the checkpoint's
            `vocab_size`.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_pretrained(AutoTokenizer, tokenizer)
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the checkpoint {vocab_size}: it is another model's."
        )
    return tokenizer


def with_classes(
    config: DenseCLIPConfig, table: ClassTable, names: list[str], tokenizer: PreTrainedTokenizerBase
) -> DenseCLIPConfig:
    """`config` with the colors of `table` and, if it reads texts, the token ids of `names`, one for each class."""
    config.palette = [list(color) for color in table.palette] if table.palette else None
    if config.use_text_guidance:
        config.class_token_ids = tokenize_classes(names, tokenizer, tower_of(config.clip_config), config)
    return DenseCLIPConfig.from_dict(config.to_dict())  # loading checks the options


def write_directory(
    output_dir: str | os.PathLike,
    model_class: type[Model],
    config: PreTrainedConfig,
    weights: StateDict,
    processor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """
    Write a model with exactly `weights`, its image processor and tokenizer to the new directory `output_dir`.

    With a `source` (where the weights come from, in words) it gets a card.

    Returns:
        The model as it was saved, in eval mode.

    Raises:
        ValueError: naming a weight that is not finite in `dtype`.
        OutputError: if the directory cannot be written.
    """
    with no_init_weights():
        model = model_class(config)
    model.load_state_dict(weights, strict=True)
    model = model.to(dtype).eval()
    for key, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{key} has values that are not finite: its training failed, or `dtype` is too small for them."
            )
    with new_directory(output_dir) as directory:
        for part in (model, processor, tokenizer):
            part.save_pretrained(directory)
        if source:
            write_card(directory, name=Path(output_dir).name, source=source)
    return model
