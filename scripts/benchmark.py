"""Time this package beside the original's way of working and models of transformers, in one run.

    python scripts/benchmark.py --tasks image training --presets denseclip-rn50

The cases of a table take turns, so that whatever else the machine does meets all of them: read the ratios, which are
medians over the rounds, rather than the seconds. All weights are random. "The original's way" is a re-enactment with
this package's modules: the text tower runs over padded prompts in every forward pass and for every window, windows go
one by one, losses are taken at full size, and all parameters have gradients.

Tasks: image (one of the published size, 150 classes), slide (windows over 2048 x 512 pixels), many (a folder of
images), training (an optimizer step at batch 2 and its peak memory), classes (a training step by number of classes),
words (on a CLIP as it is, beside a trained segmenter), text (embeddings of 10 000 words), decoders (both, by number of
classes), data (one core), start (seconds of new processes), int8 (a trained model's program on its data; only
if asked for).
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import logging
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch


if __name__ == "__main__":
    del sys.path[0]  # this folder, where `import evaluate` would find evaluate.py in place of the library

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from denseclip_hf import (
    DenseCLIPConfig,
    DenseCLIPForSemanticSegmentation,
    DenseCLIPImageProcessor,
    DenseCLIPModel,
    MeanIoU,
)
from denseclip_hf.cli.arguments import HelpFormatter, log_to_terminal, one_sentence_errors
from denseclip_hf.data import load_segmentation_dataset, read_image
from denseclip_hf.devices import device_of
from denseclip_hf.evaluation import evaluate_segmentation
from denseclip_hf.inference import Segmenter, find_sources, load_model, predict_sources, published_image_processor
from denseclip_hf.model.configuration_denseclip import COST_AGGREGATION_OPTIONS
from denseclip_hf.model.resizing_denseclip import fit_within, resize_argmax
from denseclip_hf.optimization import optimize_for_inference
from denseclip_hf.sharing import export, quantize
from denseclip_hf.training import learn_tokenizer, parameter_groups
from denseclip_hf.training.tokenizer import WORDS
from denseclip_hf.transforms import AugmentedDataset, TrainTransform
from denseclip_hf.words import WordOptions, WordReader


ORIGINAL = "the original's way"
IMAGE_SIZES = {"denseclip-rn50": 512, "denseclip-rn101": 512, "denseclip-vit-b16": 640}  # as published, in pixels
MATRICES, MATRIX_SIDE, PRODUCTS = "8 products of two matrices of 2048 x 2048", 2048, 8
# mIoU on ADE20K, one scale, images of 512 x 512 (ours: as published), from the authors.
AUTHORS = {
    "denseclip-rn50": 43.5,
    "denseclip-rn101": 45.1,
    "denseclip-vit-b16": 50.6,
    "SegFormer-B0": 37.4,
    "SegFormer-B1": 42.2,
    "SegFormer-B2": 46.5,
    "SegFormer-B4": 50.3,
    "UperNet ConvNeXt-T": 46.0,
}
# Depths, widths and the decoder's width (Xie et al. 2021, table 6).
SEGFORMERS = {
    "SegFormer-B0": ([2, 2, 2, 2], [32, 64, 160, 256], 256),
    "SegFormer-B1": ([2, 2, 2, 2], [64, 128, 320, 512], 256),
    "SegFormer-B2": ([3, 4, 6, 3], [64, 128, 320, 512], 768),
    "SegFormer-B4": ([3, 8, 27, 3], [64, 128, 320, 512], 768),
}
Cases = dict[str, Callable[[], Any]]
Rows = list[dict[str, Any]]


def take_turns(cases: Cases, rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(rounds + 1):
        for name, case in cases.items():
            _wait_for_device()
            start = time.perf_counter()
            case()
            _wait_for_device()
            if index:
                seconds[name].append(time.perf_counter() - start)
        logging.info("round %d of %d", index, rounds)
    return seconds


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table_of(what: str, cases: Cases, rounds: int, **more: dict[str, Any]) -> Rows:
    """
    A row per case: median, how many times faster than the first, and columns of `more` (name -> case -> value).

    With a column of GFLOP and [`MATRICES`] among the cases comes the share of their speed.
    """
    seconds = take_turns(cases, rounds)
    first, rows = next(iter(seconds.values())), []
    for case, taken in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(taken, first, strict=True))
        row = {
            "what": what,
            "case": case,
            "median s": f"{statistics.median(taken):.3f}",
            "times faster": f"{ratio:.2f}",
        }
        row |= {name: values.get(case, "") for name, values in more.items()}
        if MATRICES in seconds and row["GFLOP"]:
            speeds = (more["GFLOP"][name] / statistics.median(seconds[name]) for name in (case, MATRICES))
            row["of matrix speed"] = f"{next(speeds) / next(speeds):.0%}"
        rows.append(row)
    return rows


# Models


def build_model(preset: str, num_labels: int = 150, **options: Any) -> Any:
    """A full-size model of random weights in eval mode, with class names of the lengths of ADE20K's."""
    torch.manual_seed(0)
    lengths = [3 if index % 75 < 2 else 2 if index % 75 < 15 else 1 for index in range(num_labels)]
    ids = [[49406, *(1000 + i + 10_000 * place for place in range(n)), 49407] for i, n in enumerate(lengths)]
    names = {"id2label": {i: f"class {i}" for i in range(num_labels)}, "class_token_ids": ids}
    config = DenseCLIPConfig.from_preset(preset, **{**names, "inference_mode": "whole", **options})
    model = DenseCLIPForSemanticSegmentation(config).eval()
    for module in model.modules():  # statistics that do something, so that folding them is put to the test
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def work_like_the_original(model: Any) -> Any:
    """Change `model`, in place, to compute what it computes the way the authors' code does; results stay the same."""
    model.encode_classes = MethodType(embeddings_of_padded_prompts, model)
    model.config.sliding_window_batch_size = 1
    return model.requires_grad_(True)


