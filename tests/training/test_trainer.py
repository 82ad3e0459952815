"""The trainer: what it trains, logs, saves, resumes and refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, TrainerCallback
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from denseclip_hf.training import poly_learning_rate
from denseclip_hf.training.arguments import DenseCLIPTrainingArguments
from denseclip_hf.training.trainer import DenseCLIPTrainer, NonFiniteLossError
from denseclip_hf.transforms import AugmentedStream, TrainTransform
from helpers.images import pictures
from helpers.models import tiny_model, varied
from helpers.training import NO_DROPOUT, trainer_for


class GradientWatch(TrainerCallback):
    """Notes which parameters have a gradient when the optimizer is about to step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_training_freezes_the_text_tower_and_moves_the_contexts(tmp_path, kind):
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_for(tmp_path, model)
    watch = GradientWatch()
    trainer.add_callback(watch)
    trainer.train()
    after = model.state_dict()
    text = [name for name in before if name.startswith("clip.text_")]
    assert text and all(torch.equal(before[name], after[name]) for name in text)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved >= {"prompts", "gamma", "context_decoder", "neck", "decode_head", "clip"}
    frozen = {name: p for name, p in model.named_parameters() if name.startswith("clip.text_")}
    assert not {id(p) for p in frozen.values()} & {id(p) for p in trainer.optimizer.state}
    assert not any(p.requires_grad for p in frozen.values())
    assert watch.with_gradient == {name for name, _ in model.named_parameters()} - frozen.keys()


