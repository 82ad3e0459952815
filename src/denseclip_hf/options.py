"""What commands, pipeline, page and code can be asked for: dataclasses without torch, so that help is quick."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .devices import LOADING_DTYPES, needed


if TYPE_CHECKING:
    from .data import SegmentationData

# What words are read with, and training starts from, where nothing else is asked for.
DEFAULT_CLIP = "openai/clip-vit-base-patch16"
# Of a CLIP's transformers, which its weights do not show.
ACTIVATIONS = ("quick_gelu", "gelu")
# Kinds of exported programs, and their files; the longest side of their images.
PROGRAMS = {"onnx": "model.onnx", "torch_export": "model.pt2"}
MAX_SIDE = 4096


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
        default=0.0, metadata={"help": "Classes that cover at most this share of what is not background get none."}
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
        if not 0 <= self.threshold <= 1 or not 0 <= self.area_threshold <= 1:
            shares = f"{self.threshold} and {self.area_threshold}"
            raise ValueError(f"`threshold` and `area_threshold` must be from 0 to 1, got {shares}.")
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
        ValueError: for another name, which is no file.
        ImportError: for "openai" without open_clip, whose templates these are.
    """
    given = [given] if isinstance(given, str) else given
    if given is None or len(given) != 1 or "{}" in given[0]:
        return None if given is None else list(given)
    name = given[0]
    if name == "short":
        from .model.modeling_denseclip import ZERO_SHOT_TEMPLATES

        return list(ZERO_SHOT_TEMPLATES)
    if name == "openai":
        open_clip = needed("open_clip.zero_shot_metadata", "`templates` openai", "open_clip_torch")
        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if not Path(name).is_file():
        raise ValueError(f"`templates` {name!r} is none of short, openai, a text file, or sentences with {{}}.")
    return [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]


