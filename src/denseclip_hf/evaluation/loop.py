"""The evaluation loop: every image once, compared at its own size, with only counts kept."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from ..data import name_of
from ..inference import batches_of_one_size, is_native, segment_in_windows
from ..metrics import MeanIoU, scores_from_confusion_matrix
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation, eval_mode
from ..model.resizing_denseclip import resize_argmax, resize_labels


Sample = dict[str, Any]


class _Preparation:
    """What happens to a sample before the model sees it."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, sample: Sample, index: int, counted: bool = True) -> Sample:
        labels = torch.from_numpy(np.asarray(sample["mask"]).astype(np.int64))
        image = sample["image"]
        prepared = {"image": image, "mask": labels, "index": index, "counted": counted, "name": name_of(image)}
        if self.image_processor is not None:
            images = self.image_processor(prepared.pop("image"), return_tensors="pt")
            prepared["pixel_values"] = images["pixel_values"][0]
        return prepared


class _Share(Dataset):
    """One process's share of a sequence. All have as many, as sharded models need; repeated samples do not count."""

    def __init__(self, samples, world: int, rank: int, prepare: _Preparation):
        self.samples, self.world, self.rank, self.prepare = samples, world, rank, prepare

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.world)

    def __getitem__(self, position: int) -> Sample:
        index = self.rank + self.world * position
        return self.prepare(self.samples[index % len(self.samples)], index, index < len(self.samples))


class _StreamShare(IterableDataset):
    """One process's share of a stream: every `world`-th sample."""

    def __init__(self, samples, world: int, rank: int, prepare: _Preparation):
        self.samples, self.world, self.rank, self.prepare = samples, world, rank, prepare

    def __iter__(self) -> Iterator[Sample]:
        for index, sample in enumerate(self.samples):
            if index % self.world == self.rank:
                yield self.prepare(sample, index)


def _read_ahead(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The samples in their order; a thread reads the next two while the caller has one."""
    left = iter(samples)
    with ThreadPoolExecutor(1) as reader:
        waiting = deque(reader.submit(next, left, None) for _ in range(2))
        while (sample := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(next, left, None))
            yield sample


def evaluate_segmentation(
    model: DenseCLIPForSemanticSegmentation,
    samples,
    image_processor,
    *,
    accelerator: Accelerator | None = None,
    autocast: bool = True,
    batch_size: int = 1,
    num_workers: int = 0,
    progress: bool = True,
    with_loss: bool = True,
    predict: Callable[[Any], torch.Tensor] | None = None,
    on_prediction: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """
    Scores of `model` on `samples`, each counted exactly once, whatever the number of processes.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): put into eval mode for it, and back.
        samples (sequence or stream of `{"image", "mask"}`): images and `(H, W)` masks of class ids.
        image_processor ([`DenseCLIPImageProcessor`]): preprocessing of the images.
        accelerator (`Accelerator`, *optional*): shares the images among its processes.
        autocast (`bool`): compute in the mixed precision of `accelerator`, if it has one.
        batch_size (`int`): most images of one size that run together (in one process).
        num_workers (`int`): processes that read and preprocess; by default, and of a stream, a thread does.
        progress (`bool`): whether to show a progress bar.
        with_loss (`bool`): whether to work out the loss, of a model that takes whole images; it takes a quarter of the
            time on a CPU.
        predict (`Callable`, *optional*): maps an image to its class ids `(H, W)`, instead of one pass of the model:
            for instance [`multi_scale_segmentation`]. Then there is no `loss`, and images come one at a time.
        on_prediction (`Callable`, *optional*): called with the sample's index, its predicted ids `(H, W)` and its
            labels `(H, W)`.
        worker_init_fn (`Callable`, *optional*): called in each worker at its start.

    Returns:
        `dict` of [`scores_from_confusion_matrix`], with `confusion_matrix` `(K, K)`, `num_images` and, where it is
        worked out, `loss` averaged over the images.

    Raises:
        ValueError: if there is nothing to evaluate on, or, naming the image, for logits that are NaN or infinite.
    """
    length = len(samples) if hasattr(samples, "__len__") else None
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    config, device = model.config, accelerator.device if accelerator and world > 1 else model.device
    if predict is None and image_processor is not None and is_native(model, image_processor):
        predict = lambda image: segment_in_windows(model, image, image_processor)[0].long()  # noqa: E731
    prepare = _Preparation(None if predict else image_processor)
    share = (_StreamShare if length is None else _Share)(samples, world, rank, prepare)
    workers = 0 if length is None else num_workers
    loaded: Iterable[Sample] = DataLoader(share, batch_size=None, num_workers=workers, worker_init_fn=worker_init_fn)
    loaded = loaded if workers else _read_ahead(loaded)
    ignore_index: Any = config.semantic_loss_ignore_index
    with_loss = with_loss and predict is None and config.inference_mode == "whole"  # windows are not trained
    metric = MeanIoU(len(config.id2label), ignore_index)
    loss = torch.zeros((), device=device)
    with (
        eval_mode(model),
        torch.inference_mode(),
        accelerator.autocast() if accelerator and autocast else nullcontext(),
        tqdm(total=length, desc="Evaluating", disable=not progress or rank > 0, leave=False) as bar,
    ):
        together = batch_size if world == 1 and predict is None else 1
        for batch in batches_of_one_size(loaded, together, lambda s: getattr(s.get("pixel_values"), "shape", None)):
            predictions, batch_loss = _predictions(model, batch, device, predict, with_loss)
            for sample, prediction in zip(batch, predictions, strict=True):
                if sample["counted"]:
                    reference = sample["mask"].to(device)
                    metric.add(prediction=prediction, reference=reference)
                    loss += 0 if batch_loss is None else batch_loss.float()
                    if on_prediction is not None:
                        on_prediction(sample["index"], prediction, reference)
                bar.update(world)
    matrix, num_images = metric.confusion_matrix.to(device), torch.tensor(len(metric), device=device)
    if accelerator and world > 1:
        matrix, num_images, loss = (accelerator.reduce(total, "sum") for total in (matrix, num_images, loss))
    if not num_images:
        raise ValueError("there is no image to evaluate on: the split is empty.")
    scores: dict[str, Any] = {**scores_from_confusion_matrix(matrix), "confusion_matrix": matrix.cpu()}
    scores["num_images"] = int(num_images)
    if with_loss:
        scores["loss"] = (loss / num_images).item()
    return scores


def _predictions(
    model: DenseCLIPForSemanticSegmentation,
    batch: list[Sample],
    device: torch.device,
    predict: Callable[[Any], torch.Tensor] | None,
    with_loss: bool,
) -> tuple[Iterable[torch.Tensor], torch.Tensor | None]:
    """Class ids of each image at its own size, one at a time, and the mean loss of the batch where there is one."""
    if predict is not None:
        return (predict(sample["image"]).to(device) for sample in batch), None
    pixel_values = torch.stack([sample["pixel_values"] for sample in batch]).to(device)
    if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
        pixel_values = pixel_values.to(dtype)
    labels = None
    if with_loss:
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        labels = torch.stack([resize_labels(sample["mask"], size) for sample in batch]).to(device)
    try:
        outputs = model(pixel_values, labels=labels)
    except ValueError as error:
        raise ValueError(f"{', '.join(str(sample['name']) for sample in batch)}: {error}") from error
    maps = (
        resize_argmax(logits[None], sample["mask"].shape, sample["name"])[0]
        for logits, sample in zip(outputs.logits, batch, strict=True)
    )
    return maps, outputs.loss


__all__ = ["evaluate_segmentation"]