def embeddings_of_padded_prompts(model: Any) -> torch.Tensor:
    """Class embeddings `(K, D)` from K padded prompts, each with its own SOS and contexts, through the text tower."""
    text, contexts = model.clip.text_model, model.prompts.context_vectors
    rows = [torch.tensor(ids, device=model.device) for ids in model.config.class_token_ids]
    hidden = text.embeddings.token_embedding(pad_sequence(rows, batch_first=True))
    contexts = contexts.to(hidden.dtype).expand(len(rows), -1, -1)
    hidden = torch.cat([hidden[:, :1], contexts, hidden[:, 1:]], dim=1)
    length = hidden.shape[1]
    hidden = hidden + text.embeddings.position_embedding.weight[:length]
    mask = hidden.new_full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    hidden = text.final_layer_norm(text.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state)
    ends = torch.tensor([len(row) - 1 + contexts.shape[1] for row in rows], device=hidden.device)
    return model.clip.text_projection(hidden[torch.arange(len(rows), device=hidden.device), ends])


def forward(model: Any, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that runs `model` on `pixels` and returns the logits."""

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(pixels.to(model.dtype)).logits

    return run


def gflop_of(model: Any, pixels: torch.Tensor) -> float:
    """10**9 floating point operations of products and convolutions; a multiplication and an addition are two."""
    counted = copy.deepcopy(model)
    counted.set_attn_implementation("eager")  # whose products the counter sees
    counter = FlopCounterMode(display=False)
    with counter:
        forward(counted, pixels)()
    return counter.get_total_flops() / 1e9


def peers() -> dict[str, Any]:
    """Models of transformers, with random weights and 150 classes."""
    models: dict[str, Any] = {}
    for name, (depths, widths, decoder) in SEGFORMERS.items():
        config = SegformerConfig(depths=depths, hidden_sizes=widths, decoder_hidden_size=decoder, num_labels=150)
        models[name] = SegformerForSemanticSegmentation(config).eval()
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3], out_features=stages)
    config = UperNetConfig(backbone_config=backbone, use_auxiliary_head=False, num_labels=150)
    models["UperNet ConvNeXt-T"] = UperNetForSemanticSegmentation(config).eval()
    return models


def peer_as_onnx(peer: Any, pixels: torch.Tensor, folder: str) -> str:
    """A model of transformers as an ONNX file for images of one size."""
    path = f"{folder}/peer.onnx"
    torch.onnx.export(
        copy.deepcopy(peer).cpu(), (pixels.cpu(),), path, dynamo=True, external_data=False, verbose=False
    )
    return path


def onnx_program(path: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that runs an ONNX file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: torch.from_numpy(session.run(None, {name: pixels.cpu().numpy()})[0])


def in_onnxruntime(path: str, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same, of these pixels."""
    return functools.partial(onnx_program(path), pixels)


def in_openvino(path: str, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same in OpenVINO, in float32."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    program = openvino.compile_model(path, "CPU", settings)
    return lambda: torch.from_numpy(program(pixels.cpu().numpy())[0])


# Tasks


def image(args: argparse.Namespace) -> Rows:
    """One image of the published size, 150 classes."""
    rows: Rows = []
    for preset in args.presets:
        size, model = IMAGE_SIZES[preset], build_model(preset).to(args.device)
        pixels = torch.randn(1, 3, size, size, device=args.device)
        optimized = optimize_for_inference(model)
        kept = work_like_the_original(copy.deepcopy(model))
        with torch.no_grad():
            embeddings = kept.encode_classes()
        kept.encode_classes = lambda embeddings=embeddings: embeddings
        models = {
            ORIGINAL: work_like_the_original(copy.deepcopy(model)),
            f"{ORIGINAL}, text kept": kept,
            "eager": model,
            "optimized": optimized,
            "optimized, bf16": copy.deepcopy(optimized).to(torch.bfloat16),
        }
        if args.compile:
            models["optimized, compiled"] = torch.compile(optimized, fullgraph=True, options={"freezing": True})
        cases: Cases = {name: forward(each, pixels) for name, each in models.items()}
        gflop = dict.fromkeys(cases, gflop_of(model, pixels))
        authors = {"eager": AUTHORS[preset]}
        with tempfile.TemporaryDirectory() as folder:
            if with_onnx := bool(importlib.util.find_spec("onnxruntime")):
                path = str(export(model, DenseCLIPImageProcessor(), folder, "onnx"))
                cases["ONNX"], gflop["ONNX"], authors["ONNX"] = (
                    in_onnxruntime(path, pixels),
                    gflop["eager"],
                    AUTHORS[preset],
                )
                if importlib.util.find_spec("openvino"):
                    cases["OpenVINO"], gflop["OpenVINO"] = in_openvino(path, pixels), gflop["eager"]
            expected = cases[ORIGINAL]()
            differences = {name: f"{(run().float() - expected).abs().max():.0e}" for name, run in cases.items()}
            cases["eager, classes at full size"] = full_size(cases["eager"], size)
            for name, peer in peers().items():
                cases[name] = forward(peer.to(args.device), pixels)
                if with_onnx:
                    cases[f"{name}, ONNX"] = in_onnxruntime(peer_as_onnx(peer, pixels, folder), pixels)
                for way in (name, f"{name}, ONNX"):
                    gflop[way], authors[way] = gflop_of(peer, pixels), AUTHORS[name]
            cases[MATRICES], gflop[MATRICES] = matrix_products(args.device), PRODUCTS * 2 * MATRIX_SIDE**3 / 1e9
            columns = {"largest difference": differences, "authors' mIoU": authors, "GFLOP": gflop}
            rows += table_of(f"{preset}, {size} x {size}", cases, args.rounds, **columns)
    if importlib.util.find_spec("matplotlib"):
        plot_accuracy(rows, args.output_dir / "accuracy.svg")
    return rows


def full_size(logits: Callable[[], torch.Tensor], side: int) -> Callable[[], torch.Tensor]:
    return lambda: resize_argmax(logits(), (side, side))


def matrix_products(device: str) -> Callable[[], Any]:
    """As convolutions on a CPU, because torch's own products reach half of that on AMD's."""
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device)
    pixels = matrix.view(1, 32, -1, MATRIX_SIDE).permute(0, 3, 1, 2)  # channels last
    weight = matrix[..., None, None].contiguous(memory_format=torch.channels_last)
    is_cpu = torch.device(device).type == "cpu"
    return lambda: [F.conv2d(pixels, weight) if is_cpu else matrix @ matrix for _ in range(PRODUCTS)]


def plot_accuracy(rows: Rows, path: Path) -> None:
    """Accuracy against time: ours at the published sizes, the others at 512 x 512."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    seconds: dict[str, dict[str, float]] = {}
    for row in rows:
        name, _, runtime = row["case"].partition(", ")
        if is_ours := name in ("eager", "ONNX"):
            name, runtime = row["what"].partition(",")[0], name.replace("eager", "")
        if row["authors' mIoU"] and (is_ours or "512" in row["what"]):
            seconds.setdefault(name, {})[runtime or "PyTorch"] = float(row["median s"])
    faces = {"PyTorch": "white", "ONNX": None}
    for name, found in seconds.items():
        color = "tab:red" if name in IMAGE_SIZES else "tab:gray"
        for runtime, time_of_image in found.items():
            axes.plot(time_of_image, AUTHORS[name], "o", color=color, markerfacecolor=faces[runtime])
        axes.plot(found.values(), [AUTHORS[name]] * len(found), color=color, zorder=0)
        is_crowded = any(0 < AUTHORS[other] - AUTHORS[name] < 1 for other in seconds)  # by a line above
        place = (0, -14 if is_crowded else 6)
        axes.annotate(name, (min(found.values()), AUTHORS[name]), place, textcoords="offset points", color=color)
    for runtime, face in faces.items():
        axes.plot([], [], "o", color="black", markerfacecolor=face, label=runtime)
    axes.legend(loc="lower right")
    axes.set(xlabel="seconds for an image", ylabel="mIoU on ADE20K, as published", ylim=(36, 53), xlim=(0, None))
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(path)


def slide(args: argparse.Namespace) -> Rows:
    """Windows over one image of 2048 x 512 pixels."""
    rows: Rows = []
    for preset in args.presets:
        model = build_model(preset, inference_mode="slide").to(args.device)
        pixels = torch.randn(1, 3, 512, 2048, device=args.device)
        ways = {ORIGINAL: work_like_the_original(copy.deepcopy(model)), "eager": model}
        ways["optimized"] = optimize_for_inference(model)
        rows += table_of(preset, {name: forward(each, pixels) for name, each in ways.items()}, args.rounds)
    return rows


def many(args: argparse.Namespace) -> Rows:
    """40 JPEGs of 640 x 480 pixels: files to masks and overlays, and files and masks to scores, beside the model."""
    rows: Rows = []
    for preset in args.presets:
        model = build_model(preset).to(args.device)
        processor = published_image_processor(model.config)
        with torch.no_grad():  # an image shows a dozen classes, not all of them
            model.decode_head.classifier.bias[12:] -= 1e4
        with tempfile.TemporaryDirectory() as folder:
            write_data_set(Path(folder), 40)
            samples = load_segmentation_dataset(folder, validation_fraction=0).train
            sources, _ = find_sources([f"{folder}/images"])
            prepared = [processor(sample["image"], return_tensors="pt")["pixel_values"] for sample in samples]
            forwards = [forward(model, pixels.to(args.device)) for pixels in prepared]
            segmenter = Segmenter(model, processor)
            cases: Cases = {
                "the model alone": lambda forwards=forwards: [run() for run in forwards],
                "predict": lambda segmenter=segmenter, sources=sources, folder=folder: predict_sources(
                    segmenter, sources, f"{folder}/predictions", overwrite=True, progress=False
                ),
                "evaluate": lambda model=model, samples=samples, processor=processor: evaluate_segmentation(
                    model, samples, processor, progress=False, with_loss=False
                ),
            }
            rows += table_of(preset, cases, args.rounds)
    return rows


def training(args: argparse.Namespace) -> Rows:
    """One step of the published recipe at batch 2: forward, backward, AdamW; peak memory in a process of its own."""
    rows: Rows = []
    for preset in args.presets:
        ways = [ORIGINAL, "ours", "ours, text tower trained", "ours, channels-last", "ours, bf16"]
        ways += ["ours, compiled"] * args.compile
        rows += training_table(preset, {way: (preset, way, 150, {}, args.device) for way in ways}, args.rounds)
    return rows


def classes(args: argparse.Namespace) -> Rows:
    """The same by number of classes: RN50 at 512 x 512; cost aggregation on a ViT-B/16 at 384 x 384, batch 1."""
    rows: Rows = []
    for count in args.classes:
        steps = {
            "Semantic FPN": ("denseclip-rn50", "ours", count, {}, args.device),
            "cost aggregation": ("denseclip-vit-b16", "ours", count, {"tower_image_size": 384}, args.device),
        }
        rows += training_table(f"{count} classes", steps, args.rounds)
    return rows


def training_table(what: str, options: dict[str, tuple[Any, ...]], rounds: int) -> Rows:
    """A table of [`training_step`]s of these options."""
    peaks = {name: peak_memory(training_step, *each) for name, each in options.items()}  # while nothing is here
    steps: Cases = {name: training_step(*each) for name, each in options.items()}
    losses = {name: f"{step():.4f}" for name, step in steps.items()}
    return table_of(what, steps, rounds, **{"first loss": losses, "peak GiB": peaks})


def training_step(preset: str, way: str, num_labels: int, options: dict[str, Any], device: str) -> Callable[[], float]:
    """A function that does one optimizer step and returns its loss."""
    size, batch_size = IMAGE_SIZES[preset], 2
    if "tower_image_size" in options:
        size, batch_size, options = options["tower_image_size"], 1, {**COST_AGGREGATION_OPTIONS, **options}
    model = build_model(preset, num_labels, **options).to(device).train()
    if "channels-last" in way:
        model.to(memory_format=torch.channels_last)
    groups = parameter_groups(model, 1e-4, 1e-4, text_encoder_lr_multiplier=float("text" in way))
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(group["lr"] > 0)
    if way == ORIGINAL:
        work_like_the_original(model)
    optimizer = torch.optim.AdamW([group for group in groups if group["lr"] > 0], fused=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch_size, 3, size, size, generator=generator).to(device)
    labels = torch.randint(num_labels, (batch_size, size, size), generator=generator).to(device)
    run = torch.compile(model, fullgraph=True) if "compiled" in way else model

    def loss_of() -> torch.Tensor:
        if way != ORIGINAL:
            return run(pixels, labels).loss
        outputs, config = model(pixels), model.config
        full = [F.interpolate(x, (size, size), mode="bilinear") for x in (outputs.logits, outputs.score_maps)]
        auxiliary = F.cross_entropy(full[1] / config.temperature, labels)
        return F.cross_entropy(full[0], labels) + config.auxiliary_loss_weight * auxiliary

    def step() -> float:
        torch.manual_seed(0)  # every way of working drops the same channels
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled="bf16" in way):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end, so that those who wait their turn hold no gradients
        return loss.item()

    return step


def peak_memory(make: Callable[..., Callable[[], Any]], *options: Any) -> str:
    """GiB that a process takes at most which does twice what `make(*options)` gives; a device is the last option."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return f"{pool.submit(_peak_memory, make, *options).result():.1f}"


def _peak_memory(make: Callable[..., Callable[[], Any]], *options: Any) -> float:
    step, device = make(*options), options[-1]
    step(), step()
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss is inherited
    return int(peak[1]) / 2**20 if peak else float("nan")


def words(args: argparse.Namespace) -> Rows:
    """150 words on an untrained CLIP ViT-B/16, beside a trained segmenter: 640 x 480 pixels, text embeddings kept."""
    cases: Cases = {way: word_case(way, args.device) for way in WORD_WAYS}
    peaks = {way: peak_memory(word_case, way, args.device) for way in WORD_WAYS}
    return table_of("640 x 480", cases, args.rounds, **{"peak GiB": peaks})


WORD_WAYS: dict[str, dict[str, Any] | None] = {
    "trained segmenter, short side 640": None,
    "words, windows at short side 336": {},
    "words, whole image at short side 336": {"inference_mode": "whole"},
    "words, windows, refined 10 times": {"refine": 10},
}


def word_case(way: str, device: str) -> Callable[[], torch.Tensor]:
    """A function that segments a photo at its own size."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8))
    size, options = (photo.height, photo.width), WORD_WAYS[way]
    if options is None:
        model = build_model("denseclip-vit-b16").to(device)
        processor = published_image_processor(model.config)

        @torch.no_grad()
        def own_classes() -> torch.Tensor:
            pixels = processor(photo, return_tensors="pt")["pixel_values"].to(device)
            return resize_argmax(model(pixels).logits, size)

        return own_classes
    options = dict(options)
    word_options = WordOptions(refine=options.pop("refine", 0))
    clip = CLIPModel(CLIPConfig(vision_config={"patch_size": 16}))
    reader = WordReader(DenseCLIPModel.from_clip(clip, **options).eval().to(device), object())
    queries, owners = torch.randn(150, 512, device=device), torch.arange(150, device=device)

    @torch.no_grad()
    def asked() -> torch.Tensor:
        pixels = reader.preprocess(photo)
        return reader.choose(reader.score(pixels[None], queries)[0], owners, size, pixels, word_options)[0]

    return asked


def text(args: argparse.Namespace) -> Rows:
    """Embeddings of 10 000 words on an untrained CLIP ViT-B/16: worked out, and kept by an earlier reader."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, HF_ASSETS_CACHE=folder),
        ProcessPoolExecutor(1, get_context("spawn")) as pool,  # its process reads the variable at its start
    ):

        def worked_out() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            kept()

        def kept() -> None:
            pool.submit(encode_words, args.device).result()

        return table_of("10 000 words", {"worked out": worked_out, "kept by an earlier reader": kept}, args.rounds)


