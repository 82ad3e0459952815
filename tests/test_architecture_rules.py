"""Imports run one way: what a Hub repository carries is flat and imports nothing of the library around it."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import denseclip_hf


PACKAGE = Path(denseclip_hf.__file__).parent
HUB_SET = {p.stem for pattern in ("*_denseclip.py", "*_clip_resnet.py") for p in PACKAGE.glob(pattern)}
HUB_PACKAGES = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
STANDARD = {"os", "difflib", "dataclasses", "typing", "types", "collections", "itertools", "math", "functools"}
STANDARD |= {"contextlib", "copy"}
# Lower layers first; a module may import only from layers before its own.
LAYERS = [
    {"configuration_clip_resnet"},
    {"configuration_denseclip", "freezing_denseclip", "outputs_denseclip"},
    {
        "modeling_clip_resnet",
        "fpn_denseclip",
        "prompts_denseclip",
        "image_inputs_denseclip",
        "resizing_denseclip",
        "mixed_sizes_denseclip",
    },
    {
        "sliding_window_denseclip",
        "class_embeddings_denseclip",
        "context_decoder_denseclip",
        "image_encoder_denseclip",
        "image_processing_denseclip",
        "losses_denseclip",
    },
    {"open_vocabulary_denseclip"},
    {"loading_denseclip"},
    {"modeling_denseclip"},
]


def imports(path):
    """`(absolute package names, relative module names)` imported anywhere in `path`."""
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path.name} imports from above the package"
            relative |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            absolute.add(node.module.split(".")[0])
    return absolute, relative


@pytest.mark.parametrize("module", sorted(HUB_SET))
def test_hub_set_imports_only_itself_and_what_the_hub_has(module):
    absolute, relative = imports(PACKAGE / f"{module}.py")
    assert absolute <= HUB_PACKAGES | STANDARD, f"{module} imports {absolute - HUB_PACKAGES - STANDARD}"
    assert relative <= HUB_SET, f"{module} imports {relative - HUB_SET} of the library around it"


def raises(function):
    """Whether a function, without those inside it, has a `raise` of its own."""
    nodes = list(function.body)
    for node in nodes:
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return any(isinstance(node, ast.Raise) and node.exc for node in nodes)


def public_functions(tree):
    """Name and docstring, with a constructor's class's, of public functions and methods that raise."""
    for owner in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))):
        for function in (n for n in owner.body if isinstance(n, ast.FunctionDef) and raises(n)):
            told = ast.get_docstring(function) or ""
            if function.name in ("__init__", "__post_init__", "__call__"):
                yield function.name, f"{told} {ast.get_docstring(owner)}"
            elif not function.name.startswith("_"):
                yield function.name, told


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_docstrings_tell_what_is_raised(path):
    for name, told in public_functions(ast.parse(path.read_text())):
        elsewhere = re.match(r"(As|See|Do what|Like|What) \[`", told)
        assert re.search(r"[Rr]aise|Error`", told) or elsewhere, (
            f"{path.name}: the docstring of {name} does not tell what it raises"
        )


@pytest.mark.parametrize("level", range(len(LAYERS)))
def test_layers_import_downwards(level):
    below = set().union(*LAYERS[:level])
    for module in LAYERS[level]:
        _, relative = imports(PACKAGE / f"{module}.py")
        assert relative <= below, f"{module} imports {relative - below} of its own layer or above"


def test_layers_hold_the_whole_hub_set():
    assert set().union(*LAYERS) == HUB_SET


def test_the_package_has_no_circular_imports():
    imported = {path.stem: imports(path)[1] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    TopologicalSorter(imported).prepare()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_package_does_not_print_and_does_not_import_scripts(path):
    absolute, _ = imports(path)
    assert "scripts" not in absolute
    calls = [
        n.func.id
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    assert "print" not in calls
