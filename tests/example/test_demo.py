"""How the demo ends when it cannot go on; `make demo` runs it whole."""

import pytest
from PIL import Image

from denseclip_hf.cli import demo
from denseclip_hf.example import make_example_dataset


def test_a_folder_of_somebody_else_is_one_sentence(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit, match="^1$"):
        demo.main(["--output_dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/data is not empty") and said.count("\n") == 1


@pytest.mark.slow
def test_the_demo_ends_with_scores_and_an_image(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "denseclip_hf.example.make_example_dataset", lambda folder: make_example_dataset(folder, 10, 4)
    )
    demo.main(["--output_dir", str(tmp_path), "--max_steps", "2"])
    assert "mean" in capsys.readouterr().out
    with Image.open(tmp_path / "demo.png") as drawn:
        assert min(drawn.size) > 300


@pytest.mark.slow
def test_a_step_that_fails_ends_the_demo_with_its_code(capfd):
    with pytest.raises(SystemExit, match="^3$"):
        demo.run(["-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])
    assert capfd.readouterr().err == "why\n"
