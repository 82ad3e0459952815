"""Arguments, parameter groups, the trainer and the directory of a run."""

from .arguments import DenseCLIPTrainingArguments, parameter_groups, poly_learning_rate


__all__ = ["DenseCLIPTrainingArguments", "parameter_groups", "poly_learning_rate"]
