"""Pages that need no network: templates, which can include the style that all share, and text that HTML allows."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def templates(folder: Path, **filters: Callable[..., Any]) -> jinja2.Environment:
    """Returns the templates of a folder; what they show is escaped, and a name that is not given is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= filters
    return found


def allowed(page: str) -> str:
    """Returns the page with U+FFFD for the control characters that HTML forbids; text of models may hold any."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", page.replace("\r\n", "\n"))
