"""Class names, however they are given."""

import json
from pathlib import Path

import pytest

from denseclip_hf.data import parse_classes


@pytest.mark.parametrize(("kind", "encoding"), [(str, "utf-8"), (Path, "utf-8-sig"), (str, "utf-16")])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "road\r\ntree, green \n\n"),
        ("coco.names", "road\ntree, green\n"),
        ("NAMES.TXT", "road\ntree, green"),
        ("names.JSON", '["road", "tree, green"]'),
        ("names.json", '{"id2label": {"1": "tree, green", "0": "road"}}'),
        ("data.yaml", "path: ../x\nnc: 2\nnames:\n  0: road\n  1: tree, green\n"),
        ("data.yml", "names: [road, 'tree, green']\n"),
        ("classes.csv", 'Pixel Value, Class\n1,"tree, green"\n0, road\n'),
    ],
)
def test_files_of_names(tmp_path, kind, encoding, name, text):
    (tmp_path / name).write_text(text, encoding=encoding, newline="")
    assert parse_classes(kind(tmp_path / name)).id2label == {0: "road", 1: "tree, green"}


def test_files_that_hold_no_names_are_refused_by_their_name(tmp_path):
    contents = {"absent.txt": None, "names.txt": b"\xff\xfe\x00", "gap.txt": b"road\n\nroad", "names.docx": b"PK"}
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises((FileNotFoundError, ValueError)) as refused:
            parse_classes(str(tmp_path / name))
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"palete": 1}, "palete"),
        ({"ignore_label": 1}, "ignore_label"),
        ({"id_map": {"5": 2}}, "id_map"),
        ({"id_map": {"x": 0}}, "id_map"),
        ({"id_map": {"5": "car"}}, "id_map"),
        ({"id_map": [1, 2]}, "id_map"),
    ],
)
def test_tables_that_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        parse_classes({"id2label": ["road", "tree"], **changes})


def test_keys_that_are_the_users_own_may_stay():
    table = parse_classes({"id2label": ["road", "tree"], "splits": {"train": 367}, "size": [480, 360], "author": "x"})
    assert table.id2label == {0: "road", 1: "tree"}


def test_names_by_the_ids_that_masks_hold_with_reduced_labels():
    table = parse_classes({"id2label": {"1": "road", "2": "tree"}, "do_reduce_labels": True})
    assert table.id2label == {0: "road", 1: "tree"}
    with pytest.raises(ValueError, match="id_map"):
        parse_classes({"id2label": {"1": "road", "2": "tree"}})


def test_an_id_map_by_name_id_and_null(tmp_path):
    content = {"id2label": ["road", "tree"], "id_map": {"5": "tree", "6": 0, "7": None, "8": 255}}
    (tmp_path / "classes.json").write_text(json.dumps(content))
    assert parse_classes(tmp_path / "classes.json").id_map == {5: 1, 6: 0, 7: None, 8: None}
