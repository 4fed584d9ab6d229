"""What is held out for validation: decided by a hash of each document, so equal ones are on the same side."""

import hashlib

HELD_OUT = 20  # one document in this many is held out


def is_held_out(text: str) -> bool:
    """Is the document in the validation set?"""
    return is_chosen(hash_of(text))


def is_chosen(name: bytes) -> bool:
    """Is the document with this hash held out?"""
    return int.from_bytes(name[:8]) % HELD_OUT == 0


def hash_of(text: str) -> bytes:
    """A hash that identifies a document."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
