"""The error that the command line reports as one sentence instead of a traceback, and other errors on one line."""

import functools
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class UserError(ValueError):
    """A request that can't be carried out: the message gives the value and the way out."""


def told_in_a_sentence(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Turn any ValueError that `function` raises into a `UserError`."""

    @functools.wraps(function)
    def tell(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    return tell


def explain(error: BaseException) -> str:
    """An error on one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}{place}" if text else f"{type(error).__name__}{place}"
