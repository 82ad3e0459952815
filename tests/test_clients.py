"""Programs of others that take the model as they take any of transformers'."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor

from denseclip_hf import DenseCLIPModel, DenseCLIPProcessor
from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.images import pictures
from helpers.models import tiny_model
from helpers.training import trainer_for


PIXELS = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (2, 64, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(kind):
    return tiny_model(kind).eval()


def test_gradients_of_functions_are_those_of_backward(model):
    """By weights, by pixels and of each sample."""
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights, pixels, labels):
        return functional_call(model, weights, (pixels,), {"labels": labels}).loss

    pixels = PIXELS.clone().requires_grad_()
    model(pixels, labels=LABELS).loss.backward()
    by_weights = grad(loss)(weights, PIXELS, LABELS)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(by_weights[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(grad(loss, argnums=1)(weights, PIXELS, LABELS), pixels.grad, atol=1e-6, rtol=1e-3)
    each = vmap(grad(lambda w, x, y: loss(w, x[None], y[None])), in_dims=(None, 0, 0))(weights, PIXELS, LABELS)
    name = "decode_head.classifier.weight"
    torch.testing.assert_close(each[name].mean(0), by_weights[name], atol=1e-5, rtol=1e-4)


def test_an_ensemble_computes_what_its_members_do(model):
    other = tiny_model("resnet" if model.pyramid is None else "vit", seed=5).eval()
    weights, buffers = stack_module_state([model, other])
    base = copy.deepcopy(model).to("meta")

    def logits(weights, buffers, pixels):
        return functional_call(base, (weights, buffers), (pixels,)).logits

    together = vmap(logits, in_dims=(0, 0, None))(weights, buffers, PIXELS)
    for member, expected in zip(together, (model, other), strict=True):
        torch.testing.assert_close(member, expected(PIXELS).logits, atol=1e-5, rtol=1e-4)


def test_a_trace_computes_the_same_at_its_size(model):
    with torch.no_grad():
        traced = torch.jit.trace(model, PIXELS, strict=False)
        torch.testing.assert_close(traced(PIXELS + 1)["logits"], model(PIXELS + 1).logits)


def test_tensorboard_draws_the_graph(model, tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(model, PIXELS, use_strict_trace=False)
    (events,) = tmp_path.iterdir()
    assert b"decode_head" in events.read_bytes()


def test_fvcore_counts_what_every_part_computes(model):
    nn = pytest.importorskip("fvcore.nn")
    one, two = (nn.FlopCountAnalysis(model, PIXELS[:count]).unsupported_ops_warnings(False) for count in (1, 2))
    for part in ("clip.vision_model", "context_decoder", "neck", "decode_head"):
        assert 0 < 2 * one.by_module()[part] == pytest.approx(two.by_module()[part], rel=0.01)
    assert nn.parameter_count(model)[""] == model.num_parameters()


@pytest.mark.slow
def test_openvino_computes_the_same(model):
    """Of the model as it is, at the size of the example."""
    openvino = pytest.importorskip("openvino")
    with torch.no_grad():
        program = openvino.convert_model(model, example_input=PIXELS)
        compiled = openvino.Core().compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        logits = torch.from_numpy(compiled([PIXELS.numpy()])["logits"])
        torch.testing.assert_close(logits, model(PIXELS).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "load_checkpoint_and_dispatch"])
def test_weights_may_wait_elsewhere(model, tmp_path, way):
    with torch.no_grad():
        expected = model(PIXELS).logits
        if way == "cpu_offload":
            model = cpu_offload(model, execution_device=torch.device("cpu"))
        elif way == "disk_offload":
            model = disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
        else:
            model.save_pretrained(tmp_path)
            with init_empty_weights():
                model = AutoModelForSemanticSegmentation.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
            model = load_checkpoint_and_dispatch(model, str(tmp_path), device_map={"": "cpu"})
        torch.testing.assert_close(model(PIXELS).logits, expected)


def test_the_auto_classes_give_processor_and_model_of_a_trained_directory(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.tokenizer = tokenizer = learn_tokenizer(["road"])
    trainer.save_model()
    image = pictures(1)[0]["image"]
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, DenseCLIPProcessor)
    inputs = processor(images=image, text="road", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], trainer.image_processor(image, return_tensors="pt")["pixel_values"])
    assert inputs["input_ids"].tolist() == [tokenizer("road")["input_ids"]]
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs = model(inputs["pixel_values"])
    (result,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
    assert result.shape == image.size[::-1]
    assert isinstance(AutoModel.from_pretrained(tmp_path), DenseCLIPModel)
