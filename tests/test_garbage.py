"""Garbage is left alone where it is asked for, and looked for again afterwards."""

import gc

import pytest

from membench.memory.garbage import collected_by_hand


@pytest.mark.parametrize("enabled", [True, False])
def test_within_the_context_nothing_is_collected_unasked_and_afterwards_all_is_as_before(enabled):
    before = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyError), collected_by_hand():
            assert not gc.isenabled() and gc.get_freeze_count() > before[1]
            raise KeyError
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == 0
    finally:
        (gc.enable if before[0] else gc.disable)()