def test_training_learns(tmp_path):
    model = tiny_model("resnet", **NO_DROPOUT)
    trainer = trainer_for(tmp_path, model, max_steps=60, learning_rate=1e-2, image_encoder_lr_multiplier=1.0)
    before = trainer.evaluate()["eval_mean_iou"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_mean_iou"] > max(before + 0.2, 0.6)
    assert after["eval_loss"] < 1.0


def test_log_has_what_one_watches(tmp_path):
    """With the rate of every group as the step used it."""
    trainer = trainer_for(tmp_path, max_steps=4, warmup_steps=2)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, line in enumerate(lines):
        for name, base in (("decoder", 1e-3), ("context_decoder_norms", 1e-3), ("image_encoder", 1e-4)):
            expected = poly_learning_rate(step, base, total_steps=4, warmup_steps=2)
            assert line[f"learning_rate/{name}"] == pytest.approx(expected, rel=1e-12)
        assert line["learning_rate/text_encoder"] == 0.0
        assert line["loss"] == pytest.approx(line["decode_loss"] + line["auxiliary_loss"], rel=1e-3)
        assert 0 <= line["pixel_accuracy"] <= 1 and line["images_per_second"] > 0 and line["peak_memory_gib"] > 0
        assert "grad_norm" in line
    assert len(lines) == 4
    trainer.evaluate()
    assert trainer.model.training


def test_a_frozen_image_encoder_keeps_the_statistics_of_its_batch_norms(tmp_path):
    model = tiny_model("resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer_for(tmp_path, model, image_encoder_lr_multiplier=0.0).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in moved if name.startswith("clip.")]
    assert [name for name in moved if name.startswith("decode_head.") and "running_mean" in name]


def test_the_time_of_an_evaluation_is_no_time_of_training(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    trainer = trainer_for(tmp_path, max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1)

    def evaluate(*args, **kwargs):
        now[0] += 100.0
        return {"mean_iou": 0.5, "per_category_iou": [0.5] * 3}

    def step(*args, **kwargs):
        now[0] += 1.0

    monkeypatch.setattr("denseclip_hf.training.trainer.evaluate_segmentation", evaluate)
    trainer.add_callback(type("Clock", (TrainerCallback,), {"on_step_end": step})())
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "images_per_second" in entry)
    assert logged["images_per_second"] == pytest.approx(4 / 2)  # two steps of two pictures, a second each


def test_the_code_is_saved_too_if_asked_for(tmp_path):
    trainer_for(tmp_path, save_code=True).save_model(tmp_path / "model")
    assert (
        "AutoModelForSemanticSegmentation" in json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    )
    assert (tmp_path / "model" / "modeling_denseclip.py").is_file() and (tmp_path / "model" / "README.md").is_file()


def test_saved_directory_is_complete(tmp_path):
    trainer = trainer_for(tmp_path / "model")
    trainer.train()
    trainer.save_model()
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= files
    card = tmp_path / "model" / "README.md"
    card.write_text(card.read_text() + "My own words.")
    trainer.save_model()
    assert "My own words." in card.read_text()
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        outputs = model(**processor(pictures(1)[0]["image"], return_tensors="pt"))
    assert processor.post_process_semantic_segmentation(outputs, [(72, 80)])[0].shape == (72, 80)


def test_a_loss_that_is_not_finite_stops_with_step_and_files(tmp_path):
    file = tmp_path / "broken.png"
    pictures(1)[0]["image"].save(file)
    samples = [{"image": Image.open(file), "mask": sample["mask"]} for sample in pictures(2)]
    model = tiny_model()
    with torch.no_grad():
        model.decode_head.classifier.bias[0] = float("nan")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match="step 0 .*broken.png"):
        trainer_for(tmp_path / "out", model, samples).train()
    assert all(torch.equal(before[k].nan_to_num(), p.nan_to_num()) for k, p in model.named_parameters())


def test_pictures_without_a_labelled_pixel_leave_a_finite_loss_and_weights(tmp_path, kind):
    samples = [{"image": sample["image"], "mask": np.full_like(sample["mask"], 255)} for sample in pictures(4)]
    trainer = trainer_for(tmp_path, tiny_model(kind), samples, max_steps=2, evaluate=False)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class SpoilStep(TrainerCallback):
    """Makes the loss, or the gradient behind a sound loss, not finite in the third step."""

    def __init__(self, model, loss=None, gradient=None):
        self.step, self.loss, self.gradient = 0, loss, gradient
        model.register_forward_hook(self.spoil_loss)
        model.gamma.register_hook(self.spoil_gradient)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def spoil_loss(self, model, args, outputs):
        if self.step == 2 and self.loss is not None:
            outputs.loss = outputs.loss * self.loss

    def spoil_gradient(self, gradient):
        return gradient * self.gradient if self.step == 2 and self.gradient is not None else gradient


@pytest.mark.parametrize(
    ("spoilt", "max_grad_norm"),
    [({"loss": float("inf")}, 0.0), ({"gradient": float("nan")}, 0.0), ({"gradient": float("inf")}, 1.0)],
)
def test_the_last_good_checkpoint_is_kept(tmp_path, spoilt, max_grad_norm):
    model = tiny_model()
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_grad_norm": max_grad_norm}
    trainer = trainer_for(tmp_path, model, **options)
    trainer.add_callback(SpoilStep(model, **spoilt))
    with pytest.raises(NonFiniteLossError, match=f"{next(iter(spoilt))}.* step 2"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters() if name in saved)


@pytest.mark.parametrize("workers, persistent", [(0, False), (2, True)])
def test_resume_is_bit_exact(tmp_path, workers, persistent):
    """Eight pictures in batches of two are four steps an epoch; what is dropped out depends on each draw before it."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "dataloader_num_workers": workers}
    options |= {"dataloader_persistent_workers": persistent}
    whole = trainer_for(tmp_path / "whole", tiny_model(), **options)
    assert whole.model.config.context_decoder_dropout > 0
    whole.train()
    expected = whole.model.state_dict()
    for step in (3, 4, 6):  # within an epoch, between two, and when all is done
        trainer = trainer_for(tmp_path / "again", tiny_model(seed=9), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert trainer.state.global_step == 6
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, expected[name]), (step, name)


def test_a_checkpoint_is_complete_or_absent(tmp_path, monkeypatch):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_for(tmp_path, save_total_limit=1, **options)
    save_rng_state = trainer._save_rng_state

    def fail_at_the_second(output_dir):
        if trainer.state.global_step == 4:
            raise OSError("No space left on device")
        save_rng_state(output_dir)

    monkeypatch.setattr(trainer, "_save_rng_state", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert (tmp_path / "checkpoint-2" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(("options", "asked"), [({}, "miou"), ({"inference_mode": "slide"}, "loss"), ({}, "iou/moon")])
def test_an_unknown_best_metric_is_refused_before_training(tmp_path, options, asked):
    options = {"model": tiny_model(**options), "eval_strategy": "steps"}
    with pytest.raises(ValueError, match=f"{asked}.*mean_iou"):
        trainer_for(tmp_path, **options, metric_for_best_model=asked)
    trainer_for(tmp_path, **options, metric_for_best_model="eval_mean_iou")


def test_old_checkpoints_go_and_the_best_stays_and_is_found_after_the_run_has_moved(tmp_path):
    """The loss as a score that shall be high makes the first checkpoint the best."""
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    options |= {"metric_for_best_model": "loss", "learning_rate": 1e-2, "load_best_model_at_end": True}
    trainer_for(tmp_path / "here", save_total_limit=2, **options).train()
    there = (tmp_path / "here").rename(tmp_path / "there")
    assert {path.name for path in there.iterdir() if path.is_dir()} == {"checkpoint-1", "checkpoint-4"}
    trainer = trainer_for(there, tiny_model(seed=9), **options)
    trainer.train(resume_from_checkpoint=True)
    best, weights = load_file(there / "checkpoint-1" / "model.safetensors"), trainer.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in best.items())


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 9, "metric_for_best_model": "iou/class 1"}
    trainer = trainer_for(tmp_path, learning_rate=1e-9, early_stopping_patience=2, **options)
    trainer.train()
    assert trainer.state.global_step == 3
    assert "eval_iou/class 1" in trainer.state.log_history[-1 - ("train_loss" in trainer.state.log_history[-1])]


def model_of_still_batch_norms():
    """One for which it makes no difference how the pictures of a step are spread over batches."""
    model = tiny_model(**NO_DROPOUT)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
    return model


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    """Six pictures at once are four and then two accumulated, all of the same weight."""
    weights = []
    for batch, accumulation in ((6, 1), (4, 2)):
        model = model_of_still_batch_norms()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        encoded = []
        model.clip.text_model.encoder.register_forward_hook(lambda *args, encoded=encoded: encoded.append(1))
        trainer_for(tmp_path, model, pictures(6), dataloader_drop_last=False, evaluate=False, **options).train()
        assert len(encoded) == 2  # the text tower runs once per optimizer step, not once per batch
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, atol=2e-5, rtol=1e-4)


def test_a_stream_without_a_batch_is_refused(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.train_dataset = AugmentedStream([], TrainTransform(crop_size=64))
    with pytest.raises(ValueError, match="stream"):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_resumed_exactly_in_its_second_pass(tmp_path, workers):
    """Five pictures in batches of two: step 4 lies in the second pass."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": workers}
    trainers = [trainer_for(tmp_path / str(i), tiny_model(seed=i), pictures(5), **options) for i in (0, 1)]
    for trainer in trainers:
        trainer.train_dataset = AugmentedStream(pictures(5), TrainTransform(crop_size=64, scale=(128, 64)))
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "0" / "checkpoint-4"))
    assert trainers[1].state.global_step == 7
    expected = trainers[0].model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainers[1].model.state_dict().items())


