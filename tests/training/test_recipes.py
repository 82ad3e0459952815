import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from denseclip_hf import (
    DenseCLIPConfig,
    DenseCLIPForSemanticSegmentation,
    DenseCLIPImageProcessor,
    DenseCLIPTrainingArguments,
)
from denseclip_hf.cli.arguments import parse_arguments
from denseclip_hf.evaluation import EvaluationArguments, measure
from denseclip_hf.inference import Segmenter, load_model, segment_in_windows
from denseclip_hf.training.recipe import (
    DataArguments,
    ModelArguments,
    load_data,
    make_trainer,
    model_to_train,
)
from denseclip_hf.transforms import AugmentedDataset
from helpers.images import pictures
from helpers.training import CONFIGS, KINDS, TINY, TINY_CLIP, write_folder


@pytest.fixture
def folder(tmp_path):
    """A user's folder: three classes, six pictures."""
    return write_folder(tmp_path / "data", 6)


def tiny_arguments(folder):
    model = ModelArguments(clip_config=json.dumps(TINY_CLIP), config=json.dumps(TINY))
    return model, DataArguments(dataset=str(folder), crop_size=64, scale_long=128)


def two_steps(tmp_path, **options):
    options |= {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": []}
    return DenseCLIPTrainingArguments(str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, **options)


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_describe_a_model(recipe):
    model_args, data_args, args = parse_arguments(KINDS, [str(recipe)])
    options = json.loads(model_args.config)
    assert DenseCLIPConfig(**options).inference_mode in ("whole", "slide", "slide_and_whole")
    assert data_args.crop_size > 0 and args.learning_rate > 0
    text = recipe.read_text()
    assert f"configs/{recipe.name}" in text, "a recipe opens with the command that runs it"
    assert "mIoU" in text or "demo" in text


@pytest.mark.parametrize(
    ("split", "data"), [("voc_15_5", "voc20"), ("coco_stuff_156_15", "coco_stuff"), ("context_49_10", "context59")]
)
def test_split_recipes_name_classes_of_their_data(split, data):
    folder = CONFIGS[0].parent
    recipe = folder / "unseen" / f"{split}.yaml"
    _, data_args, _ = parse_arguments(KINDS, [str(folder / "catseg_vit_b16.yaml"), str(recipe)])
    (args,) = parse_arguments([EvaluationArguments], [str(recipe), "--model", "model"])
    zero_shot = yaml.safe_load((folder / "zero_shot" / f"{data}.yaml").read_text())
    names = [name.strip() for name in zero_shot["classes"].split(",")]
    unseen = int(split.rsplit("_", 1)[1])
    assert data_args.unseen == args.unseen and len(set(args.unseen) & set(names)) == unseen == len(args.unseen)
    assert not any(" " in name for name in names if "-" in name)  # broken at the end of a line
    assert len(names) == sum(map(int, split.rsplit("_", 2)[1:]))


@pytest.mark.parametrize("recipe", [path for path in CONFIGS if path.stem.startswith("ade20k")], ids=lambda p: p.stem)
def test_published_recipes_keep_the_published_rates(recipe):
    _, data_args, args = parse_arguments(KINDS, [str(recipe)])
    assert (args.learning_rate, args.weight_decay, args.max_steps, args.warmup_steps) == (1e-4, 1e-4, 80_000, 1500)
    assert data_args.crop_size == (640 if "vit" in recipe.stem else 512)
    devices = 1 if "one_gpu" in recipe.stem else 8
    assert devices * args.per_device_train_batch_size * args.gradient_accumulation_steps == 32


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 1e-3\nmax_steps: 7\nconfig: {gamma_init: 1.0}\nphotometric: false\n")
    model, data, args = parse_arguments(KINDS, [str(recipe), "--max_steps", "9"])
    assert (args.learning_rate, args.max_steps, data.photometric) == (1e-3, 9, False)
    assert json.loads(model.config) == {"gamma_init": 1.0}


def test_a_flags_mapping_is_put_over_the_recipes(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("config: {gamma_init: 1.0, neck_hidden_size: 8}\nclip_config: {model_type: clip_resnet}\n")
    ablation = CONFIGS[0].parent / "ablations" / "template_prompt.yaml"
    flags = ["--config", '{"gamma_init": 2.0}', "--clip_config", '{"projection_dim": 12}']
    model, *_ = parse_arguments(KINDS, [str(recipe), str(ablation), *flags])
    assert json.loads(model.config) == {"gamma_init": 2.0, "neck_hidden_size": 8, "num_context_tokens": 0}
    assert json.loads(model.clip_config) == {"model_type": "clip_resnet", "projection_dim": 12}
    assert parse_arguments(KINDS, [str(recipe), "--config", "{"])[0].config == "{"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rat: 1", "`learning_rate`"),
        ("- a list", "mapping"),
        ("a: [", "YAML"),
        ("x: !!python/object/apply:os.system ['true']", "YAML"),
    ],
)
def test_broken_recipes_are_refused(text, sentence, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        parse_arguments(KINDS, [str(recipe)])
    with pytest.raises(OSError, match="nowhere.yaml"):
        parse_arguments(KINDS, ["nowhere.yaml"])


@pytest.mark.parametrize(("text", "named"), [('{"tau": 0.05}', "`tau`"), ("{", "JSON"), ("[1]", "`config`")])
def test_unknown_options_are_refused_before_the_data_is_read(tmp_path, text, named):
    with pytest.raises(ValueError, match=named):
        make_trainer(ModelArguments(config=text), DataArguments(dataset="no/where"), two_steps(tmp_path))


def test_lists_missing_values_and_exponents_in_a_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "report_to: [none]\nmetric_for_best_model: null\ninclude_for_metrics: [loss, inputs]\nlearning_rate: 1e-4\n"
        "config: {gamma_init: 1e-3, x: -2E+3, y: .5e1, z: 1e, v: '1e3'}\nrun_name: '12e45'\ncrop_size: 640\n"
    )
    (tmp_path / "again.yaml").write_text("crop_size: null\n")  # the default, whatever the recipe before it says
    flags = [str(recipe), str(tmp_path / "again.yaml"), "--output_dir", str(tmp_path)]
    model_args, data_args, args = parse_arguments(KINDS, flags)
    assert args.report_to == [] and args.include_for_metrics == ["loss", "inputs"] and data_args.crop_size == 512
    assert json.loads(model_args.config) == {"gamma_init": 1e-3, "x": -2e3, "y": 5.0, "z": "1e", "v": "1e3"}
    assert args.learning_rate == 1e-4 and args.run_name == "12e45"
    for text in ("{}", "[1, 2]"):
        recipe.write_text(f"crop_size: {text}\n")
        with pytest.raises((ValueError, SystemExit)):
            parse_arguments(KINDS, [str(recipe)])


