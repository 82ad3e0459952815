"""One evaluation from arguments to files: model, data set and protocol in, report and drawings out."""

import heapq
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoTokenizer

from ..data import NAMELESS, SegmentationData, default_palette, file_stem, name_of
from ..devices import device_of
from ..files import make_directory, writing_into
from ..inference import (
    colorize,
    comparison_image,
    confusion_image,
    indexed_image,
    load_model,
    multi_scale_segmentation,
    overlay,
)
from ..metrics import boundary_counts, confusion_matrix
from ..model.class_names_denseclip import class_phrasings
from ..model.configuration_denseclip import DenseCLIPConfig
from ..model.image_processing_denseclip import decode_image
from ..model.loading_denseclip import load_pretrained, reason_of
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation, DenseCLIPModel
from ..options import EvaluationArguments, WordOptions
from ..words import WordReader, set_options
from .loop import evaluate_segmentation
from .report import (
    MatchedSamples,
    build_report,
    match_classes,
    nan_mean,
    protocol_of,
    save_report,
    scores_of_classes,
    seen_and_unseen,
)


# What a data set calls the pixels of none of its classes, if that is a class of its own.
BACKGROUND = "background"


def measure(args: EvaluationArguments, options: WordOptions | None = None) -> dict[str, Any]:
    """
    Evaluate as `args` say, words as `options` do, and write the results into `output_dir`.

    On several processes each image is counted once; the main process writes `evaluation.json`, `evaluation.csv` and,
    as asked, `predictions/`, `worst.png`, `confusion_matrix.png`.

    Returns:
        `dict`: the report that [`denseclip_hf.evaluation.report`] describes.

    Raises:
        ValueError, OSError: with one sentence, for a model, data set or protocol that cannot be used.
    """
    accelerator = Accelerator(cpu=args.device == "cpu")
    own_device = args.device not in ("auto", "cpu")
    device = device_of(args.device) if own_device else accelerator.device
    model, image_processor = load_model(args.model, args.dtype)
    model.to(device)
    for_words = args.words is not None or not isinstance(model, DenseCLIPForSemanticSegmentation)
    if options not in (None, WordOptions()) and not for_words:
        raise ValueError("these options are of words, but a segmenter's own classes are measured: add `--words {}`.")
    options = options or WordOptions()
    protocol = _set_protocol(model, image_processor, args)
    with accelerator.main_process_first():
        data = _load_data(args)
    predict: Callable[[Any], torch.Tensor] | None
    if for_words:
        predict = _word_prediction(model, image_processor, args, options, data)
        protocol |= {"words": _given(options)}
    else:
        predict = None  # one pass of the model
        if args.flip or args.scales != [1.0]:
            views = {"scales": args.scales, "flip": args.flip, "image_processor": image_processor}
            predict = partial(multi_scale_segmentation, model, **views)
        if model.config.decode_head == "cost_aggregation" and data.id2label != model.config.id2label:
            model.set_classes(data.id2label, args.model)  # it takes any
    names = model.config.id2label
    ids = match_classes(data.id2label, names)
    data.ids_of(args.unseen)  # refuses what is none
    left_out = [ids[index] for index in data.ids_of(args.leave_out)]
    protocol |= {"leave_out": args.leave_out} if left_out else {}
    ignore_index = model.config.semantic_loss_ignore_index
    make_directory(args.output_dir)
    samples = MatchedSamples(data.validation, ids, data.ignore_index, ignore_index)
    collector = _Collector(args, model.config, samples, ids)
    scores = evaluate_segmentation(
        model,
        samples,
        image_processor,
        accelerator=accelerator,
        autocast=False,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        with_loss=False,
        predict=predict,
        on_prediction=collector,
    )
    chosen = scores_of_classes(scores["confusion_matrix"], ids, left_out) | collector.boundary_scores(accelerator)
    if args.unseen:
        chosen |= seen_and_unseen(chosen["per_category_iou"], list(data.id2label.values()), args.unseen)
    worst = collector.gathered_worst()
    held_out = "held out of " + data.split_names.get("train", "the data")
    report = build_report(
        chosen,
        list(data.id2label.values()),
        model=args.model,
        dataset=args.dataset,
        split=data.split_names.get("validation", held_out),
        protocol=protocol,
        num_images=len(samples),
        absent_from_data=[name for i, name in names.items() if i not in ids],
        worst=[{"index": index, "mean_iou": -score} for score, index, _ in worst],
    )
    if accelerator.is_main_process:
        with writing_into(args.output_dir):
            save_report(report, Path(args.output_dir))
            collector.draw(Path(args.output_dir), scores["confusion_matrix"], worst)
    accelerator.wait_for_everyone()
    return report


