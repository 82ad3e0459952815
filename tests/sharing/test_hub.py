"""What leaves this machine, and that it runs where this package is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from denseclip_hf import DenseCLIPForSemanticSegmentation, DenseCLIPImageProcessor
from denseclip_hf.cli.push import main
from denseclip_hf.example import example_clip_model
from denseclip_hf.sharing import add_code, folder_to_push, push, write_card
from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.models import tiny_model
from helpers.results import RESULTS


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
from pathlib import Path
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor, pipeline
)
trust = sys.argv[1] == "trust"
for folder in sys.argv[2:]:
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=trust)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust)
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)).__name__ == "DenseCLIPConfig"
    assert processor.size["shortest_edge"] == 64
    if (Path(folder) / "tokenizer.json").exists():
        assert AutoProcessor.from_pretrained(folder, trust_remote_code=trust).image_processor.size == processor.size
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)).__name__ == "DenseCLIPModel"
    saved = torch.load(f"{folder}.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(saved["pixel_values"]).logits, saved["logits"])
    segment = pipeline("image-segmentation", model=folder, trust_remote_code=trust)
    found = segment(Image.new("RGB", (90, 70)))
    assert found and found[0]["mask"].size == (90, 70)
    print("equal")
assert ("denseclip_hf" in sys.modules) != trust
"""


@pytest.fixture
def directories(tmp_path, images):
    """Complete model directories, as training leaves them, one frozen; and beside each what its model computes."""
    folders = []
    for kind, frozen in (("vit", False), ("resnet", True)):
        model = tiny_model(kind)
        if frozen:
            model.freeze_classes()
        folders.append(tmp_path / kind)
        for part in (model, DenseCLIPImageProcessor(size={"shortest_edge": 64}), learn_tokenizer(["sky"], 520)):
            part.save_pretrained(folders[-1])
        write_card(folders[-1], license="mit")
        with torch.no_grad():
            torch.save({"pixel_values": images, "logits": model(images).logits}, f"{folders[-1]}.pt")
    return folders


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
def test_auto_classes_in_a_fresh_process(directories, tmp_path):
    result = run(f"import denseclip_hf\n{USE}", "package", *directories, tmp_path=tmp_path)
    assert result.stdout == "equal\nequal\n", result.stderr


class FakeHub:
    """Keeps what it is sent."""

    def __init__(self, private=None):
        self.private, self.repo, self.files = private, None, {}

    def create_repo(self, repo_id, private, exist_ok):
        self.repo = (repo_id, exist_ok)
        self.private = private if self.private is None else self.private

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.files = contents(folder_path)
        return f"https://hub/{repo_id}/commit/1"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_push_from_beginning_to_end(directories, tmp_path):
    """What arrives at the Hub is complete: downloaded, it runs without the package."""
    for directory in directories:
        (directory / "checkpoint-10").mkdir()
        for name in ("checkpoint-10/optimizer.pt", "training_args.bin", "notes.txt", "modeling_old.py", "private.jpg"):
            (directory / name).write_text("mine")
        before = contents(directory)
        hub = FakeHub()
        main([str(directory), "me/streets", "--push"], api=hub)
        assert hub.repo == ("me/streets", True) and hub.private is True
        stays = {"training_args.bin", "notes.txt", "modeling_old.py", "private.jpg"}
        assert not stays & hub.files.keys() and not any("/" in name for name in hub.files)
        assert {"config.json", "model.safetensors", "README.md", "modeling_denseclip.py"} <= hub.files.keys()
        assert before == contents(directory)
        card = ModelCard(hub.files["README.md"].decode())
        assert card.data.license == "mit" and 'model="me/streets"' in card.text
        downloaded = tmp_path / "downloaded" / directory.name
        downloaded.mkdir(parents=True)
        for name, content in hub.files.items():
            (downloaded / name).write_bytes(content)
        shutil.copy(f"{directory}.pt", f"{downloaded}.pt")
    downloads = [tmp_path / "downloaded" / directory.name for directory in directories]
    result = run(HIDE_PACKAGE + USE, "trust", *downloads, directories[0], tmp_path=tmp_path)
    assert result.stdout == "equal\nequal\n", result.stderr
    assert result.returncode and "denseclip" in result.stderr  # the last has no code of a push


