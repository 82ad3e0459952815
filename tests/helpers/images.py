"""Images drawn for tests."""

import numpy as np
from PIL import Image


def photo(size=(96, 64), seed: int = 0) -> Image.Image:
    """A smooth image of random colors, of (width, height) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


PHOTO_SIZES = {"a": (90, 70), "b": (64, 100), "c": (90, 70), "d": (70, 90), "e": (90, 70)}  # of the fixture `photos`


def pictures(count=8, size=(80, 72)):
    """Three horizontal bands whose colors tell their classes, with noise."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        mask = np.repeat(np.sort(rng.integers(0, 3, size[1])), size[0]).reshape(size[1], size[0]).astype(np.uint8)
        mask[:, :3] = 255
        colors = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[mask % 3]
        image = np.clip(colors + rng.normal(0, 20, colors.shape), 0, 255).astype(np.uint8)
        samples.append({"image": Image.fromarray(image), "mask": mask})
    return samples


def make_sample(height=60, width=80, seed=0):
    """A smooth image and a mask of 3 x 4 blocks of classes 0…4."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    blocks = rng.integers(0, 5, (3, 4), dtype=np.uint8)
    mask = np.kron(blocks, np.ones((height // 3, width // 4), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC), mask
