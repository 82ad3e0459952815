"""Arguments, parameter groups, the trainer and the directory of a run.

In: a recipe and a data set. Out: checkpoints, and a directory with the trained model, its results and its card.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .arguments import DenseCLIPTrainingArguments
    from .optimizer import parameter_groups, poly_learning_rate
    from .trainer import DenseCLIPTrainer

# Loaded when first used (PEP 562): the module of each name. A command that only shows its options needs no Trainer.
_LATER = {
    "DenseCLIPTrainer": ".trainer",
    "DenseCLIPTrainingArguments": ".arguments",
    "parameter_groups": ".optimizer",
    "poly_learning_rate": ".optimizer",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name], __name__), name)


__all__ = ["DenseCLIPTrainer", "DenseCLIPTrainingArguments", "parameter_groups", "poly_learning_rate"]
