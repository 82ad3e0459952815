"""How the scripts read their flags, how their help looks, and what they say while they work."""

import argparse
import copy
import difflib
import inspect
import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that tells defaults which say something, and of `--a_b` and `--a-b` the first only."""

    def _get_help_string(self, action):
        told = "default" in (action.help or "") or str(action.default) in ("None", "False", "", "[]", "{}")
        return action.help if told else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        shown, flags = copy.copy(action), action.option_strings
        shown.option_strings = [
            f for f in flags if (plain := f[:2] + f[2:].replace("-", "_")) == f or plain not in flags
        ]
        return super()._format_action_invocation(shown)


class DataclassParser(HfArgumentParser):
    """
    Flags of dataclasses, in groups: this library's before those that they inherit from transformers.

    Args:
        types (sequence of dataclasses): what to fill.
        needed (sequence of `str`): options that must be given.
        description (`str`, *optional*): begins the help.
    """

    def __init__(self, types: Sequence[Any], needed: Sequence[str] = (), description: str | None = None):
        self.needed = needed
        usage = "%(prog)s [RECIPE.yaml ...] [--option VALUE ...]"
        super().__init__(types, usage=usage, description=description, formatter_class=HelpFormatter)
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction):
                action.help, action.default = f"Switch `--{action.dest}` off.", argparse.SUPPRESS
            elif action.type is string_to_bool and action.nargs is None:  # of `bool | None`
                action.nargs, action.const = "?", True

    def _add_dataclass_arguments(self, dtype):
        own = [kind for kind in dtype.__mro__ if kind.__module__.startswith(f"{__package__}.")]
        names = {name for kind in own for name in inspect.get_annotations(kind)}
        title = " ".join(str(inspect.getdoc(dtype)).split("\n\n")[0].split()).rstrip(".")
        group = self.add_argument_group(title)
        inherited = self.add_argument_group("Further options, as transformers has them")
        hints = get_type_hints(dtype)
        for option in fields(dtype):
            if option.init:
                option.type = hints[option.name]
                self._parse_dataclass_field(group if option.name in names else inherited, option)  # type: ignore[arg-type]

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse does, but raises `ValueError` for what is unknown or missing."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                raise ValueError(f"`{flag}` belongs to no flag: recipes (.yaml, .yml, .json) come first.")
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "see `--help`."
            raise ValueError(f"the flag `{flag}` is unknown: {hint}")
        if missing := [f"`--{name}`" for name in self.needed if not getattr(namespace, name)]:
            raise ValueError(f"give {' and '.join(missing)}, by flag or recipe: see `--help`.")
        return namespace, unknown


def log_to_terminal() -> None:
    """Say what is done in plain lines, once each."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own


__all__ = ["DataclassParser", "HelpFormatter", "log_to_terminal"]
