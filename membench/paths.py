"""Where modules are looked for."""

import sys
from pathlib import Path


def put_current_folder_last() -> None:
    """Look in the current folder last: it has the user's own methods, but no module there may stand in for one of ours.

    The folder that membench itself was loaded from stays where it is.
    """
    here = Path.cwd()
    if here == Path(__file__).resolve().parent.parent:
        sys.path[:] = [str(here), *(path for path in sys.path if path not in ("", str(here)))]
    else:
        sys.path[:] = [*(path for path in sys.path if path not in ("", str(here))), str(here)]
