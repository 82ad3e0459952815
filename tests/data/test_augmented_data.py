"""Augmented data sets and streams: the same draws for any worker, process and resumed epoch."""

import itertools

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainerState

from denseclip_hf.transforms import AugmentedDataset, AugmentedStream, EpochCallback, TrainTransform
from helpers.images import make_sample


SMALL = TrainTransform(crop_size=24, scale=(128, 32))


class Samples(torch.utils.data.Dataset):
    def __init__(self, count=8):
        self.samples = [make_sample(seed=index) for index in range(count)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, mask = self.samples[index]
        return {"image": image, "mask": mask}


class SharesItself(torch.utils.data.IterableDataset):
    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        return itertools.islice(iter(named_samples(5)), worker.id, None, worker.num_workers)


def test_workers_give_each_sample_of_a_stream_once():
    for stream in (SharesItself(), named_samples(5)):
        loader = DataLoader(AugmentedStream(stream, SMALL), batch_size=None, num_workers=2)
        assert sorted(sample["name"] for sample in loader) == list("01234")


def two_epochs(num_workers, persistent, epochs=(0, 1)):
    dataset = AugmentedDataset(Samples(), SMALL, seed=3)
    loader = DataLoader(dataset, batch_size=3, num_workers=num_workers, persistent_workers=persistent)
    results = []
    for epoch in epochs:
        dataset.set_epoch(epoch)
        results.append(torch.cat([batch["pixel_values"] for batch in loader]))
    return results


@pytest.mark.parametrize("persistent", [False, True])
def test_any_number_of_workers_gives_the_same_pixels_in_every_epoch(persistent):
    expected = two_epochs(0, False)
    assert not torch.equal(*expected)
    for one, other in zip(expected, two_epochs(2, persistent), strict=True):
        assert torch.equal(one, other)
    dataset = AugmentedDataset(Samples(), SMALL, seed=4)
    assert not torch.equal(dataset[0]["pixel_values"], expected[0][0])


def test_the_callback_tells_the_epoch_on_several_processes():
    """accelerate leaves the data set out where batches are divided among processes."""
    dataset = AugmentedDataset(Samples(), SMALL)
    loader = DataLoader(dataset, batch_size=2, shuffle=True)
    prepared = prepare_data_loader(
        loader, num_processes=2, process_index=0, put_on_device=False, use_seedable_sampler=True
    )
    EpochCallback(dataset).on_epoch_begin(None, TrainerState(epoch=4.25), None)
    prepared.set_epoch(4)
    next(iter(prepared))
    assert int(dataset._epoch) == 4


def test_a_stream_is_augmented_the_same_way_by_any_worker():
    samples = Samples(4)
    stream = AugmentedStream([samples[index] for index in range(4)], SMALL, seed=2)
    first = [sample["pixel_values"] for sample in stream]
    last = [sample["pixel_values"] for sample in AugmentedStream([samples[3]], SMALL, seed=2)]
    assert torch.equal(first[3], last[0])
    stream.set_epoch(1)
    assert not torch.equal(next(iter(stream))["pixel_values"], first[0])


def names_in(stream, count):
    return [sample["name"] for sample, _ in zip(stream, range(count), strict=False)]


def named_samples(count):
    samples = [Samples(count)[index] for index in range(count)]
    for index, sample in enumerate(samples):
        sample["image"].filename = str(index)
    return samples


def test_a_shared_stream_gives_every_image_once_per_pass_and_no_end():
    shares = []
    for rank in (0, 1):
        stream = AugmentedStream(named_samples(5), SMALL)
        stream.share(2, rank)
        shares.append(names_in(stream, 5))
    assert shares == [["0", "2", "4", "1", "3"], ["1", "3", "0", "2", "4"]]


def test_each_pass_over_a_stream_draws_as_its_own_epoch():
    stream = AugmentedStream(named_samples(2), SMALL)
    expected = [sample["pixel_values"] for epoch in (0, 1) for sample in (stream.set_epoch(epoch), *stream)[1:]]
    stream.set_epoch(0)
    stream.share(1, 0)
    for (_, pixels), sample in zip(enumerate(expected), stream, strict=False):
        assert torch.equal(sample["pixel_values"], pixels)
    assert not torch.equal(expected[0], expected[2])


def test_an_empty_stream_ends():
    stream = AugmentedStream([], SMALL)
    stream.endless = True
    assert list(stream) == []
