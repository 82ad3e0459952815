"""How the demo ends when it can not go on; `make demo` runs it whole."""

import importlib.util
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_folder_of_somebody_else_is_one_sentence(demo, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit, match="^1$"):
        demo.main(["--output_dir", str(tmp_path)])
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/data is not empty and was not made by this example; choose another folder\n"
    )


@pytest.mark.slow
def test_a_step_that_fails_ends_the_demo_with_its_code(demo, capfd):
    with pytest.raises(SystemExit, match="^3$"):
        demo.run(["-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])
    assert capfd.readouterr().err == "why\n"
