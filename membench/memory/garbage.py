"""Python's garbage collector, where looking for garbage takes long and finds none."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Within this context garbage is collected only where code asks for it, and what is there already isn't garbage.

    Imports make half a million objects: passes over these, again and again, take a second. The meter collects before
    each step, so what it counts doesn't depend on this.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
