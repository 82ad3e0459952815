"""The authors' config files: merged as mmcv does, never run, and refused where they are no plain data."""

import pytest

from denseclip_hf.conversion.mmseg_config import parse_original_config, read_original_config


def test_config_files_are_merged_and_never_run(tmp_path):
    (tmp_path / "base.py").write_text("norm_cfg = dict(type='SyncBN')\nmodel = dict(a=1, neck=dict(x=1, y=[2]))\n")
    (tmp_path / "config.py").write_text(
        f"import os\nos.system('touch {tmp_path / 'mark'}')\n_base_ = ['base.py']\nwork = os.getcwd()\n"
        "model = dict(neck=dict(y=(768+150, -1)), head=dict(_delete_=True, z='w'))\n"
    )
    config = read_original_config(tmp_path / "config.py")
    assert config["model"] == {"a": 1, "neck": {"x": 1, "y": (918, -1)}, "head": {"z": "w"}}
    assert "work" not in config and not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(a=open('x'))", r"computes `model` with `open\('x'\)` in line 1"),
        ("model = (", "no Python config"),
        ("_base_ = [f'{x}']", "computes `_base_`"),
        ("model = dict(a=1/0)", "computes `model`"),
        ("model = dict(a='x' * 2)", "computes `model`"),
    ],
)
def test_config_that_is_not_plain_data(text, message):
    with pytest.raises(ValueError, match=message):
        parse_original_config(text)


def test_missing_and_circular_bases(tmp_path):
    (tmp_path / "a.py").write_text("_base_ = 'a.py'\n")
    with pytest.raises(ValueError, match="based on itself"):
        read_original_config(tmp_path / "a.py")
    (tmp_path / "a.py").write_text("_base_ = './b.py'\n")
    with pytest.raises(ValueError, match="there is no config file .*b.py, which"):
        read_original_config(tmp_path / "a.py")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"_base_ = 5", "must name config files, got 5"), (b"_base_ = [1]", "must name"), (b"\xff", "it is not text")],
)
def test_config_files_that_are_refused(tmp_path, content, message):
    (tmp_path / "a.py").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_original_config(tmp_path / "a.py")