def test_a_warm_up_longer_than_the_run_is_said(tmp_path, caplog):
    trainer_for(tmp_path, warmup_steps=1500).create_optimizer_and_scheduler(4)
    assert "warm-up of 1500 steps" in caplog.text


def test_evaluation_counts_every_picture_once_at_its_own_size(tmp_path):
    samples = pictures(3) + pictures(2, size=(100, 70))
    model = varied(tiny_model(seed=25))  # for which no pixel is nearly undecided, which rounding would decide
    trainer = trainer_for(tmp_path, model, samples, per_device_eval_batch_size=2)
    together = []
    hook = trainer.model.register_forward_pre_hook(lambda module, args: together.append(len(args[0])))
    matrix = trainer.evaluate()["eval_confusion_matrix"]
    hook.remove()
    assert sorted(together) == [1, 2, 2] and (matrix.sum(0) > 0).all()
    labeled = sum(int((sample["mask"] != 255).sum()) for sample in samples)
    assert matrix.sum() == labeled
    one_by_one = trainer_for(tmp_path, trainer.model, samples, per_device_eval_batch_size=1).evaluate()
    assert torch.equal(matrix, one_by_one["eval_confusion_matrix"])


def test_a_stream_is_evaluated_as_a_sequence_is(tmp_path):
    samples = pictures(3)
    trainer = trainer_for(tmp_path, samples=samples)
    expected = trainer.evaluate()
    streamed = trainer.evaluate(iter(samples))
    assert torch.equal(streamed["eval_confusion_matrix"], expected["eval_confusion_matrix"])
    assert streamed["eval_loss"] == pytest.approx(expected["eval_loss"])


def test_no_image_or_one_that_cannot_be_evaluated_is_refused(tmp_path):
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="no image"):
            trainer_for(tmp_path).evaluate(nothing)
    Image.new("RGB", (5000, 1)).save(tmp_path / "line.png")
    sample = {"image": Image.open(tmp_path / "line.png"), "mask": np.zeros((1, 5000), dtype=np.int64)}
    with pytest.raises(ValueError, match="line.png: .*sides"):
        trainer_for(tmp_path / "run").evaluate([sample])


def test_what_a_user_froze_stays_frozen(tmp_path):
    model = tiny_model()
    model.neck.requires_grad_(False)
    before = {name: value.clone() for name, value in model.neck.named_parameters()}
    trainer_for(tmp_path, model, evaluate=False).train()
    assert before and all(torch.equal(value, before[name]) for name, value in model.neck.named_parameters())


class Prepared(torch.utils.data.Dataset):
    """Samples as plain `Trainer` has them."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"pixel_values": torch.full((3, 64, 64), index / 3), "labels": torch.zeros(64, 64, dtype=torch.long)}


def test_prepared_samples_are_evaluated_with_own_metrics_to_the_last_of_them(tmp_path):
    trainer = trainer_for(tmp_path, samples=pictures(), evaluate=False, per_device_eval_batch_size=2)
    trainer.compute_metrics = lambda prediction: {"count": len(prediction.label_ids)}
    assert trainer.evaluate(Prepared())["eval_count"] == 3
    assert len(trainer.predict(Prepared()).label_ids) == 3
    with pytest.raises(ValueError, match="prepared samples"):
        trainer.predict(pictures())


def test_metrics_that_nothing_would_call_are_refused(tmp_path):
    arguments = DenseCLIPTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=name):
            DenseCLIPTrainer(tiny_model(), arguments, eval_dataset=pictures(), **{name: lambda *_: {}})


def test_a_loss_of_ones_own_is_used(tmp_path):
    trainer = trainer_for(tmp_path, evaluate=False)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean() * 0 + 7
    trainer.train()
    assert [row["loss"] for row in trainer.state.log_history if "loss" in row] == [7.0] * 4
