"""The documentation is true: its commands and snippets run, its links and the names it mentions exist."""

import html
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from denseclip_hf import DenseCLIPForSemanticSegmentation, DenseCLIPImageProcessor
from denseclip_hf.data import load_segmentation_dataset
from denseclip_hf.example import make_example_clip, make_example_dataset
from denseclip_hf.metrics import confusion_matrix
from denseclip_hf.model.loading_denseclip import load_clip
from helpers.forked import run_script


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "denseclip_hf"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CLIP = "openai/clip-vit-base-patch16"


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    return [code for kind, code in found if kind == language]


def shorter(code, numbers):
    """`code` with other numbers, each of which must be in it."""
    for old, new in numbers.items():
        assert old in code, f"{old} is no longer in\n{code}"
        code = code.replace(old, new)
    return code


def run(*command):
    """What `python` and these arguments say in a process with nothing imported."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_commands(block):
    """What a block of commands says in all; those of ours need not import everything anew."""
    said = ""
    for line in block.replace("\\\n", "").splitlines():
        name, *arguments = shlex.split(line)
        if name == "denseclip":
            code, text = run_script(PACKAGE.parent / "denseclip_command.py", *arguments)
            assert code == 0, f"{line}\n{text}"
            said += text
        else:
            said += subprocess.run([name, *arguments], check=True, capture_output=True, text=True).stdout
    return said


def run_snippet(code):
    Path("snippet.py").write_text(code)
    exit_code, said = run_script(Path("snippet.py").resolve())
    assert exit_code == 0, f"{code}\n{said}"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The current folder, with the scripts and recipes of a clone, in which nothing was made yet."""
    for name in ("scripts", "configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A CLIP, a small data set and an untrained model, as `make demo` would leave them."""
    folder = tmp_path_factory.mktemp("example")
    data, clip = make_example_dataset(folder / "data", 4, 2), make_example_clip(folder / "clip", "vit")
    classes = load_segmentation_dataset(data)
    sizes = {"neck_hidden_size": 16, "decode_head_hidden_size": 16, "palette": [list(c) for c in classes.palette]}
    _, tokenizer = load_clip(clip)
    model = DenseCLIPForSemanticSegmentation.from_clip(clip, classes.id2label, image_size=96, **sizes)
    processor = DenseCLIPImageProcessor(size={"shortest_edge": 96, "longest_edge": 384})
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder / "model")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("clone")
def test_tutorial():
    said = [run_commands(step) for step in blocks("docs/tutorial.md", "bash")]
    assert "No problems." in said[1] and "mean" in said[2]
    assert "mean" in said[3] and "confusion" in said[3]
    assert "Nothing was uploaded" in said[-1]


@pytest.mark.slow
def test_start_page_and_readme(clone, example):
    shutil.copytree(example, clone / "outputs" / "demo")
    shutil.copytree(example / "data", clone / "my_data")
    for clip in (CLIP, "outputs/example/clip"):  # in place of the Hub's, and of one that has learned something
        shutil.copytree(example / "clip", clone / clip)
    shutil.copy(example / "data" / "val" / "images" / "0000.jpg", clone / "photo.jpg")
    for page, short in (
        ("docs/index.md", {"--bf16": "", "accumulation_steps 4": "accumulation_steps 1"}),
        ("README.md", {}),
    ):
        (commands,) = (block for block in blocks(page, "") if block.startswith("denseclip check-data"))
        run_commands(shorter(commands, {"--max_steps 2000": "--max_steps 1 --crop_size 96", **short}))
        shutil.rmtree(clone / "outputs" / "mine"), shutil.rmtree(clone / "outputs" / "measured")
    code = "\n".join(  # one process, for speed
        block for page in ("README.md", "docs/index.md", "docs/performance.md") for block in blocks(page, "python")
    )
    code = shorter(code, {"max_steps=2000": "max_steps=1", "512": "96", ", bf16=True": "", "(0, 10)": "(0, 1)"})
    run("-c", code)


@pytest.mark.slow
def test_new_words(clone, example):
    shutil.copytree(example / "model", clone / "path" / "to" / "model")
    shutil.copy(example / "data" / "val" / "images" / "0000.jpg", clone / "photo.jpg")
    shutil.copytree(example / "clip", clone / CLIP)  # in place of the Hub's
    untrained, trained, decoder = blocks("docs/new_words.md", "python")
    build = f"""
import torch
from transformers import AutoTokenizer
from denseclip_hf import DenseCLIPForSemanticSegmentation
model = DenseCLIPForSemanticSegmentation.from_clip({CLIP!r}, ["sky"], decode_head="cost_aggregation").eval()
tokenizer, pixel_values = AutoTokenizer.from_pretrained({CLIP!r}), torch.zeros(1, 3, 384, 384)
"""
    for code in (untrained, trained, build + decoder):
        run_snippet(code)


@pytest.mark.slow
def test_extending(clone, example):
    shutil.copytree(example / "data", clone / "my_data")
    (code,) = blocks("docs/extending.md", "python")
    run_snippet(code)
    (command,) = blocks("docs/extending.md", "bash")
    assert "No problems." in run_commands(command)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    run("-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path)
    page = html.unescape((tmp_path / "reference" / "index.html").read_text())
    assert confusion_matrix.__doc__.strip().split("\n")[0] in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        found = page if not file else (page.parent / file)
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page.name} links to {target}, but there are {anchors}"


def test_the_zoo_has_every_recipe():
    zoo = (ROOT / "docs" / "zoo.md").read_text()
    recipes = [path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")]
    of_training = [
        path.as_posix() for path in recipes if path.parts[0] not in ("ablations", "accelerate", "zero_shot")
    ]
    assert of_training and not [name for name in of_training if f"`{name}`" not in zoo]


def test_every_page_is_linked_from_the_readme():
    linked = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[2:] if f"docs/{page.name}" not in linked]


@pytest.mark.parametrize("page", ["method.md", "extending.md"])
def test_names_in_the_text_are_in_the_code(page):
    source = "\n".join(path.read_text() for path in (*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py")))
    text = re.sub(r"^```.*?^```", "", (ROOT / "docs" / page).read_text(), flags=re.M | re.S)
    for quoted in set(re.findall(r"`([^`]+)`", text)):
        if "NAME" in quoted:
            continue
        if re.fullmatch(r"[A-Za-z_][\w.]*\(?\)?", quoted) and not (ROOT / quoted).exists():
            name = quoted.rstrip("()").removesuffix(".py").split(".")[-1]
            known = re.search(rf"\b{name}\b", source) or list(ROOT.glob(f"src/**/{name}.py"))
            assert known, f"{page} mentions {quoted}, which is nowhere"
        elif "/" in quoted and re.fullmatch(r"[\w/.]+", quoted):
            assert any((root / quoted).exists() for root in (ROOT, PACKAGE)), (
                f"{page} mentions {quoted}, which is nowhere"
            )
