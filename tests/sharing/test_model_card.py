"""The model card: complete, only measured numbers, and never over what a person wrote."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from denseclip_hf import DenseCLIPImageProcessor
from denseclip_hf.example.tiny_clip import make_example_tokenizer
from denseclip_hf.sharing.card import (
    MAX_BYTES,
    card_text,
    card_to_push,
    update_results,
    write_frozen_card,
    write_model_card,
)
from denseclip_hf.sharing.card_sections import environment, shown_name, shown_pictures
from denseclip_hf.sharing.hub import add_code
from helpers.limits import result_or_sentence
from helpers.models import tiny_model
from helpers.results import RESULTS


@pytest.fixture
def directory(tmp_path, kind):
    model = tiny_model(kind, palette=[[0, 1, 2], [255, 0, 0], [9, 9, 9]])
    model.save_pretrained(tmp_path / "my-model")
    return tmp_path / "my-model"


def test_a_new_card_is_complete_and_has_no_numbers(directory):
    path = write_model_card(directory, base_model="openai/clip-vit-base-patch16", dataset="someone/streets")
    card = ModelCard(path.read_text())
    front = card.data.to_dict()
    assert front == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "base_model": "openai/clip-vit-base-patch16",
        "datasets": ["someone/streets"],
        "tags": ["denseclip", "clip", "semantic-segmentation", "image-segmentation", "vision"],
    }
    for heading in ("# my-model", "## How to use", "## Classes", "## Limits and biases", "## Citation"):
        assert re.search(f"^{heading}$", card.text, re.MULTILINE)
    assert "| 1 | class 1 | `#ff0000` (255, 0, 0) |" in card.text
    assert "mIoU" not in path.read_text() and "Rao" in card.text


def test_writing_again_keeps_what_a_person_edited(directory):
    path = write_model_card(directory, training={"Steps": 3})
    text = path.read_text().replace("license: unknown", "license: cc-by-4.0\nlanguage: en")
    text = text.replace("## Citation", "## Please cite").replace("# my-model", "# Streets")
    limits = re.search(r"<!-- generated: limits \w+ -->.*?<!-- end of generated: limits -->\n", text, re.DOTALL)
    text = text.replace(limits[0], "## My own limits\n\nIt fails at night.\n") + "\nA last word.\n"
    path.write_text(text)
    write_model_card(directory, training={"Steps": 80_000}, results=RESULTS)
    again = path.read_text()
    card = ModelCard(again)
    assert card.data.license == "cc-by-4.0" and card.data.language == "en"
    assert "# Streets" in again and "It fails at night." in again and "A last word." in again
    assert "## Please cite" in again and "## Citation" not in again and "generated: limits" not in again
    assert "| Steps | 80000 |" in again and "| Steps | 3 |" not in again and "## Results" in again
    before = again
    assert write_model_card(directory).read_text() == before  # nothing new is known: nothing changes


def test_what_it_started_from_stays_known(directory):
    write_model_card(directory, base_model="openai/x", source="a friend")
    text = write_model_card(directory, license="mit").read_text()
    assert "| Started from | `openai/x` |" in text and "| Weights | a friend |" in text and "license: mit" in text


def test_a_readme_without_front_matter_is_kept(directory):
    (directory / "README.md").write_text("# Mine\n\nAll mine.\n")
    card = ModelCard(update_results(directory, RESULTS).read_text())
    assert card.text.lstrip().startswith("# Mine\n\nAll mine.\n") and "| 43.51 |" in card.text
    assert card.data.pipeline_tag == "image-segmentation" and "## How to use" not in card.text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("someone/streets", "someone/streets"),
        ("/data/of/mine/streets", "streets"),
        ("/data/of/streets/data", "streets data"),
        ("scene_parse_150", "scene_parse_150"),
    ],
)
def test_names_that_others_are_told(name, shown):
    assert shown_name(name) == shown


def test_local_paths_stay_out_of_the_front_matter(directory, tmp_path):
    path = write_model_card(directory, base_model=str(tmp_path), dataset="data/streets/val", training={"a|b": "c|d"})
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert "base_model" not in front and "datasets" not in front
    assert "c\\|d" in path.read_text()


def test_of_local_paths_only_the_last_part_is_told(directory, tmp_path):
    for name in ("clip", "streets"):
        (tmp_path / name).mkdir()
    results = {**RESULTS, "dataset": str(tmp_path / "streets")}
    path = write_model_card(
        directory, base_model=str(tmp_path / "clip"), dataset=str(tmp_path / "streets"), results=results
    )
    text = path.read_text()
    assert str(tmp_path) not in text and "| streets | val |" in text
    assert "| Started from | `clip` (a local folder) |" in text and "| Data | `streets` (a local folder) |" in text
    dataset = ModelCard(text).data.to_dict()["model-index"][0]["results"][0]["dataset"]
    assert (dataset["name"], dataset["type"]) == ("streets", "streets")


def test_environment_names_versions_and_hardware():
    found = environment()
    assert "torch" in found["Versions"] and found["Hardware"]


def _set_up_for_snippets(directory):
    """What a person has who runs a card's snippets: the whole model with code beside it, and a photo."""
    DenseCLIPImageProcessor(size={"shortest_edge": 64}).save_pretrained(directory)
    make_example_tokenizer(["sky"], vocab_size=520).save_pretrained(directory)
    add_code(directory)
    Image.new("RGB", (90, 70), (200, 30, 30)).save(directory.parent / "photo.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit"])  # the same for either
