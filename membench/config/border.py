"""The border of the command line: whatever a command throws ends as one sentence, and only our own faults as more.

A sentence is for what users can mend: a value, a file, a module of theirs, a full disk. Anything else is a fault of
membench, and says so. `--traceback` shows where any error comes from.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from membench.config.errors import NO_ROOM, UserError, about_file, explain, own_code
from reports.names import printable

MISTAKE, OWN_FAULT, BROKEN_PIPE = 2, 70, 141  # 70: EX_SOFTWARE of sysexits.h; 141: as shells count SIGPIPE
TRACEBACK = "--traceback"
_LONGEST_WORD = 300  # letters: a path may have more, but nobody reads them
_REPORT = (
    "This is a fault of membench's own, not of what you gave. Please report it with the command, the lines above and "
    "what `membench --version` prints."
)


def run(command: Callable[[], object], arguments: Sequence[str]) -> int:
    """Call `command`, which reads the command line by itself; returns the exit code.

    Args:
        command: leaves with SystemExit.
        arguments: of the command line, to find what is empty or asks for a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files needn't be Unicode, and not every terminal writes it
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_emptiness(arguments)
        return _exit_code(command)
    except Exception as error:
        return _tell(error, show=TRACEBACK in arguments)


def _check_emptiness(arguments: Sequence[str]) -> None:
    """An empty text is mostly a variable of a shell that isn't set."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, value = argument.partition("=")
        if not argument.strip() or (flag.startswith("--") and equals and not value.strip()):
            name = flag if flag.strip() else before if before.startswith("-") else "an argument"
            raise UserError(f"{name} is empty: give a value, or leave it out")


def _exit_code(command: Callable[[], object]) -> int:
    output, code = sys.stdout, None
    try:
        try:
            command()
        except SystemExit as exit:
            code = exit.code
        if output is not None:  # it is None if it was closed from the start
            output.flush()
    except OSError as error:
        if error.filename is None and error.errno in (errno.EPIPE, *NO_ROOM):  # of what was printed
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())  # or Python tries again when it ends
        if not isinstance(error, BrokenPipeError):
            raise
        return BROKEN_PIPE
    if sys.stdout is not output:  # click puts another one in its place when nobody reads any more
        return BROKEN_PIPE
    return code if isinstance(code, int) else int(code is not None)


def _tell(error: Exception, *, show: bool) -> int:
    sentence = _sentence(error)
    if show or sentence is None:
        traceback.print_exception(error)
    if sentence is None:
        print(_REPORT, file=sys.stderr)
        return OWN_FAULT
    print(f"error: {printable(_readable(sentence))}", file=sys.stderr)
    return MISTAKE


def _readable(sentence: str) -> str:
    """On one line, with what is long beyond reading (a damaged file's key, a folder's name) cut in the middle."""
    cut = re.compile(rf"(\S{{{_LONGEST_WORD // 2}}})\S{{{_LONGEST_WORD // 2},}}(\S{{20}})")
    return cut.sub(r"\1...\2", " ".join(sentence.splitlines()))


def _sentence(error: Exception) -> str | None:
    """What to say of what a user can mend; None of a fault of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return about_file(error)
    if isinstance(error, MemoryError):
        return "this machine hasn't the memory for it"
    return explain(error) if own_code(error) else None
