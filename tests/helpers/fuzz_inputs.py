"""What reads files or arguments, and the promise each makes about rubbish.

A target takes bytes and says "accepted" or "refused"; anything else (another
exception, a message of several lines, a file that was changed) is a failure. The
drivers are `tests/whole/test_rubbish.py` (Hypothesis) and
`benchmarks/trust/fuzz_inputs.py` (100,000 inputs, and atheris where it is installed).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.config.schema import Config, config_to_toml, read_config
from dp_ilg.experiments.data.files import DataError, read_idx, read_npz
from dp_ilg.experiments.data.tabular import adult
from dp_ilg.experiments.reports.record import read_run
from dp_ilg.experiments.runs import runner

PLAN = PrivacyPlan(
    num_examples=100,
    batch_size=10,
    num_steps=9,
    delta=1e-5,
    l2_clip_norm=1.0,
    score_budget=0.01,
    stages=((9, 1.0),),
    accountant="zcdp",
)
TOKENS = [
    *(b"\x00", b"\n", b'"', b"'", b"[", b"]", b"{", b"}", b"=", b",", b"-", b"."),
    *(b"nan", b"inf", b"1e999", b"true", b"null", b"\xff\xff\xff\xff", b"\x7f"),
    *(b"9" * 400, b"[" * 3000, b'{"a":' * 2000, b"1979-05-27", b"0x", b"\\u0000"),
]


class Target(NamedTuple):
    """A reader: good inputs to start from, and its promise."""

    seeds: Callable[[], list[bytes]]
    check: Callable[[bytes, Path], str]


def sentence(error: BaseException) -> str:
    """Refusals are one sentence."""
    text = str(error)
    assert text and "\n" not in text, repr(text)
    return "refused"


def reading(content: bytes, path: Path, read: Callable[[Path], Any], kind: Any) -> str:
    """Writes the bytes, reads them, and allows `kind` to be raised."""
    path.write_bytes(content)
    try:
        read(path)
    except kind as error:
        return sentence(error)
    return "accepted"


# ------------------------------------------------------------------- what is read


def config_seeds() -> list[bytes]:
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
    return [config_to_toml(Config(), seed=True).encode()] + [
        path.read_bytes() for path in files
    ]


def check_config(content: bytes, folder: Path) -> str:
    return reading(content, folder / "run.toml", read_config, ValueError)


def check_train(content: bytes, folder: Path) -> str:
    """The whole command, up to the training that would begin: no traceback."""
    (folder / "run.toml").write_bytes(content)
    before = sorted(folder.iterdir())
    found = command(["train", str(folder / "run.toml"), "--run-dir", str(folder / "r")])
    assert sorted(folder.iterdir()) == before
    return found


def command(words: list[str]) -> str:
    """A command line: exit code 0, or 2 and one line."""
    real = runner.run_training
    runner.run_training = lambda *args, **kwargs: {"epsilon": 1.0}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words)
    finally:
        runner.run_training = real
    if code == 0:
        return "accepted"
    said = [x for x in err.getvalue().splitlines() if "warning" not in x]
    assert code == 2 and len(said) == 1 and said[0].startswith("dp-ilg: "), (code, said)
    return "refused"


def check_words(content: bytes, folder: Path) -> str:
    """Words of a command line, cut at line ends; the empty one stands for none."""
    text = content.decode("utf-8", "replace").replace("\x00", "")
    # A run with no such flag would be written into the working directory.
    words = [word for word in text.split("\n") if word][:12]
    return command(["train", "--run-dir", str(folder / "r"), *words])


def words_seeds() -> list[bytes]:
    lines = [
        "--epsilon\n2\n--delta\n1e-5\n--batch-size\n64\n--num-steps\n9",
        "--optimizer.blocks\n[]\n--importance\nuniform\n--seed\n3",
        '--optimizer.blocks\n[{"path": "a", "num_blocks": 8}]\n--json',
        "--privacy.schedule.name\nlinear\n--privacy.schedule.end\n0.5",
        "--model.hidden\n8\n9\n--model.name\nmlp\n--unprotected-train-loss",
    ]
    return [line.encode() for line in lines]


def idx_bytes() -> bytes:
    return bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 3]) + bytes(range(18))


def check_idx(content: bytes, folder: Path) -> str:
    return reading(content, folder / "x", lambda p: read_idx(p, 3), DataError)


def check_idx_gz(content: bytes, folder: Path) -> str:
    return reading(content, folder / "x.gz", lambda p: read_idx(p, 3), DataError)


def npz_seeds() -> list[bytes]:
    made = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, a=np.arange(9, dtype=np.uint8), b=np.array(["x", "yz"]))
        made.append(buffer.getvalue())
    return made


def check_npz(content: bytes, folder: Path) -> str:
    return reading(content, folder / "a.npz", lambda p: read_npz(p, "ab"), DataError)


def npy_seeds() -> list[bytes]:
    made = []
    for array in (np.arange(6).reshape(2, 3), np.array(["x"]), np.zeros((0, 2))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        made.append(buffer.getvalue())
    return made


def check_npy(content: bytes, folder: Path) -> str:
    """The member of a sound archive, so that its checksum is no shield."""
    import zipfile

    path = folder / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content)
    return reading(path.read_bytes(), path, lambda p: read_npz(p, "a"), DataError)


def people_seeds() -> list[bytes]:
    row = "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, "
    row += "Not-in-family, White, Male, 2174, 0, 40, United-States, <=50K"
    return [f"|1x3 Cross validator\n{row}.\n\n{row}\n".encode()]


def check_people(content: bytes, folder: Path) -> str:
    (folder / "adult.test").write_bytes(people_seeds()[0])

    def read(path: Path) -> None:
        found = adult.read_columns([folder])
        assert found is not None
        adult.encode(found[0], str(path))

    return reading(content, folder / "adult.data", read, DataError)


def ledger_seeds() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ledger.jsonl")
        with PrivacyLedger(path, PLAN) as ledger:
            for step in range(3):
                ledger.record(step)
        return [path.read_bytes()]


def check_ledger(content: bytes, folder: Path) -> str:
    """Refused means left alone; accepted means as many steps as whole lines."""
    path = folder / "ledger.jsonl"
    path.write_bytes(content)
    try:
        with PrivacyLedger(path, PLAN, resume=True) as ledger:
            assert 0 <= ledger.steps <= PLAN.num_steps
            assert ledger.steps >= content.count(b"\n") - 1
    except ValueError as error:
        assert path.read_bytes() == content
        return sentence(error)
    return "accepted"


def check_plan(content: bytes, folder: Path) -> str:
    del folder
    try:
        PrivacyPlan.from_json(content.decode("utf-8", "replace"))
    except (ValueError, TypeError) as error:
        return sentence(error)
    return "accepted"


RUN_FILES = {
    "config.toml": lambda: config_to_toml(Config()),
    "plan.json": lambda: PLAN.to_json() + "\n",
    "ledger.jsonl": lambda: ledger_seeds()[0].decode(),
    "metrics.jsonl": lambda: metrics_line() + "\n",
    "summary.json": lambda: json.dumps({"data_note": "n", "versions": {"jax": "1"}}),
}


def metrics_line() -> str:
    layers = {"names": ["a", "b"], "sizes": [3, 4], "importance": [1.0, 2.0]}
    layers |= {"weights": [1.0, 1.0], "noise_stddev": [0.1, 0.1]}
    line = {"step": 2, "epsilon": 0.5, "test_accuracy": 0.5, "seconds": 1.0}
    return json.dumps(line | {"noise_multiplier": 1.0, "layers": layers})


def run_seeds() -> list[bytes]:
    """The name of the file that is replaced, a line end, and its content."""
    return [f"{name}\n{make()}".encode() for name, make in RUN_FILES.items()]


def check_run(content: bytes, folder: Path) -> str:
    run = folder / "run"
    if not run.exists():
        run.mkdir()
    for name, make in RUN_FILES.items():
        (run / name).write_text(make())
    name, _, rest = content.partition(b"\n")
    chosen = name.decode("utf-8", "replace")
    (run / (chosen if chosen in RUN_FILES else "metrics.jsonl")).write_bytes(rest)
    try:
        read_run(run).epsilon_charged()
    except ValueError as error:
        return sentence(error)
    return "accepted"


TARGETS: dict[str, Target] = {
    "config": Target(config_seeds, check_config),
    "idx": Target(lambda: [idx_bytes()], check_idx),
    "idx.gz": Target(lambda: [gzip.compress(idx_bytes(), mtime=0)], check_idx_gz),
    "npz": Target(npz_seeds, check_npz),
    "npy in npz": Target(npy_seeds, check_npy),
    "adult.data": Target(people_seeds, check_people),
    "ledger": Target(ledger_seeds, check_ledger),
    "plan": Target(lambda: [PLAN.to_json().encode()], check_plan),
    "run folder": Target(run_seeds, check_run),
    "train CONFIG": Target(config_seeds, check_train),
    "train FLAGS": Target(words_seeds, check_words),
}


# ------------------------------------------------------------------------ mutation


def mutate(seeds: list[bytes], dice: random.Random) -> bytes:
    """A good input with one to six changes, or bytes at random."""
    if dice.random() < 0.05:
        return dice.randbytes(dice.randint(0, 200))
    content = bytearray(dice.choice(seeds))
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        _CHANGES[dice.randrange(len(_CHANGES))](content, dice)
    return bytes(content)


def _place(content: bytearray, dice: random.Random) -> int:
    return dice.randint(0, len(content))


def _flip(content: bytearray, dice: random.Random) -> None:
    if content:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def _cut(content: bytearray, dice: random.Random) -> None:
    del content[_place(content, dice) :]


def _drop(content: bytearray, dice: random.Random) -> None:
    start = _place(content, dice)
    del content[start : start + dice.randint(1, 30)]


def _insert(content: bytearray, dice: random.Random) -> None:
    start = _place(content, dice)
    content[start:start] = dice.choice(TOKENS)


def _overwrite(content: bytearray, dice: random.Random) -> None:
    start, token = _place(content, dice), dice.choice(TOKENS)
    content[start : start + len(token)] = token


def _repeat(content: bytearray, dice: random.Random) -> None:
    start = _place(content, dice)
    piece = content[start : start + dice.randint(1, 60)]
    content[start:start] = piece * dice.randint(1, 4)


def _number(content: bytearray, dice: random.Random) -> None:
    """Another value for a number of the text."""
    digits = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if digits:
        start = dice.choice(digits)
        worst = b"-1 0 9999999999999999999999 1e308 0.5 nan".split()
        content[start : start + 1] = dice.choice(worst)


_CHANGES = (_flip, _cut, _drop, _insert, _overwrite, _repeat, _number)


def fresh(folder: Path) -> Path:
    """An empty folder for a check."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