def _word_prediction(
    model: DenseCLIPModel, image_processor, args: EvaluationArguments, options: WordOptions, data: SegmentationData
) -> Callable[[Any], torch.Tensor]:
    """
    Class ids of an image by the words for the data's classes, which become the model's. What has no class, such as
    the options' background words, belongs to the data's class "background".
    """
    if args.flip or args.scales != [1.0] or args.native_resolution:
        raise ValueError("words are measured in one view: leave out `--scales`, `--flip` and `--native_resolution`.")
    set_options(model, options.settings())
    config: Any = model.config
    config.id2label, config.semantic_loss_ignore_index = data.id2label, data.ignore_index
    config.palette = [list(color) for color in data.palette]
    names = list(data.id2label.values())
    words = read_words(args.words, names)
    void = names.index(BACKGROUND) if BACKGROUND in names else -1
    if void < 0 and (options.background or options.threshold):
        raise ValueError(
            f"`--background` and `--threshold` need a class {BACKGROUND!r} in the data, for what has none."
        )
    others = words.pop(BACKGROUND, [])
    options = replace(options, background=[*others, *options.background])
    ids = torch.tensor([*(names.index(name) for name in words), void])
    reader = WordReader(model, load_pretrained(AutoTokenizer, args.model), image_processor)
    classes = list(words.values())

    def predict(image: Any) -> torch.Tensor:
        pixels = decode_image(image)
        pixel_values = reader.preprocess(pixels, options.short_side)
        ((found, _),) = reader.read([pixel_values], [(pixels.shape[-2], pixels.shape[-1])], classes, options)
        return ids[found.cpu()]  # -1 is the last

    return predict


def read_words(text: str | None, names: list[str]) -> dict[str, list[str]]:
    """
    The phrasings of each of the classes `names`, from a file or JSON as `EvaluationArguments.words` describes it.

    Raises:
        ValueError: if it is no such mapping, or of other classes.
    """
    try:
        source = "{}" if text is None else text if text.startswith("{") else Path(text).read_text(encoding="utf-8")
        given = dict(yaml.safe_load(source))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"`--words` {text} is no mapping from the data's classes to words, as YAML or JSON ({reason_of(error)})."
        ) from error
    if unknown := [str(name) for name in given if name not in names]:
        raise ValueError(f"`--words` has words for {unknown[0]!r}, which is none of the data's classes: correct it.")
    phrasings = class_phrasings([given.get(name, name) for name in names])
    return dict(zip(names, phrasings, strict=True))


def _given(options: WordOptions) -> dict[str, Any]:
    """What of `options` is not as by default."""
    default = asdict(WordOptions())
    return {name: value for name, value in asdict(options).items() if value != default[name]}


def _set_protocol(model: DenseCLIPModel, image_processor, args: EvaluationArguments) -> dict[str, Any]:
    """Give config and image processor what `args` ask for, and say what that is."""
    settings = args.settings()
    if args.native_resolution:
        if args.inference_mode == "whole":
            raise ValueError("`--native_resolution` works in windows: leave out `--inference_mode whole`.")
        settings["inference_mode"], image_processor.do_resize = "slide", False
    set_options(model, settings)
    size = image_processor.size if image_processor.do_resize else None
    dtype = str(model.dtype).removeprefix("torch.")
    return protocol_of(model.config, size, args.scales, args.flip) | {"dtype": dtype}