def encode_words(device: str) -> None:
    model, tokenizer = clip_and_tokenizer(device)
    pairs = itertools.islice(itertools.product(WORDS.split(), repeat=2), 10_000)
    WordReader(model, tokenizer).encode(tuple(f"{first} {second}" for first, second in dict.fromkeys(pairs)))


@functools.cache
def clip_and_tokenizer(device: str) -> tuple[DenseCLIPModel, Any]:
    torch.manual_seed(0)
    tokenizer = learn_tokenizer([])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPModel(CLIPConfig(text_config={"vocab_size": len(tokenizer), **ids}, vision_config={"patch_size": 16}))
    return DenseCLIPModel.from_clip(clip).eval().to(device), tokenizer


def decoders(args: argparse.Namespace) -> Rows:
    """One image of 384 x 384 for 10 to 1000 classes, ViT-B/16, text embeddings kept: both decoders."""
    rows: Rows = []
    for count in args.classes:
        cases: Cases = {way: decoder_case(way, count, args.device) for way in DECODERS}
        peaks = {way: peak_memory(decoder_case, way, count, args.device) for way in DECODERS}
        rows += table_of(f"{count} classes", cases, args.rounds, **{"peak GiB": peaks})
    return rows


DECODERS: dict[str, dict[str, Any]] = {
    "Semantic FPN": {},
    "cost aggregation, at most 256 decoded": {"aggregator": {}},
    "cost aggregation, all decoded": {"aggregator": {"max_classes": 0}},
}


