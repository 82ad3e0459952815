"""Models as programs that run without this package: ONNX and `torch.export`, class embeddings folded in."""

import copy
import importlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import AutoTokenizer
from transformers.utils import cached_file

from ..model.loading_denseclip import load_pretrained
from .card import CARD, write_frozen_card
from .card_sections import shown_name, shown_pictures


# Sides are multiples of 32, so that every feature map's size follows from them; from 64 pixels on.
SIDE_STEP, LEAST_SIDE, MOST_SIDE = 32, 64, 4096
FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}


class _Logits(nn.Module):
    """What is exported: pixels to logits, nothing else."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.window_logits(pixel_values)


def export_program(model: Any) -> ExportedProgram:
    """
    `model` as a program from `pixel_values` `(B, 3, H, W)` to `logits` `(B, K, H / 4, W / 4)`.

    B is free; H and W are multiples of 32 from 64 to 4096. Images are taken whole: windows that slide are the
    caller's to cut. The class embeddings are constants in it, so there is no text tower.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): it stays as it is.
    """
    model = copy.deepcopy(model).eval()
    if model.config.use_text_guidance:
        model.freeze_classes()
    batch = Dim("batch", min=1, max=1024)
    rows, columns = (Dim(n, min=LEAST_SIDE // SIDE_STEP, max=MOST_SIDE // SIDE_STEP) for n in ("rows", "columns"))
    example = torch.zeros(2, 3, 3 * SIDE_STEP, 4 * SIDE_STEP, dtype=model.dtype, device=model.device)
    shapes = {"pixel_values": {0: batch, 2: SIDE_STEP * rows, 3: SIDE_STEP * columns}}
    with torch.no_grad():
        return torch.export.export(_Logits(model).eval(), (example,), dynamic_shapes=shapes)


def export(model: Any, processor: Any, directory: str | os.PathLike, kind: str) -> Path:
    """
    Write `model` into `directory`, with what is needed to use it: image processor and `labels.json`.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): in float32.
        processor ([`DenseCLIPImageProcessor`]): its image processor.
        directory (`str` or `os.PathLike`): exists already.
        kind (`str`): "onnx" or "torch_export".

    Returns:
        `Path` of the model file.

    Raises:
        ValueError: for another `kind`, or for "onnx" where one of its packages is missing.
    """
    if kind not in FILES:
        raise ValueError(f"`kind` must be one of {', '.join(FILES)}, got {kind!r}.")
    path = Path(directory) / FILES[kind]
    if kind == "onnx":
        _require("onnx", "onnxscript")
    program = export_program(model)
    if kind == "onnx":
        _save_onnx(program, path)
    else:  # through memory: on a full disk PyTorch's own writer ends the process
        archive = io.BytesIO()
        torch.export.save(program, archive)
        path.write_bytes(archive.getvalue())
    processor.save_pretrained(directory)
    labels = {"id2label": model.config.id2label, "palette": model.config.palette}
    (Path(directory) / "labels.json").write_text(json.dumps(labels, indent=2) + "\n", encoding="utf-8")
    return path


def export_frozen(model: Any, processor: Any, source: str, directory: str | os.PathLike, name: str) -> None:
    """
    Freeze the classes of `model` and write it into `directory`: a complete model with tokenizer, and with the card of
    `source` (and the pictures in it) or a new one.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): its classes are frozen in place.
        processor ([`DenseCLIPImageProcessor`]): its image processor.
        source (`str`): directory or Hub name that both were loaded from.
        directory (`str` or `os.PathLike`): exists already.
        name (`str`): title of a new card.
    """
    model.freeze_classes()
    for part in (model, processor, load_pretrained(AutoTokenizer, source)):
        part.save_pretrained(directory)
    card = _file_of(source, CARD)
    write_frozen_card(directory, card, f"`{shown_name(source)}`", name)
    for picture in shown_pictures((Path(directory) / CARD).read_text(encoding="utf-8")):
        if (file := _file_of(source, picture)) is not None:
            (Path(directory) / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, Path(directory) / picture)


def _file_of(source: str, name: str) -> str | None:
    """A file of a model directory or Hub repository, if it has one of that name."""
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def _require(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"ONNX needs the package {package}: `pip install onnx onnxscript onnxruntime`."
            ) from error


def _save_onnx(program: ExportedProgram, path: Path) -> None:
    torch.onnx.export(
        program,
        f=str(path),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def run_exported(path: str | os.PathLike, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Logits of an exported file (`.onnx` through onnxruntime, or `.pt2`) for `pixel_values` `(B, 3, H, W)`.

    Raises:
        ValueError: if onnxruntime is missing.
    """
    if str(path).endswith(".pt2"):
        with torch.no_grad():
            return torch.export.load(path).module()(pixel_values)
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


def check_export(model: Any, processor: Any, path: str | os.PathLike, image: Any) -> float:
    """
    Largest absolute difference between the logits of `model` and of the exported file for `image`.

    The picture is resized to two different multiples of 32, near the image processor's shorter side but at most 544.
    """
    side = min(processor.size.shortest_edge or processor.size.height, 512)
    side = max(side // SIDE_STEP * SIDE_STEP, LEAST_SIDE)
    size = {"height": side, "width": side + SIDE_STEP}
    pixel_values = processor(image, size=size, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.eval().window_logits(pixel_values)
    return (run_exported(path, pixel_values) - expected).abs().max().item()


__all__ = ["check_export", "export", "export_frozen", "export_program", "run_exported"]
