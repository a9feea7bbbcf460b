"""What the site needs beyond mkdocs: links out of docs/ become names of files, and doctests become blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")
_DOCTEST = re.compile(r"^( *)>>> .*(?:\n(?!\s*\n| *```).+)*", re.MULTILINE)


def on_page_markdown(text: str, **_: Any) -> str:
    """A page's text without links to what is no page of the site."""
    return _OUTSIDE.sub(r"\1 (`\2`)", text)


class Doctests(griffe.Extension):
    """Examples in docstrings as code: elsewhere in the text brackets would be links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence the examples of an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
