"""What the server imports before it forks, so that a child starts at once. Nothing here may start a thread."""

import gc

gc.disable()  # what is imported isn't garbage, and looking for some takes a seventh of the time

from membench.runs import prepare  # noqa: E402, F401
from membench.training import execute  # noqa: E402, F401
from tasks import c4, classify, dpo, instruct, superglue  # noqa: E402, F401

gc.enable()
gc.collect()
gc.freeze()  # the meter collects before each step: that would copy each page of it
