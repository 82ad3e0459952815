"""Many images to files: read ahead and written behind by threads while the model runs, and listed in a manifest."""

import json
import os
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data import parse_classes
from ..files import make_directory, write_atomically, writing_into
from ..words import fingerprint
from .drawing import heat_map, indexed_image, overlay_with_legend
from .segmenter import Segmented, Segmenter
from .sources import Source, read_frames, read_image_of
from .views import batches_of_one_size


# Of a file's name without its suffix, so that any file system takes it; the distinguishing part comes first.
MAX_STEM_BYTES = 240
# Threads that read, and as many that write. More would hold more images than the model can follow.
MAX_THREADS = 4
# Of each line of a manifest.
START = '{"source": '


@dataclass
class Summary:
    """How many images were segmented or were there already, and a sentence for each that was not."""

    done: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class _Item:
    """One image on its way from a source to files."""

    source: Source
    name: str
    line: str  # of the manifest
    frame: Image.Image | None = None  # of a video
    image: Image.Image = field(init=False)
    pixel_values: torch.Tensor | None = None  # none if it goes in windows
    result: Segmented = field(init=False)
    problem: str | None = None


def predict_sources(
    segmenter: Segmenter,
    sources: Sequence[Source],
    output_dir: str | Path,
    *,
    batch_size: int = 1,
    opacity: float = 0.6,
    overwrite: bool = False,
    timeout: float = 20.0,
    every: int = 1,
    max_frames: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> Summary:
    """
    Segment every source, and write `NAME_mask.png`, `NAME_overlay.png` and, as `segmenter` was asked,
    `NAME_certainty.png` (gray, 255 for a probability of 1) and `NAME_score_WORD.png` into `output_dir`; with words of
    the user's own, or where an earlier call had such, also which id is which, `classes.json`.

    `manifest.jsonl` gets one line for each image: its source and its files, or the problem. A call goes on where one
    with the same model and settings stopped: what the manifest has is skipped, unless the image has changed since.
    What cannot be read or segmented, or would overwrite any other file, is left out with a sentence; the others go on.

    Args:
        segmenter ([`Segmenter`]): model, classes and words.
        sources (`Sequence[Source]`): from [`find_sources`].
        output_dir: made if it is missing.
        batch_size (`int`): most images that go through the model together; they have one size after preprocessing.
        opacity (`float`): of the colors in overlays and heat maps, 0 … 1.
        overwrite (`bool`): segment everything, and replace files that are there.
        timeout (`float`): seconds to wait for an address.
        every, max_frames (`int`): of videos, take every `every`-th frame, and at most `max_frames`.
        rank, world (`int`): number of this process, and of processes that share the sources out. Each has a manifest
            of its own, `manifest.RANK.jsonl` from the second on.
        progress (`bool`): whether to show a progress bar.

    Returns:
        [`Summary`]

    Raises:
        ValueError: for masks of other words there, or a `manifest.jsonl` of something else.
        OutputError: if `output_dir` cannot be written, or the disk is full.
    """
    folder = Path(output_dir)
    make_directory(folder)
    if rank == 0 and (segmenter.classes or (folder / "classes.json").exists()):
        _name_classes(folder / "classes.json", segmenter.names, overwrite)
    threads = 1 if segmenter.native_resolution else min(os.cpu_count() or 1, MAX_THREADS)
    ahead = threads + batch_size
    readers, writers = ThreadPoolExecutor(threads), ThreadPoolExecutor(threads)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix=".", dir=folder) as parts:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # once, because all threads have one filter
        run = _Run(segmenter, folder, Path(parts), rank, opacity, overwrite, timeout)
        bar = tqdm(sources[rank::world], desc="Segmenting", disable=not progress, leave=False)
        try:
            read = run.good(_in_threads(readers, run.read, run.items(bar, every, max_frames), ahead))
            batches = batches_of_one_size(read, batch_size, lambda item: getattr(item.pixel_values, "shape", None))
            segmented = run.good(item for batch in batches for item in run.segmented(batch))
            for item in _in_threads(writers, run.drawn, segmented, ahead):
                run.keep(item)
        finally:
            for pool in (readers, writers):
                pool.shutdown(cancel_futures=True)
    return run.summary


