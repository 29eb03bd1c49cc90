"""A written page as a test reads it: tags, pictures, links, tables and text."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image


class Page(HTMLParser):
    """Tags, images by source and title, links, tables as rows of cell texts by section id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.titles: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._section = ""
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if tag == "img":
            self.images.append(given["src"] or "")
            self.titles.append((given["alt"] or "").partition(":")[0])
        if tag == "a":
            self.links.append(given["href"] or "")
        if tag == "section":
            self._section = given["id"] or ""
        if tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self._in_cell = True
            self.tables[self._section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[self._section][-1][-1] += data.strip()

    def number(self, section: str, name: str) -> int:
        """The first figure of the row of a section's tables that starts with `name`."""
        row = next(r for r in self.tables[section] if r and r[0] == name)
        return int(row[1].lstrip("− ").replace(",", ""))


def decoded(uri: str) -> Image.Image:
    head, data = uri.split(",", 1)
    assert head in ("data:image/jpeg;base64", "data:image/png;base64")
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    picture.load()
    return picture
