"""The page: panels in a frame, with style, scripts and data inside the one file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from retrograd.report.pack import pack
from retrograd.report.panel import Content

__all__ = ["Block", "Section", "as_json", "numbers", "render", "render_markdown"]


class Block(NamedTuple):
    """A panel in its place on the page."""

    id: str
    name: str
    title: str
    content: Content


class Section(NamedTuple):
    """A subject's panels."""

    name: str
    folder: str
    blocks: list[Block]


def render(title: str, sections: Sequence[Section], tables: dict[str, Content], masked: str) -> str:
    """The page as HTML.

    Args:
        tables: Arrays that several panels share.
        masked: What is hidden, in words; nothing if empty.
    """
    names = list(dict.fromkeys(block.name for section in sections for block in section.blocks))
    return _environment().get_template("page.html").render(
        title=title, sections=sections, tables=tables, names=names, masked=masked, pack=pack,
    )  # fmt: skip


def render_markdown(template: str, **values: Any) -> str:
    """A template of Markdown, in which nothing is escaped but by itself."""
    return _environment().get_template(template).render(**values)


def as_json(value: Any) -> Markup:
    """JSON for a script element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def numbers(value: float | None, digits: int = 3) -> str:
    """A number for people."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.{digits - 1}e}"


def size(count: int) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.3g} GiB"


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    plain = " ".join(text.split())
    for sign in "\\`*_[]<>|":
        plain = plain.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return plain


def files(contents: Iterable[Content]) -> list[str]:
    """The files that contents come from, each once."""
    return list(dict.fromkeys(str(source.file) for content in contents for source in content.sources))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("retrograd.report"), autoescape=_escaped,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"json": as_json, "number": numbers, "size": size, "cell": cell}
    environment.globals["asset"] = lambda name: Markup(_source(environment, name))
    return environment


def _escaped(name: str | None) -> bool:
    """Everything but Markdown, and styles and scripts of our own."""
    return not (name or "").endswith((".md", ".js", ".css"))


def _source(environment: jinja2.Environment, name: str) -> str:
    """A style sheet or a script as it stands."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
