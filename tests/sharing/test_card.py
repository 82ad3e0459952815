"""The model card: complete, only measured numbers, no local paths, and never over what a person wrote."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from denseclip_hf import DenseCLIPImageProcessor
from denseclip_hf.sharing import add_code, add_results, folder_to_push, write_card
from denseclip_hf.sharing.card import plain, shown_name
from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.models import tiny_model
from helpers.results import RESULTS


@pytest.fixture
def directory(tmp_path):
    tiny_model(palette=[[0, 1, 2], [255, 0, 0], [9, 9, 9]]).save_pretrained(tmp_path / "my-model")
    return tmp_path / "my-model"


def measured(path):
    return ModelCard(path.read_text()).data.eval_results


def test_a_new_card_is_complete_and_has_no_numbers(directory):
    path = write_card(directory, base_model="openai/clip-vit-base-patch16", dataset="someone/streets")
    card = ModelCard(path.read_text())
    assert card.data.to_dict() == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "base_model": "openai/clip-vit-base-patch16",
        "datasets": ["someone/streets"],
        "tags": ["denseclip", "clip", "semantic-segmentation", "image-segmentation", "vision"],
    }
    for heading in ("# my-model", "## How to use", "## Training", "## Classes", "## Limits and biases", "## Citation"):
        assert re.search(f"^{heading}$", card.text, re.MULTILINE)
    assert "| 1 | class 1 | `#ff0000` |" in card.text
    assert "mIoU" not in path.read_text() and "Rao" in card.text


def test_a_card_names_backbone_and_clip(directory):
    bases = ["someone/swin", "openai/clip-vit-base-patch16"]
    card = ModelCard(write_card(directory, base_model=bases).read_text())
    assert card.data.base_model == bases
    assert "| Started from | someone/swin and openai/clip-vit-base-patch16 |" in card.text


def test_a_card_shows_recipe_results_and_image(directory):
    known = {"license": "mit", "training": {"Steps": 3}, "source": "a friend", "name": "Streets", "image": "a.png"}
    card = ModelCard(write_card(directory, results=RESULTS, **known).read_text())
    for text in ("# Streets", "| Steps | 3 |", "| Weights | a friend |", "![Prediction](a.png)", "| 43.51 |"):
        assert text in card.text
    assert card.data.license == "mit" and card.data.model_name == "Streets"
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {"mIoU": 0.4351, "aAcc": 0.8}
    assert "windows of 64 x 64" in card.text and "7 images" in card.text and "| class 1 | –" not in card.text


def test_another_measurement_leaves_what_a_person_wrote(directory):
    path = write_card(directory, results=RESULTS)
    text = path.read_text().replace("license: unknown", "license: cc-by-4.0\nlanguage: en")
    text = text.replace("## Citation", "## My own limits\n\nIt fails at night.\n\n## Please cite")
    path.write_text(text.replace("# my-model", "# Streets"))
    before = path.read_text()
    add_results(directory, {**RESULTS, "metrics": {"mean_iou": 0.5}})
    after = path.read_text()
    assert "50.00" in after and "43.51" not in after
    block = re.compile("<!-- results.*end of results -->", re.DOTALL)
    assert block.sub("", after).split("---", 2)[2] == block.sub("", before).split("---", 2)[2]
    card = ModelCard(after)
    assert card.data.license == "cc-by-4.0" and card.data.language == "en"
    assert write_card(directory).read_text() == after  # a card that is there stays


def test_other_data_splits_and_protocols_stay_beside_a_new_measurement(directory):
    path = add_results(directory, RESULTS)
    add_results(directory, {**RESULTS, "split": "test"})
    add_results(directory, {**RESULTS, "protocol": {**RESULTS["protocol"], "flip": True}})
    assert len(measured(path)) == 6
    add_results(directory, {**RESULTS, "metrics": {"mean_iou": 0.5, "overall_accuracy": 0.9}})
    values = sorted(result.metric_value for result in measured(path) if result.metric_type == "mean_iou")
    assert values == [0.4351, 0.4351, 0.5]
    text = path.read_text()
    assert text.count("## Results") == 1 and "flips" in text and "| example | test |" in text


@pytest.mark.parametrize(
    "text", ["# Mine\n\n* `one`: @two\n\n---\n\nAll mine.\n", "---\nlicense: mit\n---\n\n# Mine\n"]
)
def test_results_go_to_the_end_of_a_readme_without_their_place(directory, text):
    (directory / "README.md").write_text(text)
    path = add_results(directory, RESULTS)
    assert ModelCard(path.read_text()).text.strip().startswith("# Mine")
    assert path.read_text().index("# Mine") < path.read_text().index("| 43.51 |")
    assert add_results(directory, RESULTS).read_text().count("## Results") == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("someone/streets", "someone/streets"),
        ("/data/of/mine/streets", "streets"),
        ("/home/alice/data", "data"),
        (Path.home(), "a local folder"),
        ("/", "a local folder"),
    ],
)
def test_of_local_paths_only_the_last_part_is_shown(name, shown):
    assert shown_name(name) == shown


def test_local_paths_stay_out_of_the_card(directory, tmp_path):
    for name in ("clip", "streets"):
        (tmp_path / name).mkdir()
    where = str(tmp_path / "streets")
    path = write_card(
        directory, base_model=str(tmp_path / "clip"), dataset=where, results={**RESULTS, "dataset": where}
    )
    text = path.read_text()
    assert str(tmp_path) not in text and tmp_path.name not in text
    assert "| Started from | clip |" in text and "| Data | streets |" in text and "| streets | val |" in text
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front and "datasets" not in front
    dataset = front["model-index"][0]["results"][0]["dataset"]
    assert (dataset["name"], dataset["type"]) == ("streets", "streets")


ODD = "a|b\n# <script>x</script> ![i](http://x.y/z.png) `c` \u202eevil\u2066 \x1b[31m"


def test_names_show_as_text_whatever_they_hold(tmp_path):
    names = {0: ODD, 1: "road_sign", 2: "café"}
    tiny_model(id2label=names).save_pretrained(tmp_path / "model")
    scores = {name: {"iou": 0.5} for name in names.values()}
    results = {**RESULTS, "dataset": ODD, "split": ODD, "per_category": scores}
    text = write_card(tmp_path / "model", name=ODD, training={ODD: ODD}, source=ODD, results=results).read_text()
    for markup in ("<script", r"(?<!\\)\]\(http", r"(?<!\\)`c", "\n# <"):
        assert not re.search(markup, ModelCard(text).text)
    assert not any(character in text for character in "\u202e\u2066\x1b")
    assert text.count("café") == 2 and plain("road_sign") in text
    table = [line for line in text.splitlines() if line.startswith("| 0 |")]
    assert len(table) == 1 and len(re.findall(r"(?<!\\)\|", table[0])) == 3


def test_numbers_of_numpy_are_numbers_and_missing_ones_are_left_out(directory):
    metrics = {"mean_iou": np.float32(0.25), "overall_accuracy": math.nan, "mean_accuracy": None}
    results = {**RESULTS, "metrics": metrics, "per_category": {"class 0": {"iou": np.float32(0.75)}}}
    path = add_results(directory, results)
    assert [result.metric_value for result in measured(path)] == [0.25]
    assert "| class 0 | 75.00 |" in path.read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *[({"metrics": {"mean_iou": value}}, "mean_iou") for value in (43.5, -0.1, "0.4", True)],
        ({"per_category": {"class 0": {"iou": 43.5}}}, "class 0"),
    ],
)
def test_results_that_nobody_could_read_are_refused(directory, changes, named):
    with pytest.raises(ValueError, match=named):
        add_results(directory, RESULTS | changes)
    assert not (directory / "README.md").exists()


MANY = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))])
INDEX = "model-index:\n- name: x\n  results:\n  - task: {type: a}\n    dataset: {type: a, name: a}\n    metrics: "


@pytest.mark.parametrize(
    "front",
    [
        "license: [mit",
        "- a",
        "model-index: 5",
        "model-index:\n- name: x",
        INDEX + "[{type: a, value: 0.5, args: {inference_mode: slide, crop_size: 5}}]",
        "license: !!python/object/apply:os.system [x]",
        MANY,
    ],
)
def test_a_card_that_cannot_be_read_is_one_sentence_and_stays(directory, front):
    content = f"---\n{front}\n---\n# Mine\n"
    (directory / "README.md").write_text(content)
    with pytest.raises(ValueError, match="README.md") as caught:
        add_results(directory, RESULTS)
    assert "\n" not in str(caught.value) and (directory / "README.md").read_text() == content


@pytest.mark.slow
def test_snippets_run_and_ask_nothing(directory):
    """As a person runs them who has the whole model with code beside it, and a photo."""
    DenseCLIPImageProcessor(size={"shortest_edge": 64}).save_pretrained(directory)
    learn_tokenizer(["sky"], vocab_size=520).save_pretrained(directory)
    write_card(directory)
    add_code(directory)
    Image.new("RGB", (90, 70), (200, 30, 30)).save(directory.parent / "photo.jpg")
    with folder_to_push(directory, repo_id="model/here") as folder:
        snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    command = [sys.executable, "-c", "\nprint('and')\n".join(snippets).replace("model/here", str(directory))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=directory.parent, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert all(re.search(r"class \d", said) for said in done.stdout.split("\nand\n"))
    assert "custom code" not in done.stdout + done.stderr
