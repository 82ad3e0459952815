"""What holds for any input: sizes from one pixel, class counts, prompts, windows, batches, orders."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from denseclip_hf import DenseCLIPImageProcessorPil
from denseclip_hf.inference import batches_of_one_size, find_sources
from denseclip_hf.metrics import MeanBoundaryIoU, MeanIoU, confusion_matrix
from denseclip_hf.model import resizing_denseclip
from denseclip_hf.model.layers_denseclip import resize_bilinear
from denseclip_hf.model.modeling_denseclip import sliding_window_logits
from denseclip_hf.training import poly_learning_rate
from denseclip_hf.transforms import TrainTransform
from helpers.models import EOS, SOS, tiny_model


KINDS = st.sampled_from(["vit", "resnet"])
SIDES = st.integers(1, 100)
LARGE_SIDES = st.integers(32, 100)
NAMES = st.lists(st.integers(0, SOS - 1), max_size=10)  # with SOS and EOS, and 4 contexts, 16 positions
PROMPTS = st.lists(NAMES, min_size=1, max_size=8).map(lambda names: [[SOS, *name, EOS] for name in names])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def shared_model(kind, **options):
    """A model that several examples share; none changes it."""
    return tiny_model(kind, **options)


def named(prompts, count):
    """`count` classes that go through `prompts` again and again."""
    return [prompts[i % len(prompts)] for i in range(count)]


def grids(kind, side):
    """How many positions the logits and the score maps have along a side of so many pixels."""
    if kind == "vit":
        return 4 * (side // 16), side // 16  # patches of 16
    quarter = (side + 1) // 2 // 2  # a convolution of stride 2 with a border, then averages of two
    return quarter, quarter // 2 // 2 // 2


# The model


@given(KINDS, st.integers(1, 300), PROMPTS, SIDES, SIDES, st.integers(1, 2))
@example("vit", 300, [[SOS, *range(10), EOS], [SOS, EOS]], 32, 100, 2)
@example("resnet", 1, [[SOS, 7, EOS]], 32, 32, 1)
@example("vit", 1, [[SOS, 7, EOS]], 1, 1, 1)
def test_any_size_any_classes_any_prompts(kind, count, prompts, height, width, batch):
    options = {"class_token_ids": named(prompts, count), "semantic_loss_ignore_index": -100}  # 255 may be a class
    model = tiny_model(kind, num_labels=count, **options)
    pixel_values = noise(batch, 3, height, width)
    if min(height, width) < 32:
        with pytest.raises(ValueError, match="pixels"):
            model(pixel_values)
        return
    with torch.no_grad():
        outputs = model(pixel_values, labels=torch.zeros(batch, height, width, dtype=torch.long))
    sides = zip(*(grids(kind, side) for side in (height, width)), strict=True)
    for name, size in zip(("logits", "score_maps"), sides, strict=True):
        assert outputs[name].shape == (batch, count, *size) and outputs[name].isfinite().all()
    assert outputs.text_embeds.shape == (batch, count, 12)
    assert outputs.score_maps.abs().max() <= 1 + 1e-5
    assert outputs.loss.isfinite() and outputs.loss >= 0


@given(SIDES, SIDES, st.sampled_from(["whole", "slide"]), KINDS)
def test_any_picture_gets_a_class_for_each_pixel_or_one_sentence(height, width, mode, kind):
    model = shared_model(kind, inference_mode=mode)
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 160})
    picture = Image.fromarray((noise(height, width, 3) * 60 + 128).clamp(0, 255).byte().numpy())
    inputs = processor(picture, return_tensors="pt")
    try:
        with torch.no_grad():
            outputs = model(**inputs)
    except ValueError as error:
        assert "pixels" in str(error) and max(height, width) > 4 * min(height, width)
        return
    (segmentation,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(height, width)])
    assert segmentation.shape == (height, width) and 0 <= segmentation.min() <= segmentation.max() < 3


@given(KINDS, PROMPTS, st.randoms(use_true_random=False), LARGE_SIDES, LARGE_SIDES)
def test_classes_in_another_order_give_the_same_in_that_order(kind, prompts, random, height, width):
    count = len(prompts)
    order = random.sample(range(count), count)
    model = tiny_model(kind, num_labels=count, class_token_ids=prompts)
    other = copy.deepcopy(model)
    other.prompts.set_token_ids([prompts[i] for i in order])
    with torch.no_grad():
        classifier, lateral = other.decode_head.classifier, other.neck.lateral_convs[model.config.score_map_level]
        classifier.weight.copy_(classifier.weight[order])
        classifier.bias.copy_(classifier.bias[order])
        features = lateral.in_channels - count  # before the score maps
        lateral.weight[:, features:] = lateral.weight[:, features:][:, order]
        expected, outputs = model(noise(1, 3, height, width)), other(noise(1, 3, height, width))
        torch.testing.assert_close(other.encode_classes(), model.encode_classes()[order], atol=1e-5, rtol=1e-4)
    for name in ("logits", "score_maps", "text_embeds"):
        torch.testing.assert_close(outputs[name], expected[name][:, order], atol=1e-5, rtol=1e-4)


@given(KINDS, st.integers(2, 4), LARGE_SIDES, LARGE_SIDES, st.sampled_from(["whole", "slide"]))
def test_a_batch_gives_what_its_pictures_give_alone(kind, batch, height, width, mode):
    model, pixel_values = shared_model(kind, inference_mode=mode), noise(batch, 3, height, width)
    with torch.no_grad():
        together = model(pixel_values)
        for index in range(batch):
            alone = model(pixel_values[index : index + 1])
            for name in alone:
                torch.testing.assert_close(together[name][index : index + 1], alone[name], atol=1e-5, rtol=1e-4)


@given(KINDS, st.lists(st.tuples(LARGE_SIDES, LARGE_SIDES), min_size=1, max_size=4))
def test_a_list_of_any_sizes_gives_what_its_pictures_give_alone(kind, sizes):
    model, pictures = shared_model(kind), [noise(3, *size, seed=seed) for seed, size in enumerate(sizes)]
    with torch.no_grad():
        together = model(pictures)
        for index, picture in enumerate(pictures):
            torch.testing.assert_close(together.logits[index], model(picture[None]).logits[0], atol=1e-5, rtol=1e-4)


# Sliding windows


@given(KINDS, LARGE_SIDES, LARGE_SIDES, st.integers(0, 40), st.integers(1, 100))
def test_one_window_over_everything_equals_the_whole(kind, height, width, room, stride):
    crop = [height + room, width + room]
    sliding = shared_model(
        kind, inference_mode="slide", crop_size=tuple(crop), stride=(min(stride, crop[0]), min(stride, crop[1]))
    )
    pixel_values = noise(1, 3, height, width)
    with torch.no_grad():
        whole = resize_bilinear(shared_model(kind)(pixel_values).logits, (height, width))
        torch.testing.assert_close(sliding(pixel_values).logits, whole, atol=1e-5, rtol=1e-4)


@given(st.data(), SIDES, SIDES, st.integers(1, 3), st.integers(1, 9))
def test_windows_of_any_size_and_step_see_every_pixel_where_it_is(data, height, width, batch, at_a_time):
    crop = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)), label="crop")
    stride = tuple(data.draw(st.integers(1, side), label="stride") for side in crop)
    assume((height // stride[0] + 1) * (width // stride[1] + 1) < 2000)
    pixel_values = noise(batch, 3, height, width)
    # a prediction that is the window itself must average to the picture
    averaged = sliding_window_logits(lambda windows: windows, pixel_values, crop, stride, at_a_time)
    torch.testing.assert_close(averaged, pixel_values, atol=1e-5, rtol=1e-5)


# Metrics


def maps(count, labels, seed, void):
    """`count` predictions and references of various sizes, `void` (if it is not None) among the latter."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, (count, 2))
    predictions = [rng.integers(0, labels, size) for size in sizes]
    references = [rng.integers(0, labels, size) for size in sizes]
    for reference in references:
        reference[rng.random(reference.shape) < 0.2] = 255 if void else 0
    return predictions, references


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**32 - 1), st.booleans(), st.data())
@pytest.mark.parametrize("metric", [MeanIoU, MeanBoundaryIoU])
def test_counts_add_up_in_any_order_and_any_batches(metric, count, labels, seed, void, data):
    predictions, references = maps(count, labels, seed, void)
    expected = metric(num_labels=labels)
    expected.add_batch(predictions=predictions, references=references)
    processes = [metric(num_labels=labels) for _ in range(data.draw(st.integers(1, 4)))]
    for index in data.draw(st.permutations(range(count))):
        data.draw(st.sampled_from(processes)).add(prediction=predictions[index], reference=references[index])
    merged = metric(num_labels=labels)
    for process in data.draw(st.permutations(processes)):
        merged.merge(process)
    assert len(merged) == count
    if metric is MeanIoU:
        counts = sum(confusion_matrix(p, r, labels) for p, r in zip(predictions, references, strict=True))
        assert torch.equal(merged.confusion_matrix, counts)
    np.testing.assert_equal(merged.compute(), expected.compute())


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=20), st.integers(1, 5))
def test_batches_hold_every_item_once_and_one_size(sizes, most):
    batches = list(batches_of_one_size(enumerate(sizes), most, lambda item: item[1]))
    assert sorted(index for batch in batches for index, _ in batch) == list(range(len(sizes)))
    assert all(1 <= len(batch) <= most and len({size for _, size in batch}) == 1 for batch in batches)


