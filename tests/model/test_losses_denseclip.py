import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from denseclip_hf.model import modeling_denseclip
from denseclip_hf.model.modeling_denseclip import checked_labels, dice_loss, pixel_cross_entropy
from helpers.models import tiny_config, tiny_model


def straightforward(logits, labels, ignore_index=255):
    resized = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(resized, labels, ignore_index=ignore_index, reduction="none").mean()


def test_ignored_pixels_count_as_zero():
    logits = torch.zeros(1, 4, 2, 2)
    labels = torch.tensor([[[0, 255], [255, 255]]])
    assert pixel_cross_entropy(logits, labels, 255).item() == pytest.approx(torch.log(torch.tensor(4.0)).item() / 4)
    assert pixel_cross_entropy(logits, torch.full_like(labels, 255), 255) == 0


@pytest.mark.parametrize(("strip", "size"), [(1, (33, 47)), (500, (16, 12)), (500, (5, 7)), (2**23, (24, 50))])
def test_loss_and_gradient_are_those_of_resized_logits(monkeypatch, strip, size):
    monkeypatch.setattr(modeling_denseclip, "_CHUNK_ELEMENTS", strip)
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


def test_half_precision_logits_get_a_float32_loss_and_their_own_gradient(monkeypatch):
    monkeypatch.setattr(modeling_denseclip, "_CHUNK_ELEMENTS", 1)
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(4, (1, 16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pixel_cross_entropy(logits, labels, 255)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, straightforward(logits.detach().float(), labels), rtol=1e-5, atol=1e-6)
    full = logits.detach().float().requires_grad_()
    straightforward(full, labels).backward()
    torch.testing.assert_close(logits.grad.float(), full.grad, rtol=2**-8, atol=0)


@pytest.mark.parametrize("ignore_index", [-1, 3])
def test_labels_beside_the_classes_are_ignored(ignore_index):
    labels = torch.tensor([[[0, 2, ignore_index]]], dtype=torch.int8)
    checked = checked_labels(labels, 1, tiny_config(semantic_loss_ignore_index=ignore_index))
    assert checked.dtype == torch.long and torch.equal(checked, labels.long())


@pytest.mark.parametrize("values", [[-1, 2], [0, 3]])
def test_labels_beyond_the_classes_are_refused(values):
    with pytest.raises(ValueError, match="classes"):
        checked_labels(torch.tensor([[values]], dtype=torch.int8), 1, tiny_config())


def test_nothing_of_the_labels_size_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(modeling_denseclip, "_CHUNK_ELEMENTS", 4096)
    logits, labels = torch.randn(1, 16, 8, 8, requires_grad=True), torch.zeros(1, 256, 256, dtype=torch.long)
    kept, resized = [], []
    real = F.cross_entropy
    monkeypatch.setattr(
        modeling_denseclip.F, "cross_entropy", lambda x, *args, **kw: resized.append(x.numel()) or real(x, *args, **kw)
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pixel_cross_entropy(logits, labels, 255)
    assert max(resized) <= 16 * 256 * 32  # a row of logits is 32 rows of labels
    assert all(x.numel() <= logits.numel() for x in kept if x.is_floating_point())


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_second_derivatives_are_right(monkeypatch, chunk):
    monkeypatch.setattr(modeling_denseclip, "_CHUNK_ELEMENTS", chunk)
    labels = torch.randint(3, (1, 8, 8), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    along = torch.randn_like(logits)
    products = []
    for loss in (pixel_cross_entropy(logits, labels, 255), straightforward(logits, labels)):
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        products.append(torch.autograd.grad((gradient * along).sum(), logits)[0])
    assert products[0].abs().max() > 0
    torch.testing.assert_close(*products)


@pytest.mark.parametrize(
    ("strip", "gamma", "weights"), [(1, 2.0, [0.5, 1.0, 4.0]), (2**23, 2.0, None), (2**23, 0.0, [0.5, 1.0, 4.0])]
)
def test_weights_and_focus_are_the_published_formulas(monkeypatch, strip, gamma, weights):
    """-w (1 - p)^γ log p of each pixel's own class, and zero without one."""
    monkeypatch.setattr(modeling_denseclip, "_CHUNK_ELEMENTS", strip)
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(3, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    labels[0, :5] = 255
    p = F.interpolate(logits, size=(16, 16), mode="bilinear").softmax(1).gather(1, labels.clamp(max=2)[:, None])[:, 0]
    each = -torch.tensor(weights or [1.0] * 3)[labels.clamp(max=2)] * (1 - p) ** gamma * p.log()
    expected = (each * (labels != 255)).mean()
    loss = pixel_cross_entropy(logits, labels, 255, class_weights=weights, focal_gamma=gamma)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_a_sure_pixel_has_no_gradient_that_is_not_a_number():
    logits = torch.tensor([1000.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    pixel_cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.long), 255, focal_gamma=0.5).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("strip", [1, 2**23])
def test_dice_is_that_of_the_classes_that_are_there(monkeypatch, strip):
    monkeypatch.setattr(modeling_denseclip, "_CHUNK_ELEMENTS", strip)
    labels = torch.tensor([[[0, 0], [1, 255]]])
    sure = 50.0 * F.one_hot(torch.tensor([[[0, 0], [0, 2]]]), 3).movedim(-1, 1).float()
    # Class 0: 2 pixels of 2, one too many. Class 1: none of 1. Class 2: only where nothing has a class.
    torch.testing.assert_close(dice_loss(sure, labels, 255), torch.tensor((1 - 5 / 6 + 1 - 1 / 2) / 2))
    assert dice_loss(sure, torch.full_like(labels, 255), 255) == 0


def test_the_model_trains_with_what_its_config_says():
    pixels, labels = torch.randn(1, 3, 64, 64), torch.randint(3, (1, 64, 64))
    plain, rare = tiny_model(), tiny_model(class_weights=[1.0, 2.0, 0.0], focal_gamma=1.0, dice_loss_weight=0.5)
    logits = rare.eval()(pixels, labels=labels)
    expected = pixel_cross_entropy(logits.logits, labels, 255, class_weights=[1.0, 2.0, 0.0], focal_gamma=1.0)
    torch.testing.assert_close(logits.decode_loss, expected + 0.5 * dice_loss(logits.logits, labels, 255))
    assert logits.auxiliary_loss != plain.eval()(pixels, labels=labels).auxiliary_loss
    with pytest.raises(StrictDataclassError, match="class_weights"):
        tiny_config(class_weights=[1.0])
