"""A pytest plugin that gives our adapters transformers' own common test classes, and counts what they say.

The classes come from the source distribution of the installed transformers, which pip fetches once into `.cache/`. It
lacks some files that they import: generation and export tests (which are therefore not run) and two helpers.
"""

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from inapplicable import INAPPLICABLE


VERSION = importlib.metadata.version("transformers")
STUBS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "tests/utils/__init__.py": "",
    # options that every config has, with other values than their defaults
    "tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'dtype': 'float16',\n"
        "    'architectures': ['A'], 'problem_type': 'regression', 'id2label': {0: 'a'}, 'label2id': {'a': 0}}\n"
    ),
    "tests/utils/tiny_model_summary.json": "{}",
    "src/transformers/__init__.py": "",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}


def fetch(folder: Path) -> None:
    """Lay out the tests of transformers `VERSION` in `folder`."""
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", download, f"transformers=={VERSION}"], check=True)
        (archive,) = Path(download).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if fnmatch(member.name, f"transformers-{VERSION}/tests/*.py")]
            tar.extractall(download, members, filter="data")
        for name, text in STUBS.items():
            stub = Path(download) / f"transformers-{VERSION}" / name
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text(text)
        (Path(download) / f"transformers-{VERSION}").rename(folder)


def pytest_configure(config: pytest.Config) -> None:
    folder = config.rootpath / ".cache" / f"transformers-{VERSION}"
    if not folder.exists():
        fetch(folder)
    sys.path.insert(0, str(folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that cannot apply must fail, so that one that begins to pass is noticed."""
    unused = set(INAPPLICABLE)
    for item in items:
        name = f"{item.cls.__name__}::{item.name}"  # type: ignore[attr-defined]
        for pattern in INAPPLICABLE:
            if fnmatch(name, pattern):
                unused.discard(pattern)
                item.add_marker(pytest.mark.xfail(reason=INAPPLICABLE[pattern], strict=True))
    if unused:
        raise pytest.UsageError(f"these are listed as inapplicable, but there are no such tests: {sorted(unused)}")


def pytest_terminal_summary(terminalreporter) -> None:
    counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "skipped", "xfailed")}
    terminalreporter.write_line(
        f"transformers {VERSION}: {counts['passed']} passed, {counts['skipped']} not applicable (skipped by "
        f"transformers), {counts['xfailed']} listed with reasons"
    )
