"""The commands as a user meets them: what is listed, and how each ends that cannot do what it is asked."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import denseclip_command
from denseclip_command import COMMANDS
from denseclip_hf.cli.convert import main as convert


ROOT = Path(__file__).parents[2]


def python(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)


def test_help_lists_every_command_and_no_help_imports_anything_heavy():
    code = f"""
import contextlib, sys, denseclip_command
denseclip_command.main(["--help"])
for name in {[*COMMANDS]}:
    with contextlib.suppress(SystemExit):
        denseclip_command.main([name, "--help"])
assert "torch" not in sys.modules
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout and f"usage: denseclip {name}" in done.stdout for name in COMMANDS)
    files = {path.stem for path in (ROOT / "src/denseclip_hf/cli").glob("*.py")} - {"__init__", "arguments"}
    assert files == {name.replace("-", "_") for name in COMMANDS}


def test_output_that_nobody_reads_on_ends_quietly():
    code = """
import os, sys, denseclip_command
read, write = os.pipe()
os.dup2(write, 1), os.close(read)
sys.exit(denseclip_command.main(["--help"]))
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_misspelled_command_names_the_nearest(capsys):
    assert denseclip_command.main(["trian"]) == 2
    assert "`train`" in capsys.readouterr().err


@pytest.mark.slow
def test_scripts_import_the_library_evaluate_not_the_script():
    code = """
import contextlib, runpy, sys
folder, *scripts = sys.argv[1:]
for script in scripts:
    sys.path.insert(0, folder)  # as Python does for a script
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert folder not in sys.path, script
"""
    scripts = ROOT / "scripts"
    done = python("-c", code, scripts, *scripts.glob("*.py"))
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(list(scripts.glob("*.py"))), done.stderr


@pytest.mark.parametrize("kind", ["release", "catseg", "clip"])
def test_a_bad_checkpoint_ends_in_one_line_and_leaves_nothing(tmp_path, capsys, kind):
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "x.pth")
    with pytest.raises(SystemExit, match="^1$"):
        convert([kind, str(tmp_path / "x.pth"), str(tmp_path / "parent" / "out")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]
