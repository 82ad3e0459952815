"""The functions behind the commands."""

import importlib.util
from pathlib import Path


SCRIPTS = Path(__file__).parents[2] / "scripts"


def main_of(script):
    spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
