"""What to suggest for an unknown name."""

import difflib
from collections.abc import Iterable, Mapping


def suggestion(name: str, known: Iterable[str], called: Mapping[str, str] | None = None) -> str:
    """`Did you mean 'superglue/rte'? Available: superglue/boolq, ...`; `called`: other words for a name."""
    known = list(known)
    meant = {one: one for one in known} if called is None else called
    begun = [one for one in meant if name and one.startswith(name)]
    nearest = begun or difflib.get_close_matches(name, meant, n=1)
    hint = f"Did you mean {meant[nearest[0]]!r}? " if nearest else ""
    return f"{hint}Available: {', '.join(known) or 'none'}"
