"""The names of what stands in tests/."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from tests.conftest import ROOT


def test_nothing_in_tests_shadows_a_package() -> None:
    """`python tests/SCRIPT.py` puts tests/ first on the path, and `import vllm` would find tests/vllm, installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *(need for extra in project["optional-dependencies"].values() for need in extra)]
    required = {re.split(r"[^\w.-]", need)[0].replace("-", "_") for need in needs}
    assert {"torch", "vllm", "inspect_ai"} <= required
    ours = {path.stem for path in (ROOT / "tests").iterdir() if path.is_dir() or path.suffix == ".py"}
    shadowed = ours & {*required, *packages_distributions(), *sys.stdlib_module_names}
    assert not shadowed, f"tests/{min(shadowed)} is found in place of the package {min(shadowed)}"
