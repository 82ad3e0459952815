"""The training augmentation of DenseCLIP, paired for image and mask (paper, section 4.1; mmsegmentation's recipe).

Letter key: H, W the crop; h, w the image as stored. Images are 8-bit RGB, masks hold one class id per pixel.
"""

import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import TrainerCallback
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .data import NAMELESS
from .model.resizing_denseclip import fit_within, nearest_lines


# The first box and ten redraws, as in the original recipe.
MAX_CROP_DRAWS = 11
ROWS_AT_ONCE = 32  # so few stay in the processor's cache
# In steps of 2 degrees, in gray levels, and as a factor.
MAX_HUE_SHIFT, MAX_BRIGHTNESS_SHIFT, GAIN_RANGE = 18, 32, (0.5, 1.5)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Random generator of one sample in one epoch, whichever worker or process draws it (all three non-negative)."""
    return np.random.default_rng([seed, epoch, index])


def resize_region(image: Image.Image, new_size: tuple[int, int], box: tuple[int, int, int, int]) -> torch.Tensor:
    """
    The part `box` = (top, left, bottom, right) of an RGB `image` resized to `new_size` = (height, width).

    Bilinear with half-pixel centers and without antialiasing, as OpenCV resizes, within one gray level.

    Returns:
        uint8 of shape (3, bottom - top, right - left).
    """
    top, left, bottom, right = box
    step_y, step_x = image.height / new_size[0], image.width / new_size[1]
    if step_x <= 1 and step_y <= 1:  # what enlarges needs no antialiasing, so Pillow can resize the part alone
        source = (left * step_x, top * step_y, right * step_x, bottom * step_y)
        part = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, source)
        return torch.from_numpy(np.array(part)).permute(2, 0, 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return F.interpolate(pixels[None], new_size, mode="bilinear")[0, :, top:bottom, left:right]


def crop_is_varied(labels: np.ndarray, cat_max_ratio: float = 0.75, ignore_index: int = 255) -> bool:
    """
    Whether a crop shows more than one labeled class, the largest on strictly less than `cat_max_ratio` of the
    labeled pixels. `labels`: class ids, an integer array of any shape.
    """
    if ignore_index < 0:
        labels = labels[labels >= 0]
    labels = labels if labels.dtype == np.uint8 else labels.astype(np.int64)
    counts = torch.from_numpy(labels.ravel()).bincount(minlength=max(ignore_index, 0) + 1).numpy()
    if ignore_index >= 0:
        counts[ignore_index] = 0
    return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio)


def _name_of(image: Image.Image) -> str:
    return getattr(image, "filename", "") or NAMELESS


def photometric_distortion(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """
    Random brightness (±32 gray levels), contrast and saturation (×0.5…1.5) and hue (±36°), each with probability 0.5;
    contrast comes before or after saturation and hue by a coin.

    Args:
        pixels: RGB, float32 of shape (3, H, W) in 0…255; changed in place.
        rng: source of the draws.

    Returns:
        Pixels of that shape and range, which are not rounded.
    """
    apply_brightness, contrast_first, apply_contrast, apply_saturation, apply_hue = rng.random(5) < 0.5
    shift = rng.uniform(-MAX_BRIGHTNESS_SHIFT, MAX_BRIGHTNESS_SHIFT)
    contrast, saturation = rng.uniform(*GAIN_RANGE, size=2)
    turn = rng.integers(-MAX_HUE_SHIFT, MAX_HUE_SHIFT)
    for rows in pixels.split(ROWS_AT_ONCE, dim=1):
        if apply_brightness:
            rows.add_(shift).clamp_(0, 255)
        if apply_contrast and contrast_first:
            rows.mul_(contrast).clamp_(max=255)
        if apply_saturation or apply_hue:
            rows.copy_(
                _change_colors(rows, saturation if apply_saturation else 1.0, float(turn) if apply_hue else 0.0)
            )
        if apply_contrast and not contrast_first:
            rows.mul_(contrast).clamp_(max=255)
    return pixels


def _change_colors(pixels: torch.Tensor, gain: float, turn: float) -> torch.Tensor:
    """Saturation, 1 at most, times `gain` and hue plus `turn` steps of 2°, as the hexagon of HSV has them."""
    red, green, blue = pixels
    value = torch.maximum(red, green).maximum(blue)
    lowest = torch.minimum(red, green).minimum(blue)
    spread = value - lowest
    new_spread = torch.minimum(spread * gain, value)
    spread.clamp_(min=1e-6)  # gray has no hue, and 0 times any factor stays 0
    if turn == 0:
        return value - (value - pixels).mul_(new_spread.div_(spread))
    # The hue in steps of 60° from red, in -3…3, by arithmetic alone: choosing by pixel takes ten times as long.
    share, side = (red - lowest).div_(spread), (green - blue).div_(spread)
    beside = side.abs().sub_(1).mul_(1 - 2 * share).add_(share)
    hue = torch.copysign(2 - beside, side).add_(turn / 30)
    # Each channel as a share of the new spread: 1 up to 60° from its own hue (0, 2, -2), 0 from 120° on.
    shares = torch.empty_like(pixels)
    torch.sub(2, hue.abs(), out=shares[0])
    torch.maximum(2 - (hue - 2).abs_(), -2 - hue, out=shares[1])
    torch.maximum(2 - (hue + 2).abs_(), hue - 2, out=shares[2])
    return shares.clamp_(0, 1).sub_(1).mul_(new_spread).add_(value)


@dataclass
class TrainTransform:
    """
    Random resize, random crop, horizontal flip, photometric distortion, normalization and padding of one sample.

    The crop is chosen on the mask before the image is touched, and only its pixels are resampled.

    Args:
        crop_size: side, or (height, width), of what comes out, in pixels.
        scale: (long, short) sides in pixels that a ratio of 1 resizes to, the aspect ratio kept; None for the image's
            own size, however large.
        ratio_range: lowest and highest factor on `scale`, drawn uniformly.
        cat_max_ratio: a crop is redrawn, up to ten times, while one class fills this share of its labeled pixels
            or only one class is labeled; 1 takes the first crop.
        flip_probability: probability of a left-right flip.
        photometric: whether to apply [`photometric_distortion`].
        ignore_index: label of pixels without a class, and of the padding.
        image_mean, image_std: per channel, for values in 0…1; CLIP's by default.
    """

    crop_size: int | tuple[int, int] = 512
    scale: tuple[int, int] | None = (2048, 512)
    ratio_range: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip_probability: float = 0.5
    photometric: bool = True
    ignore_index: int = 255
    image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN)
    image_std: Sequence[float] = tuple(OPENAI_CLIP_STD)

    def __post_init__(self):
        side = self.crop_size
        self._crop: tuple[int, int] = (side, side) if isinstance(side, int) else (side[0], side[1])
        self._mean, self._std = (255 * torch.tensor(v)[:, None, None] for v in (self.image_mean, self.image_std))

    def __call__(self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """
        Augment one sample; neither `image` nor `mask` is changed.

        Args:
            image: RGB image, (w, h) pixels.
            mask: (h, w) integer array of class ids.
            rng: source of every random draw, see [`sample_rng`].

        Returns:
            `pixel_values`, float32 of shape (3, H, W), normalized, 0 in the padding; `labels`, int64 of shape (H, W).

        Raises:
            ValueError: if image and mask differ in size.
        """
        if image.size != mask.shape[::-1]:
            raise ValueError(
                f"{_name_of(image)}: the image is {image.width}x{image.height} pixels and its mask "
                f"{mask.shape[1]}x{mask.shape[0]}; save both at the same size."
            )
        ratio = rng.uniform(*self.ratio_range)
        if self.scale is None:  # cut first, so that no more than a crop is resized
            sides = [math.ceil(side / ratio) for side in self._crop]
            lines = [np.arange(side) for side in mask.shape]
            (top, left, bottom, right), mask = self._random_crop(mask, lines, sides, rng)
            image = image.crop((left, top, right, bottom))
            height, width = (max(1, round(side * ratio)) for side in mask.shape)
            new_size = (min(height, self._crop[0]), min(width, self._crop[1]))
        else:
            short, long = sorted(int(side * ratio) for side in self.scale)
            new_size = fit_within(mask.shape[0], mask.shape[1], short, long)
        rows, columns = nearest_lines(mask.shape, new_size)
        box, labels = self._random_crop(mask, [rows.numpy(), columns.numpy()], self._crop, rng)
        flip = rng.random() < self.flip_probability
        crop, class_ids_of_crop = resize_region(image, new_size, box).contiguous(), torch.from_numpy(labels)
        if flip:
            crop, class_ids_of_crop = crop.flip(-1), class_ids_of_crop.flip(-1)
        pixel_values = torch.zeros(3, *self._crop)
        class_ids = torch.full(self._crop, self.ignore_index)
        pixels = pixel_values[:, : labels.shape[0], : labels.shape[1]].copy_(crop)  # the rest is padding
        class_ids[: labels.shape[0], : labels.shape[1]] = class_ids_of_crop
        if self.photometric:
            photometric_distortion(pixels, rng)
        pixels.sub_(self._mean).div_(self._std)
        return {"pixel_values": pixel_values, "labels": class_ids}

    def _random_crop(
        self, mask: np.ndarray, lines: Sequence[np.ndarray], sides: Sequence[int], rng: np.random.Generator
    ) -> tuple[tuple[int, int, int, int], np.ndarray]:
        """A box (top, left, bottom, right) of `sides` among these rows and columns of the mask, and its labels."""
        rows, columns = lines
        for _ in range(MAX_CROP_DRAWS):
            top, left = (int(rng.integers(max(len(n) - c, 0) + 1)) for n, c in zip(lines, sides, strict=True))
            bottom, right = min(top + sides[0], len(rows)), min(left + sides[1], len(columns))
            labels = mask[rows[top:bottom]].take(columns[left:right], axis=1)
            if self.cat_max_ratio >= 1 or crop_is_varied(labels, self.cat_max_ratio, self.ignore_index):
                break
        return (top, left, bottom, right), labels


class _Augmented:
    """What both kinds of augmented data share: the samples, their transform, the seed and the epoch."""

    def __init__(self, dataset: Any, transform: TrainTransform, seed: int = 0):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw as in epoch `epoch` (from 0) from the next iterator on."""
        self._epoch.fill_(epoch)

    def _augment(self, sample: dict[str, Any], epoch: int, key: int) -> dict[str, Any]:
        augmented = self.transform(sample["image"], sample["mask"], sample_rng(self.seed, epoch, key))
        return {**augmented, "name": _name_of(sample["image"])}


