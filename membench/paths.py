"""Where Python looks for modules."""

import sys
from pathlib import Path


def put_current_folder_last() -> None:
    """Look in the current folder last: it has the user's own methods, but its modules must not shadow ours.

    The folder from which membench itself was loaded stays where it is.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:  # somebody has deleted it
        return
    if here == Path(__file__).resolve().parent.parent:
        sys.path[:] = [str(here), *(path for path in sys.path if path not in ("", str(here)))]
    else:
        sys.path[:] = [*(path for path in sys.path if path not in ("", str(here))), str(here)]
