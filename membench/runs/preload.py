"""What the server imports before it forks, so that a child starts at once. Nothing here may start a thread."""

import gc

from membench.runs import prepare  # noqa: F401
from membench.training import execute  # noqa: F401
from tasks import c4, classify, dpo, instruct, superglue  # noqa: F401

gc.collect()
gc.freeze()  # what is imported isn't garbage, and the meter collects before each step: that would copy each page of it
