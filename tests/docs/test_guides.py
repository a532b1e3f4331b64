"""The code of "Start here" and of the guides runs, and prints what the pages show.

The blocks of a page run in their order and share their names. A fence marked ``text``
that follows a ``python`` block directly is what the block prints. Fences with one title
are the parts of one file.
"""

import contextlib
import importlib
import io
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "start.md", *sorted((DOCS / "guides").glob("*.md"))]
FENCE = re.compile(r'^```(\w*)(?: title="[\w.]+")?\n(.*?)^```$', re.S | re.M)
FILE = re.compile(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', re.S | re.M)
NUMBER = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?")
TOLERANCE = 0.03  # what other processors' rounding may change over a short training
NEEDS = (
    "equinox",
    "flax.linen",
    "haiku",
    "jax_privacy",
    "orbax.checkpoint",
    "sklearn",
)


class Block(NamedTuple):
    """Code, the line of the page it begins in, and what it is said to print."""

    code: str
    line: int
    shown: str


def blocks(text):
    found, fences = [], list(FENCE.finditer(text))
    for fence, after in zip(fences, [*fences[1:], None], strict=True):
        if fence[1] != "python" or FILE.match(fence[0]):
            continue
        follows = after is not None and not text[fence.end() : after.start()].strip()
        shown = after[2] if after is not None and follows and after[1] == "text" else ""
        found.append(Block(fence[2], text[: fence.start(2)].count("\n"), shown))
    return found


def files(text):
    """Files that a page shows, by name; pieces of one stand in their order."""
    found = {}
    for name, code in FILE.findall(text):
        found[name] = found.get(name, "") + code + "\n\n"
    return found


def agree(shown, printed):
    """Whether two texts are equal but for the last digits of their decimals."""
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(
        abs(float(one) - float(other)) <= room(one, other) for one, other in pairs
    )


def room(one, other):
    """How far two numbers may be apart: a tenth of accuracy where noise is fresh."""
    fresh = 0.11 if re.fullmatch(r"0\.\d", one) else 0.0
    return max(fresh, TOLERANCE * max(float(one), float(other)))


def run_here(page):
    """Runs a page's blocks in this process; yields each with what it printed."""
    names = {"__name__": "__main__"}
    for name, content in files(page.read_text()).items():
        pathlib.Path(name).write_text(content)
    for block in blocks(page.read_text()):
        code = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, names)  # noqa: S102
        yield block.shown, out.getvalue()


def run_apart(page, folder):
    """Runs a page as one program, under the XLA_FLAGS that its command line has."""
    text = page.read_text()
    (flags,) = set(re.findall(r"XLA_FLAGS=(\S+) python", text))
    program = folder / "program.py"
    program.write_text("\n".join(block.code for block in blocks(text)))
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    env = dict(os.environ, XLA_FLAGS=flags, PYTHONPATH=str(ROOT))
    command = [sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    yield "".join(block.shown for block in blocks(text)), done.stdout


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What the pages share; seconds of importing it are no page's own."""
    for name in NEEDS:
        pytest.importorskip(name)
    importlib.import_module("sklearn.datasets")
    importlib.import_module("dp_accounting.pld")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.stem == "keras":
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        pytest.importorskip("keras", reason="the extra `keras` is not installed")
    apart = page.stem == "devices"
    results = list(run_apart(page, tmp_path) if apart else run_here(page))
    assert any(shown for shown, _ in results), "the page shows no output"
    for shown, printed in results:
        assert agree(shown, printed), f"shown:\n{shown}\nprinted:\n{printed}"


def test_every_guide_is_there():
    names = {page.stem for page in PAGES}
    assert names >= {
        *("start", "linen", "nnx", "equinox", "haiku", "plain_jax"),
        *("from_optax_contrib", "optax_swap"),
        *("metrics", "dropout", "optimizers", "accumulation", "resume"),
        *("fine_tuning", "devices", "large_data", "extend"),
    }


def test_the_table_of_the_run_folder_names_its_files():
    from dp_ilg.experiments.runs.folder import RunFolder

    folder = RunFolder(pathlib.Path("runs/digits"))
    names = {p.name for p in vars(folder).values() if isinstance(p, pathlib.Path)}
    names -= {"digits", folder.projection.name}  # only runs with a projection have it
    rows = re.findall(r"^\| `([\w.]+)/?` \|", (DOCS / "start.md").read_text(), re.M)
    assert sorted(rows) == sorted({*names, "report.html", "model_card.md"})


def test_outputs_are_found_and_told_apart():
    text = "a\n```python\nprint(1)\n```\n\n```text\n1\n```\nb\n```python\nx = 2\n```\n"
    text += "so\n```text\nnot an output\n```\n"
    first, second = blocks(text)
    assert first == ("print(1)\n", 2, "1\n") and second.shown == ""
    assert agree("accuracy 0.912 of 7\n", "accuracy  0.920 of 7")
    assert not agree("accuracy 0.912 of 7", "accuracy 0.952 of 7")
    assert not agree("accuracy 0.912 of 7", "accuracy 0.912 of 8")
    assert not agree("accuracy 0.912 of 7", "0.912 of 7")
    assert not agree("1.0 2.0", "1.0")