class AugmentedDataset(_Augmented, torch.utils.data.Dataset):
    """
    Applies a [`TrainTransform`] to the samples of `dataset`, the same way for any number of workers.

    A sample has `pixel_values`, `labels` and the image's file `name`. Its draws depend on (seed, epoch, index)
    alone. The epoch lies in shared memory, so that persistent workers see it change. accelerate calls `set_epoch` at
    the start of an epoch, but not on several processes nor when it resumes within an epoch: [`DenseCLIPTrainer`]
    adds an [`EpochCallback`] for those, and so must any other `Trainer`.

    Args:
        dataset: index-addressed samples with `image` (RGB PIL image) and `mask` (integer array).
        transform: called with (image, mask, generator).
        seed: non-negative; another seed gives other draws.
    """

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._augment(self.dataset[index], int(self._epoch), index)


class AugmentedStream(_Augmented, torch.utils.data.IterableDataset):
    """
    [`AugmentedDataset`] for a streaming dataset, which has no indices: a checksum of the mask stands in for them.

    Of a stream of `datasets`, the order of its files is drawn from (seed, epoch), and that of its samples within its
    `shuffle_buffer` (see [`load_segmentation_dataset`]).
    """

    world, rank, endless = 1, 0, False

    def share(self, world: int, rank: int) -> None:
        """Give, pass after pass without an end, this process's share of the samples: every `world`-th."""
        self.world, self.rank, self.endless = world, rank, True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        position = 0
        for epoch in itertools.count(int(self._epoch)):
            start = position
            for sample in self._samples(epoch):
                if position % self.world == self.rank:
                    yield self._augment(sample, epoch, zlib.crc32(sample["mask"].tobytes()))
                position += 1
            if not self.endless or position == start:
                return

    def _samples(self, epoch: int) -> Iterable[dict[str, Any]]:
        if not hasattr(self.dataset, "set_epoch"):
            worker = torch.utils.data.get_worker_info()
            if worker is None or isinstance(self.dataset, torch.utils.data.IterableDataset):
                return self.dataset  # it shares itself out among workers
            return itertools.islice(self.dataset, worker.id, None, worker.num_workers)
        # A copy: the original shares its epoch with other workers, which are at passes of their own.
        rows = self.dataset.with_format(None)
        rows.set_epoch(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
        return rows


class EpochCallback(TrainerCallback):
    """Tells an [`AugmentedDataset`] or [`AugmentedStream`] each epoch that a Trainer begins or resumes."""

    def __init__(self, dataset: AugmentedDataset | AugmentedStream):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Within an epoch that is resumed, `state.epoch` is a fraction above the number of finished epochs.
        self.dataset.set_epoch(int(state.epoch or 0))
