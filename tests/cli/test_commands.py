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
MODULES = {name: f"denseclip_hf.cli.{name.replace('-', '_')}" for name in COMMANDS}


def python(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = "import sys, denseclip_command as c; c.main(['--help']); assert 'torch' not in sys.modules"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    files = {path.stem for path in (ROOT / "src/denseclip_hf/cli").glob("*.py")} - {"__init__", "arguments"}
    assert files == {name.replace("-", "_") for name in COMMANDS}


def test_no_commands_help_imports_anything_heavy():
    code = f"""
import contextlib, sys, denseclip_command
for name in {[*COMMANDS]}:
    with contextlib.suppress(SystemExit):
        denseclip_command.main([name, "--help"])
assert "torch" not in sys.modules
"""
    done = python("-c", code)
    assert done.returncode == 0 and all(f"usage: denseclip {name}" in done.stdout for name in COMMANDS), done.stderr


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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["denseclip"])
    with pytest.raises(SystemExit) as stop:
        denseclip_command.main([name, "--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(f"usage: denseclip {name}")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_scripts_import_the_library_evaluate_not_the_script(script, tmp_path):
    options = ["--dataset", "no/where", "--model", "no/where", "--output_dir", tmp_path / "out"]
    done = python(ROOT / "scripts" / f"{script}.py", *options)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["release", "catseg", "clip"])
def test_a_bad_checkpoint_ends_in_one_line_and_leaves_nothing(tmp_path, capsys, kind):
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "x.pth")
    with pytest.raises(SystemExit, match="^1$"):
        convert([kind, str(tmp_path / "x.pth"), str(tmp_path / "parent" / "out")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]
