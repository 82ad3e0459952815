"""What the commands share: flags and recipe files, errors in one sentence, plain lines of progress."""

import argparse
import copy
import difflib
import functools
import inspect
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[1] / "configs"  # a link to `configs/` in a clone, a folder where it is installed
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows defaults that say something, and only the first of `--a_b` and `--a-b`."""

    def _get_help_string(self, action):
        shown = "default" in (action.help or "") or str(action.default) in ("None", "False", "", "[]", "{}")
        return action.help if shown else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        shown = copy.copy(action)
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag[2:]] or action.option_strings
        return super()._format_action_invocation(shown)


class _MergingStore(argparse.Action):
    """Stores a value; a mapping (JSON) is merged into the one already stored."""

    def __call__(self, parser, namespace, values, option_string=None):
        if above := _mapping(values):
            values = json.dumps(_mapping(getattr(namespace, self.dest)) | above)
        setattr(namespace, self.dest, values)


def _mapping(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class DataclassParser(HfArgumentParser):
    """
    Flags of dataclasses, in groups: this library's before those that they inherit from transformers.

    Args:
        types (sequence of dataclasses): what to fill.
        description (`str`, *optional*): begins the help.
        usage (`str`): comes before it.
    """

    def __init__(
        self,
        types: Sequence[Any],
        description: str | None = None,
        usage: str = "%(prog)s [RECIPE.yaml ...] [--option VALUE ...]",
    ):
        super().__init__([], usage=usage, description=description, formatter_class=HelpFormatter)
        self.dataclass_types = list(types)
        self.register("action", None, _MergingStore)
        for kind in types:
            self._add_dataclass_arguments(kind)
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction):
                action.help, action.default = f"Switch `--{action.dest}` off.", argparse.SUPPRESS
            elif action.type is string_to_bool and action.nargs is None:  # a field of type `bool | None`
                action.nargs, action.const = "?", True

    def _add_dataclass_arguments(self, dtype):
        own = [kind for kind in dtype.__mro__ if kind.__module__.startswith("denseclip_hf.")]
        names = {name for kind in own for name in inspect.get_annotations(kind)}
        title = " ".join(str(inspect.getdoc(dtype)).split("\n\n")[0].split()).rstrip(".")
        group = self.add_argument_group(title)
        inherited = self.add_argument_group("Further options, as transformers has them")
        hints = get_type_hints(dtype)
        for option in fields(dtype):
            if option.init:
                option.type = hints[option.name]
                self._parse_dataclass_field(group if option.name in names else inherited, option)  # type: ignore[arg-type]


def names(text: str) -> list[str]:
    """Names with commas between them, or those of a file that [`parse_classes`] reads (which may hold commas)."""
    from ..data import parse_classes  # with torch, which help does without

    if "," in text:
        return [name.strip() for name in text.split(",")]
    try:
        return list(parse_classes(text).id2label.values())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_arguments(
    types: Sequence[Any],
    argv: Sequence[str] | None = None,
    needed: Sequence[str] = (),
    description: str | None = None,
) -> list[Any]:
    """
    Dataclasses from the command line: recipe files (.yaml, .yml, .json) first, each on top of the one before it, and
    flags on top of them all. Mappings (`config`) are merged; null stands for an option's default.

    Args:
        types (sequence of dataclasses): what to fill.
        argv (sequence of `str`, *optional*): the arguments, `sys.argv[1:]` by default.
        needed (sequence of `str`): options that must be given, by recipe or flag.
        description (`str`, *optional*): begins the help.

    Raises:
        ValueError: for a recipe that is missing or no mapping, or an option that is unknown or missing.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = DataclassParser(types, description)
    known = [option.name for kind in types for option in fields(kind)]
    recipe: dict[str, Any] = {}
    while argv and argv[0].endswith(RECIPE_SUFFIXES):
        for name, value in read_recipe(argv.pop(0), known).items():
            both = isinstance(value, dict) and isinstance(recipe.get(name), dict)
            recipe[name] = recipe[name] | value if both else value
    namespace, unknown = parser.parse_known_args([*_as_flags(recipe), *argv])
    if unknown:
        flag = unknown[0].partition("=")[0]
        is_flag = flag.startswith("-")
        hint = _closest(flag, parser._option_string_actions) if is_flag else ": recipes come first, and then flags."
        raise ValueError(f"`{flag}` is {'an unknown' if is_flag else 'no'} flag{hint}")
    if missing := [f"`--{name}`" for name in needed if not getattr(namespace, name)]:
        raise ValueError(f"give {' and '.join(missing)}, by flag or recipe: see `--help`.")
    return [kind(**{k.name: getattr(namespace, k.name) for k in fields(kind) if k.init}) for kind in types]