def _in_threads(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Item], items: Iterable[_Item], ahead: int
) -> Iterator[_Item]:
    """`function` of each item, in their order; `pool` works on the next `ahead` while the caller has one."""
    waiting: deque[Future[_Item]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _name_classes(file: Path, names: list[str], overwrite: bool) -> None:
    """
    Write which id is which word, in the format of a data set's `classes.json`, unless one there says the same. One
    that says more than that is a data set's own, and stays.
    """
    if file.exists():
        is_ours = False
        with suppress(ValueError, OSError):
            if parse_classes(file).id2label == dict(enumerate(names)):
                return
            is_ours = list(json.loads(file.read_text(encoding="utf-8"))) == ["id2label"]
        if not (overwrite and is_ours):
            way = ", or allow to overwrite it" if is_ours else ""
            raise ValueError(f"{file} is there already, of other words: choose another folder{way}.")
    text = json.dumps({"id2label": dict(enumerate(names))}, indent=2) + "\n"
    with writing_into(file.parent):
        write_atomically(file, text)


class _Run:
    """What becomes of each image. Only `read` and `drawn` run in threads; all that is counted or named is not."""

    def __init__(
        self,
        segmenter: Segmenter,
        folder: Path,
        parts: Path,
        rank: int,
        opacity: float,
        overwrite: bool,
        timeout: float,
    ):
        self.segmenter, self.folder, self.parts, self.summary = segmenter, folder, parts, Summary()
        self.opacity, self.overwrite, self.timeout = opacity, overwrite, timeout
        self.kinds = ["mask", "overlay", *["certainty"] * segmenter.certainty]
        for number, word in enumerate(segmenter.score_names):
            simple = "".join(c if c.isalnum() else "-" for c in word)[:40]
            self.kinds.append(f"score_{number}_{simple}")
        self.manifest = folder / (f"manifest.{rank}.jsonl" if rank else "manifest.jsonl")
        self.earlier = _earlier_lines(folder)
        self.settings = fingerprint(
            segmenter.model.state_dict().values(),
            segmenter.model.config.to_dict(),
            segmenter.image_processor.to_dict(),
            [segmenter.classes, segmenter.score_names, asdict(segmenter.options), opacity],
            [segmenter.certainty, segmenter.native_resolution],
        )

    def items(self, sources: Iterable[Source], every: int, max_frames: int | None) -> Iterator[_Item]:
        """Images and frames that are to be read; what has the name of another, or would overwrite it, is noted."""
        taken: set[str] = set()
        for source in sources:
            named: Iterable[tuple[str, Image.Image | None]] = [(source.name, None)]
            try:
                for name, frame in read_frames(source, every, max_frames) if source.is_video else named:
                    item = _Item(source, name, self.line(source, name), frame)
                    if name.casefold() in taken:
                        self.note(source, f"{source.shown}: results called {name} are another's: rename one of them.")
                    elif self.is_ours(item) and all(file.exists() for file in self.files(name)):
                        self.summary.skipped += 1
                    elif there := self.in_the_way(item):
                        self.note(source, there)
                    else:
                        yield item
                    taken.add(name.casefold())
            except (OSError, ValueError, ImportError) as error:
                self.note(source, str(error))

    def good(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Those without a problem; the others are noted."""
        for item in items:
            if item.problem is None:
                yield item
            else:
                self.note(item.source, item.problem)

    def note(self, source: Source, problem: str) -> None:
        self.summary.problems.append(problem)
        self.add_line(json.dumps({"source": source.shown, "problem": problem}))

    def add_line(self, line: str) -> None:
        with writing_into(self.folder), self.manifest.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def line(self, source: Source, name: str) -> str:
        """What the manifest says of an image when it is done."""
        modified = None
        with suppress(OSError, ValueError):
            modified = os.stat(source.address).st_mtime
        files = [file.name for file in self.files(name)]
        entry = {"source": source.shown, "files": files, "modified": modified, "settings": self.settings}
        return json.dumps(entry)

    def files(self, name: str) -> list[Path]:
        stems = (f"{name}_{kind}".encode()[:MAX_STEM_BYTES].decode(errors="ignore") for kind in self.kinds)
        return [self.folder / f"{stem}.png" for stem in stems]

    def is_ours(self, item: _Item) -> bool:
        """Whether an earlier call with the same settings made the files of this image, or was about to."""
        return not self.overwrite and self.earlier.get(self.files(item.name)[0].name) == {item.line}

    def in_the_way(self, item: _Item) -> str | None:
        """A sentence if something of this name is there that may not be overwritten."""
        if self.overwrite or self.is_ours(item):
            return None
        there = [file for file in self.files(item.name) if os.path.lexists(file)]
        return f"{there[0]} is there already: choose another folder, or allow to overwrite it." if there else None

    def read(self, item: _Item) -> _Item:
        """With its image, and pixel values unless it goes in windows."""
        windows = self.segmenter.native_resolution
        try:
            item.image = item.frame or read_image_of(item.source, self.timeout, large=windows)
        except (OSError, ValueError) as error:
            item.problem = str(error)
            return item
        try:
            item.pixel_values = None if windows else self.segmenter.preprocess(item.image)
        except ValueError as error:
            item.problem = f"{item.name}: {error}"
        return item

    def segmented(self, batch: Sequence[_Item]) -> Iterator[_Item]:
        """Images of one size with their results, or with the reason why they cannot be segmented."""
        pixel_values = [item.pixel_values for item in batch if item.pixel_values is not None]
        try:
            results = self.segmenter([i.image for i in batch], torch.stack(pixel_values) if pixel_values else None)
        except ValueError as error:
            if len(batch) == 1:
                batch[0].problem = f"{batch[0].name}: {error}"
                yield batch[0]
            else:  # it may be the fault of one of them
                for item in batch:
                    yield from self.segmented([item])
            return
        small = torch.uint8 if self.segmenter.void == 255 else torch.int32
        for item, result in zip(batch, results, strict=True):
            item.result, item.pixel_values = result._replace(ids=result.ids.to(small).cpu()), None
            yield item

    def drawn(self, item: _Item) -> _Item:
        """With its files, whole but elsewhere."""
        with writing_into(self.folder):
            for file, drawing in zip(self.files(item.name), self.drawings(item), strict=True):
                # A photo hardly shrinks beyond the first level, which takes a sixth of the default's time.
                drawing.save(self.parts / file.name, compress_level=1 if drawing.mode == "RGB" else 6)
        return item

    def drawings(self, item: _Item) -> Iterator[Image.Image]:
        """In the order of `kinds`, made one at a time."""
        image, (ids, certainty, maps), palette = item.image, item.result, self.segmenter.palette
        yield indexed_image(ids.numpy(), palette)
        yield overlay_with_legend(image, ids.numpy(), dict(enumerate(self.segmenter.names)), palette, self.opacity)
        if certainty is not None:
            yield Image.fromarray((255 * certainty.float()).round().cpu().numpy().astype(np.uint8))
        if maps is not None:
            lowest, highest = maps.min().item(), maps.max().item()
            yield from (heat_map(image, score_map, lowest, highest, self.opacity) for score_map in maps)

    def keep(self, item: _Item) -> None:
        """Its line goes into the manifest first, and then its files into place: none is there without a line."""
        if there := self.in_the_way(item):  # since it was read
            self.note(item.source, there)
            return
        self.add_line(item.line)
        with writing_into(self.folder):
            for file in self.files(item.name):
                os.replace(self.parts / file.name, file)
        self.summary.done += 1


def _earlier_lines(folder: Path) -> dict[str, set[str]]:
    """
    The lines of done images, by their first file: the last one of each manifest that has it.

    Raises:
        ValueError: if a manifest there is something else.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(folder.glob("manifest*.jsonl")):
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.is_symlink() or not f"{text}{START}".startswith(START):
            raise ValueError(f"{file} is there already and no list of results: choose another folder.")
        if not text.endswith("\n"):  # whoever wrote it was killed
            with file.open("a", encoding="utf-8") as end:
                end.write("\n")
        last: dict[str, str] = {}
        for line in text.splitlines():
            with suppress(ValueError, LookupError, TypeError):
                last[json.loads(line)["files"][0]] = line
        for name, line in last.items():
            found.setdefault(name, set()).add(line)
    return found
