"""Promises that the tree itself keeps: file sizes, vocabulary, pins, and what the wheel holds."""

import io
import re
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
WHEEL_PACKAGES = ("idlm_jax", "pallas_kernels")
SOURCES = (*WHEEL_PACKAGES, "train", "serve", "benchmarks", "tests")
MAX_LINES, MAX_KERNEL_LINES = 400, 700

# Files that may say `block_size` as an identifier because they translate an official name, and its meaning.
BLOCK_SIZE_ALLOWED = {"serve/official.py": "rows of a window, 2 N - 1, a key of the reference server's YAML"}


def source_files() -> list[Path]:
    return sorted(file for folder in SOURCES for file in (ROOT / folder).rglob("*.py"))


def bare_block_sizes(source: str) -> list[int]:
    """Lines on which `block_size` is an identifier; strings (keys of official files) and comments are not."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.start[0] for token in tokens if token.type == tokenize.NAME and token.string == "block_size"]


def test_files_stay_short():
    too_long = {}
    for file in source_files():
        limit = MAX_KERNEL_LINES if file.is_relative_to(ROOT / "pallas_kernels") else MAX_LINES
        lines = len(file.read_text().splitlines())
        if lines > limit:
            too_long[str(file.relative_to(ROOT))] = f"{lines} > {limit}"
    assert too_long == {}


def test_block_size_has_no_bare_use():
    found = {str(file.relative_to(ROOT)): bare_block_sizes(file.read_text()) for file in source_files()}
    assert {name for name, lines in found.items() if lines} == set(BLOCK_SIZE_ALLOWED)


def test_block_size_in_code_is_found_and_in_strings_is_not():
    assert bare_block_sizes("x = 1\ndef f(block_size): ...\n") == [2]
    assert bare_block_sizes("a.block_size = g(block_size=3)\n") == [1, 1]
    assert bare_block_sizes("h['block_size']  # block_size\nlora_block_size = 1\n") == []


def test_torch_is_imported_by_parity_tests_alone():
    # The newest jax is tested without torch, and a marker deselects a test only after its file was imported.
    pattern = re.compile(r"^\s*(?:import|from) (?:torch|peft)\b", re.MULTILINE)
    importers = {file.relative_to(ROOT) for file in source_files() if pattern.search(file.read_text())}
    assert {str(file) for file in importers if not file.is_relative_to("tests/parity")} == set()


def test_configs_say_what_they_are_for_and_avoid_block_size():
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        text = file.read_text()
        assert re.match(r"# \S", text), f"{file.name}: the first line is a comment that says what the run is for"
        assert not re.search(r"^\s*block_size\s*:", text, re.MULTILINE), file.name


def direct_requirements(python: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # torch and what needs it are installed and tested on 3.11 only.
    groups = [project["dependencies"], extras["dev"], extras["parity"] if python == "3.11" else []]
    every = [Requirement(line) for group in groups for line in group]
    return [each for each in every if each.marker is None or each.marker.evaluate({"python_version": python})]


@pytest.mark.parametrize(("python", "file"), [("3.11", "py311.txt"), ("3.12", "py312.txt")])
def test_every_direct_dependency_is_pinned_inside_its_range(python: str, file: str):
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints" / file).read_text().splitlines()]
    pinned = dict(line.split("==") for line in lines if line)
    pins = {canonicalize_name(name): version for name, version in pinned.items()}
    for requirement in direct_requirements(python):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{file} lacks {requirement.name}"
        assert requirement.specifier.contains(version), f"{file}: {version} is outside {requirement}"


@pytest.mark.slow
def test_wheel_holds_exactly_the_two_packages(tmp_path: Path):
    # --no-build-isolation: hatchling is a development dependency, so nothing is downloaded.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("idlm_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    expected = {str(file.relative_to(ROOT)) for package in WHEEL_PACKAGES for file in (ROOT / package).rglob("*.py")}
    code = names - metadata
    assert {name.split("/")[0] for name in code} == set(WHEEL_PACKAGES)
    assert {name for name in code if name.endswith(".py")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
