"""Imports run one way: from the commands down to the model, which imports nothing of the library around it."""

import ast
import re
from pathlib import Path

import pytest

import denseclip_hf


PACKAGE = Path(denseclip_hf.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Lowest first; a room imports only from those before it, and any of them from the modules beside the rooms.
ROOMS = ["model", "data", "inference", "evaluation", "sharing", "training", "conversion", "example", "app", "cli"]
HUB_PACKAGES = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
STANDARD = {"os", "difflib", "dataclasses", "typing", "types", "collections", "itertools", "math", "functools"}
STANDARD |= {"contextlib", "copy"}


def name_of(path):
    return str(path.relative_to(PACKAGE))


def imports(path):
    """Absolute package names, and relative imports as (level, module), anywhere in `path`."""
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            relative |= {(node.level, node.module or alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            absolute.add(node.module.split(".")[0])
    return absolute, relative


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=name_of)
def test_the_model_imports_only_itself_and_what_the_hub_has(path):
    absolute, relative = imports(path)
    assert absolute <= HUB_PACKAGES | STANDARD
    siblings = {sibling.stem for sibling in path.parent.glob("*.py")}
    assert relative <= {(1, sibling) for sibling in siblings}, "transformers copies flat siblings only"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards(room):
    allowed = set(ROOMS[: ROOMS.index(room)])
    for path in (PACKAGE / room).glob("*.py"):
        above = {module.split(".")[0] for level, module in imports(path)[1] if level == 2} & set(ROOMS)
        assert above <= allowed, f"{name_of(path)} imports from {above - allowed}"


def test_every_room_has_its_place():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_tell_what_is_raised(path):
    for name, told in public_functions(ast.parse(path.read_text())):
        elsewhere = re.match(r"(As|See|Do what|Like|What) \[`", told)
        assert re.search(r"[Rr]aise|Error`", told) or elsewhere, (
            f"the docstring of {name} does not tell what it raises"
        )


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "cli"], ids=name_of)
def test_only_commands_print(path):
    called = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert "print" not in {function.id for function in called if isinstance(function, ast.Name)}
