"""The command in the tests' own process, which shares its server of children, and the least data to run it on."""

import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from membench.cli import main

DATA = str(Path(__file__).resolve().parent / "data" / "superglue")  # 16 and 8 of the demo's rows of CB


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str, cwd: str | Path = ".") -> Done:
    """`membench *arguments` in the folder `cwd`."""
    path, argv = list(sys.path), sys.argv
    sys.argv = ["membench", *arguments]
    out, err = StringIO(), StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.path[:], sys.argv = path, argv
    return Done(code, out.getvalue(), err.getvalue())
