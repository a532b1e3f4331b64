"""Sentences of a Markdown page: what is left without code, tables and headings."""

import re

_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[^\n]*$", re.MULTILINE | re.DOTALL)
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
_SKIPPED = re.compile(r"^\s*(?:#|\||!!!|\?\?\?|===|:::|--8<--|</?\w)")
_END = re.compile(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_\[]*[A-Z0-9`])")
_NO_END = re.compile(r"\b(?:et al|e\.g|i\.e|vs|No|cf|Sec|Eq|Fig)\.$")


def sentences(markdown: str) -> list[str]:
    """The sentences of a page; an item of a list ends one."""
    return [s for part in _paragraphs(markdown) for s in _split(part)]


def length(sentence: str) -> int:
    """The number of words; inline code counts as one."""
    sentence = re.sub(r"`[^`]*`", "code", sentence)
    return len([w for w in sentence.split() if re.search(r"\w", w)])


def _paragraphs(markdown: str) -> list[str]:
    text = _COMMENT.sub("", _FENCE.sub("", _FRONT.sub("", markdown)))
    found = [""]
    for line in _LINK.sub(r"\1", text).splitlines():
        if not line.strip() or _SKIPPED.match(line):
            found.append("")
        elif _ITEM.match(line):
            found.append(_ITEM.sub("", line))
        else:
            found[-1] += " " + line.strip()
    return [part.strip() for part in found if part.strip()]


def _split(paragraph: str) -> list[str]:
    whole: list[str] = []
    for piece in _END.split(paragraph):
        if whole and _NO_END.search(whole[-1]):
            whole[-1] += " " + piece
        else:
            whole.append(piece)
    return [s for s in whole if length(s)]
