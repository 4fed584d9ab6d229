"""What to suggest for an unknown name."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str], unlisted: Iterable[str] = ()) -> str:
    """`Did you mean 'badam'? Available: adamw, badam`; `unlisted` names are suggested but not listed."""
    known = list(known)
    nearest = difflib.get_close_matches(name, [*known, *unlisted], n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}Available: {', '.join(known) or 'none'}"
