"""The error that the command line reports as one sentence instead of a traceback, and other errors on one line."""

import contextlib
import errno
import functools
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class UserError(ValueError):
    """A request that can't be carried out: the message gives the value and the way out."""


def told_in_a_sentence(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Turn any ValueError that `function` raises into a `UserError`."""

    @functools.wraps(function)
    def tell(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    return tell


def explain(error: BaseException) -> str:
    """An error on one line, with the place where it was raised: in a user's own code, if it has been there."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = own_code(error) or (frames[-1] if frames else None)
    place = f" ({frame.filename}:{frame.lineno})" if frame else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}{place}" if text else f"{type(error).__name__}{place}"


def log_traceback() -> None:
    """Print where the error came from that is being handled; a log whose disk is full doesn't take its place."""
    with contextlib.suppress(OSError):
        traceback.print_exc()


_ROOT = Path(__file__).resolve().parent.parent.parent
_OURS = [str(_ROOT / name) for name in ("membench", "optimizers", "tasks", "reports")]
_LIBRARIES = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]


def own_code(error: BaseException) -> traceback.FrameSummary | None:
    """The last place that an error went through in a user's own module, which is neither ours nor a library's."""
    plugins = _plugins()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    return next((one for one in reversed(frames) if one.filename in plugins or is_own(one.filename)), None)


def is_own(file: str) -> bool:
    """Is it a user's own, neither ours nor a library's?"""
    return not file.startswith(tuple(f"{place}/" for place in (*_OURS, *_LIBRARIES)))


def _plugins() -> set[str | None]:
    """Files of methods and tasks from outside: a user's own, even where they are installed beside the libraries."""
    loaders = [sys.modules[name] for name in ("optimizers.registry", "tasks.plugins") if name in sys.modules]
    names = {name for loader in loaders for name in loader.PLUGGED_IN if name in sys.modules}
    return {sys.modules[name].__file__ for name in names}


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def about_file(error: OSError) -> str:
    """What the system said of a file, and of which; where it says none, it is what was printed."""
    if error.filename is None and error.errno == errno.ENOENT:  # of asking where we are
        return "the current folder has been deleted: change to another one"
    way_out = "; make room there, or choose another folder" if error.errno in NO_ROOM else ""
    name = error.filename2 if error.filename2 is not None else error.filename  # of two, what was to become of the first
    where = f"{name}: " if name is not None else "the output can't be written: " if way_out else ""
    return f"{where}{error.strerror or error}{way_out}"
