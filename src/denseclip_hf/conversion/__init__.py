"""Other people's checkpoints in."""

from .keys import config_from_original, convert_original_state_dict


__all__ = ["config_from_original", "convert_original_state_dict"]
