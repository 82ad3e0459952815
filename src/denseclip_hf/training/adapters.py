"""Adapters of the library `peft`, such as LoRA, on a model that [`DenseCLIPTrainer`] trains.

Two ways lead to them: `peft.get_peft_model(model, config)` wraps the model, `model.add_adapter(config)` changes it.
"""

import os
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


MODEL_PREFIX = "base_model.model."
WRAPPERS = rf"^{re.escape(MODEL_PREFIX)}|\.(modules_to_save\.[^.]+|original_module|base_layer)(?=\.)"


def plain_name(name: str) -> str:
    """The name that a parameter of an adapted model has without adapters; those of an adapter keep their ending."""
    return re.sub(WRAPPERS, "", name)


def load_added_adapter(model: Any, directory: str | os.PathLike) -> None:
    """
    Put the weights that a trainer saved in `directory` back into the adapter that `model.add_adapter` made.

    Raises:
        OSError: if there are none.
    """
    from peft import set_peft_model_state_dict

    weights = load_file(Path(directory) / "adapter_model.safetensors")
    weights = {name.removeprefix(MODEL_PREFIX): value for name, value in weights.items()}
    set_peft_model_state_dict(model, weights, adapter_name=model.active_adapters()[0])


__all__ = ["load_added_adapter", "plain_name"]
