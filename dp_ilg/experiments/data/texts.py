"""English that comes with Python: documentation and comments of its standard library.

Windows of words to be continued, without any download. The text differs a little
between versions of Python, so a digest of it is part of the data set's note.
"""

import collections
import functools
import hashlib
import itertools
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUM_TOKENS = 4096
WINDOW = 16
UNKNOWN = 0
_TEST_EVERY = 10
_WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]")
_ASIDE = {"site-packages", "test", "tests", "idle_test", "pydoc_data"}
_STRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_COMMENT = re.compile(r"^[ \t]*#+ ?(.*)$", re.MULTILINE)


class Windows(NamedTuple):
    """Texts cut into windows.

    Attributes:
        train: int32[N, WINDOW + 1] word ids by falling frequency; 0 is a rare word.
        test: the same of other files.
        digest: of all the text.

    Example:
        >>> Windows(np.zeros((2, 17)), np.zeros((1, 17)), "").train.shape
        (2, 17)
    """

    train: np.ndarray
    test: np.ndarray
    digest: str


@functools.lru_cache(maxsize=1)  # the runs of a sweep share it
def read_windows(root: Path | None = None) -> Windows:
    """Reads the text of Python's library and cuts it into windows of words.

    Every tenth file, and every tenth topic of `help()`, is for testing. Windows do not
    overlap, so that a word is part of one example only, and none runs over the end of a
    file. A paragraph that stands in several files is kept once.

    Args:
        root: a folder of Python files; by default the standard library.

    Returns:
        The windows; the last 16 words of each continue the first 16.

    Privacy:
        The text is public. Where it stands for private text: the vocabulary and its
        order come from the training files and no guarantee covers them.

    Example:
        >>> from email import message
        >>> windows = read_windows(Path(message.__file__).parent)
        >>> windows.train.shape[1], bool(windows.train.max() < NUM_TOKENS)
        (17, True)
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts = list(_texts(root))
    counts = collections.Counter(
        itertools.chain.from_iterable(words for is_test, words in texts if not is_test)
    )
    order = sorted(counts, key=lambda word: (-counts[word], word))
    ids = {word: i + 1 for i, word in enumerate(order[: NUM_TOKENS - 1])}
    train, test = (_cut((w for t, w in texts if t == p), ids) for p in (False, True))
    digest = hashlib.sha256("\n".join(" ".join(w) for _, w in texts).encode())
    return Windows(train, test, digest.hexdigest()[:16])


def _texts(root: Path) -> Iterator[tuple[bool, list[str]]]:
    """For each source of text whether it is for testing, and its words."""
    seen: set[str] = set()
    for i, parts in enumerate(_sources(root)):
        text = "\n".join(_new(parts, seen))
        yield i % _TEST_EVERY == 0, _WORD.findall(text.lower())


def _sources(root: Path) -> Iterator[list[str]]:
    """Documentation and comments of each file, then the topics of `help()`."""
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    for path in paths:
        if not _ASIDE & set(path.split("/")):
            code = (root / path).read_text(encoding="utf-8", errors="ignore")
            strings = _STRING.findall(code)
            yield [*strings, "\n".join(_COMMENT.findall(_STRING.sub("", code)))]
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield [topics[name]]


def _new(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Paragraphs that were in no earlier text."""
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            if paragraph not in seen:
                seen.add(paragraph)
                yield paragraph


def _cut(texts: Iterable[list[str]], ids: dict[str, int]) -> np.ndarray:
    windows = []
    for words in texts:
        found = np.array([ids.get(word, UNKNOWN) for word in words], np.int32)
        whole = len(found) - len(found) % (WINDOW + 1)
        windows.append(found[:whole].reshape(-1, WINDOW + 1))
    cut = np.concatenate([np.empty((0, WINDOW + 1), np.int32), *windows])
    cut.flags.writeable = False
    return cut
