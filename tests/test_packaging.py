"""What is installed, what imports what, and how long `import fedcl` takes."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("algorithms", "streams", "models", "tpu")
WIRING = ("cli", "experiment", "report", "testing")
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {
    "transformers",
    "tensorflow_datasets",
    "tensorflow",
    "torch",
    "orbax",
    "matplotlib",
    "rich",
    "pydantic",
    "typer",
    "jinja2",
    "grain",
    "PIL",
    "scipy",
}


def test_every_package_is_listed_and_linked():
    packages = CONFIG["tool"]["setuptools"]["packages"]
    assert packages == ["fedcl", *(f"fedcl.{f}" for f in FOLDERS)]
    for folder in FOLDERS:
        link = ROOT / "fedcl" / folder
        assert (link / "__init__.py").is_file()
        assert not [
            p for p in (ROOT / folder).iterdir() if (p / "__init__.py").exists()
        ]


def imports(path: Path, top_only: bool = False):
    """(module, is at the top of the file) of every import."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        yield from ((name, node in tree.body) for name in names)


def folder_of(module: str) -> str | None:
    parts = module.split(".")
    inside = parts[0] == "fedcl" and len(parts) > 1 and parts[1] in FOLDERS
    return parts[1] if inside else None


def test_the_spine_imports_nothing_from_above():
    for path in (ROOT / "fedcl").glob("*.py"):
        wires = any(path.stem.lstrip("_").startswith(w) for w in WIRING)
        for module, at_top in imports(path):
            if folder_of(module):
                assert wires and not at_top, f"{path.name} imports {module}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_do_not_import_each_other(folder):
    for path in (ROOT / folder).glob("*.py"):
        for module, _ in imports(path):
            assert folder_of(module) in (None, folder), f"{path.name}: {module}"


def test_heavy_packages_are_imported_inside_functions():
    for folder in ("fedcl", *FOLDERS):
        for path in (ROOT / folder).glob("*.py"):
            for module, at_top in imports(path):
                wired = path.stem in ("cli", "_experiment_config")
                heavy = at_top and module.split(".")[0] in HEAVY and not wired
                assert not heavy, f"{path} imports {module} at module level"


def test_import_brings_in_nothing_heavy():
    code = "import fedcl, sys; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in out.stdout.split()}
    baseline = subprocess.run(
        [sys.executable, "-c", "import jax, optax, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    already = {name.split(".")[0] for name in baseline.stdout.split()}
    assert not (loaded - already) & HEAVY
    assert {n for n in loaded - already if not n.startswith("_")} <= {
        "fedcl",
        "signal",
    } | set(sys.stdlib_module_names)


def test_a_folder_imported_as_a_top_level_name_says_what_to_do():
    code = "import algorithms"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert "import `fedcl.algorithms`, not `algorithms`" in out.stderr


def test_files_stay_short():
    for folder in ("fedcl", *FOLDERS):
        for path in (ROOT / folder).glob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 450, f"{path.name} has {lines} lines"
