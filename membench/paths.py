"""Where Python looks for modules."""

import os
import sys
from pathlib import Path


def leave_out_current_folder() -> None:
    """Don't look in the current folder, which may be anybody's: a model that was downloaded, a folder of data.
    Libraries try to import many others that aren't there, and would run whatever file has such a name.

    Where a user names a module of their own, who imports it looks there, too. A folder that is in PYTHONPATH is wanted,
    but last, so that its modules don't shadow ours; that from which membench itself was loaded stays where it is.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:  # somebody has deleted it
        return
    others = [path for path in sys.path if path not in ("", str(here))]
    if here == Path(__file__).resolve().parent.parent:
        sys.path[:] = [str(here), *others]
    else:
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        wanted = any(Path(path).resolve() == here for path in given)
        sys.path[:] = [*others, *([str(here)] if wanted else [])]