def decoder_case(way: str, count: int, device: str) -> Callable[[], torch.Tensor]:
    """A function that segments an image into `count` classes."""
    options = DECODERS[way]
    if options:
        options = {**COST_AGGREGATION_OPTIONS, "tower_image_size": 384, **options}
    model = build_model("denseclip-vit-b16", count, **options).to(device)
    return forward(model, torch.randn(1, 3, 384, 384, device=device))


def data(args: argparse.Namespace) -> Rows:
    """Samples from JPEGs of 640 x 480 pixels, on one core, and the original's pipeline where OpenCV is installed."""
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_data_set(Path(folder), 20)
        samples = load_segmentation_dataset(folder, validation_fraction=0).train
        augmented = AugmentedDataset(samples, TrainTransform(crop_size=512, scale=(2048, 512)))
        processor = DenseCLIPImageProcessor(size={"shortest_edge": 512, "longest_edge": 2048})
        images, masks = (sorted(Path(folder, kind).iterdir()) for kind in ("images", "masks"))
        training_cases: Cases = {"ours": one_by_one(augmented.__getitem__, range(len(images)))}
        evaluation_cases: Cases = {"ours": one_by_one(lambda image: processor(read_image(image)), images)}
        if importlib.util.find_spec("cv2"):
            rngs = np.random.default_rng(0)
            pairs = list(zip(images, masks, strict=True))
            training_cases = {OPENCV: one_by_one(lambda pair: opencv_sample(*pair, rngs), pairs)} | training_cases
            evaluation_cases = {OPENCV: one_by_one(opencv_image, images)} | evaluation_cases
        for what, cases in (("20 training samples", training_cases), ("20 images for evaluation", evaluation_cases)):
            rows += table_of(what, cases, args.rounds)
    return rows