# Resizing


@given(SIDES, SIDES, st.integers(1, 600), st.one_of(st.none(), st.integers(1, 2000)))
def test_fitted_sizes_keep_bounds_and_proportions(height, width, shortest, longest):
    new_height, new_width = resizing_denseclip.fit_within(height, width, shortest, longest)
    assert min(new_height, new_width) >= 1
    assert min(new_height, new_width) <= shortest and (longest is None or max(new_height, new_width) <= longest)
    assert abs(new_height * width - new_width * height) <= max(height, width)


@given(SIDES, SIDES, SIDES, SIDES)
def test_resized_labels_are_labels_that_were_there(height, width, new_height, new_width):
    labels = torch.arange(height * width).reshape(height, width)
    resized = resizing_denseclip.resize_labels(labels, (new_height, new_width))
    assert resized.shape == (new_height, new_width) and resized[0, 0] == 0
    assert (resized.diff(dim=0) >= 0).all() and (resized.diff(dim=1) >= 0).all()
    assert resized.min() >= 0 and resized.max() < labels.numel()


@given(SIDES, SIDES, st.integers(1, 40), st.tuples(SIDES, SIDES), st.integers(0, 2**32 - 1))
def test_training_crops_have_one_size_and_only_known_labels(height, width, crop, scale, seed):
    transform = TrainTransform(crop_size=crop, scale=scale)
    picture = Image.new("RGB", (width, height), "teal")
    mask = np.random.default_rng(seed).integers(0, 4, (height, width))
    sample = transform(picture, mask, np.random.default_rng(seed))
    assert sample["pixel_values"].shape == (3, crop, crop) and sample["pixel_values"].isfinite().all()
    assert sample["labels"].shape == (crop, crop)
    assert set(sample["labels"].unique().tolist()) <= {0, 1, 2, 3, 255}


