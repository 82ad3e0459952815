"""How words and windows are asked for, by command, pipeline and page alike; without torch, so that help is quick."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class WindowOptions:
    """Whole images or windows; what is left open is as the model's config says."""

    inference_mode: str | None = field(
        default=None, metadata={"help": "whole or slide; by default what the model's config says."}
    )
    crop_size: list[int] | None = field(default=None, metadata={"help": "Window: one side, or height and width."})
    stride: list[int] | None = field(default=None, metadata={"help": "Window step: one, or down and right."})

    def settings(self) -> dict[str, Any]:
        """What is asked for, as a config holds it."""
        asked = {"inference_mode": self.inference_mode, "crop_size": self.crop_size, "stride": self.stride}
        pairs = {k: list(v) * 2 if isinstance(v, (list, tuple)) and len(v) == 1 else v for k, v in asked.items()}
        given = {name: value for name, value in pairs.items() if value is not None}
        return given if "crop_size" not in given else {"stride": None, **given}


@dataclass
class WordOptions:
    """How words are read; what is left open is as published for an untrained CLIP, or as the model was trained."""

    background: list[str] = field(
        default_factory=list, metadata={"help": "Words for all that is not asked for: its pixels get no class."}
    )
    threshold: float = field(
        default=0.0, metadata={"help": "Pixels whose class is less probable (0 to 1) get none, in masks the id 255."}
    )
    area_threshold: float = field(
        default=0.0, metadata={"help": "Classes on at most this share of the pixels beside the background get none."}
    )
    templates: list[str] | None = field(
        default=None,
        metadata={
            "help": "Sentences with one {} for the word: short (five), openai (80, from the package open_clip_torch), "
            "a text file with one a line, or the sentences. By default short, or a trained model's own prompt."
        },
    )
    scale: float | None = field(default=None, metadata={"help": "What cosines are multiplied by before the softmax."})
    short_side: int | None = field(default=None, metadata={"help": "Pixels that images are resized to."})
    last_block: str | None = field(
        default=None,
        metadata={"help": "How the image tower's last block attends: naclip, sfp, …, see DenseCLIPConfig."},
    )
    refine: int = field(default=0, metadata={"help": "Steps that move borders to edges of color (PAMR): 10 is usual."})
    dilations: list[int] = field(
        default_factory=lambda: [8, 16], metadata={"help": "Distances of the pixels that such a step compares."}
    )

    def __post_init__(self):
        for name in ("threshold", "area_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, got {getattr(self, name)}.")
        if self.scale is not None and self.scale <= 0 or self.refine < 0 or min(self.dilations, default=0) < 1:
            raise ValueError(
                f"`scale` and `dilations` must be above 0 and `refine` at least 0, got {self.scale}, {self.dilations} "
                f"and {self.refine}."
            )
        self.background = [self.background] if isinstance(self.background, str) else list(self.background)
        self.templates = read_templates(self.templates)

    def settings(self) -> dict[str, Any]:
        """What a config holds of it."""
        temperature = None if self.scale is None else 1 / self.scale
        asked = {"last_block": self.last_block, "temperature": temperature}
        return {name: value for name, value in asked.items() if value is not None}


def read_templates(given: str | Sequence[str] | None) -> list[str] | None:
    """
    The sentences that words are put into, see [`WordOptions`].

    Raises:
        ValueError: for another name, or a package that is missing.
    """
    given = [given] if isinstance(given, str) else given
    if given is None or len(given) != 1 or "{}" in given[0]:
        return None if given is None else list(given)
    name = given[0]
    if name == "short":
        from .model.modeling_denseclip import ZERO_SHOT_TEMPLATES

        return list(ZERO_SHOT_TEMPLATES)
    if name == "openai":
        try:
            from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
        except ImportError as error:
            raise ValueError(
                "the 80 templates are open_clip's: `pip install open_clip_torch`, or give a file with one a line."
            ) from error
        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    if not Path(name).is_file():
        raise ValueError(f"`templates` {name!r} is none of short, openai, a text file, or sentences with {{}}.")
    return [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]


__all__ = ["WindowOptions", "WordOptions", "read_templates"]
