"""What the tests of data share: all documents of some files and folders, as `prepare` reads them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from moekit.data.text import Document, file_documents, text_files


@pytest.fixture(scope="session")
def read_documents() -> Callable[..., Iterator[Document]]:
    def read(paths: Iterable[Path], text_field: str = "text", domain_field: str = "domain") -> Iterator[Document]:
        for path, folder in text_files(paths).items():
            with path.open("rb") as raw:
                yield from file_documents(path, raw, text_field, domain_field, folder)

    return read
