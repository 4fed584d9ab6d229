"""The leaves stand alone: each can be read, tested and replaced without the others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("optimizers", "tasks", "reports", "membench")
ALLOWED = {
    "optimizers": {"torch", "peft"},
    "tasks": {"torch", "transformers", "datasets", "evaluate", "sklearn", "numpy", "tokenizers", "huggingface_hub"},
    "reports": {"tabulate", "matplotlib", "jinja2", "scipy", "numpy"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("leaf", ALLOWED)
def test_a_leaf_imports_none_of_the_other_packages_and_only_its_own_libraries(leaf):
    import sys

    for path in sorted((ROOT / leaf).rglob("*.py")):
        names = set(imported(path)) - {leaf, "__future__"} - sys.stdlib_module_names
        assert not names & set(PACKAGES), f"{path.relative_to(ROOT)} imports {names & set(PACKAGES)}"
        assert names <= ALLOWED[leaf], f"{path.relative_to(ROOT)} imports {names - ALLOWED[leaf]}"


def test_each_file_opens_with_what_it_is():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"
