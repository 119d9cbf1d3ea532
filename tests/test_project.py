"""The project's own rules: requirements, style, and which way imports point."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

from lib.book import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = [
    Requirement(line) for line in PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["test"]
]
LOCKED = {
    requirement.name.lower().replace("_", "-"): requirement
    for requirement in (
        Requirement(line)
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and line[0] != "#"
    )
}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_lock_meets_requirement(requirement):
    locked = LOCKED[requirement.name.lower()]
    (pin,) = locked.specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version, prereleases=True), f"{locked} is not {requirement}"


def test_lock_pins_torch_with_its_triton():
    assert str(LOCKED["torch"].specifier) == "==2.13.0"
    assert str(LOCKED["triton"].specifier) == "==3.7.1"
    linux = {**default_environment(), "platform_system": "Linux"}
    mac = {**default_environment(), "platform_system": "Darwin"}
    assert LOCKED["triton"].marker.evaluate(linux) and not LOCKED["triton"].marker.evaluate(mac)


def test_conda_environment_agrees():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    python = next(entry for entry in conda if entry.startswith("python="))
    assert (
        Version(python.split("=")[1])
        in Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    )
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}


def test_readme_says_what_each_dependency_is_for():
    rows = set(re.findall(r"(?m)^\| ([a-z][a-z0-9-]*) \| \S", (ROOT / "README.md").read_text()))
    assert rows == {requirement.name for requirement in REQUIREMENTS}


def test_code_is_linted_and_formatted():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_imports_point_one_way():
    """chapters → lib → kernels; a kernel needs torch and triton alone. The benchmark harness measures lib too."""
    allowed = sys.stdlib_module_names | {"torch", "triton", "kernels"}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if path.name != "bench.py":
            assert set(imported(path)) <= allowed, path
    for path in sorted((ROOT / "lib").rglob("*.py")):
        assert not {"chapters", "tests", "triton"} & set(imported(path)), path


def test_lib_works_without_triton():
    script = """
import importlib.util, sys
sys.modules["triton"] = None  # importing it now fails
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
import pkgutil, torch, lib
for module in pkgutil.walk_packages(lib.__path__, "lib."):
    __import__(module.name)
from lib.losses import linear_cross_entropy
from lib.numerics import two_pass_softmax
x = torch.randn(4, 7)
torch.testing.assert_close(two_pass_softmax(x), x.softmax(-1))
linear_cross_entropy(torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 1, 2, 3]))
try:
    two_pass_softmax(x, impl="triton")
except RuntimeError as error:
    assert "triton" in str(error)
else:
    raise AssertionError("impl='triton' must say that triton is missing")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_git_does_not_ignore_lib():
    assert not re.search(r"(?m)^/?lib/?$", (ROOT / ".gitignore").read_text())
