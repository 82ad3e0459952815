import json
import sys

import pytest
import torch

from denseclip_hf import DenseCLIPTrainer, DenseCLIPTrainingArguments
from denseclip_hf.conversion.keys import ORIGINAL_KEY_TABLE, rename
from denseclip_hf.training import parameter_groups, poly_learning_rate
from helpers.golden import FIXTURES, golden_case, golden_model
from helpers.images import pictures
from helpers.models import tiny_model
from helpers.training import trainer_for


OPTIM = json.loads((FIXTURES / "optim.json").read_text())


# Parameter groups


@pytest.mark.parametrize("name", ["seg_vit", "seg_resnet"])
def test_groups_are_the_originals(name):
    model = golden_model(name)
    groups = parameter_groups(model, lr=1e-4, weight_decay=1e-4)
    ours = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    original = {key: (v["lr"], v["weight_decay"]) for key, v in OPTIM["params"][name].items()}
    state = {k.removeprefix("state_dict/"): v for k, v in golden_case(name)[1].items()}
    parameters, compared = dict(model.named_parameters()), 0
    for key, (lr, decay) in original.items():
        for our_key in rename({key: state[key]}, ORIGINAL_KEY_TABLE):
            assert ours[id(parameters[our_key])] == (pytest.approx(lr), decay), our_key
            compared += 1
    assert compared == len(parameters)


@pytest.mark.parametrize("text, image", [(0.0, 1.0), (0.5, 0.0)])
def test_multipliers(text, image):
    groups = parameter_groups(tiny_model(), 2.0, 0.0, image, text)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["text_encoder"] == 2 * text and rates["image_encoder"] == 2 * image
    assert rates["decoder"] == rates["context_decoder_norms"] == 2.0


def test_exemption_covers_norms_and_biases():
    groups = parameter_groups(tiny_model(), 1.0, 0.5, exempt_norms_and_biases=True)
    for group in groups:
        assert all((p.dim() < 2) == (group["weight_decay"] == 0.0) for p in group["params"])
    exempt = {group["name"] for group in groups if group["name"].endswith("_without_decay")}
    assert exempt == {f"{name}_without_decay" for name in ("text_encoder", "image_encoder", "decoder")}


def test_unknown_parameter_is_refused():
    model = tiny_model()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra.weight"):
        parameter_groups(model, 1.0, 1.0)


def test_baseline_has_groups_too(kind):
    groups = parameter_groups(tiny_model(kind, use_text_guidance=False), 1.0, 1.0)
    assert {group["name"] for group in groups} == {"image_encoder", "decoder"}


# Schedule


@pytest.mark.parametrize("base_lr", OPTIM["schedule"]["lr"])
def test_schedule_is_the_originals(base_lr):
    schedule = OPTIM["schedule"]
    for step, expected in zip(schedule["iters"], schedule["lr"][base_lr], strict=True):
        assert poly_learning_rate(step, float(base_lr), total_steps=80_000) == pytest.approx(expected, rel=1e-9)


def test_schedule_without_warmup_starts_at_the_base():
    assert poly_learning_rate(0, 0.5, total_steps=10, warmup_steps=0) == 0.5
    assert poly_learning_rate(10, 0.5, total_steps=10, warmup_steps=0) == 1e-6
    assert poly_learning_rate(12, 0.5, total_steps=10, warmup_steps=0) == 1e-6


def test_other_schedules_are_transformers_own(tmp_path):
    trainer = trainer_for(tmp_path, lr_scheduler_type="constant")
    trainer.create_optimizer_and_scheduler(4)
    assert {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}["image_encoder"] == 1e-4


