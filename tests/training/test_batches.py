import pytest

from denseclip_hf.training.sampling import GlobalBatches


def steps(num_samples, batch_size, world=1, epoch=0, **options):
    """The positions of each global batch of an epoch, gathered from all processes, and the batches' sizes."""
    shares = []
    for rank in range(world):
        batches = GlobalBatches(num_samples, batch_size, world=world, rank=rank, **options)
        batches.set_epoch(epoch)
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
    sizes = [[len(batch) for batch in share] for share in shares]
    return [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)], sizes


@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_the_batches_of_one(drop_last):
    one, _ = steps(11, 4, drop_last=drop_last)
    two, sizes = steps(11, 2, world=2, drop_last=drop_last)
    assert one == two and len(one) == (2 if drop_last else 3)
    assert sizes == ([[2, 2], [2, 2]] if drop_last else [[2, 2, 2], [2, 2, 1]])


def test_the_order_is_drawn_from_seed_and_epoch():
    orders = [list(steps(9, 1, seed=seed, epoch=epoch)[0]) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(order) for order in orders}) == 4
    assert orders[3] == steps(9, 1, seed=1, epoch=1)[0] and sorted(sum(orders[0], [])) == list(range(9))


def test_an_epoch_is_cut_to_whole_steps():
    """Six batches at accumulation 4 are one step, as one batch of four times the size is."""
    batches = GlobalBatches(12, 2, accumulation=4)
    assert len(batches) == 4 and batches.images_in_step(0) == batches.images_in_step(7) == 8
    assert sorted(sum(batches, [])) == sorted(sum(GlobalBatches(12, 8), []))


def test_pictures_of_an_incomplete_step_are_counted():
    batches = GlobalBatches(11, 2, world=2, accumulation=2, drop_last=False)
    assert [batches.images_in_step(step) for step in range(4)] == [8, 3, 8, 3]


def test_fewer_pictures_than_processes_are_left_out():
    assert steps(9, 2, world=2, drop_last=False)[1] == [[2, 2], [2, 2]]
    assert GlobalBatches(9, 2, world=2, drop_last=False).images_in_step(2) == 4


def test_no_step_at_all_is_refused():
    with pytest.raises(ValueError, match="13 images and one step needs 20"):
        GlobalBatches(13, 20)
    with pytest.raises(ValueError, match="1 images and one step needs 2 "):
        GlobalBatches(1, 20, world=2, drop_last=False)
    assert len(GlobalBatches(13, 20, drop_last=False)) == 1
