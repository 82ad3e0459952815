"""Imports run one way: from the commands down to the model, which imports nothing of the library around it."""

import ast
from pathlib import Path

import pytest

import denseclip_hf


PACKAGE = Path(denseclip_hf.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Lowest first; a room imports only from those before it, and any of them from the modules beside the rooms.
ROOMS = ["model", "data", "inference", "evaluation", "sharing", "training", "conversion", "example", "app", "cli"]
HUB_PACKAGES = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "cv2"}  # the last if it is there
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


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != PACKAGE], ids=name_of)
def test_others_rooms_are_entered_by_the_door(path):
    """The model's files have none: they are siblings, which transformers copies. The page is not imported unasked."""
    inside = {module for level, module in imports(path)[1] if level == 2 and "." in module}
    assert not {module for module in inside if not module.startswith("model.")} - {"app.page"}


def test_every_room_has_its_place():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "cli"], ids=name_of)
def test_only_commands_print(path):
    called = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert "print" not in {function.id for function in called if isinstance(function, ast.Name)}
