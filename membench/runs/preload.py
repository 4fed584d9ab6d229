"""What the server imports before it forks, so that a child starts at once. Nothing here may start a thread."""

from . import execute, runs  # noqa: F401
