"""Pages that need no network: one look, in head.html and page.css beside this file, and one way to write them."""

import re
import shlex
from pathlib import Path

import jinja2

from moekit import files
from moekit.tables import short


def templates(folder: Path) -> jinja2.Environment:
    """Returns the templates of a folder; they may include head.html; an unknown name is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "quote": shlex.quote}
    return environment


def allowed(page: str) -> str:
    """Returns the page with U+FFFD for the control characters that HTML forbids; text of models may hold any."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", page.replace("\r\n", "\n"))


def write(path: Path, page: str) -> Path:
    """Returns `path` after the page is there, whole."""
    files.write(path, allowed(page))
    return path
