"""What the command line reports as one sentence instead of a traceback, and other errors in a line."""

import traceback


class UserError(Exception):
    """A request that can't be carried out: the message has the value and the way out."""


def explain(error: BaseException) -> str:
    """An error in one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}{place}" if text else f"{type(error).__name__}{place}"
