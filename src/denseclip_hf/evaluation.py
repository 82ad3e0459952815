"""The evaluation loop: every picture once, compared at its own size, with only counts kept."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .metrics import confusion_matrix, scores_from_confusion_matrix
from .resizing_denseclip import resize_argmax, resize_labels
from .transforms import reduce_labels


Sample = dict[str, Any]


class _Prepared(torch.utils.data.Dataset):
    """Pictures, preprocessed if there is a processor, in worker processes; `indices` are this process's share."""

    def __init__(self, samples, indices: list[int], image_processor, do_reduce_labels: bool, ignore_index: int):
        self.samples, self.indices, self.image_processor = samples, indices, image_processor
        self.do_reduce_labels, self.ignore_index = do_reduce_labels, ignore_index

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample:
        sample = self.samples[self.indices[position]]
        mask = np.asarray(sample["mask"])
        mask = reduce_labels(mask, self.ignore_index) if self.do_reduce_labels else mask
        prepared = {"image": sample["image"], "mask": torch.from_numpy(mask.astype(np.int64))}
        if self.image_processor is not None:
            pictures = self.image_processor(prepared.pop("image"), return_tensors="pt")
            prepared["pixel_values"] = pictures["pixel_values"][0]
        return prepared


def evaluate_segmentation(
    model,
    samples,
    image_processor,
    *,
    do_reduce_labels: bool = False,
    accelerator: Accelerator | None = None,
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
        samples (sequence of `{"image", "mask"}`): pictures and raw masks.
        image_processor ([`DenseCLIPImageProcessor`]): preprocessing of the pictures.
        do_reduce_labels (`bool`): raw masks hold 0 for no class and n for class n - 1.
        accelerator (`Accelerator`, *optional*): shares the pictures among its processes.
        batch_size (`int`): most consecutive pictures of one size run together.
        num_workers (`int`): processes that read and preprocess.
        progress (`bool`): whether to show a progress bar.
        predict (`Callable`, *optional*): maps a picture to its class ids `(H, W)`, instead of one pass of the model:
            for instance [`multi_scale_segmentation`]. Then there is no `loss`, and pictures come one at a time.
        on_prediction (`Callable`, *optional*): called with the sample's index, its predicted ids `(H, W)` and its
            labels `(H, W)`.

    Returns:
        `dict` of [`scores_from_confusion_matrix`], with `confusion_matrix` `(K, K)` and, unless the model slides,
        `loss` averaged over the pictures.

    Raises:
        ValueError: if there is nothing to evaluate on.
    """
    count = len(samples)
    if count == 0:
        raise ValueError("there is no picture to evaluate on: the split is empty.")
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    config, device = model.config, accelerator.device if accelerator else model.device
    # Every process runs as often as the others (sharded models need that); what wraps around is not counted.
    share = [(rank + world * step) % count for step in range(math.ceil(count / world))]
    counted = [rank + world * step < count for step in range(len(share))]
    prepared = _Prepared(
        samples, share, None if predict else image_processor, do_reduce_labels, config.semantic_loss_ignore_index
    )
    loader = torch.utils.data.DataLoader(prepared, batch_size=None, num_workers=num_workers)
    bar = tqdm(total=count, desc="Evaluating", disable=not progress or rank > 0, leave=False)
    matrix = torch.zeros(config.num_labels, config.num_labels, dtype=torch.int64, device=device)
    loss, was_training, position = torch.zeros((), device=device), model.training, 0
    model.eval()
    with torch.inference_mode(), accelerator.autocast() if accelerator else nullcontext():
        for batch in same_size_batches(loader, batch_size if world == 1 and predict is None else 1):
            predictions, batch_loss = _predictions(model, batch, device, predict)
            for sample, prediction in zip(batch, predictions, strict=True):
                if counted[position]:
                    reference = sample["mask"].to(device)
                    matrix += confusion_matrix(
                        prediction, reference, config.num_labels, config.semantic_loss_ignore_index
                    )
                    if batch_loss is not None:
                        loss += batch_loss.float()
                    if on_prediction is not None:
                        on_prediction(share[position], prediction, reference)
                position += 1
                bar.update(world)
    bar.close()
    model.train(was_training)
    if accelerator and world > 1:
        matrix, loss = accelerator.reduce(matrix, "sum"), accelerator.reduce(loss, "sum")
    scores: dict[str, Any] = {**scores_from_confusion_matrix(matrix), "confusion_matrix": matrix.cpu()}
    if config.inference_mode == "whole" and predict is None:
        scores["loss"] = loss.item() / count
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
    sizes = [sample["mask"].shape for sample in batch]
    maps = (resize_argmax(logits[None], size)[0] for logits, size in zip(outputs.logits, sizes, strict=True))
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
