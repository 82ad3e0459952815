import pytest
import torch
from torch.nn import functional as F

from denseclip_hf import losses_denseclip
from denseclip_hf.losses_denseclip import pixel_cross_entropy


def straightforward(logits, labels, ignore_index=255):
    resized = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(resized, labels, ignore_index=ignore_index, reduction="none").mean()


def test_ignored_pixels_count_as_zero():
    logits = torch.zeros(1, 4, 2, 2)
    labels = torch.tensor([[[0, 255], [255, 255]]])
    assert pixel_cross_entropy(logits, labels, 255).item() == pytest.approx(torch.log(torch.tensor(4.0)).item() / 4)
    assert pixel_cross_entropy(logits, torch.full_like(labels, 255), 255) == 0


@pytest.mark.parametrize("strip", [1, 500, 2**23])
@pytest.mark.parametrize("size", [(32, 48), (16, 12), (33, 47), (8, 12), (5, 7), (24, 50)])
def test_loss_and_gradient_are_those_of_resized_logits(monkeypatch, strip, size):
    monkeypatch.setattr(losses_denseclip, "_STRIP_ELEMENTS", strip)
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 8, 12, requires_grad=True)
    labels = torch.randint(5, (2, *size))
    labels[0, : size[0] // 2] = 255
    expected = straightforward(logits, labels)
    loss = pixel_cross_entropy(logits, labels, 255)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for upstream in (1.0, -3.0):
        ours, theirs = (
            torch.autograd.grad(upstream * value, logits, retain_graph=True)[0] for value in (loss, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_nothing_of_the_labels_size_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(losses_denseclip, "_STRIP_ELEMENTS", 4096)
    logits, labels = torch.randn(1, 16, 8, 8, requires_grad=True), torch.zeros(1, 256, 256, dtype=torch.long)
    largest = 0
    real = F.cross_entropy

    def watched(resized, *args, **kwargs):
        nonlocal largest
        largest = max(largest, resized.numel())
        return real(resized, *args, **kwargs)

    monkeypatch.setattr(losses_denseclip.F, "cross_entropy", watched)
    loss = pixel_cross_entropy(logits, labels, 255)
    assert largest <= 16 * 256 * 32  # a row of logits is 32 rows of labels
    node = loss.grad_fn.next_functions[0][0]  # before the division by the number of pixels
    assert [tensor.numel() for tensor in node.saved_tensors] == [logits.numel()]


def test_half_precision_logits_get_a_float32_loss_and_their_own_gradient():
    logits = torch.randn(1, 4, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(4, (1, 16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pixel_cross_entropy(logits, labels, 255)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, straightforward(logits.detach().float(), labels), rtol=1e-5, atol=1e-6)
