"""The evaluation loop: every picture once, compared at its own size, with only counts kept."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..data import name_of
from ..metrics import confusion_matrix, scores_from_confusion_matrix
from ..model.modeling_denseclip import eval_mode
from ..model.resizing_denseclip import resize_argmax, resize_labels
from ..training.stopping import OutlivesSignals, sigterm_blocked


Sample = dict[str, Any]


class _Preparation:
    """What happens to a sample before the model sees it."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, sample: Sample, index: int, counted: bool = True) -> Sample:
        labels = torch.from_numpy(np.asarray(sample["mask"]).astype(np.int64))
        prepared = {"image": sample["image"], "mask": labels, "index": index, "counted": counted}
        prepared["name"] = name_of(sample["image"])
        if self.image_processor is not None:
            pictures = self.image_processor(prepared.pop("image"), return_tensors="pt")
            prepared["pixel_values"] = pictures["pixel_values"][0]
        return prepared


class _Share(torch.utils.data.Dataset):
    """One process's share of a sequence. Every process has as many (sharded models need that); repeats don't count."""

    def __init__(self, samples, world: int, rank: int, prepare: _Preparation):
        self.samples, self.world, self.rank, self.prepare = samples, world, rank, prepare

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.world)

    def __getitem__(self, position: int) -> Sample:
        index = self.rank + self.world * position
        return self.prepare(self.samples[index % len(self.samples)], index, index < len(self.samples))


class _StreamShare(torch.utils.data.IterableDataset):
    """One process's share of a stream: every `world`-th sample."""

    def __init__(self, samples, world: int, rank: int, prepare: _Preparation):
        self.samples, self.world, self.rank, self.prepare = samples, world, rank, prepare

    def __iter__(self) -> Iterator[Sample]:
        for index, sample in enumerate(self.samples):
            if index % self.world == self.rank:
                yield self.prepare(sample, index)


def evaluate_segmentation(
    model,
    samples,
    image_processor,
    *,
    accelerator: Accelerator | None = None,
    autocast: bool = True,
    batch_size: int = 1,
    num_workers: int = 0,
    progress: bool = True,
    predict: Callable[[Any], torch.Tensor] | None = None,
    on_prediction: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> dict[str, Any]:
    """
    Scores of `model` on `samples`, each counted exactly once, whatever the number of processes.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): put into eval mode for it, and back.
        samples (sequence or stream of `{"image", "mask"}`): images and masks of class ids.
        image_processor ([`DenseCLIPImageProcessor`]): preprocessing of the pictures.
        accelerator (`Accelerator`, *optional*): shares the pictures among its processes.
        autocast (`bool`): compute in the mixed precision of `accelerator`, if it has one.
        batch_size (`int`): most consecutive pictures of one size run together.
        num_workers (`int`): processes that read and preprocess.
        progress (`bool`): whether to show a progress bar.
        predict (`Callable`, *optional*): maps a picture to its class ids `(H, W)`, instead of one pass of the model:
            for instance [`multi_scale_segmentation`]. Then there is no `loss`, and pictures come one at a time.
        on_prediction (`Callable`, *optional*): called with the sample's index, its predicted ids `(H, W)` and its
            labels `(H, W)`.

    Returns:
        `dict` of [`scores_from_confusion_matrix`], with `confusion_matrix` `(K, K)`, `num_images` and, unless
        the model slides, `loss` averaged over the pictures.

    Raises:
        ValueError: if there is nothing to evaluate on, or, naming the picture, for logits that are NaN or infinite.
    """
    length = len(samples) if hasattr(samples, "__len__") else None
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    config, device = model.config, accelerator.device if accelerator else model.device
    prepare = _Preparation(None if predict else image_processor)
    share = (_StreamShare if length is None else _Share)(samples, world, rank, prepare)
    loader = torch.utils.data.DataLoader(
        share, batch_size=None, num_workers=0 if length is None else num_workers, worker_init_fn=OutlivesSignals()
    )
    with sigterm_blocked():
        loaded = iter(loader)
    bar = tqdm(total=length, desc="Evaluating", disable=not progress or rank > 0, leave=False)
    matrix = torch.zeros(config.num_labels, config.num_labels, dtype=torch.int64, device=device)
    totals = torch.zeros(2, device=device)  # loss, pictures
    with (
        eval_mode(model),
        torch.inference_mode(),
        accelerator.autocast() if accelerator and autocast else nullcontext(),
    ):
        for batch in same_size_batches(loaded, batch_size if world == 1 and predict is None else 1):
            predictions, batch_loss = _predictions(model, batch, device, predict)
            for sample, prediction in zip(batch, predictions, strict=True):
                if sample["counted"]:
                    reference = sample["mask"].to(device)
                    matrix += confusion_matrix(
                        prediction, reference, config.num_labels, config.semantic_loss_ignore_index
                    )
                    totals[0] += 0 if batch_loss is None else batch_loss.float()
                    totals[1] += 1
                    if on_prediction is not None:
                        on_prediction(sample["index"], prediction, reference)
                bar.update(world)
    bar.close()
    if accelerator and world > 1:
        matrix, totals = accelerator.reduce(matrix, "sum"), accelerator.reduce(totals, "sum")
    if not totals[1]:
        raise ValueError("there is no picture to evaluate on: the split is empty.")
    scores: dict[str, Any] = {**scores_from_confusion_matrix(matrix), "confusion_matrix": matrix.cpu()}
    scores["num_images"] = int(totals[1])
    if config.inference_mode == "whole" and predict is None:
        scores["loss"] = (totals[0] / totals[1]).item()
    return scores


def _predictions(
    model, batch: list[Sample], device: torch.device, predict: Callable[[Any], torch.Tensor] | None
) -> tuple[Iterable[torch.Tensor], torch.Tensor | None]:
    """Class ids of each picture at its own size, one at a time, and the mean loss of the batch where there is one."""
    if predict is not None:
        return (predict(sample["image"]).to(device) for sample in batch), None
    pixel_values = torch.stack([sample["pixel_values"] for sample in batch]).to(device)
    if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
        pixel_values = pixel_values.to(dtype)
    outputs = model(pixel_values, labels=_labels(batch, pixel_values, model.config.inference_mode))
    maps = (
        resize_argmax(logits[None], sample["mask"].shape, sample["name"])[0]
        for logits, sample in zip(outputs.logits, batch, strict=True)
    )
    return maps, outputs.loss


def same_size_batches(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Consecutive samples whose `pixel_values` have one size, at most `batch_size` at a time."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == batch_size or sample["pixel_values"].shape != batch[-1]["pixel_values"].shape):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _labels(batch: list[Sample], pixel_values: torch.Tensor, inference_mode: str) -> torch.Tensor | None:
    """Labels at the size of the network's input, for the loss; a sliding window is not trained, so has none."""
    if inference_mode == "slide":
        return None
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    return torch.stack([resize_labels(sample["mask"], size) for sample in batch]).to(pixel_values.device)


__all__ = ["evaluate_segmentation", "same_size_batches"]
