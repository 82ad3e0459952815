import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES, golden_case, golden_model, tiny_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, TrainerCallback

from denseclip_hf import DenseCLIPImageProcessor, DenseCLIPTrainer, DenseCLIPTrainingArguments
from denseclip_hf.conversion import ORIGINAL_KEY_TABLE, rename
from denseclip_hf.trainer import NonFiniteLossError
from denseclip_hf.training import parameter_groups, poly_learning_rate
from denseclip_hf.transforms import AugmentedDataset, TrainTransform


OPTIM = json.loads((FIXTURES / "optim.json").read_text())
NO_DROPOUT = {"context_decoder_dropout": 0.0, "decode_head_dropout": 0.0, "drop_path_rate": 0.0}


def pictures(count=8, size=(80, 72)):
    """Three horizontal bands whose colours tell their classes, with noise."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        mask = np.repeat(np.sort(rng.integers(0, 3, size[1])), size[0]).reshape(size[1], size[0]).astype(np.uint8)
        mask[:, :3] = 255
        colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[mask % 3]
        picture = np.clip(colours + rng.normal(0, 20, colours.shape), 0, 255).astype(np.uint8)
        samples.append({"image": Image.fromarray(picture), "mask": mask})
    return samples


def write_folder(root, count, suffix=".jpg"):
    """The same pictures as a user's folder: images, masks, classes.json."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for index, sample in enumerate(pictures(count)):
        sample["image"].save(root / "images" / f"{index}{suffix}")
        Image.fromarray(sample["mask"]).save(root / "masks" / f"{index}.png")
    (root / "classes.json").write_text(json.dumps({"id2label": {"0": "sky", "1": "road", "2": "car"}}))
    return root


def trainer_for(output_dir, model=None, samples=None, evaluate=True, **options):
    samples = pictures() if samples is None else samples
    transform = TrainTransform(crop_size=64, scale=(128, 64))
    defaults = {
        "max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "learning_rate": 1e-3,
    }  # fmt: skip
    return DenseCLIPTrainer(
        tiny_model() if model is None else model,
        DenseCLIPTrainingArguments(output_dir=str(output_dir), **{**defaults, **options}),
        train_dataset=AugmentedDataset(samples, transform),
        eval_dataset=samples if evaluate else None,
        image_processor=DenseCLIPImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}),
    )


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
    assert compared == len(parameters) - 1  # CLIP's temperature is not part of the original


