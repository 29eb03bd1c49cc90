"""Templates to pages: number formats, and one self-contained HTML file a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from shards.artifact import write_atomically


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page by its template; whatever the values say is escaped."""
    html = _environment().get_template(template).render(**values)
    write_atomically(path, html.encode())


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("flows.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        n=lambda value: "–" if value is None else f"{value:,}",
        percent=lambda value, digits=1: f"{value:.{digits}%}",
        fixed=lambda value, digits=2: "–" if value is None else f"{value:,.{digits}f}",
        sentence=lambda text: f"{text[:1].upper()}{text[1:]}.",
        words=lambda name: name.replace("_", " "),
        when=lambda utc: f"{utc[:10]} {utc[11:19]} UTC",
        megabytes=lambda n_bytes: f"{n_bytes / 1e6:,.1f} MB",
    )
    return environment
