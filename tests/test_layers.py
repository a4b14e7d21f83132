"""Imports point downward only (docs/architecture.md, "Layers")."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Top first; packages of one line do not import each other.
LAYERS = (
    ("benchmarks", "examples"),
    ("cli",),
    ("plugin",),
    ("worker",),
    ("upstream", "train", "models"),
    ("step", "drafter", "platform", "client"),
    ("kernels",),
)
LEAVES = {"settings", "errors", "__init__"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def rooms() -> list[tuple[str, Path]]:
    """(package, file) of every module of the product."""
    product = ROOT / "sglang_dflash"
    own = [(path.relative_to(product).parts[0], path) for path in product.glob("**/*.py")]
    kernels = [("kernels", path) for path in ROOT.glob("kernels/**/*.py")]
    tools = [(top, path) for top in ("benchmarks", "examples") for path in ROOT.glob(f"{top}/**/*.py")]
    return [(room.removesuffix(".py"), path) for room, path in [*own, *kernels, *tools]]


def imported(path: Path) -> set[str]:
    """Our packages that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "sglang_dflash":
                found.add(rest.split(".")[0])
            elif head in ("dflash_kernels", "benchmarks", "sglang"):
                found.add("kernels" if head == "dflash_kernels" else head)
    return found


@pytest.mark.parametrize("room", sorted({room for room, _ in rooms()} - LEAVES))
def test_imports_point_down(room):
    wrong = []
    for path in (path for name, path in rooms() if name == room):
        for other in imported(path) - LEAVES - {room, "sglang", "__version__"}:
            if other not in LEVEL or LEVEL[other] <= LEVEL[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


@pytest.mark.parametrize("room", ["kernels", "step"])
def test_what_a_step_is_made_of_needs_no_sglang(room):
    assert not [path for name, path in rooms() if name == room and "sglang" in imported(path)]


def test_leaves_import_nothing_above():
    for leaf in ("settings", "errors"):
        assert imported(ROOT / f"sglang_dflash/{leaf}.py") <= {"errors"}