def one_by_one(function: Callable[[Any], Any], items: Sequence[Any]) -> Callable[[], Any]:
    """`function` of each item, and no result is kept, as in a worker that hands them on."""
    return lambda: deque(map(function, items), maxlen=0)


def write_data_set(folder: Path, count: int) -> None:
    """Images of 640 x 480 pixels and their masks."""
    rng = np.random.default_rng(0)
    for kind, channels, suffix in (("images", 3, ".jpg"), ("masks", 1, ".png")):
        (folder / kind).mkdir()
        for index in range(count):
            coarse = rng.integers(0, 256 if channels == 3 else 2, (48, 64, channels)).astype(np.uint8).squeeze()
            resample = Image.Resampling.BICUBIC if channels == 3 else Image.Resampling.NEAREST
            image = Image.fromarray(coarse).resize((640, 480), resample)
            image.save(folder / kind / f"{index:02}{suffix}", quality=90)
    (folder / "classes.json").write_text(json.dumps({"id2label": {"0": "sky", "1": "road"}}))


OPENCV = "the original's pipeline, OpenCV"


def opencv_image(path: Path) -> torch.Tensor:
    """What the original's test pipeline makes of an image: resized and normalized."""
    pixels = opencv_resized(_decoded(path), 1.0)
    return torch.from_numpy(np.ascontiguousarray(_normalized(pixels).transpose(2, 0, 1)))


