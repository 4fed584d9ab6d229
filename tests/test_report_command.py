"""`membench report` in the formats that go to files: what is written, what is refused, and how it ends."""

import base64
import builtins
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
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


@pytest.mark.parametrize("ranking", [("--at-memory", "8GiB"), ("--to-target", "accuracy=0.5")])
def test_a_table_is_not_chosen_of_a_ranking(folder, capsys, monkeypatch, ranking):
    code, _, said = report(capsys, monkeypatch, folder, "--table", "memory", *ranking)
    assert code == 2 and "--table chooses among a report's tables, and --at-memory and --to-target make" in said


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


def test_a_pipe_is_written_to_and_a_link_stays_one(folder, tmp_path, capsys, monkeypatch):
    pipe, link = tmp_path / "pipe", tmp_path / "link.md"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    report(capsys, monkeypatch, str(folder), "--format", "markdown", "--out", str(pipe))
    link.symlink_to("page.md")
    report(capsys, monkeypatch, str(folder), "--format", "markdown", "--out", str(link))
    assert link.is_symlink() and pipe.is_fifo()
    assert os.read(reader, 1 << 20) == (tmp_path / "page.md").read_bytes() != b""


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


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; what was sent is kept."""

    refuse = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.asked.append((self.path, body))
        answer = {"url": f"http://{self.headers['Host']}/datasets/me/runs", "errors": [], "warnings": []}
        if "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            answer = {"files": [{**one, "shouldIgnore": False, "oid": None} for one in files]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"http://{self.headers['Host']}/datasets/me/runs/commit/1", "commitOid": "1"}
        text = json.dumps({"error": "No permission."} if self.server.refuse else answer).encode()
        self.send_response(403 if self.server.refuse else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.refuse = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_for_the_test")
    yield server
    server.shutdown()
    server.server_close()


def pushed(hub):
    """What the only upload had, by name."""
    (commit,) = [body for path, body in hub.asked if path.startswith("/api/datasets/me/runs/commit/main")]
    sent = [json.loads(line)["value"] for line in commit.splitlines() if json.loads(line)["key"] == "file"]
    return {one["path"]: base64.b64decode(one["content"]) for one in sent}


def test_two_records_of_one_name_are_both_pushed(hub, tmp_path, capsys, monkeypatch):
    both = [make_record(), make_record(metrics__accuracy=0.25)]
    (tmp_path / "runs.json").write_text(json.dumps(both))
    assert report(capsys, monkeypatch, tmp_path / "runs.json", "--push", "hub:me/runs")[0] == 0
    held = [json.loads(text) for path, text in pushed(hub).items() if path.startswith("records/")]
    assert sorted(one["metrics"]["accuracy"] for one in held) == [0.25, 0.5]


def test_records_and_page_are_pushed_to_a_dataset_repository(hub, folder, capsys, monkeypatch):
    record.write(make_record(seed=7), folder / "tuning")
    code, out, errors = report(capsys, monkeypatch, folder, "--push", "hub:me/runs")
    assert (code, errors) == (0, "") and "me/runs" in out
    created = json.loads(next(body for path, body in hub.asked if path == "/api/repos/create"))
    assert (created["type"], created["name"]) == ("dataset", "runs")
    held = pushed(hub)
    assert {path for path in held if "/" not in path} == {"report.html", "README.md"}
    assert held["report.html"].startswith(b"<!doctype html>") and b"## superglue/rte" in held["README.md"]
    for path in [*folder.glob("*.json"), *folder.glob("tuning/*.json")]:
        assert json.loads(held[f"records/{path.relative_to(folder)}"]) == json.loads(path.read_text())


def test_what_the_hub_refuses_is_a_sentence(hub, folder, capsys, monkeypatch):
    hub.refuse = True
    code, _, errors = report(capsys, monkeypatch, folder, "--push", "hub:me/runs")
    assert code == 2 and errors.startswith("error: --push hub:me/runs: ") and errors.count("\n") == 1
    code, _, errors = report(capsys, monkeypatch, folder, "--push", "me")
    assert (code, errors) == (2, "error: --push me: write hub:USER/NAME, the dataset repository to upload to\n")


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
