"""What the server imports before it forks, so that a child starts at once. Nothing here may start a thread."""

from membench.runs import prepare  # noqa: F401
from membench.training import execute  # noqa: F401
from tasks import c4, classify, instruct, superglue  # noqa: F401
