"""The command `denseclip`, outside the package so that its help has to import neither torch nor transformers."""

import difflib
import importlib.util
import os
import sys
from importlib.metadata import version


COMMANDS = {
    "train": "train a segmenter, by recipe files and flags",
    "evaluate": "measure a model on a data set",
    "predict": "segment images and videos",
    "words": "segment images into any words, without training",
    "check-data": "look through a data set before training on it",
    "convert": "turn a released DenseCLIP or a CLIP of OpenAI or open_clip into a model directory",
    "export": "write a model as ONNX, a torch program, or without its text tower",
    "push": "upload a model directory to the Hub",
    "app": "open a page to try models on images",
    "ablate": "run the published ablations and print their tables",
    "demo": "train on the built-in example and draw what the model sees",
    "example": "write the built-in example's data and CLIP",
}


def main(argv: list[str] | None = None) -> int | None:
    """Run the command that `argv` (by default `sys.argv[1:]`) names; its exit code."""
    try:
        try:
            return run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        return 1


def run(argv: list[str] | None) -> int | None:
    """Do as [`main`] says."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "--version":
        print(version("denseclip_hf"))
    elif name in ("-h", "--help"):
        print("usage: denseclip COMMAND [...]\n\nDenseCLIP for transformers. Commands:\n")
        print("\n".join(f"  {command:<12}{does}" for command, does in COMMANDS.items()))
        print("\n`denseclip COMMAND --help` lists the options of one.")
    elif name in COMMANDS:
        sys.argv[0] = f"denseclip {name}"
        if {"-h", "--help"} & set(rest) and "denseclip_hf" not in sys.modules:
            # Help needs the rooms, not what the package registers: leave out its `__init__`, which loads torch.
            package = importlib.util.find_spec("denseclip_hf")
            assert package is not None  # this file lies beside it
            sys.modules["denseclip_hf"] = importlib.util.module_from_spec(package)
        module = importlib.import_module(f"denseclip_hf.cli.{name.replace('-', '_')}")
        code = module.main(rest)
        return code if isinstance(code, int) else None
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else "see `denseclip --help`."
        print(f"error: there is no command `{name}`: {hint}", file=sys.stderr)
        return 2
    return None


if __name__ == "__main__":
    sys.exit(main())
