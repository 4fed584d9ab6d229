"""What the command line reports as one sentence instead of a traceback."""


class UserError(Exception):
    """A request that can't be carried out: the message has the value and the way out."""
