"""Folders of shards: the rows that were written, or none; in constant memory."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import unittest.mock

import numpy as np
import pytest

from dp_ilg.experiments.cli.main import main
from dp_ilg.experiments.data import shard_rows, shards
from dp_ilg.experiments.data.datasets import Dataset, load_dataset
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.folders import (
    is_folder_name,
    load_folder,
    save_dataset,
)
from dp_ilg.experiments.data.shards import ShardedArray, open_shards, write_shards
from dp_ilg.sampling.gather import take
from dp_ilg.training.sources import GatheredSource, Source

N = 23
X = np.arange(N * 6, dtype=np.float32).reshape(N, 2, 3)
Y = np.arange(N, dtype=np.uint16)
TREE = {"x": (X, Y), "y": Y + 1}


@pytest.fixture
def folder(tmp_path):
    return write_shards(TREE, tmp_path / "rows", rows_per_shard=5)


@pytest.mark.parametrize("indices", [[0], [22, 0, 7, 7], list(range(N)), [4, -1, 5]])
def test_rows_come_back_from_any_shard_in_any_order(folder, indices):
    found = take(open_shards(folder), np.array(indices))
    known = take({"x.0": X, "x.1": Y, "y": Y + 1}, np.array(indices))
    assert found.keys() == known.keys()
    for name, rows in known.items():
        assert found[name].dtype == rows.dtype and np.array_equal(found[name], rows)


def test_shards_look_like_an_array(folder):
    x = open_shards(folder)["x.0"]
    assert x.shape == X.shape and x.dtype == X.dtype and x.ndim == 3 and len(x) == N
    assert np.array_equal(x[3:17:2], X[3:17:2]) and np.array_equal(np.asarray(x), X)
    with pytest.raises(TypeError):
        x[np.ones(N, bool)]
    for bad in (N, -1):
        with pytest.raises(IndexError, match=f"Row {bad} is not among 23 rows; give 0"):
            x[[0, bad]]


@pytest.mark.parametrize("per", [1, 5, 23, 100, None])
def test_any_number_of_rows_a_file(tmp_path, per):
    path = write_shards({"x": X}, tmp_path / "rows", rows_per_shard=per)
    count = -(-N // per) if per else 1
    assert len(list(path.glob("x-*.npy"))) == count
    assert np.array_equal(np.asarray(open_shards(path)["x"]), X)


def test_the_digest_is_that_of_the_rows_and_damage_is_found(folder, tmp_path):
    digest = open_shards(folder)["y"].content_digest()
    again = write_shards(TREE, tmp_path / "again", rows_per_shard=5)
    assert open_shards(again)["y"].content_digest() == digest
    other = write_shards({"y": Y + 2}, tmp_path / "other", rows_per_shard=5)
    assert open_shards(other)["y"].content_digest() != digest
    path = folder / "y-00002.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="y-00002.npy is not what its index says"):
        open_shards(folder)["y"].content_digest()


def edit_index(folder, **changes):
    path = folder / "index.json"
    index = json.loads(path.read_text()) | changes
    del index["sha256"]
    index["sha256"] = shards._seal(index)
    path.write_text(json.dumps(index))


def cut(folder):
    path = folder / "x.0-00001.npy"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "cut file": cut,
    "no file": lambda f: (f / "y-00000.npy").unlink(),
    "no index": lambda f: (f / "index.json").unlink(),
    "cut index": lambda f: (f / "index.json").write_text('{"rows": 3'),
    "list": lambda f: (f / "index.json").write_text("[]"),
    "deep": lambda f: (f / "index.json").write_text("[" * 100_000),
    "changed": lambda f: (f / "index.json").write_text(
        (f / "index.json").read_text().replace("23", "22")
    ),
    "format": lambda f: edit_index(f, dp_ilg_shards=2),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_sentence(folder, how):
    DAMAGE[how](folder)
    with pytest.raises(DataError) as caught:
        open_shards(folder)["x.0"][np.arange(5, 10)]
    assert str(caught.value).endswith(".") and ". " not in str(caught.value)


def test_a_file_of_another_shape_or_with_objects_is_not_read(folder):
    np.save(folder / "y-00000.npy", np.arange(40.0))
    with pytest.raises(DataError, match="not what its index"):
        open_shards(folder)["y"][:1]
    np.save(folder / "y-00000.npy", np.array([{}] * 50), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        open_shards(folder)["y"][:1]


def test_a_folder_that_exists_is_not_touched(folder):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(DataError, match="exists"):
        write_shards(TREE, folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_only_the_owner_may_look(folder):
    assert folder.stat().st_mode & 0o077 == 0


class Failing:
    def __init__(self, error, first=7):
        self.error, self.first = error, first

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index >= self.first:
            raise self.error
        return X[0]


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize(
    "kind", [OSError, ValueError, KeyError, MemoryError, DataError]
)
def test_a_failing_source_leaves_nothing_and_quotes_no_row(tmp_path, kind, first):
    source = Failing(kind("the patient is called 4711"), first)
    with pytest.raises(DataError, match=rf"\({kind.__name__}\)") as caught:
        write_shards(source, tmp_path / "rows", rows_per_shard=2)
    assert "4711" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_not_written(tmp_path, bad):
    x = X.copy()
    x[17, 1, 2] = bad
    with pytest.raises(DataError) as caught:
        write_shards({"x": x, "y": Y}, tmp_path / "rows", rows_per_shard=5)
    told = str(caught.value)
    assert told.startswith("Some rows of x are not finite;") and "17" not in told
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
import numpy as np
from dp_ilg.experiments.data.shards import write_shards
class Slow:
    def __len__(self): return 1000
    def __getitem__(self, i):
        if i == 500:
            print("half", flush=True)
            time.sleep(60)
        return np.ones(3)
write_shards(Slow(), sys.argv[1], rows_per_shard=100)
"""


