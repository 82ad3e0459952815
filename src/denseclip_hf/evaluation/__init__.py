"""
How good a model is: the loop over a data set, the protocol of one measurement, and its report.

A model and samples of `{"image", "mask"}` go in; scores, `evaluation.json`, `evaluation.csv` and drawings come out.
"""

from ..options import EvaluationArguments
from .loop import evaluate_segmentation
from .measurement import measure
from .report import protocol_of, report_table, without_nan


__all__ = [
    "EvaluationArguments",
    "evaluate_segmentation",
    "measure",
    "protocol_of",
    "report_table",
    "without_nan",
]