@dataclass
class DatasetArguments:
    """Which data set, and how it is read."""

    dataset: str | None = field(
        default=None, metadata={"help": "Needed: a folder (images and masks, see docs/data.md) or a Hub name."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str | None = field(default=None, metadata={"help": "Name of the training split."})
    validation_fraction: float | None = field(
        default=0.1, metadata={"help": "Held out if there is no validation split."}
    )
    classes: str | None = field(
        default=None,
        metadata={"help": "Class names: a file (JSON, CSV, YAML, or text with one a line), or names with commas."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images (datasets)."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the masks (datasets)."})
    ignore_index: int | None = field(
        default=None, metadata={"help": "Id of pixels without a class: what the data says, or 255."}
    )
    do_reduce_labels: bool | None = field(
        default=None, metadata={"help": "Masks hold 0 for no class and n for class n - 1 (as ADE20K's)."}
    )
    skip_unpaired: bool | None = field(
        default=None, metadata={"help": "Leave out images without a mask and masks without an image."}
    )

    def load(self, **options: Any) -> "SegmentationData":
        """
        The data set, with further `options` of [`load_segmentation_dataset`].

        Raises:
            ValueError: if none is named, and as [`load_segmentation_dataset`] does.
        """
        from .data import load_segmentation_dataset

        if not self.dataset:
            raise ValueError("name a data set: `--dataset FOLDER_OR_HUB_NAME`.")
        return load_segmentation_dataset(
            self.dataset,
            self.dataset_config,
            train_split=self.train_split,
            validation_fraction=0.1 if self.validation_fraction is None else self.validation_fraction,
            classes=self.classes,
            ignore_index=self.ignore_index,
            do_reduce_labels=self.do_reduce_labels,
            image_column=self.image_column,
            label_column=self.label_column,
            skip_unpaired=bool(self.skip_unpaired),
            **options,
        )


@dataclass
class ModelArguments:
    """What is trained: a fresh segmenter around a CLIP or a backbone, or a trained one that goes on."""

    clip: str = field(
        default=DEFAULT_CLIP,
        metadata={"help": "CLIP to start from: a directory, or a name on the Hub."},
    )
    clip_config: str = field(
        default="{}", metadata={"help": "A CLIP's config as JSON: start from random weights instead of `clip`."}
    )
    backbone: str | None = field(
        default=None,
        metadata={"help": "Backbone that reads the images instead of the CLIP: a directory, or a name on the Hub."},
    )
    backbone_config: str = field(
        default="{}", metadata={"help": "A backbone's config as JSON: random weights instead of `backbone`'s."}
    )
    model: str | None = field(
        default=None, metadata={"help": "A trained DenseCLIP to go on from, directory or Hub name, instead of `clip`."}
    )
    replace_classes: bool = field(
        default=False, metadata={"help": "Give `model` the classes of the data where they differ."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer, directory or Hub name; by default the CLIP's or model's own."}
    )
    config: str = field(
        default="{}", metadata={"help": "Options of DenseCLIPConfig as JSON, such as num_context_tokens."}
    )
    balance_classes: bool = field(
        default=False,
        metadata={"help": "Weight classes by median frequency over their own, counted in all training masks first."},
    )


@dataclass
class DataArguments(DatasetArguments):
    """What it is trained on, and how images are resized and augmented (sizes in pixels)."""

    validation_split: str | None = field(default=None, metadata={"help": "Name of the validation split."})
    streaming: bool = field(default=False, metadata={"help": "Read a Hub data set without downloading it first."})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Samples, still encoded, from which a stream's next is drawn."}
    )
    crop_size: int = field(default=512, metadata={"help": "Side of the training crops."})
    native_resolution: bool = field(
        default=False, metadata={"help": "Cut crops and windows from images as they are, without resizing them first."}
    )
    scale_long: int = field(default=2048, metadata={"help": "Longest side an image is resized to."})
    scale_short: int | None = field(
        default=None, metadata={"help": "Short side an image is resized to, `crop_size` by default."}
    )
    eval_scale_short: int | None = field(
        default=None, metadata={"help": "Short side in evaluation, saved with the model; `scale_short` by default."}
    )
    ratio_min: float = field(default=0.5, metadata={"help": "Lowest random factor on that size in training."})
    ratio_max: float = field(default=2.0, metadata={"help": "Highest random factor on that size in training."})
    cat_max_ratio: float = field(default=0.75, metadata={"help": "Largest share of a crop that one class may fill."})
    photometric: bool = field(default=True, metadata={"help": "Random brightness, contrast, saturation and hue."})
    unseen: list[str] = field(
        default_factory=list,
        metadata={"help": "Classes that training must not know: their pixels have none."},
    )
    check_data: bool = field(default=True, metadata={"help": "Look at a sample of the files before training."})


@dataclass
class TrainingOptions:
    """How it is trained: the published recipe by default, and whatever else transformers' TrainingArguments take."""

    output_dir: str | None = field(default=None, metadata={"help": "Needed: the directory of the run."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Rate of what is new: contexts, γ, decoders."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's, see `parameter_groups`."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 clips nothing."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps: 80000, or -1 (count epochs) if `num_train_epochs` is given."}
    )
    num_train_epochs: float | None = field(default=None, metadata={"help": "Epochs, where `max_steps` is not given."})
    warmup_steps: float = field(default=1500, metadata={"help": "Warm-up steps, or below 1 their share of all."})
    lr_scheduler_type: str = field(
        default="polynomial", metadata={"help": "`polynomial` is the original's schedule; others are transformers'."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Images per device and forward pass."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Images of one size per forward pass."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Leave an incomplete last batch out."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: file names travel along."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Kept off: a bad loss stops training."})
    metric_for_best_model: str | None = field(default="mean_iou", metadata={"help": "What `best` means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    image_encoder_lr_multiplier: float = field(
        default=0.1,
        metadata={"help": "Learning rate of the image encoder, as a share of `learning_rate`; 0 freezes it."},
    )
    text_encoder_lr_multiplier: float = field(
        default=0.0, metadata={"help": "Learning rate of the text encoder, as a share; 0 freezes it."}
    )
    min_learning_rate: float = field(default=1e-6, metadata={"help": "Rate of every group at the last step."})
    poly_power: float = field(default=0.9, metadata={"help": "Exponent of the polynomial decay."})
    warmup_start_ratio: float = field(default=1e-6, metadata={"help": "Share of the rate at step 0."})
    channels_last: bool = field(
        default=False, metadata={"help": "Keep convolutions' tensors channels-last: faster with bf16 and ResNets."}
    )
    exempt_norms_and_biases: bool = field(default=False, metadata={"help": "No weight decay on norms and biases."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better `metric_for_best_model`."}
    )
    precision: str | None = field(
        default=None,
        metadata={
            "help": "auto: `bf16` where the hardware has it, else float32; by default as `--bf16` and `--fp16` say."
        },
    )
    save_code: bool = field(
        default=False,
        metadata={"help": "Put the model's code beside the weights, for `trust_remote_code=True`."},
    )


@dataclass
class EvaluationArguments(WindowOptions, DatasetArguments):
    """What is evaluated on what, how, and what is written."""

    model: str = field(
        default="", metadata={"help": "Needed: a segmenter or, for words, a CLIP; a directory or a name on the Hub."}
    )
    words: str | None = field(
        default=None,
        metadata={
            "help": "Measure words without training: a YAML or JSON file (or JSON) with a word or a list of phrasings "
            "for each of the data's classes that is not called by its own name; {} for none. A CLIP is measured so."
        },
    )
    split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; by default as in training on this data, or validation."}
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "Held out if there is no validation split: as the model was trained on this data, or 0.1."},
    )
    unseen: list[str] = field(
        default_factory=list, metadata={"help": "Classes that training did not know: scored apart from the others."}
    )
    leave_out: list[str] = field(
        default_factory=list, metadata={"help": "Classes that the means are not over, such as the background."}
    )
    max_images: int | None = field(default=None, metadata={"help": "Evaluate on at most N images, the first."})
    scales: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Factors on the image size."})
    flip: bool = field(default=False, metadata={"help": "Average with mirrored views."})
    native_resolution: bool = field(
        default=False, metadata={"help": "Segment in windows of the images as they are, without resizing them first."}
    )
    boundary_iou: bool = field(default=False, metadata={"help": "Also measure boundary IoU."})
    batch_size: int = field(default=1, metadata={"help": "Images of one size run together (one process, one scale)."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read and preprocess."})
    dtype: str = field(default="float32", metadata={"help": "Of the model.", "choices": list(LOADING_DTYPES)})
    device: str = field(default="auto", metadata={"help": "auto (an accelerator if there is one), cpu, or torch's."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Where results are written."})
    save_predictions: bool = field(default=False, metadata={"help": "Write predictions as indexed PNG."})
    worst: int = field(default=0, metadata={"help": "Draw the N images with the lowest mean IoU."})
    confusion_matrix: bool = field(default=False, metadata={"help": "Draw the confusion matrix."})
    update_card: bool = field(
        default=True,
        metadata={"help": "Add the result to the card of a model in a local folder (not with --max_images)."},
    )


__all__ = [
    "ACTIVATIONS",
    "DEFAULT_CLIP",
    "MAX_SIDE",
    "PROGRAMS",
    "DataArguments",
    "DatasetArguments",
    "EvaluationArguments",
    "ModelArguments",
    "TrainingOptions",
    "WindowOptions",
    "WordOptions",
    "read_templates",
]
