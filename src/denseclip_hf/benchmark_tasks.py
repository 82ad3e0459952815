"""The measurements `scripts/benchmark.py` makes; each returns rows for one table."""

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from .benchmarking import (
    Timing,
    build_model,
    floating_point_operations,
    matrix_speed,
    multiply_adds,
    take_turns,
    time_of_parts,
    training_step,
    unpacked_class_embeddings,
    work_like_the_original,
)
from .optimization import optimize_for_inference
from .training.callbacks import peak_memory


logger = logging.getLogger(__name__)

BASELINE = "the original's way"
# Side in pixels the presets were published for, and multiply-adds in units of 1e9 as published (table 1 of the paper).
IMAGE_SIZES = {"denseclip-rn50": 512, "denseclip-rn101": 512, "denseclip-vit-b16": 640}
PUBLISHED_GFLOPS = {"denseclip-rn50": 269.2, "denseclip-rn101": 346.3, "denseclip-vit-b16": 1043.1}
WIDE_PICTURE = (512, 2048)  # height, width
CLASS_COUNTS = (10, 150, 1000, 10_000)
# Depths and widths of SegFormer's six sizes (Xie et al. 2021, table 6).
SEGFORMERS: dict[str, dict[str, Any]] = {
    "SegFormer-B0": {"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "decoder_hidden_size": 256},
    "SegFormer-B1": {"depths": [2, 2, 2, 2], "decoder_hidden_size": 256},
    "SegFormer-B2": {"depths": [3, 4, 6, 3]},
    "SegFormer-B3": {"depths": [3, 4, 18, 3]},
    "SegFormer-B4": {"depths": [3, 8, 27, 3]},
    "SegFormer-B5": {"depths": [3, 6, 40, 3]},
}


@dataclass
class Settings:
    """What to measure: `presets`, `rounds`, `device`, and whether to `compile` too."""

    presets: list[str]
    rounds: int
    device: str
    compile: bool


Rows = list[dict[str, Any]]


def inference(settings: Settings) -> Rows:
    """One picture of the published size, taken whole."""
    rows: Rows = []
    for preset in settings.presets:
        size = IMAGE_SIZES[preset]
        pixels = torch.randn(1, 3, size, size, device=settings.device)
        rows += _inference_rows(
            f"{preset}, {size} x {size}", build_model(preset).to(settings.device), pixels, settings
        )
    return rows


def slide(settings: Settings) -> Rows:
    """Sliding windows over one picture of 2048 x 512 pixels."""
    rows: Rows = []
    for preset in settings.presets:
        pixels = torch.randn(1, 3, *WIDE_PICTURE, device=settings.device)
        model = build_model(preset, inference_mode="slide").to(settings.device)
        rows += _inference_rows(f"{preset}, windows", model, pixels, settings)
    return rows


def _ways_of_inference(model: Any) -> dict[str, Any]:
    """Models that give what `model` gives, by how they work."""
    original: Any = work_like_the_original(copy.deepcopy(model))
    optimized: Any = optimize_for_inference(model)
    return {
        BASELINE: original,
        f"{BASELINE}, bf16": copy.deepcopy(original).to(torch.bfloat16),
        "ours, eager": model,
        "ours, optimized": optimized,
        "ours, optimized, bf16": copy.deepcopy(optimized).to(torch.bfloat16),
    }


def _inference_rows(name: str, model: Any, pixels: torch.Tensor, settings: Settings) -> Rows:
    models = _ways_of_inference(model)
    if settings.compile:
        for key in ("ours, optimized", "ours, optimized, bf16"):
            models[f"{key}, compiled"] = _compiled(models[key])

    cases = {key: forward(each, pixels.to(each.dtype)) for key, each in models.items()}
    expected = cases[BASELINE]()
    differences = {key: (run().float() - expected).abs().max().item() for key, run in cases.items()}
    timings = take_turns(cases, settings.rounds)
    extra = {key: {"largest difference": f"{value:.1e}"} for key, value in differences.items()}
    return _ratio_rows(name, timings, extra)


def _compiled(model: Any) -> Any:
    """`model` for inference, compiled as one graph; frozen: its weights are laid out once, for the kernels."""
    options: dict[str, Any] = {"fullgraph": True, "options": {"freezing": True}}
    if model.config.inference_mode == "whole":
        return torch.compile(model, **options)
    sliding = copy.copy(model)  # a graph of all windows would hold each of them: compile one, and loop in Python
    sliding.window_logits = torch.compile(model.window_logits, **options)
    return sliding


def forward(model: Any, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that runs `model` on `pixels` and returns the logits."""

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(pixels).logits

    return run


def _ratio_rows(name: str, timings: dict[str, Timing], extra: dict[str, dict[str, Any]] | None = None) -> Rows:
    rows = []
    for key, timing in timings.items():
        middle, low, high = timing.ratio_to(timings[BASELINE])
        row = {"what": name, "case": key, "median s": round(timing.median, 3), "times faster": f"{middle:.2f}"}
        rows.append({**row, "quartiles": f"{low:.2f} - {high:.2f}", **(extra or {}).get(key, {})})
    return rows


def training(settings: Settings) -> Rows:
    """One optimizer step at batch 1, forward, backward and AdamW; bf16 is autocast's."""
    rows: Rows = []
    for preset in settings.presets:
        size, model = IMAGE_SIZES[preset], build_model(preset).to(settings.device)
        bf16: dict[str, Any] = {"dtype": torch.bfloat16}
        compiled: dict[str, Any] = {"compiled": True}
        variants = {"ours": {}, "ours, bf16": bf16}
        if settings.compile:
            variants |= {"ours, compiled": compiled, "ours, bf16, compiled": bf16 | compiled}
        original = work_like_the_original(copy.deepcopy(model))
        cases = {BASELINE: training_step(original, size), f"{BASELINE}, bf16": training_step(original, size, **bf16)}
        cases |= {key: training_step(copy.deepcopy(model), size, **options) for key, options in variants.items()}
        losses = {key: {"first loss": f"{step():.5f}"} for key, step in cases.items()}
        rows += _ratio_rows(f"{preset}, {size} x {size}", take_turns(cases, settings.rounds), losses)
    return rows


def throughput(settings: Settings) -> Rows:
    """Pictures per second in bf16, in batches of 8, and how much of the device's speed in matrix products that is."""
    rows: Rows = []
    speed = matrix_speed(settings.device)
    for preset in settings.presets:
        size = IMAGE_SIZES[preset]
        pixels = torch.randn(8, 3, size, size, device=settings.device, dtype=torch.bfloat16)
        model = build_model(preset).to(settings.device)
        optimized: Any = optimize_for_inference(model)
        optimized = optimized.to(torch.bfloat16)
        cases: dict[str, Callable[[], Any]] = {
            "inference": forward(_compiled(optimized) if settings.compile else optimized, pixels),
            "training": training_step(model, size, 8, torch.bfloat16, compiled=settings.compile),
        }
        work = {
            "inference": floating_point_operations(forward(optimized, pixels)),
            "training": floating_point_operations(training_step(copy.deepcopy(model), size, 8, torch.bfloat16)),
        }
        for case, timing in take_turns(cases, settings.rounds).items():
            row = {"what": f"{preset}, {size} x {size}", "case": case, "compiled": settings.compile}
            share = work[case] / timing.median / speed
            rows.append({**row, "pictures/s": round(8 / timing.median, 1), "of the matrix speed": f"{share:.0%}"})
    return rows


def memory(settings: Settings) -> Rows:
    """Peak memory of a process that does two training steps at batch 1, or two forward passes."""
    rows: Rows = []
    for preset in settings.presets:
        for what in ("training", "inference"):
            peaks = {}
            for case in (BASELINE, "ours"):
                arguments = f"{preset!r}, {what!r}, {case!r}, {settings.device!r}"
                code = f"from denseclip_hf.benchmark_tasks import peak_of; print(peak_of({arguments}))"
                result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                peaks[case] = float(result.stdout)
            for case, peak in peaks.items():
                row = {"what": f"{preset}, {what}", "case": case, "peak GiB": round(peak, 2)}
                rows.append({**row, "of the original": f"{peak / peaks[BASELINE]:.2f}"})
    return rows


def peak_of(preset: str, what: str, case: str, device: str) -> float:
    """Peak GiB of this process after two steps; to be called in a process of its own."""
    model = build_model(preset).to(device)
    if case == BASELINE:
        work_like_the_original(model)
    size = IMAGE_SIZES[preset]
    pixels = torch.randn(1, 3, size, size, device=device)
    step: Callable[[], Any] = training_step(model, size) if what == "training" else forward(model, pixels)
    for _ in range(2):
        step()
    return peak_memory(torch.device(device).type) / 2**30


def parts(settings: Settings) -> Rows:
    """Where the time of a forward pass goes."""
    rows: Rows = []
    for preset in settings.presets:
        size = IMAGE_SIZES[preset]
        pixels = torch.randn(1, 3, size, size, device=settings.device)
        model = build_model(preset).to(settings.device)
        for case, each in _ways_of_inference(model).items():
            times = time_of_parts(each, pixels.to(each.dtype), settings.rounds)
            rows.append({"what": preset, "case": case, **{part: round(s, 3) for part, s in times.items()}})
    return rows


def classes(settings: Settings) -> Rows:
    """What the class embeddings cost with the number of classes: tokens, and forward plus backward to the contexts."""
    rows: Rows = []
    for number in CLASS_COUNTS:
        model = build_model("denseclip-rn50", number).to(settings.device)
        model.clip.text_model.requires_grad_(False)
        model.clip.text_projection.requires_grad_(False)
        model.train()
        cases = {"ours": model.encode_classes}
        if number <= 1000:  # the original's way needs tens of GiB beyond
            cases[BASELINE] = lambda model=model: unpacked_class_embeddings(model)
        timings = take_turns({k: _with_backward(f) for k, f in cases.items()}, max(settings.rounds // 2, 1))
        longest = max(map(len, model.config.class_token_ids)) + model.config.num_context_tokens
        tokens = {"ours": model.prompts.token_ids.numel(), BASELINE: number * longest}
        for case, timing in timings.items():
            rows.append({"classes": number, "case": case, "tokens": tokens[case], "median s": round(timing.median, 3)})
    return rows


def _with_backward(embed: Callable[[], torch.Tensor]) -> Callable[[], None]:
    return lambda: embed().sum().backward()


def sizes(settings: Settings) -> Rows:
    """How a forward pass grows with image size and batch."""
    rows: Rows = []
    for preset in settings.presets:
        model = optimize_for_inference(build_model(preset).to(settings.device))
        cases = {
            f"batch {batch}, {side} x {side}": forward(
                model, torch.randn(batch, 3, side, side, device=settings.device)
            )
            for batch, side in ((1, 256), (1, 512), (1, 768), (1, 1024), (2, 512), (4, 512))
        }
        timings = take_turns(cases, settings.rounds)
        rows += [{"what": preset, "case": k, "median s": round(t.median, 3)} for k, t in timings.items()]
    return rows


def flops(settings: Settings) -> Rows:
    """Multiply-adds at 1024 x 1024 beside the published figures."""
    rows: Rows = []
    for preset in settings.presets:
        model = build_model(preset).to(settings.device)
        model.encode_classes()
        ours = multiply_adds(model, 1024)
        original = multiply_adds(work_like_the_original(model), 1024)
        rows.append(
            {
                "what": preset,
                "published GMAC": PUBLISHED_GFLOPS[preset],
                "the original's way": round(original / 1e9, 1),
                "ours": round(ours / 1e9, 1),
            }
        )
    return rows


def others(settings: Settings) -> Rows:
    """What else one could take from transformers, at 512 x 512 with 150 classes, eager."""
    models: dict[str, Any] = {"denseclip-rn50": build_model("denseclip-rn50")}
    models["denseclip-vit-b16"] = build_model("denseclip-vit-b16")
    models["denseclip-rn50, optimized"] = optimize_for_inference(models["denseclip-rn50"])
    models["denseclip-vit-b16, optimized"] = optimize_for_inference(models["denseclip-vit-b16"])
    for name, options in SEGFORMERS.items():
        sizes: Any = {"hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768, "num_labels": 150, **options}
        models[name] = SegformerForSemanticSegmentation(SegformerConfig(**sizes))
    upernet: Any = {"num_labels": 150}
    models["UperNet, ResNet-50"] = UperNetForSemanticSegmentation(UperNetConfig(**upernet))
    pixels = torch.randn(1, 3, 512, 512, device=settings.device)
    cases = {name: forward(model.to(settings.device).eval(), pixels) for name, model in models.items()}
    timings = take_turns(cases, settings.rounds)
    return [
        {
            "model": name,
            "parameters (M)": round(sum(p.numel() for p in models[name].parameters()) / 1e6, 1),
            "GMAC": round(multiply_adds(models[name], 512) / 1e9, 1),
            "median s": round(timing.median, 3),
        }
        for name, timing in timings.items()
    ]


TASKS: dict[str, Callable[[Settings], Rows]] = {
    "inference": inference,
    "slide": slide,
    "training": training,
    "throughput": throughput,
    "memory": memory,
    "parts": parts,
    "classes": classes,
    "sizes": sizes,
    "flops": flops,
    "others": others,
}

__all__ = ["TASKS", "Settings", "peak_of"]