def test_snippets_run_and_ask_nothing(directory):
    _set_up_for_snippets(directory)
    write_model_card(directory)
    snippets = re.findall(r"```python\n(.*?)```", card_to_push(directory, str(directory)), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        command = [sys.executable, "-c", snippet]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=directory.parent, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
        assert re.search(r"class \d", done.stdout) and "custom code" not in done.stdout + done.stderr


# What a person did to a card


def sections_of(text):
    return dict(re.findall(r"<!-- generated: (\w+) \w+ -->\n(.*?)<!-- end of generated: \1 -->", text, re.DOTALL))


def test_text_inside_a_section_is_kept(directory, caplog):
    path = update_results(directory, RESULTS)
    path.write_text(path.read_text().replace("| 43.51 |", "| 43.51 (at night 20) |"))
    text = update_results(directory, {**RESULTS, "metrics": {"mean_iou": 0.5}}).read_text()
    assert "43.51 (at night 20)" in text and "50.00 |" not in sections_of(text)["results"].split("<details>")[0]
    assert "'results' of the card was changed by hand and stays as it is" in caplog.text
    assert sections_of(write_model_card(directory, training={"Steps": 3}).read_text())["training"].count(
        "| Steps | 3 |"
    )


def test_a_section_taken_over_or_deleted_does_not_come_back(directory):
    path = update_results(directory, RESULTS)
    text = re.sub(r"<!-- (end of )?generated: results.*?-->\n", "", path.read_text())  # taken over: no markers
    text = re.sub(r"<!-- generated: limits.*?<!-- end of generated: limits -->\n", "", text, flags=re.DOTALL)
    path.write_text(text)
    text = write_model_card(directory, results=RESULTS, training={"Steps": 3}).read_text()
    assert text.count("## Results") == 1 and "## Limits" not in text and "| Steps | 3 |" in text


def test_all_markers_taken_out_leave_one_section_of_results(directory):
    path = update_results(directory, RESULTS)
    path.write_text(re.sub(r"<!-- .*? -->\n", "", path.read_text()))
    assert update_results(directory, RESULTS).read_text().count("## Results") == 1


def test_front_matter_changes_survive(directory):
    path = write_model_card(directory, base_model="openai/x", dataset="someone/streets")
    front, body = path.read_text().split("---", 2)[1:]
    front = yaml.safe_load(front)
    del front["base_model"], front["library_name"]
    path.write_text(f"---\n{yaml.safe_dump({**front, 'tags': [], 'language': 'en'})}---{body}")
    write_model_card(directory, base_model="openai/x", dataset="another/set", results=RESULTS)
    again = yaml.safe_load(path.read_text().split("---", 2)[1])
    assert again.pop("model-index") and again == {
        "license": "unknown", "pipeline_tag": "image-segmentation", "tags": [], "datasets": ["someone/streets"],
        "language": "en",
    }  # fmt: skip


def test_what_is_known_later_goes_into_the_front_matter(directory):
    write_model_card(directory)
    path = write_model_card(directory, base_model="openai/x")
    assert ModelCard(path.read_text()).data.base_model == "openai/x"


def test_comments_in_the_front_matter_stay_while_nothing_new_is_known(directory):
    path = write_model_card(directory)
    path.write_text(path.read_text().replace("license: unknown", "license: mit  # asked our lawyers"))
    assert "asked our lawyers" in write_model_card(directory, training={"Steps": 3}).read_text()


def test_a_byte_order_mark_makes_no_second_front_matter(directory):
    path = write_model_card(directory)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    text = write_model_card(directory, license="mit").read_text(encoding="utf-8")
    assert (
        text.startswith("---\n") and text.count("library_name") == 2 and "license: mit" in text
    )  # once in the record


INDEX = b"""---
model-index:
- name: x
  results:
  - task: {type: image-segmentation}
    dataset: {type: a, name: %s}
    metrics: [{type: mean_iou, value: 0.5, args: %s}]
---
"""
ODD_ARGUMENTS = (
    b"{inference_mode: slide, crop_size: 5}", b"{inference_mode: slide, stride: [1, 2, 3]}", b"[1, 2]", b"{scales: 3}",
    b"{scales: [a]}",
)  # fmt: skip
ODD_INDEX = "`model-index` of .*README.md is not as the Hub defines it"
ODD_DATA = (b"2017", b"a, split: 5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\nlicense: [mit\n---\n# Mine\n", r"front matter of .*README.md is no YAML .line 3.: correct it"),
        (b"---\n- a\n---\n", "must be YAML of keys and values"),
        (b"---\nmodel-index: 5\n---\n", "`model-index` of .*README.md is not as the Hub defines it"),
        (b"---\nmodel-index:\n- name: x\n---\n", "`model-index` of .*README.md is not as the Hub defines it"),
        *(
            (INDEX % (b"a", args), "`model-index` of .*README.md is not as the Hub defines it")
            for args in ODD_ARGUMENTS
        ),
        *((INDEX % (data, b"{}"), "`model-index` of .*README.md is not as the Hub defines it") for data in ODD_DATA),
        (b"---\nlicense: !!bool maybe\n---\n", "front matter of .*README.md is no YAML .*its tag"),
        (b"\xff\xfe", "README.md is no text in UTF-8"),
    ],
)
def test_a_card_that_can_not_be_read_is_one_sentence_and_stays(directory, content, message):
    (directory / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        update_results(directory, RESULTS)
    assert "\n" not in str(caught.value) and (directory / "README.md").read_bytes() == content


def test_a_full_disk_leaves_the_card_as_it_was(directory, monkeypatch):
    path = write_model_card(directory)
    before = path.read_text()

    def fail(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        update_results(directory, RESULTS)
    assert path.read_text() == before and not list(directory.glob(".README*"))


# Cards that go elsewhere


def test_a_card_to_push_names_its_repository_and_licence_alone(directory):
    path = write_model_card(directory)
    path.write_text(path.read_text().replace("# my-model\n", "# my-model\n\nMade by hand.\n"))
    before = path.read_text()
    text = card_to_push(directory, "me/streets", "apache-2.0")
    assert path.read_text() == before
    assert text.count('"me/streets"') == 3 and "PATH_OR_REPOSITORY" not in text
    usage = re.compile(r"<!-- generated: usage \w+ -->")
    expected = before.replace("license: unknown", "license: apache-2.0").replace("PATH_OR_REPOSITORY", "me/streets")
    assert usage.sub("", text) == usage.sub("", expected)
    path.write_text(text)  # downloaded, it is still as it was generated
    assert write_model_card(directory).read_text() == card_to_push(directory, "me/streets").replace(
        "me/streets", "PATH_OR_REPOSITORY"
    ).replace(usage.search(text)[0], usage.search(before)[0])


def test_a_frozen_models_card_is_that_of_its_model(directory, tmp_path):
    card = write_model_card(
        directory,
        license="mit",
        base_model="openai/x",
        dataset="someone/streets",
        results=RESULTS,
        training={"Steps": 3},
    )
    frozen = tmp_path / "frozen"
    shutil.copytree(directory, frozen, ignore=shutil.ignore_patterns("README.md"))
    text = write_frozen_card(frozen, card, "`me/streets`").read_text()
    assert ModelCard(text).data.to_dict() == ModelCard(card.read_text()).data.to_dict()
    assert "| Steps | 3 |" in text and "| 43.51 |" in text
    note = "This is `me/streets` with its classes frozen"
    assert text.index("end of generated: about") < text.index(note) < text.index("## How to use")
    bare = write_frozen_card(frozen, None, "`me/streets`", "Streets").read_text()
    assert note in bare and bare.count("## For inference alone") == 1


def test_many_aliases_in_a_model_card_are_refused(directory):
    lines = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    (directory / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    with pytest.raises(ValueError, match="front matter of .*README.md is no YAML .with what its aliases"):
        update_results(directory, RESULTS)


def test_pictures_of_a_card_are_found():
    card = "![a](a.png) ![](b.png)![a [b] c](c/d.png \"t\") [![e](e.png)](https://x.y) <img width=3\n src='f.png'> "
    assert shown_pictures(card + "![x](https://x.y/z.png) ![y](/etc/z.png) ![z](../z.png) [no](g.png)") == [
        "a.png", "b.png", "c/d.png", "e.png", "f.png"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line", ["<!-- generated: a -->\n", "<!-- generated front matter: ", "---\n", "x", "<img ", "![", "![[x]"]
)
def test_long_model_cards_end_in_a_result_or_a_sentence(directory, line):
    for size in (MAX_BYTES, MAX_BYTES + len(line)):
        (directory / "README.md").write_text(line * (size // len(line)))
        with result_or_sentence():
            shown_pictures(card_text(directory / "README.md"))
        with result_or_sentence():
            update_results(directory, RESULTS)