def test_data_without_a_training_split_is_refused(folder, tmp_path):
    (tmp_path / "only").mkdir()
    folder.rename(tmp_path / "only" / "val")
    (tmp_path / "only" / "val" / "classes.json").rename(tmp_path / "only" / "classes.json")
    model_args, data_args = tiny_arguments(tmp_path / "only")
    with pytest.raises(ValueError, match="--train_split"):
        make_trainer(model_args, data_args, two_steps(tmp_path))


def test_a_folder_trains_from_random_weights(folder, tmp_path):
    trainer, data = make_trainer(*tiny_arguments(folder), two_steps(tmp_path))
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_mean_iou"] <= 1
    trainer.save_model()
    assert trainer.model.config.id2label == {0: "sky", 1: "road", 2: "car"} and data.validation is not None
    assert len(trainer.model.config.palette) == 3
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= saved


def test_a_model_trained_at_native_resolution_goes_on_at_it(folder, tmp_path):
    """Crops of the image as it is; the same windows in training's evaluation, in `evaluate` and in `predict`."""
    args = two_steps(tmp_path)
    model_args, data_args = tiny_arguments(folder)
    with pytest.raises(ValueError, match="scale_long"):
        make_trainer(model_args, replace(data_args, native_resolution=True), args)
    data_args = DataArguments(dataset=str(folder), crop_size=64, native_resolution=True)
    trainer, data = make_trainer(model_args, data_args, args)
    trainer.train()
    measured = trainer.evaluate()
    trainer.save_model()
    out, options = str(tmp_path / "out"), {"output_dir": str(tmp_path / "report"), "update_card": False}
    for asked in (False, True):
        report = measure(EvaluationArguments(model=out, dataset=str(folder), native_resolution=asked, **options))
        assert report["metrics"]["mean_iou"] == measured["eval_mean_iou"] and report["protocol"]["size"] is None
    model, processor = load_model(out)
    image = data.validation[0]["image"]
    expected, _ = segment_in_windows(model, image, processor)
    assert torch.equal(Segmenter(model, processor)([image])[0].ids, expected)


def test_a_backbone_is_trained_beside_the_texts_of_a_clip(folder, tmp_path):
    stages = {"hidden_sizes": [4, 8, 16, 32], "depths": [1, 1, 1, 1]}
    model_args, data_args = tiny_arguments(folder)
    model_args = replace(model_args, backbone_config=json.dumps({"model_type": "convnext", **stages}))
    trainer, _ = make_trainer(model_args, data_args, two_steps(tmp_path, learning_rate=1e-3, warmup_steps=0))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name.split(".")[0] for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert {"backbone", "pool", "prompts"} <= moved and "clip" not in moved
    trainer.save_model()
    loaded = DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert loaded.config.backbone_config.model_type == "convnext" and loaded.config.image_size == 64
    saved = DenseCLIPImageProcessor.from_pretrained(tmp_path / "out")
    assert list(saved.image_mean) == list(loaded.tower.image_mean) == [0.485, 0.456, 0.406]


