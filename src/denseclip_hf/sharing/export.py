"""Models as programs that run without this package: ONNX and `torch.export`, for their classes or for any words."""

import copy
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from transformers import AutoTokenizer
from transformers.utils import cached_file

from ..devices import dtype_of, needed
from ..inference import find_sources, read_image_of
from ..model.image_processing_denseclip import DenseCLIPImageProcessorPil
from ..model.loading_denseclip import load_pretrained
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation, DenseCLIPModel
from ..model.towers_denseclip import drop
from ..options import MAX_SIDE, PROGRAMS
from .card import CARD, plain, shown_images, shown_name, write_card


WORDS_FILE = "text_embeds.npy"
MAX_WORDS = 4096
MAX_CALIBRATION_IMAGES = 64


class _Logits(nn.Module):
    """What is exported: pixels, and words where asked for, to logits; all in float32 whatever the weights are in."""

    def __init__(self, model: DenseCLIPModel, step: int):
        super().__init__()
        self.model, self.step = model, step

    def forward(self, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None = None) -> torch.Tensor:
        rows, columns = (side // self.step for side in pixel_values.shape[-2:])
        # No change where the sides are multiples of the step; elsewhere the ONNX program fails here.
        blocks = pixel_values.unflatten(2, (rows, self.step)).unflatten(4, (columns, self.step))
        return whole_logits(self.model, blocks.flatten(4, 5).flatten(2, 3), text_embeds)


def whole_logits(
    model: DenseCLIPModel, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """What a program gives: logits of images taken whole; of a model without decoder, cosines over the temperature."""
    pixel_values = pixel_values.to(model.dtype)
    text_embeds = text_embeds if text_embeds is None else text_embeds.to(model.dtype)
    if isinstance(model, DenseCLIPForSemanticSegmentation):
        return model.window_logits(pixel_values, text_embeds).float()
    return model(pixel_values, text_embeds).score_maps.float() / model.config.temperature


def export_program(
    model: DenseCLIPModel,
    size: tuple[int, int] | None = None,
    max_side: int = MAX_SIDE,
    dtype: str = "float32",
    words: bool = False,
) -> ExportedProgram:
    """
    `model` as a program from `pixel_values` `(B, 3, H, W)` to `logits` `(B, K, h, w)`, both in float32.

    Images are taken whole: windows that slide are the caller's to cut. The class embeddings are constants or, with
    `words`, a second input `text_embeds` `(K, D)`, with any number of classes; there is no text tower, unless they
    depend on the image (`prompting="pre_model"`).

    Args:
        model ([`DenseCLIPModel`]): it stays as it is.
        size (`tuple[int, int]`, *optional*): the only height and width it takes, one image at a time. By default B is
            free, and H and W are multiples of the config's `coarsest_stride`: at least twice that, at most `max_side`.
        max_side (`int`): bound of H and W.
        dtype (`str`): of the weights, a key of `DTYPES`.
        words (`bool`): whether the program takes any words, for a model without decoder or with cost aggregation (up
            to one less than its `max_classes`).

    Raises:
        ValueError: if `size` is no multiple of the step, or `max_side` is less than four of them; for `words` where
            the decoder knows only the classes of its training.
    """
    step = model.config.coarsest_stride
    if any(side % step or side < 2 * step for side in size or ()) or max_side < 4 * step:
        raise ValueError(
            f"the sides of this model's exported images are multiples of {step}, from {2 * step} to `max_side` "
            f"(at least {4 * step}), got size {size} and `max_side` {max_side}."
        )
    is_segmenter = isinstance(model, DenseCLIPForSemanticSegmentation)
    if words and is_segmenter and model.config.decode_head != "cost_aggregation":
        raise ValueError("the decoder knows only the classes of its training, so its program takes no words.")
    if not words and not is_segmenter:
        raise ValueError("a model without decoder has no classes of its own: export it with `words`.")
    model = copy.deepcopy(model).eval().to(dtype_of(dtype))
    if words:
        drop(model.clip, model.text_tower.text_parts)
        model.prompts = None
    elif model.config.use_text_guidance and model.config.prompting == "post_model":
        model.freeze_classes()
    shapes: dict[str, Any] = {"pixel_values": None}
    if size is None:
        rows, columns = (Dim(name, min=2, max=max_side // step) for name in ("rows", "columns"))
        shapes["pixel_values"] = {0: Dim("batch", min=1, max=1024), 2: step * rows, 3: step * columns}
    example = [torch.zeros(1 if size else 2, 3, *(size or (3 * step, 4 * step)), device=model.device)]
    if words:
        head: Any = model.decode_head if is_segmenter else None
        decoded = head.max_classes if head is not None else 0
        most = decoded - 1 if decoded else MAX_WORDS
        example.append(torch.ones(3, model.config.embedding_size, device=model.device))
        # Not a named `Dim`: torch cannot prove of a pooling's strides that they fit every number.
        shapes["text_embeds"] = {0: Dim.DYNAMIC(min=1, max=most)}
    with torch.no_grad():
        program = torch.export.export(_Logits(model, step).eval(), tuple(example), dynamic_shapes=shapes)
    for part in program.graph_module.modules():  # traces name the files, and so the folders, of this machine
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def export(
    model: DenseCLIPModel,
    processor: DenseCLIPImageProcessorPil,
    directory: str | os.PathLike,
    kind: str,
    opset: int | None = None,
    words: dict[str, torch.Tensor] | None = None,
    **options: Any,
) -> Path:
    """
    Write `model` into `directory`, with what is needed to use it: image processor and `labels.json`.

    Args:
        model ([`DenseCLIPModel`]): in float32.
        processor ([`DenseCLIPImageProcessor`]): its image processor.
        directory (`str` or `os.PathLike`): exists already.
        kind (`str`): "onnx" or "torch_export".
        opset (`int`, *optional*): of ONNX, by default PyTorch's.
        words (`dict[str, torch.Tensor]`, *optional*): make the program take any words, and write these, each with an
            embedding `(D,)`, as `labels.json` and `text_embeds.npy` `(K, D)`.
        options: `size`, `max_side` and `dtype` of [`export_program`].

    Returns:
        `Path` of the model file.

    Raises:
        ImportError: for "onnx" where one of its packages is missing.
        ValueError: as [`export_program`].
    """
    path = Path(directory) / PROGRAMS[kind]
    if kind == "onnx":
        _require("onnx", "onnxscript")
    program = export_program(model, words=words is not None, **options)
    if kind == "onnx":
        save_onnx(program, path, opset)
    else:  # through memory: on a full disk PyTorch's own writer ends the process
        archive = io.BytesIO()
        torch.export.save(program, archive)
        path.write_bytes(archive.getvalue())
    processor.save_pretrained(directory)
    labels = {
        "id2label": model.config.id2label,
        "palette": model.config.palette,
        "side_step": model.config.coarsest_stride,
    }
    if words is not None:
        labels |= {"id2label": dict(enumerate(words)), "palette": None}
        np.save(Path(directory) / WORDS_FILE, torch.stack(list(words.values())).float().cpu().numpy())
    (Path(directory) / "labels.json").write_text(json.dumps(labels, indent=2) + "\n", encoding="utf-8")
    return path


def save_onnx(program: ExportedProgram, path: str | os.PathLike, opset: int | None = None) -> None:
    """Write `program` as ONNX; free axes are called batch, height, width and words."""
    inputs = ["pixel_values", "text_embeds"][: len(program.graph_signature.user_inputs)]
    exported: Any = torch.onnx.export(
        program, dynamo=True, input_names=inputs, output_names=["logits"], opset_version=opset, verbose=False
    )
    graph = exported.model.graph
    for value, names in (
        (graph.inputs[0], ("batch", None, "height", "width")),
        (graph.outputs[0], ("batch", "words", "logits_height", "logits_width")),
        *((value, ("words", None)) for value in graph.inputs[1:]),
    ):
        for axis, name in enumerate(names):
            if name and not isinstance(value.shape[axis], int):
                value.shape[axis] = name
    for node in graph.all_nodes():
        node.metadata_props.clear()
    exported.save(str(path), external_data=False)


def quantize(
    model: DenseCLIPModel,
    processor: DenseCLIPImageProcessorPil,
    path: str | os.PathLike,
    folder: str | os.PathLike,
    size: tuple[int, int] | None = None,
    text_embeds: torch.Tensor | None = None,
) -> float:
    """
    Make the ONNX program at `path` one that computes convolutions and products with weights in int8.

    Weights have a scale for each channel and 7 bits, whose sums no processor cuts off. Activations have 8 bits and the
    range that they have on images of `folder`. The first convolution, norms, attention and sums stay in float32.

    Args:
        model ([`DenseCLIPModel`]): what was exported.
        processor ([`DenseCLIPImageProcessor`]): its image processor.
        path (`str` or `os.PathLike`): what [`export`] wrote, in float32; replaced.
        folder (`str` or `os.PathLike`): holds images like those to come, of which at most 64 are used.
        size (`tuple[int, int]`, *optional*): the height and width that it was exported for.
        text_embeds (`torch.Tensor` of shape `(K, D)`, *optional*): words, if the program takes any.

    Returns:
        `float`: share of places in 8 of the images that keep their class.

    Raises:
        ImportError: if onnx or onnxruntime is missing.
        ValueError, OSError: if there is no image, or one cannot be read.
    """
    _require("onnx", "onnxruntime")
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(inputs, None)

    def classes() -> torch.Tensor:
        return torch.cat([run_exported(path, image, text_embeds).argmax(1).flatten() for image in images[:8]])

    images = _calibration_images(folder, processor, model.config.coarsest_stride, size)
    words = {} if text_embeds is None else {"text_embeds": text_embeds.numpy()}
    inputs = ({"pixel_values": image.numpy()} | words for image in images)
    before, program = classes(), onnx.load(path)
    weights, nodes = {weight.name for weight in program.graph.initializer}, program.graph.node
    in_float = [node.name for node in nodes if node.op_type == "MatMul" and node.input[1] not in weights]
    in_float += [node.name for node in nodes if node.op_type == "Conv"][:1]  # pixels lose most
    add_pre_process_metadata(program)  # or it would ask for norms to be folded, which they are
    quantization.quantize_static(
        program,
        path,
        Reader(),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        per_channel=True,
        reduce_range=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_exclude=in_float,
    )
    return (before == classes()).float().mean().item()


def _calibration_images(
    folder: str | os.PathLike, processor: DenseCLIPImageProcessorPil, step: int, size: tuple[int, int] | None
) -> list[torch.Tensor]:
    """Pixel values `(1, 3, H, W)` of images spread evenly over a folder, cut to multiples of `step`."""
    sources, problems = find_sources([folder])
    if not sources:
        raise ValueError(problems[0])
    resized: Any = {"size": dict(zip(("height", "width"), size, strict=True)), "do_resize": True} if size else {}
    images = []
    for source in sources[:: -(-len(sources) // MAX_CALIBRATION_IMAGES)]:
        pixels = processor(read_image_of(source), return_tensors="pt", **resized)["pixel_values"]
        height, width = (side // step * step for side in pixels.shape[-2:])
        images.append(pixels[..., :height, :width])
    return images


def _require(*packages: str) -> None:
    for package in packages:
        needed(package, "ONNX", "onnx onnxscript onnxruntime")


def run_exported(
    path: str | os.PathLike, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Logits of an exported file (`.onnx` through onnxruntime, or `.pt2`) for `pixel_values` `(B, 3, H, W)` and, if it
    takes words, `text_embeds` `(K, D)`.

    Raises:
        ImportError: if onnxruntime is missing.
    """
    inputs = {"pixel_values": pixel_values} | ({} if text_embeds is None else {"text_embeds": text_embeds})
    if str(path).endswith(".pt2"):
        with torch.no_grad():
            return torch.export.load(path).module()(*inputs.values())
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0])


def check_export(
    model: DenseCLIPModel,
    path: str | os.PathLike,
    size: tuple[int, int] | None = None,
    text_embeds: torch.Tensor | None = None,
) -> float:
    """
    Largest absolute difference between the logits of `model` and of the exported file, for an image of noise.

    Args:
        model ([`DenseCLIPModel`]): what was exported.
        path (`str` or `os.PathLike`): what [`export`] wrote.
        size (`tuple[int, int]`, *optional*): height and width, by default near those of training.
        text_embeds (`torch.Tensor` of shape `(K, D)`, *optional*): words, if the file takes any.
    """
    step = model.config.coarsest_stride
    side = max(min(model.config.image_size, 512) // step * step, 2 * step)
    pixel_values = torch.randn(1, 3, *(size or (side, side + step)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole_logits(model.eval(), pixel_values, text_embeds)
    return (run_exported(path, pixel_values, text_embeds) - expected).abs().max().item()


def export_frozen(
    model: DenseCLIPForSemanticSegmentation,
    processor: DenseCLIPImageProcessorPil,
    source: str,
    directory: str | os.PathLike,
    name: str,
) -> None:
    """
    Freeze the classes of `model` and write it into `directory`: a complete model with tokenizer, and with the card of
    `source` (and the images in it) or a new one.

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
    target = Path(directory) / CARD
    card = cached_file(source, CARD, _raise_exceptions_for_missing_entries=False)
    if card is None:
        write_card(directory, name=name)
    else:
        shutil.copyfile(card, target)
        for image in shown_images(Path(card).parent, target.read_text(encoding="utf-8")):
            (Path(directory) / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(card).parent / image, Path(directory) / image)
    with target.open("a", encoding="utf-8") as file:
        file.write(
            f"\n## For inference alone\n\nThis is {plain(shown_name(source))} with its classes frozen: the text tower "
            "is gone, the logits are the same bit for bit, and it can neither be trained nor take new words.\n"
        )
