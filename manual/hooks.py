"""Hooks of mkdocs: a folder in the navigation is all its pages; a link to a file outside docs/ becomes its path."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)\)")


def on_config(config: Any) -> Any:
    """Folders in the navigation, which end with a slash, become lists of their pages."""
    config["nav"] = _expanded(config["nav"], Path(config["docs_dir"]))
    return config


def _expanded(nav: list[Any], docs: Path) -> list[Any]:
    return [
        {name: _pages(inside, docs) for name, inside in one.items()} if isinstance(one, dict) else one for one in nav
    ]


def _pages(inside: Any, docs: Path) -> Any:
    if isinstance(inside, list):
        return _expanded(inside, docs)
    if not inside.endswith("/"):
        return inside
    found = sorted((docs / inside).glob("*.md"), key=lambda path: (path.stem != "index", path.stem))
    return [{"All" if path.stem == "index" else path.stem: str(path.relative_to(docs))} for path in found]


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with links to other files of the repository as text; such a file must exist."""
    docs = Path(config["docs_dir"])
    folder = (docs / page.file.src_uri).parent

    def told(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {link[2]} doesn't exist")
        return f"{link[1]} (`{target.relative_to(docs.parent)}` in the repository)"

    return _LINK.sub(told, markdown)
