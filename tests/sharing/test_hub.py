"""What leaves this machine, and that it runs where this package is not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard

from denseclip_hf import DenseCLIPImageProcessor
from denseclip_hf.cli.push import main
from denseclip_hf.example.tiny_clip import make_example_tokenizer
from denseclip_hf.sharing.card import write_model_card
from denseclip_hf.sharing.hub import add_code, files_to_push, push
from helpers.models import tiny_model


SCRIPTS = Path(__file__).parents[2] / "scripts"
HIDE_PACKAGE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "denseclip_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""
USE = """
import sys, torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
folder, inputs, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=trust)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust)
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)).__name__ == "DenseCLIPConfig"
assert processor.size["shortest_edge"] == 64
saved = torch.load(inputs, weights_only=True)
with torch.no_grad():
    assert torch.equal(model(saved["pixel_values"]).logits, saved["logits"])
segment = pipeline("image-segmentation", model=folder, trust_remote_code=trust)
found = segment(Image.new("RGB", (90, 70)))
assert found and found[0]["mask"].size == (90, 70)
assert ("denseclip_hf" in sys.modules) != trust
print("equal")
"""


@pytest.fixture(params=[False, True], ids=["whole", "frozen"])
def directory(request, kind, tmp_path, images):
    """A complete model directory, as training leaves it, and beside it what the model computes."""
    model = tiny_model(kind)
    if request.param:
        model.freeze_classes()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    DenseCLIPImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    make_example_tokenizer(["sky"], vocab_size=520).save_pretrained(folder)
    write_model_card(folder, license="mit")
    with torch.no_grad():
        torch.save({"pixel_values": images, "logits": model(images).logits}, tmp_path / "inputs.pt")
    return folder


def run(code, *arguments, tmp_path):
    caches = {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command,
        env={**os.environ, **caches, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )


@pytest.mark.slow
def test_auto_classes_in_a_fresh_process(directory, tmp_path):
    result = run(f"import denseclip_hf\n{USE}", directory, tmp_path / "inputs.pt", "package", tmp_path=tmp_path)
    assert result.stdout == "equal\n", result.stderr


@pytest.mark.slow
def test_without_code_beside_them_weights_need_the_package(directory, tmp_path):
    result = run(HIDE_PACKAGE + USE, directory, tmp_path / "inputs.pt", "trust", tmp_path=tmp_path)
    assert result.returncode and "denseclip" in result.stderr


@pytest.mark.slow
def test_remote_code_in_a_fresh_process_without_the_package(directory, tmp_path):
    before = json.loads((directory / "config.json").read_text())
    add_code(directory)
    after = json.loads((directory / "config.json").read_text())
    assert after.pop("auto_map").keys() == {"AutoConfig", "AutoModelForSemanticSegmentation"} and after == before
    result = run(HIDE_PACKAGE + USE, directory, tmp_path / "inputs.pt", "trust", tmp_path=tmp_path)
    assert result.stdout == "equal\n", result.stderr


class FakeHub:
    """Keeps what it is sent."""

    def __init__(self, private=None):
        self.private, self.repo, self.files = private, None, {}

    def create_repo(self, repo_id, repo_type, private, exist_ok):
        self.repo = (repo_id, repo_type, exist_ok)
        self.private = private if self.private is None else self.private

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo_id, operations, commit_message):
        assert all(isinstance(operation, CommitOperationAdd) for operation in operations)
        self.files = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}
        return f"https://hub/{repo_id}/commit/1"


@pytest.mark.slow
def test_a_push_from_beginning_to_end(directory, tmp_path, capsys):
    """What arrives at the Hub is complete: downloaded, it runs without the package."""
    (directory / "checkpoint-10").mkdir()
    (directory / "checkpoint-10" / "optimizer.pt").write_text("state")
    (directory / "training_args.bin").write_text("pickle")
    (directory / "notes.txt").write_text("mine")
    before = {f.name: f.read_bytes() for f in directory.iterdir() if f.is_file()}
    hub = FakeHub()
    main([str(directory), "me/streets", "--push"], api=hub)
    assert hub.repo == ("me/streets", "model", True) and hub.private is True
    assert not {"training_args.bin", "notes.txt"} & hub.files.keys() and not any("/" in name for name in hub.files)
    assert {"config.json", "model.safetensors", "README.md", "modeling_denseclip.py"} <= hub.files.keys()
    assert before == {f.name: f.read_bytes() for f in directory.iterdir() if f.is_file()}
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-segmentation"
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in hub.files.items():
        (downloaded / name).write_bytes(content)
    result = run(HIDE_PACKAGE + USE, downloaded, tmp_path / "inputs.pt", "trust", tmp_path=tmp_path)
    assert result.stdout == "equal\n", result.stderr


def test_a_dry_run_is_the_default_and_shows_every_file(directory, capsys):
    class NoHub:
        def __getattr__(self, name):
            raise AssertionError(f"the Hub was asked to {name}")

    main([str(directory), "me/streets"], api=NoHub())
    shown = capsys.readouterr().out
    weights = (directory / "model.safetensors").stat().st_size
    assert f"{weights:,}  model.safetensors" in shown and "modeling_denseclip.py" in shown
    assert "Nothing was uploaded" in shown and "(private)" in shown


@pytest.fixture
def small(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path / "model")
    DenseCLIPImageProcessor().save_pretrained(tmp_path / "model")
    write_model_card(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "OPTIMIZER.PT",
        "Checkpoint-3/optimizer.pt",
        "training_args.bin",
        "x.pth",
        ".env",
        "secrets.json",
        # which one pattern alone refuses
        "Checkpoint-3/model.safetensors",
        "optimizer.safetensors",
        "scheduler.json",
        "rng_state.json",
        "scaler.json",
        "trainer_state.json",
        "x.pt",
        "x.bin",
        "x.pkl",
        "x.pickle",
        "x.ckpt",
        ".netrc",
        "x.env",
        "server.pem",
        "id.key",
        "credentials.json",
    ],
)
def test_training_state_is_refused(small, name):
    (small / name).parent.mkdir(exist_ok=True)
    (small / name).write_text("")
    with pytest.raises(ValueError, match="training state or a pickle"), files_to_push(small, include=[name]):
        pass
    with files_to_push(small, code=False) as (files, left):
        assert name not in files and Path(name).parts[0] in left


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname"])
def test_files_outside_are_refused(small, name):
    (small.parent / "secret.txt").write_text("")
    with pytest.raises(ValueError, match="outside the model directory"), files_to_push(small, include=[name]):
        pass


def show(small, name):
    """Put a picture into the card."""
    (small / "README.md").write_text((small / "README.md").read_text() + f"\n![Example]({name})\n")


def test_links_that_lead_outside_are_refused(small):
    (small.parent / "photo.png").write_text("")
    (small / "picture.png").symlink_to(small.parent / "photo.png")
    show(small, "picture.png")
    with pytest.raises(ValueError, match="outside the model directory"), files_to_push(small):
        pass


def test_links_to_what_is_refused_are_refused(small):
    (small / "Optimizer.pt").write_text("")
    (small / "picture.png").symlink_to(small / "Optimizer.pt")
    show(small, "picture.png")
    with pytest.raises(ValueError, match="picture.png is training state or a pickle"), files_to_push(small):
        pass


@pytest.mark.parametrize("code", [True, False])
def test_code_weights_and_pictures_that_nothing_needs_stay_here(small, code):
    stale = ("secrets.py", "modeling_old.py", "private.jpg", "model-00001-of-00002.safetensors", "tokenizer_mine.json")
    for name in (*stale, "shown.jpg", "tag.png"):
        (small / name).write_text("")
    (small / "README.md").write_text((small / "README.md").read_text() + '\n<img width="5" src="tag.png">\n')
    show(small, "./shown.jpg")
    with files_to_push(small, code=code) as (files, left):
        assert set(stale) <= set(left) and {"shown.jpg", "tag.png"} <= files.keys()
        assert ("modeling_denseclip.py" in files) == code


def test_shards_are_those_of_the_index(small):
    (small / "model.safetensors").unlink()
    tiny_model().save_pretrained(small, max_shard_size="20KB")
    shards = {file.name for file in small.glob("model-*.safetensors")}
    (small / "model-00001-of-00099.safetensors").write_text("")
    with files_to_push(small, code=False) as (files, left):
        assert shards and shards | {"model.safetensors.index.json"} <= files.keys()
        assert "model-00001-of-00099.safetensors" in left
    (small / sorted(shards)[0]).unlink()
    with pytest.raises(ValueError, match="there is no file model-00001"), files_to_push(small):
        pass


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_refused(small, content):
    (small / "model.safetensors").unlink()
    (small / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json is damaged"), files_to_push(small):
        pass


def test_included_names_are_those_in_the_repository(small):
    (small / "sub").mkdir()
    (small / "my.json").write_text("{}")
    (small / "sub" / "notes.txt").write_text("")
    include = ["sub/../my.json", "./sub//notes.txt", str(small / "my.json")]
    with files_to_push(small, include=include) as (files, _):
        assert {"my.json", "sub/notes.txt"} <= files.keys()
        assert not [name for name in files if ".." in name or name.startswith("/")]


def test_without_code_no_config_asks_for_it(small):
    add_code(small)
    with files_to_push(small, code=False) as (files, _):
        assert not [name for name in files if name.endswith(".py")]
        assert all("auto_map" not in files[name].read_text() for name in ("config.json", "preprocessor_config.json"))
    assert "auto_map" in (small / "config.json").read_text()


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors"])
def test_incomplete_directories_are_refused(small, name, capsys):
    (small / name).unlink()
    with pytest.raises(SystemExit, match="^1$"):
        main([str(small), "me/x", "--push"], api=None)
    assert "no complete model directory" in capsys.readouterr().err


def test_a_public_repository_is_not_pushed_to_by_accident(small):
    hub = FakeHub(private=False)
    with files_to_push(small, code=False) as (files, _), pytest.raises(ValueError, match="exists and is public"):
        push(files, "me/x", api=hub)
    assert not hub.files
    with files_to_push(small, code=False, include=[]) as (files, _):
        push(files, "me/x", private=False, api=hub)
    assert hub.files.keys() == files.keys()


def test_a_private_repository_is_not_taken_for_a_public_one(small, caplog):
    hub = FakeHub(private=True)
    with files_to_push(small, code=False) as (files, _):
        push(files, "me/x", private=False, api=hub)
    assert hub.files and "me/x exists and is private, and stays so" in caplog.text


@pytest.mark.parametrize("call", ["create_repo", "create_commit"])
def test_without_network_a_push_ends_in_one_sentence(small, capsys, monkeypatch, call):
    class Unreachable(Exception):
        """As the HTTP library's: of no family that anybody would list."""

    def fail(*_, **__):
        raise Unreachable("[Errno -2] Name or service not known\n\nand so on")

    hub = FakeHub()
    monkeypatch.setattr(hub, call, fail)
    with pytest.raises(SystemExit, match="^1$"):
        main([str(small), "me/x", "--push", "--no_code"], api=hub)
    said = capsys.readouterr().err
    assert said.startswith("error: pushing to me/x failed ([Errno -2] Name or service not known): look at")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--push"]])
def test_a_licence_for_the_push_leaves_the_directory_alone(small, options):
    card = small / "README.md"
    card.write_text(card.read_text() + "\nA sentence of my own.\n")
    before = {file.name: file.read_bytes() for file in small.iterdir()}
    hub = FakeHub()
    main([str(small), "me/x", "--license", "apache-2.0", *options], api=hub)
    assert before == {file.name: file.read_bytes() for file in small.iterdir()}
    if options:
        pushed = hub.files["README.md"].decode()
        assert "license: apache-2.0" in pushed and "A sentence of my own." in pushed
        assert 'model="me/x"' in pushed and "PATH_OR_REPOSITORY" not in pushed


def test_the_license_goes_into_the_card(small):
    hub = FakeHub()
    main([str(small), "me/x", "--push", "--public", "--license", "cc-by-4.0", "--no_code"], api=hub)
    assert hub.private is False and "license: cc-by-4.0" in hub.files["README.md"].decode()
    assert "modeling_denseclip.py" not in hub.files
