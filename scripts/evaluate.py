"""Measure a model on a data set; flags may stand in YAML or JSON files, given first.

    python scripts/evaluate.py --model outputs/run --dataset path/to/data_set [--inference_mode slide]

On several devices: `accelerate launch scripts/evaluate.py ...`.
The published multi-scale protocol: `--scales 0.5 0.75 1 1.25 1.5 1.75 --flip`.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    from denseclip_hf.training.run_directory import one_sentence_errors

    one_sentence_errors(run)(argv)


def run(argv: list[str] | None) -> None:
    from accelerate import PartialState

    from denseclip_hf.command_line import log_to_terminal
    from denseclip_hf.evaluation.measure import EvaluationArguments, measure
    from denseclip_hf.evaluation.report import report_table
    from denseclip_hf.training.recipe import parse_arguments

    log_to_terminal()
    (args,) = parse_arguments([EvaluationArguments], argv, description=__doc__)
    report = measure(args)
    if PartialState().is_main_process:
        print(report_table(report))
        print(f"Results are in {args.output_dir}")


def become_the_library() -> None:
    """Python looks for modules beside the script it runs first, so there `import evaluate` finds this file."""
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("evaluate", [path for path in sys.path if Path(path or ".").resolve() != here])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("the library `evaluate` is missing: pip install evaluate")
    sys.modules["evaluate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["evaluate"])


if __name__ == "__main__":
    main()
elif __name__ == "evaluate":
    become_the_library()
