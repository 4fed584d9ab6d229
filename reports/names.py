"""Names as they are shown, and what to say of one that nothing has."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str], unlisted: Iterable[str] = ()) -> str:
    """`Did you mean 'badam'? Available: adamw, badam`; what is `unlisted` may be meant, too."""
    known = list(known)
    meant = [*known, *unlisted]
    begun = [one for one in meant if name and one.startswith(name)]  # a100: a100-40g rather than a10
    nearest = begun or difflib.get_close_matches(name, meant, n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}Available: {', '.join(known) or 'none'}"


def printable(text: str) -> str:
    """A text of which a terminal shows every letter: control signs, ends of lines and halves of pairs are escaped."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def counted(count: int | str, what: str) -> str:
    """`1 run`, `2 runs`; a count may be a text, such as `2 to 4`."""
    return f"{count} {what}" + ("" if str(count) == "1" else "s")


def batch_text(size: int | str, length: int | str, task: str | None) -> str:
    """`8 x 32 tokens`: a batch of sequences; of `task` "dpo" `8 x 2 x 32 tokens`, since it is one of pairs of them."""
    pairs = "2 x " if task == "dpo" else ""
    return f"{size} x {pairs}{length} tokens"