def test_a_killed_writer_leaves_no_folder_and_the_next_one_tidies_up(tmp_path):
    path = tmp_path / "rows"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"half\n"
        process.kill()
    assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    write_shards({"x": X}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


MEMORY = """
import resource, sys
import numpy as np
from dp_ilg.experiments.data.shards import open_shards, write_shards
class Many:
    shape, dtype = (200_000, 256), np.dtype(np.float32)
    def __len__(self): return self.shape[0]
    def __getitem__(self, rows): return np.ones((len(rows), 256), np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_shards(Many(), sys.argv[1] + "/rows", rows_per_shard=50_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_200_mb_are_written_in_constant_memory(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(out.stdout) < 40  # MiB more than before; the rows are 195
    assert open_shards(tmp_path / "rows")["rows"].shape == (200_000, 256)


# --- data sets ----------------------------------------------------------------------


def test_a_data_set_comes_back_as_it_was(tmp_path):
    digits = load_dataset("digits")
    path = save_dataset(digits, tmp_path / "digits", 400)
    found = load_folder(path)
    assert isinstance(found.x_train, ShardedArray)
    assert np.array_equal(np.asarray(found.x_train), digits.x_train)
    assert np.array_equal(np.asarray(found.y_train), digits.y_train)
    assert np.array_equal(found.x_test, digits.x_test)
    assert np.array_equal(found.y_test, digits.y_test)
    assert found.num_classes == 10 and "Read from shards" in found.note


def images(shape, dtype: type = np.uint8):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, *shape)).astype(dtype), np.arange(30) % 10
    return Dataset("pictures", x[:20], y[:20], x[20:], y[20:], 10, note="Made up.")


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_images_of_bytes_are_pixels_from_0_to_1(tmp_path, shape):
    data = images(shape)
    found = load_folder(save_dataset(data, tmp_path / "rows", 7))
    wide = data.x_train.reshape(20, 4, 5, -1)
    known = wide.astype(np.float32) / np.float32(255)
    assert found.x_train.shape == known.shape and found.x_train.ndim == 4
    assert found.x_train.dtype == np.asarray(found.x_train).dtype == np.float32
    assert np.array_equal(found.x_train[3:9], known[3:9]) and len(found.x_train) == 20
    assert np.array_equal(take(found.x_train, [19, 0]), known[[19, 0]])
    assert found.x_test.dtype == np.float32 and found.x_test.max() <= 1
    raw = open_shards(tmp_path / "rows")["x"]
    assert raw.dtype == np.uint8  # a quarter of the space
    assert found.x_train.content_digest() == raw.content_digest()


def test_counts_of_words_are_no_pixels(tmp_path):
    data = images((12,))
    found = load_folder(save_dataset(data, tmp_path / "rows", 7))
    assert found.x_train.dtype == np.uint8
    assert np.array_equal(np.asarray(found.x_train), data.x_train)


def cli(*args):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["shards", *args])
    return code, said.getvalue()


def test_the_command_says_what_training_would(tmp_path, capsys):
    path = str(tmp_path / "rows")
    assert cli(path, "--data", "digits", "--rows-per-shard", "0") == (
        2,
        "dp-ilg: --rows-per-shard is 0, but must be a whole number of at least 1.\n",
    )
    code, words = cli(path, "--rows-per-shard", "3")
    assert code == 2 and "is 3, but nothing is written without --data" in words
    write_shards({"x": X, "y": Y}, path, facts={"num_classes": 30})
    code, words = cli(path)
    assert code == 2 and "has no part test to evaluate on" in words
    save_dataset(images((2, 2)), tmp_path / "good", None)
    assert cli(str(tmp_path / "good"), "--json") == (0, "")
    assert json.loads(capsys.readouterr().out)["rows"] == 20
    bad = images((3,), np.float32)
    bad.x_train[7, 1] = np.nan
    with unittest.mock.patch.object(shard_rows, "check_finite"):  # as others write
        save_dataset(bad, tmp_path / "bad", None)
    code, words = cli(str(tmp_path / "bad"))
    assert code == 2 and "Some rows of x are not finite" in words
    load_folder(tmp_path / "bad")  # training tells nothing: such rows are absent


def test_a_feed_of_shards_has_the_batches_of_memory(tmp_path):
    """The small form of the next test."""
    from dp_ilg.sampling.poisson import PoissonSampler
    from dp_ilg.training.feeds import Feed

    digits = load_dataset("digits")
    found = load_folder(save_dataset(digits, tmp_path / "digits", 400))
    sampler = PoissonSampler(len(digits.y_train), 0.05, key=3, num_steps=3)
    with (
        Feed((digits.x_train, digits.y_train), sampler) as memory,
        Feed((found.x_train, found.y_train), sampler) as files,
    ):
        for step in range(3):
            (known, _), (rows, _) = memory.chunks(step)[0], files.chunks(step)[0]
            assert np.array_equal(known[0], rows[0])
            assert np.array_equal(known[1], rows[1])


@pytest.mark.slow
def test_a_run_from_shards_has_the_bits_of_a_run_from_memory(tmp_path):
    from dp_ilg.experiments.config.schema import config_from_mapping
    from dp_ilg.experiments.runs.runner import run_training

    path = save_dataset(load_dataset("digits"), tmp_path / "digits", 400)

    def run(name, out, resume=False, steps=4):
        config = config_from_mapping(
            {
                "data": {"name": str(name)},
                "model": {"name": "mlp", "hidden": (4,)},
                "privacy": {
                    "epsilon": 8.0,
                    "delta": 1e-5,
                    "batch_size": 64,
                    "num_steps": steps,
                    "accountant": "rdp",
                    "schedule": {"name": "constant"},
                },
                "optimizer": {
                    "learning_rate": 0.02,
                    "learning_rate_schedule": {"name": "constant"},
                },
                "run": {"seed": 5, "eval_every": 100},
            }
        )
        return run_training(config, tmp_path / out, resume=resume)

    known = run("digits", "memory")
    found = run(path, "shards")
    assert found["params_sha256"] == known["params_sha256"]
    content = bytearray((path / "x-00001.npy").read_bytes())
    content[-3] ^= 1
    (path / "x-00001.npy").write_bytes(content)
    with pytest.raises(ValueError, match="not what its index says"):
        run(path, "shards", resume=True)


def test_names_of_folders():
    assert is_folder_name("./digits") and not is_folder_name("digits")


def test_sources_of_other_libraries_have_one_interface():
    rows = [{"image": x, "label": int(y)} for x, y in zip(X, Y, strict=True)]
    source = GatheredSource(rows, lambda batch: (batch["image"], batch["label"]))
    assert isinstance(source, Source) and len(source) == N
    images, labels = source.rows(np.array([3, -1, 8]))
    assert np.array_equal(images[[0, 2]], X[[3, 8]]) and labels.tolist() == [3, 0, 8]


@pytest.mark.parametrize("library", ["grain", "datasets"])
def test_grain_and_datasets_through_a_feed(library):
    """Both are in the extra ``data``; sampling/test_poisson.py has their rows."""
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    from dp_ilg.sampling.poisson import PoissonSampler
    from dp_ilg.training.feeds import Feed

    rows = [{"x": x, "y": int(y)} for x, y in zip(X, Y, strict=True)]
    if library == "grain":
        data = module.MapDataset.source(rows).map(lambda row: row | {"y": row["y"] + 1})
    else:
        table = {"x": X.tolist(), "y": (Y + 1).tolist()}
        data = module.Dataset.from_dict(table).with_format("numpy")
    sampler = PoissonSampler(N, 0.5, key=3, num_steps=3)
    with Feed(GatheredSource(data), sampler) as feed:
        for step in range(3):
            batch, mask = feed.chunks(step)[0]
            drawn = sampler.indices(step)
            keep = ~np.asarray(mask)
            assert np.array_equal(np.asarray(batch["x"])[keep], X[drawn])
            assert np.array_equal(np.asarray(batch["y"])[keep], Y[drawn] + 1)


@pytest.mark.parametrize(
    "source, words",
    [
        ([1, 2, 3.5], "int64 at first and float64 later"),
        ([np.int8(1), np.int64(300)], "int8 at first and int64"),
        ({"../evil": np.arange(3)}, "evil.*letters, digits"),
        ({"a/b": np.arange(3)}, "letters, digits"),
        ({"x": (np.arange(3), np.arange(3)), "x.0": np.arange(3)}, "different names"),
        (np.array(["a", "b"], object), "numbers only"),
    ],
)
def test_rows_are_refused_rather_than_changed(tmp_path, source, words):
    with pytest.raises(ValueError, match=words):
        write_shards(source, tmp_path / "inner" / "rows")
    assert list((tmp_path / "inner").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inner"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: dict(y_train=d.y_train + 12345), r"outside 0\.\.9"),
        (lambda d: dict(y_train=d.y_train - 3), r"outside 0\.\.9"),
        (lambda d: dict(y_train=d.y_train * 1.0), "write both alike"),
        (
            lambda d: dict(y_train=d.y_train * 1.0, y_test=d.y_test * 1.0),
            "float64 labels",
        ),
        (lambda d: dict(x_test=d.x_test[:, :-1]), "write both alike"),
    ],
)
def test_a_folder_is_checked_as_files_are(tmp_path, change, words):
    digits = load_dataset("digits")
    wrong = dataclasses.replace(digits, **change(digits))
    save_dataset(wrong, tmp_path / "rows", 700)
    with pytest.raises(DataError, match=words):
        load_folder(tmp_path / "rows")
