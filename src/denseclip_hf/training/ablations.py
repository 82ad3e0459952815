"""The ablations of the supplementary material: every row a named variant, measured beside what was published."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row of a published table: which variant (a file in `configs/ablations`) it is, and its mIoU in percent."""

    table: str
    label: str
    variant: str
    published: str


# RN50, ADE20K validation, single-scale (supplementary material, tables 1 to 3; the paper's table 1 for the baselines).
ROWS = [
    Row("Table 1: learning-rate multipliers", "text 0.0, image 0.1 (final)", "final", "43.5"),
    Row("Table 1: learning-rate multipliers", "text 0.0, image 1.0", "image_encoder_full_rate", "42.6"),
    Row("Table 1: learning-rate multipliers", "text 0.1, image 0.1", "text_encoder_trained", "42.2"),
    Row("Table 2: textual context", '"a photo of a [CLS]."', "template_prompt", "42.9"),
    Row("Table 2: textual context", "learnable contexts (final)", "final", "43.5"),
    Row("Table 3: γ", "1e-4, fixed", "gamma_fixed", "42.6"),
    Row("Table 3: γ", "1e-4, learnable (final)", "final", "43.5"),
    Row("Table 3: γ", "1.0, learnable", "gamma_one", "42.8"),
    Row("Baselines: CLIP + FPN, no language", "image 0.1", "baseline", "39.6"),
    Row("Baselines: CLIP + FPN, no language", "image 1.0", "baseline_full_rate", "< 30"),
]
VARIANTS = list(dict.fromkeys(row.variant for row in ROWS))


def read_measurements(folder: Path, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, list[float]]:
    """
    mIoU in percent of every finished run `folder/VARIANT/seed-SEED`, by variant.

    Raises:
        ValueError: if a run's results hold none.
    """
    measured = {}
    for variant in variants:
        files = [folder / variant / f"seed-{seed}" / "eval_results.json" for seed in seeds]
        measured[variant] = [_mean_iou(file) for file in files if file.exists()]
    return measured


def _mean_iou(file: Path) -> float:
    return 100 * float(json.loads(file.read_text(encoding="utf-8"))["eval_mean_iou"])


def mean_and_spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation (n)` of some percentages, or a dash."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({len(values)})"


def ablation_tables(measured: Mapping[str, Sequence[float]]) -> str:
    """The published tables in Markdown, with the measured column beside the published one."""
    lines: list[str] = []
    for table in dict.fromkeys(row.table for row in ROWS):
        lines += [f"### {table}", "", "| variant | published mIoU | measured mIoU (runs) |", "|---|---|---|"]
        for row in ROWS:
            if row.table == table:
                lines.append(f"| {row.label} | {row.published} | {mean_and_spread(measured.get(row.variant, []))} |")
        lines.append("")
    return "\n".join(lines)


def ablation_json(measured: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The same as JSON values: one entry per row, with all runs."""
    return [{**row._asdict(), "measured": list(measured.get(row.variant, []))} for row in ROWS]


__all__ = ["ROWS", "VARIANTS", "ablation_json", "ablation_tables", "mean_and_spread", "read_measurements"]