def test_without_push_nothing_is_uploaded_and_every_file_is_shown(small, capsys):
    class NoHub:
        def __getattr__(self, name):
            raise AssertionError(f"the Hub was asked to {name}")

    (small / "notes.txt").write_text("mine")
    main([str(small), "me/streets"], api=NoHub())
    shown = capsys.readouterr().out
    weights = (small / "model.safetensors").stat().st_size
    assert f"{weights:,}  model.safetensors" in shown and "modeling_denseclip.py" in shown
    assert "not among them: notes.txt" in shown and "Nothing was uploaded" in shown and "(private)" in shown


@pytest.fixture
def small(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    DenseCLIPImageProcessor().save_pretrained(tmp_path / "model")
    write_card(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("code", [True, False])
def test_no_file_of_a_push_names_a_path_of_this_machine(code, tmp_path, monkeypatch):
    """A CLIP, data and a run that lie in a person's home, under folders of telling names."""
    home = tmp_path / "home" / "alice_secret"
    clip, data, run_dir = (home / "nobodys_business" / name for name in ("clip", "streets", "run"))
    for folder in (clip, data):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    tokenizer = learn_tokenizer(["sky", "road"], vocab_size=520)
    for part in (example_clip_model(tokenizer, "vit"), tokenizer):
        part.save_pretrained(clip)
    sizes = {"context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2, "neck_hidden_size": 8}
    model = DenseCLIPForSemanticSegmentation.from_clip(clip, ["sky", "road"], image_size=64, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(clip)
    for part in (model, tokenizer, DenseCLIPImageProcessor()):
        part.save_pretrained(run_dir)
    DenseCLIPForSemanticSegmentation.from_pretrained(run_dir).save_pretrained(run_dir)
    assert "alice" not in (run_dir / "config.json").read_text()  # whoever pushes it by other means
    results = {**RESULTS, "dataset": str(data)}
    write_card(run_dir, base_model=str(clip), dataset=str(data), results=results)
    hub = FakeHub()
    with folder_to_push(run_dir, code=code) as folder:
        push(folder, "me/x", api=hub)
    assert len(hub.files) >= 5
    for name, content in hub.files.items():
        for told in ("alice", "nobodys", str(tmp_path)):
            assert told.encode() not in content, f"{name} names {told}"


@pytest.mark.parametrize("where", ["home", "folder"])
def test_a_card_with_a_local_path_in_it_is_not_pushed(small, where):
    place = {"home": Path.home() / "data", "folder": small}[where]
    (small / "README.md").write_text((small / "README.md").read_text() + f"\nI ran it in {place}.\n")
    with pytest.raises(ValueError, match="README.md"), folder_to_push(small):
        pass


REFUSED = [
    "optimizer.pt", "OPTIMIZER.PT", "Checkpoint-3/optimizer.pt", "training_args.bin", "x.pth", ".env", "secrets.json",
    # which one pattern alone refuses
    "Checkpoint-3/model.safetensors", "optimizer.safetensors", "scheduler.json", "rng_state.json", "scaler.json",
    "trainer_state.json", "x.pt", "x.bin", "x.pkl", "x.pickle", "x.ckpt", ".netrc", "x.env", "server.pem", "id.key",
    "credentials.json",
]  # fmt: skip


def test_training_state_and_secrets_are_refused(small):
    for name in REFUSED:
        (small / name).parent.mkdir(exist_ok=True)
        (small / name).write_text("{}")
    for name in REFUSED:
        with pytest.raises(ValueError, match=Path(name).name), folder_to_push(small, code=False, include=[name]):
            pass
    with folder_to_push(small, code=False) as folder:
        assert not contents(folder).keys() & set(REFUSED)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "sub/../../secret.txt", "nothing.txt"])
def test_files_that_are_outside_or_missing_are_refused(small, name):
    (small.parent / "secret.txt").write_text("")
    with pytest.raises(ValueError, match=name), folder_to_push(small, code=False, include=[name]):
        pass


@pytest.mark.parametrize("leads_to", ["outside.png", "model/Optimizer.pt"])
def test_links_to_what_is_not_pushed_are_refused(small, leads_to):
    (small.parent / leads_to).write_text("")
    (small / "image.png").symlink_to(small.parent / leads_to)
    with (small / "README.md").open("a") as card:
        card.write("\n![Example](image.png)\n")
    with pytest.raises(ValueError, match="image.png"), folder_to_push(small, code=False):
        pass


@pytest.mark.parametrize("code", [True, False])
def test_shown_images_shards_and_named_files_go_along(small, code):
    tiny_model().save_pretrained(small, max_shard_size="20KB")
    (small / "sub").mkdir()
    shown = {"a.png", "b.jpg", "sub/c.png", "d.png"}
    for name in (*shown, "other.jpg", "notes.txt", "sub/more.txt", "modeling_denseclip.py"):
        (small / name).write_text("mine")
    with (small / "README.md").open("a") as card:
        card.write('![a](a.png) ![](./b.jpg "b") [![c](sub/c.png)](https://x.y) <img width=3 src="d.png"> other.jpg\n')
    with folder_to_push(small, code, include=["notes.txt", "sub/more.txt"]) as folder:
        files = contents(folder)
    assert shown | {"notes.txt", "sub/more.txt"} <= files.keys() and "other.jpg" not in files
    assert {path.name for path in small.glob("model*.safetensors*")} <= files.keys()
    assert files.get("modeling_denseclip.py") != b"mine" and ("modeling_denseclip.py" in files) == code
    assert (small / "modeling_denseclip.py").read_text() == "mine"


def test_without_code_no_config_asks_for_it(small):
    add_code(small)
    with folder_to_push(small, code=False) as folder:
        assert not list(folder.glob("*.py"))
        assert all("auto_map" not in path.read_text() for path in folder.glob("*.json"))
    assert "auto_map" in (small / "config.json").read_text()


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors"])
def test_incomplete_directories_are_refused(small, name):
    (small / name).unlink()
    with pytest.raises(ValueError, match=str(small)), folder_to_push(small):
        pass


def test_a_repository_stays_as_private_as_it_is(small, caplog):
    public, private = FakeHub(private=False), FakeHub(private=True)
    with pytest.raises(ValueError, match="public"):
        push(small, "me/x", api=public)
    assert not public.files
    push(small, "me/x", private=False, api=public)
    assert public.files
    push(small, "me/x", private=False, api=private)
    assert private.files and "stays private" in caplog.text


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_without_network_a_push_ends_in_one_sentence(small, monkeypatch, call):
    class Unreachable(Exception):
        """As the HTTP library's: of no family that anybody would list."""

    def fail(*_, **__):
        raise Unreachable("[Errno -2] Name or service not known\n\nand so on")

    hub = FakeHub()
    monkeypatch.setattr(hub, call, fail)
    with pytest.raises(OSError, match="service not known") as caught:
        push(small, "me/x", api=hub)
    assert "\n" not in str(caught.value)


def test_a_license_for_the_push_leaves_the_directory_alone(small):
    card = small / "README.md"
    card.write_text(card.read_text() + "\nA sentence of my own.\n")
    before = contents(small)
    hub = FakeHub()
    main([str(small), "me/x", "--push", "--public", "--license", "apache-2.0", "--no_code"], api=hub)
    assert before == contents(small) and hub.private is False
    pushed = hub.files["README.md"].decode()
    assert "license: apache-2.0" in pushed and "A sentence of my own." in pushed
    assert "modeling_denseclip.py" not in hub.files
