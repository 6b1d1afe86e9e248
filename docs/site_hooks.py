"""What `mkdocs.yml` needs beyond its plugins: links out of docs/, and the list of public names.

A link to a file of the repository that is not part of the site becomes the file's name. The marker
PUBLIC_NAMES in api.md becomes one entry for each public name, grouped by the module that holds it.
"""

import os
import re
from typing import Any

import anybatch

LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")
IMAGE_LINK = re.compile(r"\[!\[([^\]]*)\]\(([^)]*)\)\]\(([^)]*)\)")
PUBLIC_NAMES = "<!-- every public name -->"


def name_files_outside(markdown: str, page: str) -> str:
    """Replace links that leave docs/ by the text and the path in the repository."""
    folder = os.path.dirname(page)

    def replace(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        if "://" in target:
            return match.group()
        path = os.path.normpath(os.path.join("docs", folder, target))
        if path.startswith("docs/"):
            return match.group()
        return f"{text} (`{path}`)" if text.strip("`") != path else f"`{path}`"

    return LINK.sub(replace, markdown)


def list_public_names() -> str:
    """Return an entry of mkdocstrings for each public name."""
    homes: dict[str, list[str]] = {}
    for name in anybatch.__all__:
        value = getattr(anybatch, name)
        homes.setdefault(value.__module__, []).append(value.__qualname__)
    entries = [f"::: {module}.{name}" for module in sorted(homes) for name in sorted(homes[module])]
    return "\n\n".join(entries)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    markdown = markdown.replace(PUBLIC_NAMES, list_public_names())
    return name_files_outside(markdown, page.file.src_uri)
