"""The documentation: its generated pages are what the methods say now, and no link leads nowhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import command

import optimizers
from manual import choice, method_page, tables
from optimizers.described import hyperparameters

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
STALE = "is stale: run `python -m manual`"


def test_a_hyper_parameter_is_listed_with_its_default_range_and_advice():
    known = {one.name: one for one in hyperparameters(optimizers.get("blockllm"))}
    assert known["patience"][1:] == (
        100,
        "a whole number of at least 1",
        "m, how many past losses the newest is compared with.",
    )
    assert known["sparsity"].allowed == "at least 0 and below 1"
    assert known["rule"].allowed == "one of paper, release"
    assert known["probe_every"].allowed == "a whole number of at least 1 or none"
    assert known["betas"].advice == known["eps"].advice == "as in Adam."
    assert known["rows"].advice.endswith("no positions are kept and nothing is gathered.")  # over several lines


def test_list_methods_prints_one_methods_hyper_parameters_and_refuses_what_it_does_not_know():
    done = command("list", "methods", "badam")
    assert "switch_every = 100   (a whole number of at least 1)\n    K, optimizer steps per block visit." in done.stdout
    assert "Did you mean 'badam'?" in command("list", "methods", "badm").stderr
    assert "list tasks takes no name" in command("list", "tasks", "badam").stderr


def test_a_page_is_what_its_method_says():
    assert (DOCS / "methods" / "badam.md").read_text() == method_page.page("badam"), f"docs/methods/badam.md {STALE}"


def test_a_page_says_where_the_figures_of_the_gpu_are_of_earlier_code():
    (names,) = re.findall(r"but for (.+), whose code has changed", tables.section("docs/gpu.md", method_page._LLAMA))
    told = {name for name in optimizers.available() if "Its code has changed since then" in method_page.page(name)}
    assert told == set(names.split(", "))


def test_the_table_of_methods_is_what_the_registry_says():
    made = method_page.index(optimizers.available())
    assert (DOCS / "methods" / "index.md").read_text() == made, f"docs/methods/index.md {STALE}"


def test_the_decision_page_is_made_from_the_committed_plans():
    assert choice.PAGE.read_text() == choice.page(), f"docs/which-method.md {STALE}"


def test_the_decision_page_says_which_methods_for_pretraining_the_study_has():
    (row,) = [line for line in choice.page().splitlines() if line.startswith("| pretraining from random weights")]
    names = re.findall(r"`([\w-]+)`", row.partition("made for it")[0])
    have = {
        line.split("|")[1].strip()
        for line in (choice.ROOT / "docs/studies/pretraining.md").read_text().splitlines()
        if line.count("|") > 5
    }
    assert [f"`{name}`" for name in names if name in have] == re.findall(r"`[\w-]+`", row.partition("made for it")[2])


@pytest.mark.slow
def test_all_pages_are_what_their_methods_say():
    made = method_page.pages()
    assert {path: text for path, text in made.items() if path.read_text() != text} == {}, f"docs/methods {STALE}"
    assert set(DOCS.glob("methods/*.md")) == set(made)


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizers.available())
def test_each_hyper_parameter_has_a_range_and_advice(name):
    for one in hyperparameters(optimizers.get(name)):
        assert one.allowed and one.advice, f"{name}.{one.name}"


def test_words_are_only_written_of_methods_that_exist():
    assert tomllib.loads((ROOT / "manual" / "words.toml").read_text()).keys() <= set(optimizers.available())


def test_no_link_of_the_documentation_leads_nowhere():
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "switch_every" in (tmp_path / "methods" / "badam" / "index.html").read_text()
    assert "fits" in (tmp_path / "which-method" / "index.html").read_text()