# The schedule


RATES = st.floats(1e-8, 1.0)


@given(RATES, RATES, st.integers(1, 10**6), st.integers(0, 10**4), st.floats(0, 1), st.floats(0.1, 3), st.data())
def test_rates_stay_between_their_ends(base, lowest, total, warmup, ratio, power, data):
    options = {"total_steps": total, "min_lr": lowest, "power": power, "warmup_steps": warmup, "warmup_ratio": ratio}
    step = data.draw(st.integers(0, total))
    rate = poly_learning_rate(step, base, **options)
    assert 0 <= rate <= max(base, lowest) * (1 + 1e-9)
    if step >= warmup:
        assert rate >= min(base, lowest) * (1 - 1e-9)
        after = poly_learning_rate(min(step + 1, total), base, **options)
        assert (after - rate) * (lowest - base) >= -1e-15  # toward the last rate, never back
    assert poly_learning_rate(max(total, warmup), base, **options) == pytest.approx(lowest)


# Names of results


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=300), max_size=6))
def test_results_of_any_address_are_files_of_the_folder(names):
    sources, problems = find_sources([f"http://host/{name}?key=secret" for name in names])
    assert not problems and len(sources) == len(set(names))
    stems = [source.name for source in sources]
    assert len({stem.casefold() for stem in stems}) == len(stems)
    for stem in stems:
        assert stem and "/" not in stem and "\\" not in stem and stem.strip(". ") and len(stem.encode()) <= 220
