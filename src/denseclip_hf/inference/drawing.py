"""Pictures of results: indexed masks, overlays with a legend, heat maps, confusion matrices; with Pillow alone.

Shapes: K classes, H x W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..model.layers_denseclip import resize_bilinear
from .views import overlay


Palette = Sequence[Sequence[int]]

MAX_INDEXED_CLASSES = 256
# Cold to hot, evenly spaced.
HEAT_COLORS = ((20, 20, 90), (0, 110, 200), (40, 190, 160), (250, 220, 60), (220, 40, 30))
# Pixels that are coloured at a time.
STRIP_PIXELS = 2**20
# Above this many classes a confusion matrix has numbers of classes beside it instead of their names.
MAX_NAMED_CLASSES = 60


def indexed_picture(segmentation, palette: Palette) -> Image.Image:
    """
    Class ids `(H, W)` as a picture whose pixel values are the ids: 8 bit with `palette`, to be saved as PNG.

    More than 256 classes do not fit a palette: they become a picture of 16-bit grey levels without colours.

    Raises:
        ValueError: for ids below 0 or above 65535.
    """
    ids = np.asarray(segmentation)
    if ids.size and not 0 <= ids.min() <= ids.max() <= 65535:
        raise ValueError(f"class ids must lie in 0 … 65535 to be saved, got {ids.min()} … {ids.max()}.")
    if len(palette) > MAX_INDEXED_CLASSES or (ids.size and ids.max() >= MAX_INDEXED_CLASSES):
        return Image.fromarray(ids.astype(np.uint16))
    picture = Image.fromarray(ids.astype(np.uint8)).convert("P")
    picture.putpalette([int(value) for color in palette for value in color])
    return picture


def overlay_with_legend(
    image: Image.Image, segmentation, id2label: Mapping[int, str], palette: Palette, opacity: float = 0.6
) -> Image.Image:
    """
    `image` with the classes painted over it, and below it the names of those it shows, the largest first.

    It is wider than the image where a name would not fit.
    """
    ids, known = np.asarray(segmentation), max(id2label, default=-1) + 1
    counts = np.zeros(known + 2, dtype=np.int64)
    for top, bottom in _strips(image):
        places = np.clip(ids[top:bottom].astype(np.int64), -1, known) + 1  # NumPy 2.0 takes no -1 beside unsigned ids
        counts += np.bincount(places.ravel(), minlength=known + 2)
    shown = [int(i) for i in np.argsort(-counts[1:-1], kind="stable") if counts[i + 1] and int(i) in id2label]
    size = min(max(image.width // 40, 12), 40)
    font, line = ImageFont.load_default(size=size), round(1.5 * size)
    column = 2 * line + int(max((font.getlength(id2label[i]) for i in shown), default=0))
    columns = max(image.width // column, 1)
    height = image.height + line * -(-len(shown) // columns)
    sheet = Image.new("RGB", (max(image.width, column if shown else 0), height), "white")
    for top, bottom in _strips(image):
        strip = image.crop((0, top, image.width, bottom))
        sheet.paste(overlay(strip, ids[top:bottom], palette, opacity), (0, top))
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(shown):
        x, y = place % columns * (sheet.width // columns), image.height + place // columns * line
        draw.rectangle((x + 2, y + 2, x + line - 4, y + line - 4), tuple(palette[index]), "black")
        draw.text((x + line, y + line // 8), id2label[index], "black", font)
    return sheet


def heat_map(
    image: Image.Image, score_map: torch.Tensor, lowest: float, highest: float, opacity: float = 0.6
) -> Image.Image:
    """
    `image` with a score map `(h, w)` over it, resized bilinearly: dark blue at `lowest` and below, red at `highest`.

    Give the maps of one picture the same bounds, so that their colours compare.
    """
    stops = np.linspace(0, 255, len(HEAT_COLORS))
    colors = np.stack([np.interp(np.arange(256), stops, channel) for channel in zip(*HEAT_COLORS, strict=True)], -1)
    colors = colors.round().astype(np.uint8)
    scores = resize_bilinear(score_map[None, None].float().cpu(), (image.height, image.width))[0, 0]
    result = Image.new("RGB", image.size)
    for top, bottom in _strips(image):
        levels = (
            ((scores[top:bottom] - lowest) / max(highest - lowest, 1e-12)).clamp(0, 1).mul(255).round().to(torch.uint8)
        )
        strip = image.crop((0, top, image.width, bottom)).convert("RGB")
        result.paste(Image.blend(strip, Image.fromarray(colors[levels.numpy()]), opacity), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of one strip of an image after the other."""
    rows = max(1, STRIP_PIXELS // image.width)
    return ((top, min(top + rows, image.height)) for top in range(0, image.height, rows))


def confusion_picture(matrix, names: Sequence[str], columns: Sequence[str] | None = None) -> Image.Image:
    """
    A confusion matrix as a table of squares: rows are true classes, columns predicted ones.

    Args:
        matrix (counts of shape `(rows, columns)`): each row is divided by its sum; black is 0, white 100 %, and a row
            without a count is grey.
        names (`Sequence[str]`): of the rows.
        columns (`Sequence[str]`, *optional*): names of the columns, those of the rows by default.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    columns = names if columns is None else columns
    cell = max(min(900 // max(counts.shape), 48), 6)
    font = ImageFont.load_default(size=min(max(cell - 2, 8), 16))
    named = max(counts.shape) <= MAX_NAMED_CLASSES
    labels = [list(names), list(columns)] if named else [[str(i) for i in range(n)] for n in counts.shape]
    margin = 12 + round(max(font.getlength(label) for label in [*labels[0], *labels[1]]))
    rows = counts.sum(1, keepdims=True)
    share = np.divide(counts, rows, out=np.full_like(counts, 0.5), where=rows > 0)
    grey = Image.fromarray((255 * share).round().astype(np.uint8))
    grid = grey.resize((cell * counts.shape[1], cell * counts.shape[0]), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (margin + grid.width + 8, margin + grid.height + 8), (235, 240, 250))
    sheet.paste(grid.convert("RGB"), (margin, margin))
    every = max(1, -(-12 // cell)) if not named else 1
    draw = ImageDraw.Draw(sheet)
    for row in range(0, counts.shape[0], every):
        draw.text((margin - 6, margin + row * cell + cell // 2), labels[0][row], "black", font, anchor="rm")
    # Columns' names read upwards: written as rows of another picture, which is turned to the left.
    above = Image.new("RGB", (margin, grid.width), (235, 240, 250))
    draw = ImageDraw.Draw(above)
    for column in range(0, counts.shape[1], every):
        draw.text((6, column * cell + cell // 2), labels[1][column], "black", font, anchor="lm")
    sheet.paste(above.transpose(Image.Transpose.ROTATE_90), (margin, 0))
    return sheet


__all__ = ["confusion_picture", "heat_map", "indexed_picture", "overlay_with_legend"]
