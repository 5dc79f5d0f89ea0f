"""Data flows one way, so imports do: a file may import its own layer and those below, nothing above."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "idlm_jax", "train", "serve")

# Height of every layer. Layers of one height (train and serve) do not know each other. `idlm_jax`, the public
# API, stands for its __init__ alone; a module below it that is not listed has no layer, which is an error.
HEIGHT = {
    "pallas_kernels": 0,
    "idlm_jax.array_types": 1,
    "idlm_jax.cluster": 1,
    "idlm_jax.config": 1,
    "idlm_jax.deviceless": 1,
    "idlm_jax.qwen3_sizes": 1,
    "idlm_jax.sharding": 1,
    "idlm_jax.model": 2,
    "idlm_jax.weights": 3,
    "idlm_jax.decoding": 4,
    "idlm_jax.evaluation": 0,  # asks servers, and knows no model
    "idlm_jax": 5,
    "idlm_jax.options": 5,  # of command lines: those of idlm and of the server
    "train": 6,
    "serve": 6,
    "idlm_jax.cli": 7,
}
BASE = {
    "idlm_jax.array_types",
    "idlm_jax.cluster",
    "idlm_jax.config",
    "idlm_jax.deviceless",
    "idlm_jax.qwen3_sizes",
    "idlm_jax.sharding",
}


def layer_of(module: str) -> str | None:
    """The layer a dotted name belongs to; None for other people's modules.

    Raises:
        ValueError: one of ours without a layer.
    """
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    layer = ".".join(parts[:2]) if parts[0] == "idlm_jax" else parts[0]
    if layer not in HEIGHT:
        raise ValueError(f"{module} has no layer: give {layer} a height")
    return "base" if layer in BASE else layer


def height_of(layer: str) -> int:
    return HEIGHT["idlm_jax.config"] if layer == "base" else HEIGHT[layer]


def imports_of(path: Path, root: Path) -> Iterator[tuple[int, str, bool]]:
    """Yields (line, dotted name, whether it happens only when a function is called) of every import."""
    package = path.relative_to(root).with_suffix("").parts[:-1]

    def visit(node: ast.AST, is_lazy: bool) -> Iterator[tuple[int, str, bool]]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name, is_lazy
            case ast.ImportFrom(module=module, names=names, level=level):
                start = package[: len(package) - level + 1] if level else ()
                stem = ".".join([*start, *([module] if module else [])])
                for alias in names:
                    dotted = f"{stem}.{alias.name}"
                    # `from idlm_jax import config` names a module, `from idlm_jax import load` the API.
                    is_module = (root / dotted.replace(".", "/")).is_dir() or (
                        root / (dotted.replace(".", "/") + ".py")
                    ).is_file()
                    yield node.lineno, dotted if is_module else stem, is_lazy
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module, is_lazy
        inside = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(), str(path)), False)


def violations(root: Path) -> list[str]:
    """One line per import that the rule forbids."""
    found = []
    for path in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        own = layer_of(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        assert own is not None
        for line, module, is_lazy in imports_of(path, root):
            other = layer_of(module)
            if other is None or other == own:
                continue
            is_allowed = height_of(other) < height_of(own)
            if own == "idlm_jax.cli" and other in ("train", "serve"):
                # The command line joins both worlds, but the wheel holds it without train: only on demand.
                is_allowed = other == "train" and is_lazy
            if not is_allowed:
                found.append(f"{path.relative_to(root)}:{line}: {own} imports {module}")
    return found


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_no_file_imports_upward():
    assert violations(ROOT) == []


def test_every_layer_that_exists_was_read():
    read = {file.relative_to(ROOT).parts[0] for p in PACKAGES for file in (ROOT / p).rglob("*.py")}
    assert read >= {"pallas_kernels", "idlm_jax", "train"}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pallas_kernels/op/api.py", "from idlm_jax.array_types import Keys"),
        ("idlm_jax/config.py", "import idlm_jax.model"),
        ("idlm_jax/model/a.py", "from ..decoding import step"),
        ("idlm_jax/model/a.py", "from idlm_jax import load"),
        ("idlm_jax/model/a.py", "def f():\n    from idlm_jax.weights import names"),
        ("idlm_jax/weights/a.py", "import importlib\nimportlib.import_module('idlm_jax.decoding')"),
        ("idlm_jax/decoding/a.py", "from train.loop import run"),
        ("idlm_jax/__init__.py", "import idlm_jax.cli"),
        ("train/a.py", "from serve import engine"),
        ("serve/a.py", "import train.batch"),
        ("idlm_jax/cli/a.py", "import train.loop"),
        ("idlm_jax/cli/a.py", "class A:\n    from train import loop"),
        ("idlm_jax/cli/a.py", "def f():\n    import serve.engine"),
    ],
)
def test_upward_import_is_found(tmp_path: Path, path: str, text: str):
    assert len(violations(write(tmp_path, {path: text}))) == 1


def test_downward_imports_pass(tmp_path: Path):
    tree = {
        "idlm_jax/config.py": "import jax, dataclasses\nfrom idlm_jax.array_types import Keys",
        "idlm_jax/model/a.py": "from pallas_kernels.op import api\nfrom .. import config\nfrom . import b",
        "idlm_jax/__init__.py": "from idlm_jax.decoding.generate import generate",
        "train/a.py": "import idlm_jax\nfrom idlm_jax import load\nfrom train import batch",
        "idlm_jax/cli/a.py": "import idlm_jax\ndef f():\n    from train import loop",
    }
    assert violations(write(tmp_path, tree)) == []


def test_module_without_a_layer_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"idlm_jax\.extras has no layer"):
        violations(write(tmp_path, {"idlm_jax/extras.py": ""}))
