"""Time this implementation beside the original's way of working, in one run: `python scripts/benchmark.py`.

Writes `benchmark.json` and the same as tables, `benchmark.md`, into `--output_dir`, after every task. See
docs/performance.md.
"""

import argparse
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from denseclip_hf.benchmark_tasks import IMAGE_SIZES, TASKS, Settings
from denseclip_hf.cli.arguments import HelpFormatter, log_to_terminal, one_sentence_errors
from denseclip_hf.devices import device_of
from denseclip_hf.files import write_atomically
from denseclip_hf.sharing.card_sections import markdown_table


def hardware(device: str) -> str:
    on_gpu, cpu = torch.device(device).type == "cuda", f"{platform.machine()} CPU, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if on_gpu else cpu
    threads, versions = torch.get_num_threads(), f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {threads} threads, {versions}"


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(columns, ([str(row.get(column, "")) for column in columns] for row in rows))


@one_sentence_errors
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    tasks = [name for name in TASKS if name != "throughput" or torch.cuda.is_available()]
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=tasks, help="by default all, without a GPU all but throughput"
    )
    presets = ["denseclip-rn50", "denseclip-vit-b16"]
    parser.add_argument("--presets", nargs="+", choices=IMAGE_SIZES, default=presets, help="models")
    parser.add_argument("--rounds", type=int, default=7, help="times every case is run, in turn")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, or a device of torch")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile (minutes on a CPU)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"), help="where tables go")
    args = parser.parse_args(argv)
    log_to_terminal()
    args.device = device_of(args.device)
    settings = Settings(args.presets, args.rounds, args.device, args.compile)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"hardware": hardware(args.device), "rounds": args.rounds, "tasks": {}}
    text = [f"Measured on {report['hardware']}; {args.rounds} rounds, medians."]
    for name in args.tasks:
        logging.info("%s: %s", name, TASKS[name].__doc__)
        report["tasks"][name] = TASKS[name](settings)
        text += [f"\n### {name}\n{TASKS[name].__doc__}\n", table(report["tasks"][name])]
        write_atomically(args.output_dir / "benchmark.json", json.dumps(report, indent=2) + "\n")
        write_atomically(args.output_dir / "benchmark.md", "\n".join(text) + "\n")
        print(text[-2] + text[-1])
    print(f"Results are in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