def read_recipe(path: str | os.PathLike, known: Sequence[str]) -> dict[str, Any]:
    """
    The mapping in a YAML or JSON file, read without executing anything.

    Args:
        path (`str` or `os.PathLike`): a file, or the name of one of this package's, such as `configs/example.yaml`.
        known (sequence of `str`): the options that there are.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is no mapping, or an option is not among `known`.
    """
    file = recipe_file(path)
    try:
        recipe = dict(yaml.load(file.read_text(encoding="utf-8"), _ExponentLoader))  # noqa: S506, it is a SafeLoader
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(
            f"the recipe {file} is no mapping from options to values, as YAML or JSON: {error}."
        ) from error
    for name in recipe:
        if name not in known:
            raise ValueError(f"the option `{name}` of the recipe {file} is unknown{_closest(str(name), known)}")
    return recipe


def recipe_file(path: str | os.PathLike) -> Path:
    """A recipe of the user's or, where there is no such file, this package's of that name if it has one."""
    name = Path(path)
    own = RECIPES / Path(*name.parts[name.parts[:1] == ("configs",) :])
    return own if own.is_file() and not name.is_file() else name


class _ExponentLoader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in JSON and YAML 1.2."""


_ExponentLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _as_flags(recipe: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in recipe.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _closest(name: str, known: Iterable[str]) -> str:
    if "warmup_ratio" in name:
        return ": give `--warmup_steps`, which below 1 is a share of all steps."
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean `{close[0]}`?" if close else ": see `--help`."


def log_to_terminal() -> None:
    """Say what is done in plain lines, once each."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own


def one_sentence_errors(main: Callable) -> Callable:
    """Decorator of a command's `main`: what a user can mend ends in one sentence and exit code 1, no traceback."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt as stop:
            exit_code = getattr(
                stop, "exit_code", None
            )  # training that stopped with a checkpoint has one, and said so
            if exit_code is None:
                logger.warning("interrupted")
            sys.exit(exit_code or 128 + signal.SIGINT)
        except (ValueError, OSError, RuntimeError, ImportError, StrictDataclassError) as error:
            logger.debug("traceback", exc_info=True)
            sys.stderr.write(f"error: {sentence_of(error)}\n")
            sys.exit(1)

    return wrapped


def sentence_of(error: BaseException) -> str:
    """The message of `error`, in one sentence also if it comes from a data-loader worker or another process."""
    from torch import distributed

    from ..model.loading_denseclip import reason_of

    text = str(error).strip()
    if isinstance(error, StrictDataclassError):  # a config's validator raised it
        return reason_of(error)
    if text.startswith("Caught ") and "Original Traceback" in text:  # a worker's, with its traceback
        text = re.split(r"^[\w.]+: ", text, flags=re.MULTILINE)[-1].strip()
        return text.splitlines()[-1] if "Traceback (" in text else text  # the last error may have no message
    if text.startswith("DataLoader worker"):
        return (
            f"a process that reads data died ({text.rstrip(' .')}), as it does when memory runs out: start the same "
            "command again, with fewer workers if it happens again."
        )
    if distributed.is_initialized() and re.search(r"gloo|nccl|connection (closed|reset)", text, re.IGNORECASE):
        return (
            f"another process of this run is gone ({text.splitlines()[0]}): see what it said, then start the same "
            "command again; training goes on from its last checkpoint."
        )
    return text or type(error).__name__
