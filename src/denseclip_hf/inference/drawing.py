"""Drawings of results: indexed masks, overlays with a legend, heat maps, confusion matrices; with Pillow alone.

Shapes: K classes, H x W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


Palette = Sequence[Sequence[int]]

MAX_INDEXED_CLASSES = 256
VOID_COLOR = (0, 0, 0)
# Cold to hot, evenly spaced.
HEAT_COLORS = ((20, 20, 90), (0, 110, 200), (40, 190, 160), (250, 220, 60), (220, 40, 30))
# Pixels that are colored at a time.
STRIP_PIXELS = 2**20
# Above this many classes a confusion matrix has numbers of classes beside it instead of their names.
MAX_NAMED_CLASSES = 60


def colorize(segmentation, palette: Palette) -> Image.Image:
    """Class ids `(H, W)` in the colors of `palette`; ids without a color are black."""
    table = np.array([*palette, VOID_COLOR], dtype=np.uint8)
    ids = np.asarray(segmentation)
    return Image.fromarray(table[np.where((ids < 0) | (ids >= len(palette)), len(palette), ids)])


def overlay(image: Image.Image, segmentation, palette: Palette, opacity: float = 0.6) -> Image.Image:
    """`image` with the classes of `segmentation` (`(H, W)` ids of the same size) painted over it."""
    return Image.blend(image.convert("RGB"), colorize(segmentation, palette), opacity)


def indexed_image(segmentation, palette: Palette) -> Image.Image:
    """
    Class ids `(H, W)` as an image whose pixel values are the ids: 8 bit with `palette`, to be saved as PNG.

    Ids beyond the palette, such as 255 for no class, are black. More than 256 classes do not fit a palette: they
    become 16-bit gray levels without colors.

    Raises:
        ValueError: for ids below 0 or above 65535.
    """
    ids = np.asarray(segmentation)
    if ids.size and not 0 <= ids.min() <= ids.max() <= 65535:
        raise ValueError(f"class ids must be in 0 … 65535 to be saved, got {ids.min()} … {ids.max()}.")
    if len(palette) > MAX_INDEXED_CLASSES or (ids.size and ids.max() >= MAX_INDEXED_CLASSES):
        return Image.fromarray(ids.astype(np.uint16))
    image = Image.fromarray(ids.astype(np.uint8)).convert("P")
    colors = [*palette, *[VOID_COLOR] * (int(ids.max(initial=0)) + 1 - len(palette))]
    image.putpalette([int(value) for color in colors for value in color])
    return image


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

    Give the maps of one image the same bounds, so that their colors compare.
    """
    stops = np.linspace(0, 255, len(HEAT_COLORS))
    colors = np.stack([np.interp(np.arange(256), stops, channel) for channel in zip(*HEAT_COLORS, strict=True)], -1)
    colors = colors.round().astype(np.uint8)
    scores = score_map.float().cpu()
    levels = ((scores - lowest) / max(highest - lowest, 1e-12)).clamp(0, 1).mul(255).round().to(torch.uint8)
    resized = Image.fromarray(levels.numpy()).resize(image.size, Image.Resampling.BILINEAR)
    result = Image.new("RGB", image.size)
    for top, bottom in _strips(image):
        part = (0, top, image.width, bottom)
        heat = Image.fromarray(colors[np.asarray(resized.crop(part))])
        result.paste(Image.blend(image.crop(part).convert("RGB"), heat, opacity), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of one strip of an image after the other."""
    rows = max(1, STRIP_PIXELS // image.width)
    return ((top, min(top + rows, image.height)) for top in range(0, image.height, rows))


def comparison_image(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    id2label: dict[int, str],
    palette: Palette,
    width: int = 320,
) -> Image.Image:
    """
    Images in a table with column titles, and a legend of class colors below.

    Args:
        rows (sequence of rows of images): each row as long as `titles`.
        titles (`Sequence[str]`): one per column.
        id2label (`dict[int, str]`): class names.
        palette: K colors `(r, g, b)`.
        width (`int`): of each image, in pixels; heights follow.
    """
    font, margin, line = ImageFont.load_default(size=max(width // 20, 11)), 8, max(width // 14, 16)
    nearest = Image.Resampling.NEAREST
    scaled = [
        [image.resize((width, round(image.height * width / image.width)), nearest) for image in row] for row in rows
    ]
    legend_column = width // 2
    per_line = max(width * len(titles) // legend_column, 1)
    legend_height = line * -(-len(id2label) // per_line)
    heights = [max(image.height for image in row) for row in scaled]
    total_height = 2 * margin + line + legend_height + sum(height + margin for height in heights)
    sheet = Image.new("RGB", (margin + len(titles) * (width + margin), total_height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((margin + column * (width + margin), margin // 2), title, "black", font)
    top = margin + line
    for row, height in zip(scaled, heights, strict=True):
        for column, image in enumerate(row):
            sheet.paste(image, (margin + column * (width + margin), top))
        top += height + margin
    for index, label in id2label.items():
        x, y = margin + index % per_line * legend_column, top + index // per_line * line
        draw.rectangle((x, y + 2, x + line - 6, y + line - 4), tuple(palette[index]), "black")
        draw.text((x + line, y), label, "black", font)
    return sheet


def confusion_image(matrix, names: Sequence[str], columns: Sequence[str] | None = None) -> Image.Image:
    """
    A confusion matrix as a table of squares: rows are true classes, columns predicted ones.

    Args:
        matrix (counts of shape `(rows, columns)`): each row is divided by its sum; black is 0, white 100 %, and a row
            without a count is gray.
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
    gray = Image.fromarray((255 * share).round().astype(np.uint8))
    grid = gray.resize((cell * counts.shape[1], cell * counts.shape[0]), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (margin + grid.width + 8, margin + grid.height + 8), (235, 240, 250))
    sheet.paste(grid.convert("RGB"), (margin, margin))
    every = max(1, -(-12 // cell)) if not named else 1
    draw = ImageDraw.Draw(sheet)
    for row in range(0, counts.shape[0], every):
        draw.text((margin - 6, margin + row * cell + cell // 2), labels[0][row], "black", font, anchor="rm")
    # Columns' names read upwards: written as rows of another image, which is turned to the left.
    above = Image.new("RGB", (margin, grid.width), (235, 240, 250))
    draw = ImageDraw.Draw(above)
    for column in range(0, counts.shape[1], every):
        draw.text((6, column * cell + cell // 2), labels[1][column], "black", font, anchor="lm")
    sheet.paste(above.transpose(Image.Transpose.ROTATE_90), (margin, 0))
    return sheet
