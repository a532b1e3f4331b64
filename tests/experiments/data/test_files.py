"""Readers of untrusted files: arrays or one `DataError`, and little memory."""

import gzip
import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_ilg.experiments.data.files import DataError, read_idx, read_npz
from tests.experiments.data.test_datasets import IMAGES, LABELS, idx


def _npz_with(path: Path, member: bytes, method=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", member)


def _npy_header(shape: str, descr="|u1", version=1) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()


@pytest.mark.parametrize(
    ("shape", "descr", "version"),
    [
        ("(10000000000000,)", "|u1", 1),
        ("(10000000000000, 10000000000000)", "<f8", 1),
        ("(-1,)", "|u1", 1),
        ("(-1, -8)", "|u1", 1),
        ("(1000000000,)", "<U0", 1),
        ("(1,)", "<U100000000", 1),
        ("(9,)", "|u1", 3),
        ("(9,)", "|O", 2),
        ("'nine'", "|u1", 2),
        ("(9,)", "nonsense", 1),
        ("((((((((", "|u1", 1),
    ],
)
def test_npy_headers_that_lie(tmp_path, shape, descr, version):
    path = tmp_path / "a.npz"
    _npz_with(path, _npy_header(shape, descr, version) + b"12345678")
    with pytest.raises(DataError), _little_memory():
        read_npz(path, ["a"])


def test_zip_bombs_and_unusual_packing(tmp_path):
    path = tmp_path / "a.npz"
    header = _npy_header("(8,)")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        _npz_with(path, header + b"12345678", method)
        with pytest.raises(DataError, match="savez_compressed"):
            read_npz(path, ["a"])
    _npz_with(path, header + b"12345678")
    content = bytearray(path.read_bytes())
    huge = struct.pack("<I", 2**31)
    place = content.rfind(b"PK\x01\x02") + 20  # both sizes in the central directory
    content[place : place + 8] = huge * 2
    path.write_bytes(content)
    with pytest.raises(DataError), _little_memory():
        read_npz(path, ["a"])


# ------------------------------------------------------------------ damaged IDX


GOOD = idx(LABELS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "nothing"),
        (GOOD[:3], "000008"),
        (GOOD[:6], "no readable IDX"),
        (GOOD[:-1], "fewer"),
        (GOOD + b"!", "more"),
        (idx(IMAGES), "00000803"),
        (bytes([0, 0, 9, 1]) + GOOD[4:], "00000901"),
        (b"\x1f\x8b" + GOOD, "1f8b"),
        (GOOD[:4] + b"\xff\xff\xff\xff" + GOOD[8:], "4294967295"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx(tmp_path, content, words, packed):
    path = tmp_path / ("labels.gz" if packed else "labels")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=words) as caught, _little_memory():
        read_idx(path, 1)
    assert str(path) in str(caught.value)


def test_idx_of_huge_images(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"12")
    with pytest.raises(DataError, match="fewer"), _little_memory():
        read_idx(path, 3)


@pytest.mark.parametrize("cut", [0, 5, 15, -9, -1])
def test_cut_gzip(tmp_path, cut):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(GOOD)[:cut])
    with pytest.raises(DataError, match="labels.gz"):
        read_idx(path, 1)


def test_absent_file_and_folder_in_its_place(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        for read in (lambda p: read_idx(p, 1), lambda p: read_npz(p, ["a"])):
            with pytest.raises(DataError, match="cannot be opened"):
                read(path)


# ---------------------------------------------------------------------- fuzz


class _little_memory:
    """Asserts that no more than 16 MiB were asked for at any one time."""

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, *_):
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20


def _npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=LABELS, b=np.array(["x", "yz"]))
    return buffer.getvalue()


def _npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, LABELS)
    return buffer.getvalue()


@st.composite
def mutated(draw, whole: bytes):
    """Bytes at random, or a good file with some bytes changed, cut or repeated."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=64))
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        new = draw(st.binary(max_size=8))
        content[place : place + draw(st.integers(0, 8))] = new
    return bytes(content)


def _reads_or_data_error(read) -> None:
    """Runs a reader; whatever the bytes, it gives arrays or a `DataError`."""
    with _little_memory():
        try:
            read()
        except DataError as error:
            assert str(error).endswith(".") and "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(content=mutated(idx(IMAGES[:2, :3, :3])), num_axes=st.integers(1, 3))
def test_fuzz_idx(tmp_path_factory, content, num_axes):
    path = tmp_path_factory.getbasetemp() / "fuzz-idx"
    path.write_bytes(content)
    _reads_or_data_error(lambda: read_idx(path, num_axes))


@settings(max_examples=150, deadline=None)
@given(content=mutated(gzip.compress(idx(LABELS), mtime=0)))
def test_fuzz_gzipped_idx(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz-idx.gz"
    path.write_bytes(content)
    _reads_or_data_error(lambda: read_idx(path, 1))


@settings(max_examples=200, deadline=None)
@given(content=mutated(_npz_bytes()))
def test_fuzz_npz(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.npz"
    path.write_bytes(content)
    _reads_or_data_error(lambda: read_npz(path, ["a", "b"]))


@settings(max_examples=200, deadline=None)
@given(member=mutated(_npy_bytes()))
def test_fuzz_npy_in_a_sound_zip(tmp_path_factory, member):
    path = tmp_path_factory.getbasetemp() / "fuzz-member.npz"
    _npz_with(path, member)
    _reads_or_data_error(lambda: read_npz(path, ["a"]))


def test_the_fuzzed_files_are_good_before_they_are_changed(tmp_path):
    """Otherwise the fuzz would only ever see the first check."""
    path = tmp_path / "a.npz"
    path.write_bytes(_npz_bytes())
    assert read_npz(path, ["a", "b"])["b"].tolist() == ["x", "yz"]
    _npz_with(path, _npy_bytes())
    assert np.array_equal(read_npz(path, ["a"])["a"], LABELS)