def test_balanced_classes_weigh_the_rare_more(folder):
    """Median frequency: of three images, each half sky; road is the other half of one and a sixteenth of another."""
    for index, mask in enumerate(sorted((folder / "masks").iterdir())):
        ids = np.full((72, 80), 255, dtype=np.uint8)
        ids[:36] = 0
        if index == 0:
            ids[36:] = 1
        Image.fromarray(ids).save(mask)
    model_args, data_args = tiny_arguments(folder)
    data = load_data(replace(data_args, validation_fraction=0.5))
    seen = [int((sample["mask"] == 1).sum()) for sample in data.train]
    model, _ = model_to_train(replace(model_args, balance_classes=True), data, 64)
    sky = 36 * 80 * len(seen) / (36 * 80 * len(seen) + sum(seen))
    frequencies = [sky, 0.5] if sum(seen) else [sky]
    expected = [float(np.median(frequencies)) / f for f in frequencies] + [1.0] * (3 - len(frequencies))
    assert model.config.class_weights == pytest.approx(expected, abs=1e-3)
    for part in model_to_train(model_args, data, 64):
        part.save_pretrained(folder / "trained")
    trained, _ = model_to_train(ModelArguments(model=str(folder / "trained"), balance_classes=True), data, 64)
    assert trained.config.class_weights == model.config.class_weights


@pytest.fixture
def trained(folder, tmp_path):
    """A model of three classes."""
    model_args, data_args = tiny_arguments(folder)
    for part in model_to_train(model_args, load_data(data_args), 64):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_trained_model_with_another_config_or_a_frozen_one_is_refused(trained, folder, tmp_path):
    data = load_data(DataArguments(dataset=str(folder)))
    with pytest.raises(ValueError, match="keeps its own"):
        model_to_train(ModelArguments(model=trained, config=json.dumps({"gamma_init": 2.0})), data, 64)
    model = DenseCLIPForSemanticSegmentation.from_pretrained(trained)
    model.freeze_classes()
    model.save_pretrained(shutil.copytree(trained, tmp_path / "frozen"))
    with pytest.raises(ValueError, match="frozen"):
        model_to_train(ModelArguments(model=str(tmp_path / "frozen")), data, 64)


def test_a_trained_model_goes_on_in_float32(trained, folder, tmp_path):
    """Half precision would round most steps of the published rate away."""
    half = shutil.copytree(trained, tmp_path / "half")
    DenseCLIPForSemanticSegmentation.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(half)
    assert DenseCLIPForSemanticSegmentation.from_pretrained(half).dtype == torch.bfloat16
    model, _ = model_to_train(ModelArguments(model=str(half)), load_data(DataArguments(str(folder))), 64)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("names", [["sky", "road"], ["sky", "road", "tree"]])
def test_other_classes_in_the_data_than_in_the_model(trained, tmp_path, names):
    root = write_folder(tmp_path / "other", 3)
    for mask in (root / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(mask)) % len(names)).save(mask)
    (root / "classes.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    data = load_data(DataArguments(dataset=str(root)))
    with pytest.raises(ValueError, match="--replace_classes"):
        model_to_train(ModelArguments(model=trained), data, 64)
    model, _ = model_to_train(ModelArguments(model=trained, replace_classes=True), data, 64)
    assert list(model.config.id2label.values()) == names


def test_a_trained_model_takes_over_what_means_no_class(trained, folder, tmp_path):
    for mask in (folder / "masks").iterdir():
        ids = np.array(Image.open(mask))
        Image.fromarray(np.where(ids == 255, 99, ids).astype(np.uint8)).save(mask)
    with pytest.raises(ValueError, match="holds the ids 99"):
        load_data(DataArguments(dataset=str(folder)))
    data = load_data(parse_arguments(KINDS, ["--dataset", str(folder), "--ignore_index", "99"])[1])
    model, _ = model_to_train(ModelArguments(model=trained), data, 64)
    assert model.config.semantic_loss_ignore_index == 99


def test_files_in_a_folder_are_no_stream(folder, tmp_path):
    model_args, data_args = tiny_arguments(folder)
    trainer, data = make_trainer(model_args, replace(data_args, streaming=True), two_steps(tmp_path))
    assert isinstance(trainer.train_dataset, AugmentedDataset) and len(trainer.train_dataset) == len(data.train)


def test_the_data_set_must_be_named_and_what_means_no_class_be_no_class(folder):
    with pytest.raises(ValueError, match="name a data set"):
        load_data(DataArguments())
    names = ",".join(f"class {i}" for i in range(256))
    # with reduced labels class 2 is stored as 3
    for options in ({"ignore_index": 2}, {"ignore_index": 3, "do_reduce_labels": True}, {"classes": names}):
        with pytest.raises(ValueError, match="ignore_index"):
            load_data(DataArguments(dataset=str(folder), **options))


def test_the_look_at_the_data_is_logged(folder, caplog):
    for mask in (folder / "masks").iterdir():
        Image.fromarray(np.zeros((72, 80), dtype=np.uint8)).save(mask)
    with caplog.at_level("INFO"):
        load_data(DataArguments(dataset=str(folder)))
    assert "all 80x72 pixels" in caplog.text and "100.00%" in caplog.text and "No problems." in caplog.text
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "road, car" in warning


def test_data_that_does_not_fit_stops_before_training(folder):
    Image.fromarray(pictures(1)[0]["mask"] + 7).save(folder / "masks" / "3.png")
    with pytest.raises(ValueError, match="3.png .*denseclip check-data"):
        load_data(DataArguments(dataset=str(folder)))
