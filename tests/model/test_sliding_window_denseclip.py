import pytest
import torch

from denseclip_hf.model.layers_denseclip import resize_bilinear
from denseclip_hf.model.modeling_denseclip import sliding_window_logits, window_starts


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [(512, 512, 341, [0]), (513, 512, 341, [0, 1]), (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536]), (3, 5, 1, [0])],
)
def test_windows_cover_the_side_and_end_with_it(length, window, stride, starts):
    assert window_starts(length, window, stride) == starts


@pytest.mark.parametrize("batch_size", [1, 2])
def test_overlaps_are_averaged_by_hand(batch_size):
    image = torch.zeros(1, 3, 1, 5)
    image[0, 0, 0] = torch.arange(5.0)
    calls = []

    def predict(crops):
        calls.append(len(crops))
        return crops[:, :1] + crops[:, :1, :, :1]  # every window adds its first pixel

    logits = sliding_window_logits(predict, image, (1, 3), (1, 1), batch_size)
    # windows begin at 0, 1, 2; pixel 2 lies in all three: 2 + (0 + 1 + 2) / 3
    assert logits[0, 0, 0].tolist() == [0.0, 1.5, 3.0, 4.5, 6.0]
    assert sum(calls) == 3 and max(calls) <= batch_size


def test_half_precision_logits_are_averaged_in_float32():
    small = torch.randn(1, 2, 2, 2, dtype=torch.bfloat16)
    logits = sliding_window_logits(lambda crops: small, torch.zeros(1, 3, 8, 8), (8, 8), (4, 4))
    assert torch.equal(logits, resize_bilinear(small.float(), (8, 8)))


def test_accelerators_take_four_windows_at_a_time():
    calls = []
    images = torch.zeros(1, 3, 4, 20, device="meta")
    logits = sliding_window_logits(lambda crops: calls.append(len(crops)) or crops, images, (4, 4), (4, 4))
    assert calls == [4, 1] and logits.shape == (1, 3, 4, 20) and logits.is_meta


def test_steps_that_leave_pixels_out_are_refused():
    with pytest.raises(ValueError, match="crop_size"):
        sliding_window_logits(lambda crops: crops, torch.zeros(1, 3, 8, 8), (4, 4), (4, 5))