def opencv_sample(image: Path, mask: Path, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What the original's training pipeline makes of a sample, step by step and whole images at a time."""
    import cv2

    ratio, crop = rng.uniform(0.5, 2.0), 512
    pixels, labels = (opencv_resized(x, ratio) for x in (_decoded(image), np.asarray(Image.open(mask))))
    for _ in range(11):
        top, left = (rng.integers(max(side - crop, 0) + 1) for side in labels.shape)
        window = np.s_[top : top + crop, left : left + crop]
        counts = np.unique(labels[window], return_counts=True)[1]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    pixels, labels = pixels[window], labels[window]
    if rng.random() < 0.5:
        pixels, labels = np.flip(pixels, 1), np.flip(labels, 1).copy()
    steps: list[tuple[int | None, float, float]] = [(None, 1.0, rng.uniform(-32, 32))]  # channel of HSV, gain, shift
    contrast = (None, rng.uniform(0.5, 1.5), 0.0)
    colors = [(1, rng.uniform(0.5, 1.5), 0.0), (0, 1.0, rng.integers(-18, 18))]
    steps += [contrast, *colors] if rng.random() < 0.5 else [*colors, contrast]
    for channel, gain, shift in steps:
        if rng.random() < 0.5:
            continue
        if channel is None:
            pixels = _linear(pixels, gain, shift)
            continue
        hsv = cv2.cvtColor(pixels, cv2.COLOR_BGR2HSV)
        changed = (hsv[..., 0].astype(int) + int(shift)) % 180 if channel == 0 else _linear(hsv[..., 1], gain, 0)
        hsv[..., channel] = changed
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    border = (0, crop - labels.shape[0], 0, crop - labels.shape[1], cv2.BORDER_CONSTANT)
    pixels = cv2.copyMakeBorder(_normalized(pixels), *border, value=0)
    labels = cv2.copyMakeBorder(labels, *border, value=255)
    tensors = np.ascontiguousarray(pixels.transpose(2, 0, 1)), labels.astype(np.int64)
    return torch.from_numpy(tensors[0]), torch.from_numpy(tensors[1])


def _decoded(path: Path) -> np.ndarray:
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)


