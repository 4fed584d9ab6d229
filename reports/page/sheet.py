"""What all pages are made of: one HTML file with its style and its script in it, without a network."""

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from reports.figures import svg
from reports.figures.style import printable


def fill(template: str, styles: Sequence[str], scripts: Sequence[str], **values: Any) -> str:
    """A template of this folder with its values, and `style`, `script` and `allowed`: no other script runs."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_readable, trim_blocks=True)
    environment.filters["svg"] = svg.inline
    script = "\n".join(map(_file, scripts))
    return environment.from_string(_file(template)).render(
        style="\n".join(map(_file, styles)),
        script=script,
        allowed=b64encode(sha256(f"\n{script}\n".encode()).digest()).decode(),
        **values,
    )


def _readable(value: Any) -> Any:
    """Names and errors are anybody's text: control signs and halves of surrogates don't belong into HTML."""
    return printable(value) if type(value) is str else value


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
