"""Times and memory of this implementation beside the original's way of working, in one run.

Cases take turns, so that whatever else the machine does meets all of them; a ratio is the median over the rounds.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from .model.configuration_denseclip import DenseCLIPConfig
from .model.fpn_denseclip import resize_bilinear
from .model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from .training.arguments import parameter_groups


logger = logging.getLogger(__name__)


# The original's way of working, with our modules and weights


def unpacked_class_embeddings(model: Any) -> torch.Tensor:
    """Class embeddings `(K, D)` from K padded prompts, each with its own SOS and contexts, through the text tower."""
    text, prompts = model.clip.text_model, model.prompts
    device = text.embeddings.token_embedding.weight.device
    rows = [torch.tensor(ids, device=device) for ids in model.config.class_token_ids]
    hidden = text.embeddings.token_embedding(pad_sequence(rows, batch_first=True))  # K, L, C
    contexts = prompts.context_vectors
    shift = 0 if contexts is None else len(contexts)
    if contexts is not None:
        hidden = torch.cat([hidden[:, :1], contexts.to(hidden.dtype).expand(len(rows), -1, -1), hidden[:, 1:]], dim=1)
    length = hidden.shape[1]
    hidden = hidden + text.embeddings.position_embedding.weight[:length]
    mask = hidden.new_full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    hidden = text.final_layer_norm(text.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state)
    last = torch.tensor([len(row) - 1 + shift for row in rows], device=hidden.device)
    return model.clip.text_projection(hidden[torch.arange(len(rows), device=hidden.device), last])


def _separate_upsampling(head: Any, levels: list[torch.Tensor]) -> torch.Tensor:
    """The Semantic-FPN head with every level brought to stride 4 by itself."""
    finest, *coarser = [scale(level) for scale, level in zip(head.scale_heads, levels, strict=True)]
    for level in coarser:
        finest = finest + head._upsample(level, finest.shape[-2:])
    return head.classifier(head.dropout(finest))


def _losses_at_full_size(model: Any, segmentation: Any, labels: torch.Tensor):
    config, losses = model.config, []
    for scores in (segmentation.logits, segmentation.score_maps / model.config.temperature):
        scores = resize_bilinear(scores, labels.shape[-2:])
        loss = F.cross_entropy(scores, labels, ignore_index=config.semantic_loss_ignore_index, reduction="none")
        losses.append(loss.mean())
    return losses[0], config.auxiliary_loss_weight * losses[1]


def work_like_the_original(model: DenseCLIPForSemanticSegmentation) -> DenseCLIPForSemanticSegmentation:
    """
    Change `model`, in place, to compute what it computes the way the authors' code does; results stay the same.

    The text tower runs over K padded prompts in every forward pass and for every window, windows go one by one, every
    level of the head is upsampled by itself, the losses are taken at full size, and all parameters have gradients.
    """
    model.encode_classes = MethodType(unpacked_class_embeddings, model)  # type: ignore[method-assign]
    model.decode_head.forward = MethodType(_separate_upsampling, model.decode_head)  # type: ignore[method-assign]
    model._losses = MethodType(_losses_at_full_size, model)  # type: ignore[method-assign]
    model.config.sliding_window_batch_size = 1
    return model.requires_grad_(True)


# Models and inputs


def class_token_ids(num_labels: int) -> list[list[int]]:
    """Made-up names of the lengths of ADE20K's: 150 of them have 184 tokens beside SOS and EOS, at most 3 each."""
    ids = []
    for index in range(num_labels):
        length = 3 if index % 75 < 2 else 2 if index % 75 < 15 else 1
        ids.append([49406, *(1000 + index + 10_000 * place for place in range(length)), 49407])
    return ids


