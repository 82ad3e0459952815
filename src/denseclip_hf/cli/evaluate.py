"""Measure a model on a data set, by flags; recipe files may come first.

    denseclip evaluate --model outputs/run --dataset path/to/data_set [--inference_mode slide]

On several devices: `accelerate launch -m denseclip_hf.cli.evaluate ...`.
The published multi-scale protocol: `--scales 0.5 0.75 1 1.25 1.5 1.75 --flip`.
"""

from accelerate import PartialState

from ..evaluation.measure import EvaluationArguments, measure
from ..evaluation.report import report_table
from .arguments import log_to_terminal, one_sentence_errors, parse_arguments


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    log_to_terminal()
    (args,) = parse_arguments([EvaluationArguments], argv, description=__doc__)
    report = measure(args)
    if PartialState().is_main_process:
        print(report_table(report))
        print(f"Results are in {args.output_dir}")


if __name__ == "__main__":
    main()
