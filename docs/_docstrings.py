"""Makes the docstrings' own sections into what the site's renderer knows.

``Example:`` becomes ``Examples:``, whose doctests are set as code, and a paragraph that
begins with ``Privacy:`` becomes a section of its own. A Griffe extension, named in
``mkdocs.yml``.
"""

import re
import textwrap
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:[ \t]*$", re.MULTILINE)
_PRIVACY = re.compile(r"^Privacy:[ \t]+(\S.*(?:\n(?!\s*$).+)*)", re.MULTILINE)


def sections(text: str) -> str:
    r"""A docstring with sections that Griffe's Google parser knows.

    Args:
        text: the docstring, without its common indentation.

    Returns:
        The same words, other headings.

    Example:
        >>> print(sections("Adds.\n\nPrivacy: none\nat all."))
        Adds.
        <BLANKLINE>
        Privacy:
            None
            at all.
    """
    text = _EXAMPLE.sub("Examples:", text)
    return _PRIVACY.sub(lambda m: "Privacy:\n" + _block(m.group(1)), text)


def _block(paragraph: str) -> str:
    text = "\n".join(line.strip() for line in paragraph.splitlines())
    return textwrap.indent(text[0].upper() + text[1:], "    ")


class Sections(griffe.Extension):
    """Rewrites every docstring once, before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by Griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = sections(obj.docstring.value)