def build_model(preset: str, num_labels: int = 150, **options) -> Any:
    """A full-size model of random weights (seed 0) in eval mode, taking images whole."""
    torch.manual_seed(0)
    names = {"id2label": {i: f"class {i}" for i in range(num_labels)}, "class_token_ids": class_token_ids(num_labels)}
    config = DenseCLIPConfig.from_preset(preset, **{**names, "inference_mode": "whole", **options})
    model = DenseCLIPForSemanticSegmentation(config).eval()
    for module in model.modules():  # batch norms that do something, so that folding them is put to the test
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def training_step(
    model: Any,
    image_size: int,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Callable[[], float]:
    """A function that does one optimizer step of the published recipe, under autocast to `dtype`; returns its loss."""
    model.train()
    trainable = any(p.requires_grad for p in model.clip.text_model.parameters())
    groups = parameter_groups(model, 1e-4, 1e-4, text_encoder_lr_multiplier=1e-3 if trainable else 0.0)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(trainable or group["lr"] > 0)
    optimizer = torch.optim.AdamW([g for g in groups if trainable or g["lr"] > 0], fused=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch_size, 3, image_size, image_size, generator=generator).to(model.device)
    labels = torch.randint(model.config.num_labels, (batch_size, image_size, image_size), generator=generator)
    labels = labels.to(model.device)
    run = torch.compile(model, fullgraph=True) if compiled else model
    autocast = torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)

    def step() -> float:
        torch.manual_seed(0)  # every way of working drops the same channels
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = run(pixels, labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


# Measuring


@dataclass
class Timing:
    """Seconds of every round of one case."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)

    def ratio_to(self, other: "Timing") -> tuple[float, float, float]:
        """How many times faster than `other`: median and quartiles of the rounds' ratios."""
        ratios = [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return middle, low, high


def take_turns(cases: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time all `cases` once per round, in turn; on CUDA the device is waited for."""
    timings = {name: Timing() for name in cases}
    for index in range(warmup + rounds):
        for name, case in cases.items():
            _synchronise()
            start = time.perf_counter()
            case()
            _synchronise()
            if index >= warmup:
                timings[name].seconds.append(time.perf_counter() - start)
        logger.info("round %d of %d", index + 1, warmup + rounds)
    return timings


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_of_parts(model: Any, pixel_values: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds per forward pass in each part of `model`, in all of it and in what no part covers."""
    parts = {
        "text tower": model.clip.text_model and model.clip.text_model.encoder,
        "image tower": model.clip.vision_model if model.config.has_resnet else model.clip.vision_model.encoder,
        "pyramid": model.pyramid,
        "context decoder": model.context_decoder,
        "neck": model.neck,
        "head": model.decode_head,
    }
    rows: dict[str, list[float]] = {name: [] for name in [*parts, "all"]}
    for index in range(rounds + 1):
        spent = dict.fromkeys(parts, 0.0)
        with _stopwatches(parts, spent), torch.no_grad():
            start = time.perf_counter()
            model(pixel_values)
            _synchronise()
            total = time.perf_counter() - start
        if index:  # the first is for warming up
            for name, seconds in {**spent, "all": total}.items():
                rows[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in rows.items()}
    return {**medians, "rest": medians["all"] - sum(medians[name] for name in parts)}


@contextmanager
def _stopwatches(parts: dict[str, Any], spent: dict[str, float]) -> Iterator[None]:
    """Add to `spent` the seconds every call of a module in `parts` takes."""
    patched = []
    for name, module in parts.items():
        modules = [] if module is None else [module]
        if name == "image tower" and module is not None and not hasattr(module, "stages"):
            modules = list(module.layers)  # a ViT's layers are called one by one
        for each in modules:
            patched.append((each, vars(each).get("forward")))
            each.forward = _timed(each.forward, name, spent)
    try:
        yield
    finally:
        for each, own in patched:
            if own is None:
                del each.forward
            else:
                each.forward = own


def _timed(forward: Callable, name: str, spent: dict[str, float]) -> Callable:
    def timed(*args, **kwargs):
        _synchronise()
        start = time.perf_counter()
        result = forward(*args, **kwargs)
        _synchronise()
        spent[name] += time.perf_counter() - start
        return result

    return timed


def floating_point_operations(run: Callable[[], Any]) -> int:
    """Operations of `run` by torch's counter: two for a multiply-add."""
    # the CPU's fused attention is not counted, its plain formula is
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def multiply_adds(model: Any, image_size: int) -> int:
    """Multiply-adds of one forward pass over a square image."""
    pixels = torch.zeros(1, 3, image_size, image_size, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        return floating_point_operations(lambda: model(pixels)) // 2


def matrix_speed(device: str, side: int = 4096) -> float:
    """Operations per second of a bf16 product of two square matrices: median of five."""
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / take_turns({"product": lambda: left @ right}, 5)["product"].median


__all__ = [
    "Timing",
    "build_model",
    "class_token_ids",
    "floating_point_operations",
    "matrix_speed",
    "multiply_adds",
    "take_turns",
    "time_of_parts",
    "training_step",
    "unpacked_class_embeddings",
    "work_like_the_original",
]
