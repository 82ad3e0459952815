"""COCO's annotations: polygons, run lengths and panoptic PNGs become masks."""

import json

import numpy as np
import pytest
from PIL import Image

from denseclip_hf.data import load_segmentation_dataset


pytest.importorskip("pycocotools", reason="the extra `coco` is not installed")

SQUARE = [2, 1, 5, 1, 5, 4, 2, 4]
CATEGORIES = [{"id": 7, "name": "car"}, {"id": 3, "name": "road"}]


def annotated(file, image_folder, **changes):
    image_folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(image_folder / "a.jpg")
    Image.new("RGB", (8, 6)).save(image_folder / "b.jpg")
    large = {"image_id": 1, "category_id": 3, "segmentation": [[0, 0, 8, 0, 8, 6, 0, 6]], "area": 48}
    small = {"image_id": 1, "category_id": 7, "segmentation": [SQUARE], "area": 9}
    counts = {"image_id": 2, "category_id": 7, "segmentation": {"size": [6, 8], "counts": [6, 6, 36]}, "area": 6}
    images = [{"id": i, "file_name": f"{name}.jpg", "height": 6, "width": 8} for i, name in ((1, "a"), (2, "b"))]
    content = {"images": images, "annotations": [small, large, counts], "categories": CATEGORIES, **changes}
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/instances_{}.json", "{}"),
        ("annotations/instances_{}2017.json", "{}2017"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
def test_instances_are_drawn_the_small_on_top_of_background(tmp_path, file, images):
    for split in ("train", "val"):
        annotated(tmp_path / file.format(split), tmp_path / images.format(split))
    data = load_segmentation_dataset(tmp_path)
    assert list(data.id2label.values()) == ["background", "road", "car"] and len(data.validation) == 2
    mask = data.train[0]["mask"]
    assert mask[2, 3] == 2 and mask[0, 0] == 1 and (mask == 2).sum() == 9
    other = data.train[1]["mask"]
    assert (other[:, 1] == 2).all() and (np.delete(other, 1, axis=1) == 0).all()


def test_a_file_without_splits_and_the_group_of_roboflow(tmp_path):
    group = {"id": 0, "name": "things", "supercategory": "none"}
    kinds = [{**category, "supercategory": "things"} for category in CATEGORIES]
    annotated(tmp_path / "annotations.json", tmp_path / "images", categories=[group, *kinds])
    data = load_segmentation_dataset(tmp_path, validation_fraction=0)
    assert list(data.id2label.values()) == ["background", "road", "car"] and len(data.train) == 2


@pytest.mark.parametrize("images", ["train", "images/train"])
def test_panoptic_pngs(tmp_path, images):
    (tmp_path / "annotations/panoptic_train").mkdir(parents=True)
    colors = np.zeros((6, 8, 3), np.uint8)
    colors[:3], colors[3:, :4] = (5, 0, 0), (1, 2, 0)  # segments 5 and 513
    for name in "ab":
        Image.fromarray(colors).save(tmp_path / f"annotations/panoptic_train/{name}.png")
    segments = [{"id": 5, "category_id": 3}, {"id": 513, "category_id": 7}]
    rows = [{"image_id": i, "file_name": f"{n}.png", "segments_info": segments} for i, n in ((1, "a"), (2, "b"))]
    annotated(tmp_path / "annotations/panoptic_train.json", tmp_path / images, annotations=rows)
    data = load_segmentation_dataset(tmp_path, validation_fraction=0)
    assert list(data.id2label.values()) == ["road", "car"]
    assert data.train[1]["mask"][:, [0, 7]].tolist() == [[0, 0]] * 3 + [[1, 255]] * 3


def test_missing_images_are_left_out_only_on_demand(tmp_path):
    annotated(tmp_path / "annotations/instances_train.json", tmp_path / "train")
    (tmp_path / "train/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="b.jpg"):
        load_segmentation_dataset(tmp_path)
    assert len(load_segmentation_dataset(tmp_path, skip_unpaired=True).train) == 1


@pytest.mark.parametrize("size", [[6, 9], [10**6, 10**6]])
def test_sizes_that_are_not_the_images_are_refused(tmp_path, size):
    images = [{"id": i, "file_name": f"{n}.jpg", "height": size[0], "width": size[1]} for i, n in ((1, "a"), (2, "b"))]
    annotated(tmp_path / "annotations/instances_train.json", tmp_path / "train", images=images)
    with pytest.raises(ValueError, match="a.jpg"):
        load_segmentation_dataset(tmp_path)


def test_files_that_name_no_split_are_not_left_out_in_silence(tmp_path):
    for part in ("north", "south"):
        annotated(tmp_path / f"annotations/instances_{part}.json", tmp_path / "images")
    with pytest.raises(ValueError, match="north, south"):
        load_segmentation_dataset(tmp_path)
    assert len(load_segmentation_dataset(tmp_path, train_split="south", validation_fraction=0).train) == 2