def test_every_parameter_is_in_one_group(kind):
    model = tiny_model(kind)
    grouped = [p for group in parameter_groups(model, 1.0, 1.0) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


@pytest.mark.parametrize("text, image", [(0.0, 0.1), (0.1, 0.1), (0.0, 1.0), (0.5, 0.0)])
def test_multipliers(text, image):
    groups = parameter_groups(tiny_model(), 2.0, 0.0, image, text)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["text_encoder"] == 2 * text and rates["image_encoder"] == 2 * image
    assert rates["decoder"] == rates["context_decoder_norms"] == 2.0 and rates["logit_scale"] == 0.0


def test_exemption_covers_norms_and_biases():
    groups = parameter_groups(tiny_model(), 1.0, 0.5, exempt_norms_and_biases=True)
    for group in groups:
        if group["name"] not in ("logit_scale",):
            assert all((p.dim() < 2) == (group["weight_decay"] == 0.0) for p in group["params"])


def test_unknown_parameter_is_refused():
    model = tiny_model()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no parameter group covers extra.weight"):
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


def test_trainer_steps_every_group_on_its_own_rate(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=20, warmup_steps=3)
    trainer.create_optimizer_and_scheduler(20)
    base = [group["lr"] for group in parameter_groups(trainer.model, 1e-3, 1e-4) if group["lr"]]
    for step in range(20):
        for group, base_lr in zip(trainer.optimizer.param_groups, base, strict=True):
            expected = poly_learning_rate(step, base_lr, total_steps=20, warmup_steps=3)
            assert group["lr"] == pytest.approx(expected, rel=1e-12)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


def test_other_schedules_are_transformers_own(tmp_path):
    trainer = trainer_for(tmp_path, lr_scheduler_type="constant")
    trainer.create_optimizer_and_scheduler(4)
    assert {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}["image_encoder"] == 1e-4


def test_defaults_are_the_published_recipe():
    args = DenseCLIPTrainingArguments(output_dir="unused")
    assert (args.learning_rate, args.weight_decay, args.max_steps, args.warmup_steps) == (1e-4, 1e-4, 80_000, 1500)
    assert (args.image_encoder_lr_multiplier, args.text_encoder_lr_multiplier, args.max_grad_norm) == (0.1, 0.0, 0.0)
    adam = OPTIM["adamw_defaults"]
    assert [args.adam_beta1, args.adam_beta2] == adam["betas"] and args.adam_epsilon == adam["eps"]


# Training


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
    frozen = {name: p for name, p in model.named_parameters() if name.startswith(("clip.text_", "clip.logit_scale"))}
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
    trainer = trainer_for(tmp_path)
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert line["loss"] == pytest.approx(line["decode_loss"] + line["auxiliary_loss"], rel=1e-3)
    assert 0 <= line["pixel_accuracy"] <= 1 and line["images_per_second"] > 0 and line["peak_memory_gib"] > 0
    assert {"grad_norm", "learning_rate/image_encoder", "learning_rate/decoder"} <= line.keys()
    assert line["learning_rate/decoder"] == pytest.approx(10 * line["learning_rate/image_encoder"], rel=0.05)


def test_saved_directory_is_complete(tmp_path):
    trainer = trainer_for(tmp_path / "model")
    trainer.train()
    trainer.save_model()
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= files
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
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    with pytest.raises(NonFiniteLossError, match="nan at step 0 on .*broken.png.*before it reaches"):
        trainer_for(tmp_path / "out", model, samples).train()
    after = model.state_dict()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before if "num_batches" not in k)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_within_an_epoch_is_bit_exact(tmp_path, workers):
    """Eight pictures in batches of two are four steps an epoch: step 3 lies within the first, 6 within the second."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": workers}
    whole = trainer_for(tmp_path / "whole", tiny_model(), **options)
    whole.train()
    expected = whole.model.state_dict()
    for step in (3, 6):
        trainer = trainer_for(tmp_path / "again", tiny_model(seed=9), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert trainer.state.global_step == 7
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


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_for(tmp_path, max_steps=5, save_total_limit=2, learning_rate=1e-2, **options)
    trainer.train()
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    best = trainer.state.best_global_step
    assert left == ({"checkpoint-5", f"checkpoint-{best}"} if best < 5 else {"checkpoint-4", "checkpoint-5"})


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    """Batch norms see the smaller batch, so they are held still here; everything else must be the same."""
    weights = []
    for batch, accumulation in ((4, 1), (2, 2)):
        model = tiny_model(**NO_DROPOUT)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = trainer_for(tmp_path, model, max_steps=2, **options)
        encoded = []
        model.clip.text_model.encoder.register_forward_hook(lambda *args, encoded=encoded: encoded.append(1))
        trainer.train()
        assert len(encoded) == 2  # the text tower runs once per optimizer step, not once per batch
        weights.append(model.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-5, rtol=1e-4)


def test_evaluation_counts_every_picture_once_at_its_own_size(tmp_path):
    samples = pictures(3) + pictures(2, size=(100, 70))
    trainer = trainer_for(tmp_path, samples=samples, per_device_eval_batch_size=2)
    matrix = trainer.evaluate()["eval_confusion_matrix"]
    labelled = sum(int((sample["mask"] != 255).sum()) for sample in samples)
    assert matrix.sum() == labelled
    one_by_one = trainer_for(tmp_path, trainer.model, samples, per_device_eval_batch_size=1).evaluate()
    assert torch.equal(matrix, one_by_one["eval_confusion_matrix"])


def test_a_stream_is_evaluated_as_a_sequence_is(tmp_path):
    samples = pictures(3)
    trainer = trainer_for(tmp_path, samples=samples)
    expected = trainer.evaluate()
    streamed = trainer.evaluate(iter(samples))
    assert torch.equal(streamed["eval_confusion_matrix"], expected["eval_confusion_matrix"])
    assert streamed["eval_loss"] == pytest.approx(expected["eval_loss"])


@pytest.mark.parametrize("nothing", [[], iter([])])
def test_nothing_to_evaluate_is_refused(tmp_path, nothing):
    with pytest.raises(ValueError, match="no picture to evaluate on"):
        trainer_for(tmp_path).evaluate(nothing)


def test_evaluation_leaves_the_model_training(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.model.train()
    trainer.evaluate()
    assert trainer.model.training