def test_defaults_are_the_published_recipe():
    args = DenseCLIPTrainingArguments(output_dir="unused")
    beta1, beta2 = OPTIM["adamw_defaults"]["betas"]
    expected = {
        "learning_rate": 1e-4, "weight_decay": 1e-4, "max_steps": 80_000, "num_train_epochs": 3.0,
        "lr_scheduler_type": "polynomial", "min_learning_rate": 1e-6, "poly_power": 0.9,
        "warmup_steps": 1500, "warmup_start_ratio": 1e-6,
        "image_encoder_lr_multiplier": 0.1, "text_encoder_lr_multiplier": 0.0, "max_grad_norm": 0.0,
        "adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": OPTIM["adamw_defaults"]["eps"],
        "exempt_norms_and_biases": False, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "dataloader_drop_last": True, "remove_unused_columns": False, "logging_nan_inf_filter": False,
        "metric_for_best_model": "mean_iou", "greater_is_better": True, "channels_last": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_epochs_that_are_given_count(caplog):
    assert DenseCLIPTrainingArguments("unused", num_train_epochs=2).max_steps == -1
    assert DenseCLIPTrainingArguments("unused", max_steps=-1).num_train_epochs == 3.0
    assert DenseCLIPTrainingArguments("unused", max_steps=-1, num_train_epochs=2).num_train_epochs == 2
    assert DenseCLIPTrainingArguments("unused", max_steps=7).max_steps == 7
    assert not caplog.text
    assert DenseCLIPTrainingArguments("unused", max_steps=7, num_train_epochs=2).max_steps == 7
    assert "num_train_epochs" in caplog.text


@pytest.mark.parametrize(
    ("option", "value", "keyword"),
    [
        ("max_steps", 0, "max_steps"),
        ("max_steps", -2, "max_steps"),
        ("label_smoothing_factor", 0.1, "label_smoothing"),
        ("image_encoder_lr_multiplier", -1.0, "multipliers"),
        ("text_encoder_lr_multiplier", -1.0, "multipliers"),
        ("precision", "bf16", "precision"),
        ("push_to_hub", True, "push"),  # Trainer would push the pickle of its arguments, with the token in it
    ],
)
def test_options_that_mean_nothing_here_are_refused(option, value, keyword):
    with pytest.raises(ValueError, match=keyword):
        DenseCLIPTrainingArguments("unused", **{option: value})


def test_neither_a_push_nor_an_order_that_is_not_random_is_taken_from_trainer(tmp_path):
    with pytest.raises(ValueError, match="denseclip push"):
        trainer_for(tmp_path).push_to_hub()
    with pytest.raises(ValueError, match="sequential"):
        trainer_for(tmp_path, train_sampling_strategy="sequential").train()


def test_a_missing_logger_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match="pip install mlflow"):
        DenseCLIPTrainingArguments("unused", report_to="mlflow")


@pytest.mark.parametrize("capable", [False, True])
def test_bf16_is_taken_where_the_hardware_has_it(tmp_path, caplog, monkeypatch, capable):
    monkeypatch.setattr("denseclip_hf.training.arguments.has_bf16", lambda cpu: capable)
    assert DenseCLIPTrainingArguments(str(tmp_path), precision="auto", use_cpu=True).bf16 is capable
    assert not caplog.text
    assert DenseCLIPTrainingArguments(str(tmp_path), bf16=True, use_cpu=True).bf16
    assert ("no bf16 instructions" in caplog.text) is not capable


def test_without_a_launcher_one_of_several_devices_trains(tmp_path, caplog):
    """torch's DataParallel would give the contexts no gradient."""
    trainer = trainer_for(tmp_path)
    trainer.args._n_gpu = 2
    again = DenseCLIPTrainer(trainer.model, trainer.args, trainer.train_dataset)
    assert again.args.n_gpu == 1 and again._train_batch_size == 2
    assert "accelerate launch" in caplog.text


def test_several_sets_are_evaluated_by_name(tmp_path):
    sets = {"day": pictures(), "night": pictures()[:2]}
    trainer = trainer_for(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.eval_dataset = sets
    trainer.train()
    scores = trainer.evaluate()
    for name, samples in sets.items():
        alone = trainer.evaluate(samples)
        assert scores[f"eval_{name}_mean_iou"] == alone["eval_mean_iou"]
        assert scores[f"eval_{name}_num_images"] == len(samples)
    assert scores["eval_mean_iou"] == (scores["eval_day_mean_iou"] + scores["eval_night_mean_iou"]) / 2
    assert sum("eval_night_loss" in entry for entry in trainer.state.log_history) == 3


def test_the_cpu_is_used_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert DenseCLIPTrainingArguments("unused", bf16=True).use_cpu
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not DenseCLIPTrainingArguments("unused").use_cpu
    assert DenseCLIPTrainingArguments("unused", use_cpu=True).use_cpu
