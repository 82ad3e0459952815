"""Class names, however they are given. Folders and their files are in `test_data.py`."""

import pytest

from denseclip_hf.data import parse_classes


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["text", "path"])
def test_a_text_file_names_one_class_a_line(tmp_path, kind):
    (tmp_path / "names.txt").write_text("\ufeffroad\ntree, green \n\n", encoding="utf-8")
    assert parse_classes(kind(tmp_path / "names.txt")).id2label == {0: "road", 1: "tree, green"}


def test_a_text_file_that_is_none_is_refused(tmp_path):
    file = tmp_path / "names.txt"
    with pytest.raises(FileNotFoundError, match="names.txt, which should hold the class names, does not exist"):
        parse_classes(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="names.txt is not a text file"):
        parse_classes(str(file))
    file.write_text("road\n\nroad")
    with pytest.raises(ValueError, match="names.txt must name the classes .* one is empty"):
        parse_classes(str(file))