def opencv_resized(array: np.ndarray, ratio: float) -> np.ndarray:
    """To a short side of 512 and a long one of 2048 at most, times `ratio`; masks by the nearest pixel."""
    import cv2

    height, width = fit_within(*array.shape[:2], int(512 * ratio), int(2048 * ratio))
    return cv2.resize(array, (width, height), interpolation=cv2.INTER_LINEAR if array.ndim == 3 else cv2.INTER_NEAREST)


def _linear(levels: np.ndarray, gain: float, shift: float) -> np.ndarray:
    return np.clip(levels.astype(np.float32) * gain + shift, 0, 255).astype(np.uint8)


def _normalized(pixels: np.ndarray) -> np.ndarray:
    import cv2

    mean, std = (255 * np.array([values], np.float64) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    result = cv2.cvtColor(pixels.astype(np.float32), cv2.COLOR_BGR2RGB)
    cv2.subtract(result, mean, result)
    return cv2.multiply(result, 1 / std, result)


def start(args: argparse.Namespace) -> Rows:
    """Seconds of a new process."""
    commands = {
        "transformers' CLIP": ["-c", "from transformers.models.clip import modeling_clip"],
        "import denseclip_hf": ["-c", "import denseclip_hf"],
        "denseclip --help": ["-m", "denseclip_command", "--help"],
        "denseclip predict --help": ["-m", "denseclip_command", "predict", "--help"],
        "denseclip train --help": ["-m", "denseclip_command", "train", "--help"],
    }

    def runner(command: list[str]) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)

    rows = table_of("start", {name: runner(command) for name, command in commands.items()}, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(args.presets[0])
        model.save_pretrained(folder)
        published_image_processor(model.config).save_pretrained(folder)
        command = [sys.executable, "-c", PARTS_OF_PREDICT, folder, args.device]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(args.rounds)]
    for part in runs[0]:
        seconds = statistics.median(run[part] for run in runs)
        rows.append({"what": f"predict, {args.presets[0]}", "case": part, "median s": f"{seconds:.3f}"})
    return rows


