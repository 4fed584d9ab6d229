"""What to suggest for an unknown name."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str], unlisted: Iterable[str] = ()) -> str:
    """`Did you mean 'badam'? Available: adamw, badam`; `unlisted` names are suggested but not listed."""
    known = list(known)
    meant = [*known, *unlisted]
    begun = [one for one in meant if name and one.startswith(name)]  # a100: a100-40g rather than a10
    nearest = begun or difflib.get_close_matches(name, meant, n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}Available: {', '.join(known) or 'none'}"
