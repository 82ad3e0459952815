"""Other people's checkpoints: files of weights in, complete model directories out.

[`convert_release`] takes the authors' DenseCLIP checkpoints, [`convert_catseg`] those of CAT-Seg, [`convert_clip`]
OpenAI's and open_clip's CLIPs. [`rename`] applies a table of key patterns.
"""

from .catseg import config_from_catseg, convert_catseg, convert_catseg_state_dict
from .clip import convert_clip
from .keys import clip_key_table, convert_original_state_dict, rename
from .options import config_from_original
from .release import convert_release
from .weights import CheckpointError, read_checkpoint, state_dict_of


__all__ = [
    "CheckpointError",
    "clip_key_table",
    "config_from_catseg",
    "config_from_original",
    "convert_catseg",
    "convert_catseg_state_dict",
    "convert_clip",
    "convert_original_state_dict",
    "convert_release",
    "read_checkpoint",
    "rename",
    "state_dict_of",
]
