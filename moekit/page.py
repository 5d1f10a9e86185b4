"""Pages that need no network and run no script: one look, in page.css beside this file, and one way to write them."""

import re
import shlex
from pathlib import Path

import jinja2

from moekit import files
from moekit.tables import short


def templates(folder: Path) -> jinja2.Environment:
    """Returns the templates of a folder; they may include page.css, and an unknown name in one is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "quote": shlex.quote}
    return environment


def write(path: Path, page: str) -> Path:
    """Returns `path` after the page is there, whole; control characters, which HTML forbids, are replaced."""
    page = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", page.replace("\r\n", "\n"))
    files.write(path, page)
    return path
