"""Who may import whom, walked over every file of the packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "pairing", "segmentation", "shards", "trainer")
MAY_IMPORT = {
    "shards": set(),
    "pairing": {"shards"},
    "segmentation": {"pairing", "shards"},
    "flows": {"segmentation", "pairing", "shards"},
    "trainer": {"shards"},
}
FRAMEWORKS = {"prefect", "dask", "distributed"}
TORCH_IN_SEGMENTATION = {
    "dynamics.py",
    "foreign.py",
    "network.py",
    "train_compact.py",
    "weights_file.py",
}


def imports(path: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").split(".")[0]


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    for path in files(package):
        ours = set(imports(path)) & set(PACKAGES) - {package}
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {ours}"


@pytest.mark.parametrize("package", PACKAGES)
def test_frameworks_and_torch_stay_in_their_rooms(package: str) -> None:
    for path in files(package):
        found = set(imports(path))
        if package != "flows":
            assert not found & FRAMEWORKS, f"{path.relative_to(ROOT)} imports a framework"
        allowed = package == "trainer" or (
            package == "segmentation" and path.name in TORCH_IN_SEGMENTATION
        )
        assert allowed or "torch" not in found, f"{path.relative_to(ROOT)} imports torch"


def test_the_pipeline_knows_neither_prefect_nor_dask() -> None:
    assert not set(imports(ROOT / "flows" / "pipeline.py")) & FRAMEWORKS


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import shards.schema, shards.stream", {"torch", "pandas", "zarr", "scipy", "dask"}),
        ("import flows.cli", {"torch", "numpy", "pandas", "prefect", "pyarrow"}),
    ],
)
def test_light_imports_stay_light(statement: str, heavy: set[str]) -> None:
    script = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not heavy & set(done.stdout.split())
