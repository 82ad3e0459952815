"""What one watches while a model trains: the parts of its loss, accuracy, learning rates, speed and memory."""

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch.nn import functional as F


LOSSES = ("decode_loss", "auxiliary_loss")


class TrainingLog:
    """
    Adds up what the batches between two log lines give, without waiting for the device.

    `rates` are the learning rates of all parameter groups, by name, in the step that runs.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)
        self._last_line = time.perf_counter()
        self.rates: dict[str, float] = {}

    @torch.no_grad()
    def add(self, outputs: Mapping[str, Any], labels: torch.Tensor, share: float, ignore_index: int) -> None:
        """
        Add a batch to what the next line averages.

        Args:
            outputs ([`DenseCLIPSemanticSegmenterOutput`]): what the model gave for it.
            labels (`torch.Tensor` of shape `(batch_size, height, width)`): class ids.
            share (`float`): which part of its optimizer step the batch is, 0 to 1.
            ignore_index (`int`): label of pixels without a class.
        """
        sums = self._sums
        sums["steps"] += share
        sums["images"] += len(labels)
        for key in LOSSES:
            if outputs.get(key) is not None:
                sums[key] += outputs[key].detach() * share
        # At the logits' own resolution: exact enough to watch, and nothing is upsampled for it.
        small = F.interpolate(labels[:, None].float(), size=outputs["logits"].shape[-2:], mode="nearest")[:, 0]
        labeled = small != ignore_index
        sums["hits"] += ((outputs["logits"].argmax(1) == small) & labeled).sum()
        sums["pixels"] += labeled.sum()

    def note_rates(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Take the rates of an optimizer's parameter groups; a caller's own may have no names."""
        self.rates |= {group.get("name", f"group_{i}"): group["lr"] for i, group in enumerate(groups)}

    def leave_out(self, seconds: float) -> None:
        """Take `seconds`, which went into something else than training, out of the speed."""
        self._last_line += seconds

    def next_line(self, accelerator: Accelerator) -> dict[str, float]:
        """Averages over all that the processes of `accelerator` added since the last line; empty if there is none."""
        if not self._sums:
            return {}
        counted, self._sums = self._sums, defaultdict(float)
        values = [torch.as_tensor(value, device=accelerator.device).float() for value in counted.values()]
        sums = dict(zip(counted, accelerator.reduce(torch.stack(values), "sum").tolist(), strict=True))
        losses: dict[str, float] = {key: sums[key] / sums["steps"] for key in LOSSES if key in sums}
        now = time.perf_counter()
        seconds, self._last_line = now - self._last_line, now
        return {
            **losses,
            "pixel_accuracy": sums["hits"] / max(sums["pixels"], 1.0),
            **{f"learning_rate/{name}": rate for name, rate in self.rates.items()},
            "images_per_second": sums["images"] / seconds,
            "peak_memory_gib": peak_memory(accelerator.device.type) / 2**30,
        }


def peak_memory(device_type: str) -> float:
    """Most bytes in use so far: on the current device if that is "cuda", else of this process."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):  # Linux, whose `ru_maxrss` starts from the parent's peak
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        memory: Any = psutil.Process().memory_info()
        return memory.peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


__all__ = ["TrainingLog", "peak_memory"]
