"""What a child process of the tests does; light, so that it is at work at once."""

import os
import time
from pathlib import Path


def announce_and_wait(file, send):
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def echo(value, send):
    send("message", "on the way")
    return value


def variable(name, send):
    """An environment variable of this process."""
    return os.environ.get(name)