def int8(args: argparse.Namespace) -> Rows:
    """The ONNX program of a trained model in float32 and in 8 bits: mIoU and seconds of its validation images."""
    model, processor = load_model(args.model, "float32")
    data, step = load_segmentation_dataset(args.data), model.config.coarsest_stride
    samples = [data.validation[index] for index in range(len(data.validation))]
    sides = [processor(sample["image"])["pixel_values"][0].shape[-2:] for sample in samples]
    sizes = [[max(round(side / step), 2) * step for side in pair] for pair in sides]
    pixels = [
        processor(sample["image"], size={"height": size[0], "width": size[1]}, return_tensors="pt")["pixel_values"]
        for sample, size in zip(samples, sizes, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as images:
        for index in range(0, len(data.train), max(1, len(data.train) // 64)):
            data.train[index]["image"].save(f"{images}/{index}.png")
        path = export(model, processor, folder, "onnx")
        programs = {"float32": onnx_program(str(path))}
        sizes_of_file = {"float32": f"{path.stat().st_size / 1e6:.1f}"}
        quantize(model, processor, path, images)
        programs["int8"], sizes_of_file["int8"] = onnx_program(str(path)), f"{path.stat().st_size / 1e6:.1f}"
        scores = {}
        for name, program in programs.items():
            metric = MeanIoU(len(data.id2label), data.ignore_index)
            for sample, image in zip(samples, pixels, strict=True):
                ids = resize_argmax(program(image), sample["mask"].shape)[0]
                metric.add_batch(predictions=[ids.numpy()], references=[sample["mask"]])
            scores[name] = f"{100 * metric.compute()['mean_iou']:.2f}"
        cases: Cases = {
            name: lambda program=program: [program(image) for image in pixels[:20]]
            for name, program in programs.items()
        }
        return table_of(f"{args.model}, 20 images", cases, args.rounds, **{"mIoU of all": scores, "MB": sizes_of_file})


PARTS_OF_PREDICT = """
import json, sys, time
begin, seconds = time.perf_counter(), {}
def end_of(part):
    global begin
    seconds[part] = time.perf_counter() - begin
    begin = time.perf_counter()
import torch
end_of("import torch")
from transformers import AutoModel, CLIPModel
end_of("import transformers")
from PIL import Image
from denseclip_hf.inference import Segmenter, load_model
end_of("import denseclip_hf.inference")
model, image_processor = load_model(sys.argv[1], "float32")
model.to(sys.argv[2])
end_of("open the model")
segmenter, image = Segmenter(model, image_processor), Image.new("RGB", (640, 480))
pixel_values = segmenter.preprocess(image)[None]
end_of("prepare an image")
for part in ("first image, with the classes' embeddings", "second image"):
    segmenter([image], pixel_values)
    end_of(part)
print(json.dumps(seconds))
"""


TASKS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    task.__name__: task for task in (image, slide, many, training, classes, words, text, decoders, data, start, int8)
}


def markdown(rows: Rows) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hardware(device: str) -> str:
    """What was measured on; figures mean little without it."""
    name = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {torch.get_num_threads()} threads, {versions}"


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=[name for name in TASKS if name != "int8"], help="tables"
    )
    parser.add_argument("--presets", nargs="+", choices=IMAGE_SIZES, default=["denseclip-rn50", "denseclip-vit-b16"])
    parser.add_argument(
        "--classes", nargs="+", type=int, default=[10, 150, 1000], help="numbers of the tasks classes and decoders"
    )
    parser.add_argument("--model", default="outputs/demo/model", help="of the task int8: a saved model")
    parser.add_argument("--data", default="outputs/demo/data", help="of the task int8: its data set")
    parser.add_argument("--rounds", type=int, default=5, help="times every case is run, in turn")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, or a device of torch")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile (minutes on a CPU)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"), help="where tables go")
    args = parser.parse_args(argv)
    log_to_terminal()
    args.device = device_of(args.device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"hardware": hardware(args.device), "rounds": args.rounds, "tasks": {}}
    text = [f"Measured on {report['hardware']}; medians of {args.rounds} rounds."]
    for name in args.tasks:
        report["tasks"][name] = TASKS[name](args)
        text.append(f"\n### {name}\n{TASKS[name].__doc__}\n\n{markdown(report['tasks'][name])}")
        (args.output_dir / "benchmark.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.output_dir / "benchmark.md").write_text("\n".join(text) + "\n")
        print(text[-1])
    print(f"Results are in {args.output_dir}")


if __name__ == "__main__":
    main()
