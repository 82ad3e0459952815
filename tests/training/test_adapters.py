"""LoRA on the image tower through `peft`: what is trained, what is saved, and that it comes back the same."""

import peft
import pytest
import torch
from packaging import version
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSemanticSegmentation
from transformers.integrations.peft import MIN_PEFT_VERSION

from denseclip_hf.training import parameter_groups
from denseclip_hf.training.adapters import plain_name
from helpers.models import calls_in_checkpointed_layers, tiny_model
from helpers.training import NO_DROPOUT, trainer_for


HEADS = ["prompts", "context_decoder", "pyramid", "neck", "decode_head"]
TOO_OLD = version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION)
NEWER_PEFT = pytest.mark.skipif(
    TOO_OLD, reason=f"this transformers adds adapters with peft {MIN_PEFT_VERSION} or newer only"
)
WAYS = ["get_peft_model", pytest.param("add_adapter", marks=NEWER_PEFT)]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def lora(heads=(*HEADS, "normalization"), **options):
    return LoraConfig(
        target_modules=r"clip\.vision_model\..*\.(q_proj|v_proj)", modules_to_save=list(heads), r=2, **options
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A saved model of each image tower, as an adapter is nothing without one."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("vit", "resnet"):
        tiny_model(kind, **NO_DROPOUT).save_pretrained(folder / kind)
    return folder


@pytest.fixture
def base(bases, kind):
    return bases / kind


def adapted(base, way, config=None, seed=0):
    torch.manual_seed(seed)
    model, config = AutoModelForSemanticSegmentation.from_pretrained(base), config or lora()
    if way == "get_peft_model":
        return get_peft_model(model, config)
    model.add_adapter(config)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IMAGES).logits


def group_names(model, groups):
    """The group of every parameter of `model` by name."""
    by_id = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("way", WAYS)
def test_every_parameter_is_in_the_group_it_had(base, way):
    model = adapted(base, way)
    groups = parameter_groups(model, 1.0, 0.5)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    plain = AutoModelForSemanticSegmentation.from_pretrained(base)
    before, now = group_names(plain, parameter_groups(plain, 1.0, 0.5)), group_names(model, groups)
    for name, group in now.items():
        assert group == ("adapters" if ".lora_" in name else before[plain_name(name)]), name
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["adapters"] == rates["decoder"] == 1.0 and rates["image_encoder"] == 0.1


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (LoHaConfig, {"target_modules": ["q_proj"]}),
        (IA3Config, {"target_modules": ["k_proj"], "feedforward_modules": []}),
    ],
)
def test_adapters_of_any_kind_train_at_the_full_rate(bases, config_class, options):
    """In the frozen text tower too."""
    model = get_peft_model(AutoModelForSemanticSegmentation.from_pretrained(bases / "vit"), config_class(**options))
    new = [parameter for parameter in model.parameters() if parameter.requires_grad]
    group = next(group for group in parameter_groups(model, 1.0, 0.5) if group["name"] == "adapters")
    assert group["lr"] == 1.0 and {id(p) for p in group["params"]} == {id(p) for p in new} and len(new) > 2


@pytest.mark.parametrize(
    ("kind", "way"), [("vit", "get_peft_model"), pytest.param("resnet", "add_adapter", marks=NEWER_PEFT)]
)
def test_training_moves_the_adapter_alone_which_comes_back_and_becomes_a_plain_model(bases, kind, way, tmp_path):
    model = adapted(bases / kind, way)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_for(tmp_path / "out", model, **options)
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert all(".lora_" in name or ".modules_to_save." in name for name in moved), moved
    assert any("clip.vision_model" in name and "lora_B" in name for name in moved)
    for head in ("prompts", "context_decoder", "neck", "decode_head"):
        assert any(f"{head}.modules_to_save" in name for name in moved), head
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or ".modules_to_save." in name for name in trained)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(trained)

    trainer.save_model(str(tmp_path / "adapter"))
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json"} <= files
    assert "model.safetensors" not in files
    expected = logits(trainer.model)
    for saved in (trainer.state.best_model_checkpoint, tmp_path / "adapter"):
        untrained = AutoModelForSemanticSegmentation.from_pretrained(bases / kind)
        assert not torch.allclose(expected, logits(untrained), atol=1e-3)
        loaded = PeftModel.from_pretrained(untrained, saved)
        assert torch.equal(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    base, plain = (AutoModelForSemanticSegmentation.from_pretrained(f) for f in (bases / kind, tmp_path / "merged"))
    assert torch.equal(logits(plain), logits(merged)) and plain.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("way", WAYS)
def test_resume_is_bit_exact(bases, way, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "evaluate": False}
    whole = trainer_for(tmp_path / "whole", adapted(bases / "vit", way), **options)
    whole.train()
    again = trainer_for(tmp_path / "again", adapted(bases / "vit", way, seed=9), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = whole.model.state_dict()
    for name, value in again.model.state_dict().items():
        if ".original_module." not in name:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_without_heads_leaves_their_batch_norms_alone(bases, way, tmp_path):
    """Their statistics are not in the adapter, so a moved one would make another model of what is loaded."""
    base = bases / "resnet"
    trainer = trainer_for(tmp_path / "out", adapted(base, way, lora(heads=())), learning_rate=1e-2, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(AutoModelForSemanticSegmentation.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(trainer.model))


def lora_weights(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".lora_" in name}


@pytest.mark.parametrize(
    ("kind", "way"), [("vit", "get_peft_model"), pytest.param("resnet", "add_adapter", marks=NEWER_PEFT)]
)
def test_adapters_train_with_activation_checkpointing(bases, kind, way, tmp_path):
    losses, weights, calls = [], [], []
    for checkpointing in (False, True):
        options = {"max_steps": 3, "warmup_steps": 0, "learning_rate": 1e-2, "activation_checkpointing": checkpointing}
        trainer = trainer_for(tmp_path, adapted(bases / kind, way), **options)
        before = lora_weights(trainer.model)
        calls.append(calls_in_checkpointed_layers(trainer.model))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(lora_weights(trainer.model))
        assert before and not any(torch.equal(value, before[name]) for name, value in weights[-1].items())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-3)
    assert len(calls[1]) == 2 * len(calls[0]) > 0
