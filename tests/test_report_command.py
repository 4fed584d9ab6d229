"""`membench report` in the formats that go to files: what is written, what is refused, and how it ends."""

import builtins
import sys

import pytest
from reports_factory import make_record

from membench.cli import main
from reports import record


@pytest.fixture
def folder(tmp_path):
    for method in ("adamw", "badam"):
        record.write(make_record(method=method), tmp_path / "runs")
    return tmp_path / "runs"


def report(capsys, monkeypatch, *arguments):
    """Exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["membench", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code or 0, *capsys.readouterr()


def test_a_page_is_written_where_it_is_wanted_and_named(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "report.html"
    assert report(capsys, monkeypatch, folder, "--format", "html", "--out", out) == (0, f"{out}\n", "")
    assert out.read_text().startswith("<!doctype html>")


def test_without_a_place_a_page_is_printed(folder, capsys, monkeypatch):
    code, out, _ = report(capsys, monkeypatch, folder, "--format", "html")
    assert code == 0 and out.rstrip().endswith("</html>")


def test_plots_are_files_in_a_folder_and_need_one(folder, tmp_path, capsys, monkeypatch):
    code, out, _ = report(capsys, monkeypatch, folder, "--format", "plots", "--out", tmp_path / "plots")
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert (code, out) == (0, f"{len(written)} files in {tmp_path / 'plots'}\n")
    assert {"memory.svg", "memory.png", "pareto.svg", "step-time.png", "coverage.svg"} <= set(written)
    assert report(capsys, monkeypatch, folder, "--format", "plots")[::2] == (
        2,
        "error: --format plots writes files: say where with --out FOLDER.\n",
    )


def test_tables_go_to_a_file_too(folder, tmp_path, capsys, monkeypatch):
    report(capsys, monkeypatch, folder, "--format", "markdown", "--out", tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text().startswith("## superglue/rte")


def test_what_is_no_record_is_named_and_the_rest_is_on_the_page(folder, tmp_path, capsys, monkeypatch):
    (folder / "cut.json").write_text('{"schema": 1')
    (folder / "empty.json").write_text("")
    (folder / "future.json").write_text('{"schema": 99}')
    code, _, errors = report(capsys, monkeypatch, folder, "--format", "html", "--out", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert code == 1
    for name in ("cut.json", "empty.json", "future.json"):
        assert name in errors and name in html
    assert "badam" in html


def test_a_place_that_cannot_be_written_is_a_sentence(folder, tmp_path, capsys, monkeypatch):
    code, _, errors = report(capsys, monkeypatch, folder, "--format", "html", "--out", tmp_path)
    assert code == 2 and errors.startswith("error: ") and "can't be written" in errors and errors.count("\n") == 1


def test_without_matplotlib_the_way_to_get_it_is_said_and_tables_still_work(folder, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name.startswith("reports.")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, errors = report(capsys, monkeypatch, folder, "--format", "html")
    assert (code, errors) == (2, "error: Pages and plots need matplotlib: pip install 'membench[page]'.\n")
    assert report(capsys, monkeypatch, folder)[0] == 0