def _load_data(args: EvaluationArguments) -> SegmentationData:
    data = args.load(validation_split=args.split)
    rows: Any = data.validation
    if rows is None:
        raise ValueError(f"{args.dataset} has no validation split: name one with `--split`.")
    if args.max_images is not None:
        data.validation = rows.select(range(min(args.max_images, len(rows))))
    return data


class _Collector:
    """Looks at every prediction: contours, the worst images so far, files of predictions."""

    def __init__(self, args: EvaluationArguments, config: DenseCLIPConfig, samples: MatchedSamples, ids: list[int]):
        self.args, self.config, self.samples, self.ids = args, config, samples, ids
        self.palette = config.palette or default_palette(len(config.id2label))
        self.boundary: torch.Tensor | None = None
        self.worst: list[tuple[float, int, np.ndarray]] = []  # a heap of (-mean IoU, index, prediction)
        self.folder = Path(args.output_dir) / "predictions"
        if args.save_predictions:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, index: int, prediction: torch.Tensor, reference: torch.Tensor) -> None:
        labels = len(self.config.id2label)
        ignore: Any = self.config.semantic_loss_ignore_index
        if self.args.boundary_iou:
            counts = boundary_counts(prediction, reference, labels, ignore)
            self.boundary = counts if self.boundary is None else self.boundary + counts
        if self.args.worst:
            matrix = confusion_matrix(prediction, reference, labels, ignore)
            score = scores_of_classes(matrix, self.ids)["mean_iou"]
            if not math.isnan(score):
                kept = prediction.cpu().numpy().astype(np.uint16)
                heapq.heappush(self.worst, (-score, index, kept))
                if len(self.worst) > self.args.worst:
                    heapq.heappop(self.worst)
        if self.args.save_predictions:
            name = name_of(self.samples.samples[index]["image"])
            stem = "" if name == NAMELESS else f"_{file_stem(name.split('::')[0])}"
            image = indexed_image(prediction.cpu().numpy(), self.palette)
            with writing_into(self.folder):
                image.save(self.folder / f"{index:06d}{stem}.png")

    def boundary_scores(self, accelerator: Accelerator) -> dict[str, Any]:
        if not self.args.boundary_iou:
            return {}
        labels = len(self.config.id2label)
        counts = torch.zeros(3, labels, dtype=torch.int64) if self.boundary is None else self.boundary
        counts = counts.to(accelerator.device)
        both, predicted, labeled = accelerator.reduce(counts, "sum").cpu().double()
        iou = (both / (predicted + labeled - both))[self.ids].tolist()
        return {"mean_boundary_iou": nan_mean(iou), "per_category_boundary_iou": iou}

    def gathered_worst(self) -> list[tuple[float, int, np.ndarray]]:
        """The worst images of all processes, the worst first."""
        if not self.args.worst:
            return []
        return sorted(gather_object(self.worst), key=lambda entry: (-entry[0], entry[1]))[: self.args.worst]

    def draw(self, folder: Path, matrix: torch.Tensor, worst: list[tuple[float, int, np.ndarray]]) -> None:
        names, rows = self.config.id2label, []
        for _, index, prediction in worst:
            sample = self.samples[index]
            image = sample["image"]
            truth = colorize(sample["mask"], self.palette)
            rows.append([image, overlay(image, prediction, self.palette), colorize(prediction, self.palette), truth])
        if rows:
            titles = ["image", "prediction over image", "prediction", "truth (black: void)"]
            comparison_image(rows, titles, names, self.palette).save(folder / "worst.png")
        if self.args.confusion_matrix:
            drawn = confusion_image(matrix[self.ids], [names[i] for i in self.ids], list(names.values()))
            drawn.save(folder / "confusion_matrix.png")


__all__ = ["EvaluationArguments", "measure"]
