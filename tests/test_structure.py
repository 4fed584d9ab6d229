"""Imports go one way: the leaves stand alone, and within a package each folder uses only those below it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("optimizers", "tasks", "reports", "membench")
LIBRARIES = {
    "optimizers": {"torch", "peft", "numpy"},
    "tasks": {
        *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
        *("datasets", "evaluate", "sklearn", "numpy"),
    },
    "reports": {"tabulate", "matplotlib", "jinja2", "scipy", "numpy"},
}
# What each folder may use of its own package. A module beside the folders goes by its own name.
BELOW = {
    "membench.memory": set(),
    "membench.config": set(),
    "membench.training": {"memory", "config"},
    "membench.planning": {"training", "memory", "config"},
    "membench.runs": {"planning", "training", "memory", "config"},
    "membench.reproduce": {"runs", "planning", "training", "memory", "config"},
    "membench.commands": {"reproduce", "runs", "planning", "training", "memory", "config"},
    "membench.cli": {"commands", "runs", "config", "paths"},
    "tasks.data": set(),
    "tasks.models": {"data", "names"},
    "tasks.superglue": {"models", "data", "metrics", "base"},
    "tasks.c4": {"models", "data", "metrics", "base"},
    "tasks.instruct": {"models", "data", "metrics", "base"},
    "tasks.dpo": {"models", "data", "metrics", "base", "instruct"},  # its pairs are conversations
    "tasks.classify": {
        "models",
        "data",
        "metrics",
        "base",
        "superglue",
    },  # its demo is CommitmentBank's, in other clothes
    "optimizers.shared": {"base"},
}


def modules(place):
    return sorted((ROOT / place).rglob("*.py")) or [(ROOT / place).with_suffix(".py")]


def imported(path):
    """The dotted names of all that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}: write imports in full, so that they can be found"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("leaf", LIBRARIES)
def test_a_leaf_imports_none_of_the_other_packages_and_only_its_own_libraries(leaf):
    for path in modules(leaf):
        names = {name.split(".")[0] for name in imported(path)} - {leaf, "__future__"} - sys.stdlib_module_names
        assert not names & set(PACKAGES), f"{path.relative_to(ROOT)} imports {names & set(PACKAGES)}"
        assert names <= LIBRARIES[leaf], f"{path.relative_to(ROOT)} imports {names - LIBRARIES[leaf]}"


@pytest.mark.parametrize("place", BELOW)
def test_a_folder_imports_only_what_lies_below_it(place):
    package, own = place.split(".")
    for path in modules(place.replace(".", "/")):
        used = {name.split(".")[1] for name in imported(path) if name.startswith(f"{package}.")} - {own}
        used = {name for name in used if (ROOT / package / name).is_dir() or (ROOT / package / f"{name}.py").is_file()}
        assert used <= BELOW[place], f"{path.relative_to(ROOT)} imports {package}.{', '.join(used - BELOW[place])}"


def test_every_folder_has_its_rule():
    for package in ("membench", "tasks", "optimizers"):
        folders = {f"{package}.{path.parent.name}" for path in (ROOT / package).glob("*/__init__.py")}
        assert folders <= set(BELOW)


def test_each_file_opens_with_what_it_is():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"
