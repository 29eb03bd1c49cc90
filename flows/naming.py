"""Where texts name a donor who must go."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection
from dataclasses import dataclass

# Pictures of a page are letters too.
_PICTURE = re.compile(r"base64,[A-Za-z0-9+/=]+")


@dataclass(frozen=True, slots=True)
class Naming:
    """Finds some names in texts, as whole words; none where `pattern` is None."""

    pattern: re.Pattern[str] | None

    @classmethod
    def of(cls, names: Collection[str]) -> Naming:
        return cls(re.compile("|".join(map(_one, sorted(names)))) if names else None)

    def is_in(self, text: str) -> bool:
        return self.pattern is not None and self.pattern.search(text) is not None

    def is_in_page(self, page: str) -> bool:
        return self.is_in(html.unescape(_PICTURE.sub("", page)))

    def without_lines(self, data: bytes) -> bytes:
        """The lines of a text that name nobody."""
        lines = data.splitlines(keepends=True)
        return b"".join(x for x in lines if not self.is_in(x.decode(errors="replace")))

    def without_keys(self, data: bytes) -> bytes:
        """A JSON object without the keys that name somebody; none of them where it is torn."""
        try:
            entries = json.loads(data)
        except ValueError:
            entries = {}
        rest = {key: value for key, value in entries.items() if not self.is_in(key)}
        return data if rest == entries else json.dumps(rest, indent=0, sort_keys=True).encode()


def _one(name: str) -> str:
    if len(name) > 1 and not name.isdigit():
        return rf"(?<!\w){re.escape(name)}(?!\w)"
    # A letter or a number is a name where it stands as one: quoted, or alone in a table's cell.
    return rf"(?<=['\">]){re.escape(name)}(?=['\"<])"
