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
    model.requires_grad_(False)
    config.frozen_classes = True


def refuse_random_classes(config: Any, loading_info: dict[str, Any]) -> None:
    """Raise `ValueError` if a model of `config` was loaded whose class embeddings, or text tower, are noise."""
    missing = {key if isinstance(key, str) else key[0] for key in loading_info["mismatched_keys"]}
    missing |= set(loading_info["missing_keys"])
    if config.frozen_classes and "class_embeddings" in missing:
        raise ValueError(
            f"these weights hold no frozen embeddings of {config.num_labels} classes, so they would be noise: load "
            "the model as it was saved; `freeze_classes()` freezes the classes of one that has its text tower."
        )
    if not config.frozen_classes and "class_embeddings" in loading_info["unexpected_keys"]:
        raise ValueError(
            "these weights are of a model whose classes are frozen, its text tower is gone and would be noise: load "
            "it as it was saved, or the model it was made from."
        )


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


__all__ = ["drop_text_tower", "freeze_classes", "refuse_if_frozen", "refuse_random_classes"]
