"""Models for inference alone: the class embeddings as numbers, without the text tower that made them."""

from typing import Any

import torch


def freeze_classes(model: Any) -> None:
    """Do what [`DenseCLIPForSemanticSegmentation.freeze_classes`] says."""
    config = model.config
    if config.frozen_classes:
        return
    if not config.use_text_guidance:
        raise ValueError("this model has no text guidance (`use_text_guidance=False`), so no classes to freeze.")
    model.eval()
    with torch.no_grad():
        embeddings = model.encode_classes().detach().clone()
    del model.prompts
    drop_text_tower(model.clip)
    model.register_buffer("class_embeddings", embeddings)
    config.frozen_classes = True


def drop_text_tower(clip: Any) -> None:
    """Take everything out of `clip` (a `CLIPModel`) that only texts, or comparing with them, need."""
    clip.text_model = clip.text_projection = clip.logit_scale = None


def refuse_if_frozen(config: Any, action: str) -> None:
    """Raise `ValueError` if a model of `config` has frozen classes, saying that it can not do `action`."""
    if config.frozen_classes:
        raise ValueError(
            f"this model's classes are frozen, so it can not {action}: its text tower is gone. Go back to the model "
            "it was made from, and call `freeze_classes()` again afterwards."
        )


__all__ = ["drop_text_tower", "freeze_classes", "refuse_if_frozen"]
