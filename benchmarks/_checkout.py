"""Makes archzoo importable from a checkout that nobody installed: for a GPU machine with torch and triton alone.

The packages `archzoo.kernels` and `archzoo.configs` are the folders `kernels` and `configs`, which an installation
brings together. Where there is none, a finder does, in this process and in those that it starts.
"""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
"""The trials of the faults are also tests."""
PACKAGES = {"archzoo": ROOT / "archzoo", "archzoo.kernels": ROOT / "kernels", "archzoo.configs": ROOT / "configs"}
"""As `package-dir` of pyproject.toml has them."""


class _Finder:
    """Of the three packages alone: what lies in them is found by their paths."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        folder = PACKAGES.get(name)
        if folder is None:
            return None
        start = folder / "__init__.py"
        if not start.exists():  # a namespace package, as the configs are
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
        return importlib.util.spec_from_file_location(name, start, submodule_search_locations=[str(folder)])


def install_finder() -> None:
    """Before all others, as a working folder on the path has an `archzoo` without kernels."""
    sys.meta_path.insert(0, _Finder)


def make_importable() -> None:
    """Does nothing where archzoo is installed. Other processes get the finder by a `sitecustomize` on PYTHONPATH."""
    if importlib.util.find_spec("archzoo") is not None:
        return
    install_finder()
    folder = Path(tempfile.mkdtemp(prefix="archzoo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "sitecustomize.py").write_text(f"import runpy\nrunpy.run_path({__file__!r})['install_finder']()\n")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def make_tests_importable() -> None:
    """`tests` from this process alone, and without the checkout on the path, where `kernels` would be a package too."""
    spec = ModuleSpec("tests", None, is_package=True)
    spec.submodule_search_locations = [str(TESTS)]
    sys.modules["tests"] = importlib.util.module_from_spec(spec)
