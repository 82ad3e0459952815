"""The image processor: the published protocol, kinds of pictures, batches, refusals, post-processing, saving."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import PILImageResampling
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil, reduce_labels
from denseclip_hf.model.image_processing_denseclip_torchvision import DenseCLIPImageProcessor
from helpers.golden import fixture


PICTURES = ["landscape", "portrait", "upscale"]
RAW = {"do_rescale": False, "do_normalize": False}
SMALL = {"size": {"shortest_edge": 96, "longest_edge": 128}}


# the torchvision class shares all its code, none of which needs torchvision
@pytest.fixture(params=[DenseCLIPImageProcessorPil, DenseCLIPImageProcessor], ids=["pil", "torchvision"])
def processor_class(request):
    return request.param


@pytest.fixture
def processor():
    return DenseCLIPImageProcessorPil(**SMALL)


@pytest.fixture
def golden():
    return fixture("preprocess")


def picture(height=12, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- the published protocol


@pytest.mark.parametrize("name", PICTURES)
def test_preprocessing_matches_the_original(golden, processor_class, name):
    description, tensors = golden
    image, label = tensors[f"in/{name}/image"].numpy(), tensors[f"in/{name}/label"].numpy()
    processor = processor_class(**SMALL)

    resized = processor(Image.fromarray(image), return_tensors="pt", **RAW)["pixel_values"][0]
    expected = tensors[f"out/{name}/resized"].permute(2, 0, 1)
    assert resized.dtype == torch.uint8
    assert torch.equal(resized, expected)

    inputs = processor(Image.fromarray(image), Image.fromarray(label), return_tensors="pt")
    assert inputs["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(inputs["pixel_values"][0], tensors[f"out/{name}/pixel_values"], rtol=0, atol=1e-6)
    assert inputs["labels"].dtype == torch.int64
    assert torch.equal(inputs["labels"][0], tensors[f"out/{name}/label_resized"].long())

    pad_size = dict(zip(("height", "width"), description["pad_size"], strict=True))
    padded = processor(image, label, do_pad=True, pad_size=pad_size, return_tensors="pt")
    expected = tensors[f"out/{name}/padded_pixel_values"]
    torch.testing.assert_close(padded["pixel_values"][0], expected, rtol=0, atol=1e-6)
    assert torch.equal(padded["labels"][0], tensors[f"out/{name}/padded_label"])


def test_reducing_labels_matches_the_original(golden, processor):
    _, tensors = golden
    label = tensors["in/reduce_zero/label"]
    for raw in (label, label.numpy()):
        before = raw.tolist()
        labels = processor(
            np.zeros((40, 50, 3), np.uint8), raw, do_resize=False, do_reduce_labels=True, return_tensors="pt"
        )["labels"]
        assert torch.equal(labels[0], tensors["out/reduce_zero/label"].long())
        assert raw.tolist() == before


def test_labels_are_reduced_with_any_ignore_index_in_a_copy():
    raw = np.array([0, 1, 150, 255])
    assert reduce_labels(raw, ignore_index=-100).tolist() == [-100, 0, 149, 254]
    assert raw.tolist() == [0, 1, 150, 255]


def test_antialiasing_and_resampling_are_options(processor):
    image = picture(300, 400)
    pil = Image.fromarray(image).resize((128, 96), PILImageResampling.BILINEAR)
    antialiased = processor(image, do_antialias=True, return_tensors="pt", **RAW)["pixel_values"][0]
    assert (antialiased.int() - torch.from_numpy(np.array(pil)).permute(2, 0, 1).int()).abs().max() <= 1
    plain = processor(image, return_tensors="pt", **RAW)["pixel_values"][0]
    bicubic = processor(image, resample=PILImageResampling.BICUBIC, return_tensors="pt", **RAW)["pixel_values"][0]
    assert not torch.equal(plain, antialiased) and not torch.equal(plain, bicubic)


# --- kinds of pictures


RGB = Image.fromarray(picture())
GREY = RGB.convert("L")


def test_exif_orientation_is_left_alone(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert processor(image, do_resize=False, return_tensors="pt")["pixel_values"].shape[-2:] == (12, 16)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "F"])
def test_every_pil_mode_becomes_rgb(processor, mode):
    image = (RGB if mode not in ("LA", "PA", "F") else GREY).convert(mode)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    pixels = processor(image, do_resize=False, return_tensors="pt", **RAW)["pixel_values"][0]
    torch.testing.assert_close(pixels.to(torch.uint8), expected)


@pytest.mark.parametrize("mode", ["I;16B", "I", "tensor"])
def test_16_bit_grey_is_scaled_not_clipped(processor, mode):
    values = np.array([[0, 257, 300, 32896, 65535]], dtype=np.uint16)
    images = {
        "I;16B": lambda: Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes()),
        "I": lambda: Image.fromarray(values.astype(np.int32)),
        "tensor": lambda: torch.from_numpy(values),
    }
    pixels = processor(images[mode](), do_resize=False, return_tensors="pt", **RAW)["pixel_values"]
    assert pixels.tolist() == [[[[0, 1, 1, 128, 255]]] * 3]


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image[:, ::-1][:, ::-1],
        lambda image: image.transpose(2, 0, 1),
        lambda image: image.astype(np.int64),
        lambda image: image.astype(">f4"),
        lambda image: np.dstack([image, image[..., 0]]),
        lambda image: torch.tensor(image).permute(2, 0, 1).float().requires_grad_(),
        lambda image: [[image]],
        lambda image: image[None],
    ],
)
def test_arrays_and_tensors_equal_the_pil_image(processor, convert):
    image = picture()
    expected = processor(Image.fromarray(image), do_resize=False, return_tensors="pt")["pixel_values"]
    read_only = image.copy()
    read_only.flags.writeable = False
    pixel_values = processor(convert(read_only), do_resize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, expected)


def test_a_palette_map_keeps_its_indices(processor):
    indices = np.random.default_rng(0).integers(0, 5, (12, 16), dtype=np.uint8)
    palette_map = Image.fromarray(indices).convert("P")
    palette_map.putdata(indices.flatten().tolist())
    labels = processor(RGB, palette_map, do_resize=False, return_tensors="pt")["labels"]
    np.testing.assert_array_equal(labels[0].numpy(), indices)


# --- batches


def test_images_of_different_sizes_come_as_they_would_alone(processor):
    images = [picture(12, 16, 0), picture(16, 12, 1), picture(12, 16, 2)]
    maps = [image[..., 0] for image in images]
    batch = processor(images, maps)
    for i, (image, label_map) in enumerate(zip(images, maps, strict=True)):
        alone = processor(image, label_map, return_tensors="pt")
        assert torch.equal(batch["pixel_values"][i], alone["pixel_values"][0])
        assert torch.equal(batch["labels"][i], alone["labels"][0])


def test_different_sizes_need_permission_to_be_padded(processor):
    images = [picture(12, 16), picture(16, 12)]
    with pytest.raises(ValueError, match="do_pad"):
        processor(images, return_tensors="pt")
    maps = [np.ones(image.shape[:2], np.uint8) for image in images]
    padded = processor(images, maps, do_pad=True, return_tensors="pt")
    assert padded["pixel_values"].shape == (2, 3, 128, 128)
    assert not padded["pixel_values"][0, :, 96:].any() and not padded["pixel_values"][1, :, :, 96:].any()
    assert (padded["labels"][0, 96:] == 255).all() and (padded["labels"][0, :96] == 1).all()
    alone = processor(images[1], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(padded["pixel_values"][1, :, :, :96], alone)


# --- refusals


def with_value(value):
    image = picture().astype(np.float32)
    image[3, 4, 1] = value
    return image


MAP = np.zeros((12, 16), np.uint8)


@pytest.mark.parametrize(
    ("images", "maps", "options", "message"),
    [
        (with_value(np.inf), None, {}, "NaN"),
        (picture().astype(np.int32) * 300, None, {}, "255"),
        (np.zeros((12, 16, 2), np.uint8), None, {}, "channels"),
        (np.zeros((0, 16, 3), np.uint8), None, {}, "pixels"),
        (picture(), np.zeros((16, 12), np.uint8), {}, "12×16 .* 16×12"),
        ([picture()] * 2, [MAP], {}, "zip"),
        (RGB, RGB, {}, "shape"),
        (RGB, MAP.astype(np.float32), {}, "float32"),
        (RGB, None, {"do_center_crop": True, "crop_size": 8}, "do_center_crop"),
        (RGB, None, {"do_pad": True, "pad_size": 90}, "96×128"),
    ],
)
def test_bad_input_is_refused(processor, images, maps, options, message):
    with pytest.raises(ValueError, match=message):
        processor(images, maps, return_tensors="pt", **options)


# --- post-processing


@pytest.mark.parametrize("sizes", [None, torch.tensor([[20, 31], [9, 8]])])
def test_post_processing(processor, sizes):
    outputs = SimpleNamespace(logits=torch.randn(2, 4, 6, 7, generator=torch.Generator().manual_seed(0)))
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    with_scores = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    for i, size in enumerate([(6, 7)] * 2 if sizes is None else [(20, 31), (9, 8)]):
        expected = F.interpolate(outputs.logits[i : i + 1], size, mode="bilinear", align_corners=False)[0]
        assert torch.equal(maps[i], expected.argmax(dim=0)) and maps[i].dtype == torch.int64
        assert torch.equal(with_scores[i].segmentation, maps[i])
        assert torch.equal(with_scores[i].segmentation_scores, expected)


@pytest.mark.parametrize("with_scores", [False, True])
def test_pixels_without_a_probable_class_have_none(processor, with_scores):
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1, 0] = torch.tensor([0.1, 3.0])
    post_process = partial(processor.post_process_semantic_segmentation, return_segmentation_scores=with_scores)
    (found,) = post_process(SimpleNamespace(logits=logits), threshold=0.9)
    assert (found.segmentation if with_scores else found).tolist() == [[-1, 1]]
    logits[0, 1, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN"):
        post_process(SimpleNamespace(logits=logits))


# --- saving and loading


OPTIONS = {"size": {"height": 24, "width": 32}, "do_reduce_labels": True, "do_antialias": True, "do_pad": True}


def test_save_and_load(tmp_path, processor_class):
    processor = processor_class(**OPTIONS)
    processor.save_pretrained(tmp_path)
    for loaded in (processor_class.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.image_processor_type == "DenseCLIPImageProcessor"
        for name, value in OPTIONS.items():
            assert (dict(loaded.size) if name == "size" else getattr(loaded, name)) == value
    best = DenseCLIPImageProcessor if is_torchvision_available() else DenseCLIPImageProcessorPil
    assert type(loaded) is best  # what the Auto class takes
