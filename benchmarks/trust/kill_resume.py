"""Kills a training run again and again and checks what is left; resumable.

    python benchmarks/trust/kill_resume.py --kills 200
    python benchmarks/trust/kill_resume.py --kills 8 --out /tmp/kills.jsonl

Each line of benchmarks/results/kill_resume.jsonl is one SIGKILL: at a random moment, at
the n-th file operation (half of a write done, or before a rename, an fsync, a removal),
or while a checkpoint is being written. Afterwards a copy of the folder is resumed to
its end. What must hold is checked there and then, and a breach ends the program:

* the ledger holds every step that was released before the kill;
* every release of a step, first or repeated, has the same bits;
* a resume takes no step twice;
* it ends with the parameters of a run that nobody disturbed, and leaves no drafts.

Processes are forked from one that has imported everything and started no device; one
of them stays and resumes the copies. To be quick they share a plan and a cache of
compiled steps, skip the rehearsal on shapes, and write a report without figures.
"""

import argparse
import faulthandler
import functools
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import numpy as np
import sklearn.datasets  # noqa: F401 - before the forks

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RESULTS, commit, machine  # noqa: E402
from dp_ilg.experiments.config.schema import (  # noqa: E402
    Config,
    ModelConfig,
    PrivacyConfig,
    RunConfig,
)
from dp_ilg.experiments.reports import page  # noqa: E402
from dp_ilg.experiments.runs import evaluation, job, runner, trainer
from dp_ilg.experiments.runs.recipe import make_plan  # noqa: E402
from dp_ilg.training import environment

LINES = RESULTS / "kill_resume.jsonl"
FORK = multiprocessing.get_context("fork")
STEPS = 12
CONFIG = Config(
    model=ModelConfig(hidden=(8,)),
    privacy=PrivacyConfig(num_steps=STEPS, batch_size=64, accountant="rdp"),
    run=RunConfig(seed=20260101, eval_every=4, checkpoint_every=3),
)
_PATIENCE = 240  # seconds after which a process shows where it hangs, and ends
EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")


class Kill(NamedTuple):
    """When a process is killed: `kind` and its number.

    Seconds for "random", which operation for "operation", and for "saving" which
    checkpoint, with a part of a second after it was begun as the fraction.
    """

    kind: str
    number: float


class Outcome(NamedTuple):
    """What a process told before it ended: releases (step, digest), file operations."""

    code: int
    released: list[tuple[int, str]]
    operations: int
    summary: dict[str, Any] | None
    seconds: float
    died: str = ""


# ---------------------------------------------------------------- in a child


def run(folder: Path, kill: Kill, cache: Path, tell: int) -> None:
    """One process of the training run; tells its releases through a pipe."""
    write = os.write

    def say(**facts: Any) -> None:
        write(tell, json.dumps(facts).encode() + b"\n")

    prepare(cache)
    _tell_releases(say)
    count = _die_at(folder, kill, say)
    summary = runner.run_training(CONFIG, folder, resume=True)
    say(summary=summary, operations=count())


def prepare(cache: Path) -> None:
    """Leaves out what takes long and writes nothing."""
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    job._rehearse = lambda built: None
    job.make_plan = lambda config, num_examples: the_plan()
    page.render_report = lambda record: f"<p>{record.folder}</p>" * 2000


@functools.cache
def the_plan() -> Any:
    """The plan of the run, calibrated once."""
    return make_plan(CONFIG, 1437)


def _tell_releases(say: Any) -> None:
    make_train_step = trainer.make_train_step

    def made(grad_fn: Any, tx: Any) -> Any:
        step_fn = make_train_step(grad_fn, tx)

        def step(params: Any, state: Any, chunks: Any) -> Any:
            before = int(np.asarray(_step_of(state)))
            params, state = step_fn(params, state, chunks)
            say(released=before, digest=evaluation.params_sha256(params))
            return params, state

        return step

    trainer.make_train_step = made


def _step_of(state: Any) -> Any:
    """The number of steps an optimizer's state has seen: its first counter."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    return next(x for name, x in names if name.endswith((".step", ".count")))


def _die_at(folder: Path, kill: Kill, say: Any) -> Any:
    """Counts file operations of the run, and kills the process at one of them."""
    seen, place = [0], str(folder.parent)
    real_write, real_fsync = os.write, os.fsync

    def happens() -> bool:
        seen[0] += 1
        return kill.kind == "operation" and seen[0] == kill.number

    def die(what: str) -> None:
        say(died=what)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def hook(event: str, args: tuple) -> None:
        if event not in EVENTS or not str(args[0]).startswith(place):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if happens():
            die(f"{event} {Path(str(args[0])).name}")

    def write(handle: int, data: bytes) -> int:
        if happens():
            real_write(handle, data[: len(data) // 2])
            die("half a write")
        return real_write(handle, data)

    def fsync(handle: int) -> None:
        if happens():
            die("fsync")
        real_fsync(handle)

    sys.addaudithook(hook)
    os.write, os.fsync = write, fsync
    return lambda: seen[0]


class Resumer:
    """A process that resumes one folder after another, with everything compiled."""

    def __init__(self, cache: Path):
        """Forks the process."""
        self.mouth, ear = FORK.Pipe()
        self.process = FORK.Process(target=self._serve, args=(ear, cache), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.process.start()
        self.machine = self.mouth.recv()  # asks JAX for its devices

    def __call__(self, folder: Path) -> Outcome:
        """Resumes a folder to its end."""
        self.mouth.send(folder)
        return self.mouth.recv()

    def _serve(self, ear: Any, cache: Path) -> None:
        prepare(cache)
        ear.send(machine())
        runner.build_job = functools.cache(runner.build_job)
        for name in ("make_train_step", "_evaluator"):
            setattr(trainer, name, _once(getattr(trainer, name)))
        said: list[dict[str, Any]] = []
        _tell_releases(lambda **facts: said.append(facts))
        while True:
            folder = ear.recv()
            faulthandler.dump_traceback_later(_PATIENCE, exit=True)
            said.clear()
            summary = runner.run_training(CONFIG, folder, resume=True)
            released = [(x["released"], x["digest"]) for x in said]
            ear.send(Outcome(0, released, 0, summary, 0.0))


def _once(make: Any) -> Any:
    """Makes it for the first arguments and gives the same ever after."""
    made: list[Any] = []

    def cached(*args: Any) -> Any:
        if not made:
            made.append(make(*args))
        return made[0]

    return cached


# --------------------------------------------------------------- in the parent


def process(folder: Path, kill: Kill, cache: Path) -> Outcome:
    """Forks a process that trains, and kills it if the kill is the parent's."""
    began, (ear, mouth) = time.perf_counter(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no device has been started: nothing to harm
        child = os.fork()
    if not child:
        _be_child(folder, kill, cache, ear, mouth)
    os.close(mouth)
    _strike(child, folder, kill)
    with os.fdopen(ear, "rb") as file:
        said = [json.loads(x) for x in file.read().split(b"\n") if x.endswith(b"}")]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    whole = said[-1] if said and "summary" in said[-1] else {}
    released = [(x["released"], x["digest"]) for x in said if "released" in x]
    where = next((x["died"] for x in said if "died" in x), "")
    seconds = time.perf_counter() - began
    counted, summary = whole.get("operations", 0), whole.get("summary")
    return Outcome(code, released, counted, summary, seconds, where)


def _be_child(folder: Path, kill: Kill, cache: Path, ear: int, mouth: int) -> None:
    try:
        os.close(ear)
        run(folder, kill, cache, mouth)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _strike(child: int, folder: Path, kill: Kill) -> None:
    """Waits for the moment and kills, unless the process has ended by itself."""
    if kill.kind in ("never", "operation"):
        return
    seen: set[str] = set()
    while kill.kind == "saving" and len(seen) < int(kill.number) and _runs(child):
        seen |= {path.name for path in folder.parent.glob("*/checkpoints/*tmp*")}
        time.sleep(0.0005)
    ends = time.perf_counter() + kill.number - len(seen)
    while time.perf_counter() < ends and _runs(child):
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)


def _runs(child: int) -> bool:
    found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is None


def verify(folder: Path, reference: Outcome, resume: Resumer) -> dict[str, Any]:
    """Resumes a copy to its end and compares; returns what was repeated."""
    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as scratch:
        copy = Path(scratch) / folder.name
        for path in folder.parent.iterdir():
            shutil.copytree(path, Path(scratch) / path.name)
        found = resume(copy)
        left = [p.name for p in (*copy.rglob(".*"), *Path(scratch).glob(".*"))]
    if found.code or found.summary is None or reference.summary is None:
        raise SystemExit(f"{folder} could not be resumed")
    if found.summary["params_sha256"] != reference.summary["params_sha256"]:
        raise SystemExit(f"{folder} resumed to other parameters")
    if left:
        raise SystemExit(f"{folder} keeps drafts: {left}")
    _check_releases(found.released, reference)
    return {"resumed": [step for step, _ in found.released]}


def _check_releases(released: list[tuple[int, str]], reference: Outcome) -> None:
    wrong = set(released) - set(reference.released)
    if wrong:
        raise SystemExit(f"other bits were released at steps {sorted(wrong)}")
    steps = [step for step, _ in released]
    if len(steps) != len(set(steps)):
        raise SystemExit(f"a step was taken twice by one process: {steps}")


def on_file(folder: Path) -> int:
    """Whole lines of the ledger after its header; 0 where there is no folder yet."""
    path = folder / "ledger.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def draw(dice: random.Random, reference: Outcome) -> Kill:
    """The next moment to kill at."""
    kind = dice.choice(("random", "operation", "operation", "saving"))
    number = {
        "random": dice.uniform(0, 1.05 * reference.seconds),
        "operation": dice.randint(1, reference.operations),
        "saving": dice.randint(1, 3) + dice.uniform(0, 0.06),
    }[kind]
    return Kill(kind, number)


class Tools(NamedTuple):
    """What every kill needs."""

    dice: random.Random
    cache: Path
    reference: Outcome
    resume: Resumer


def one_kill(folder: Path, known: Counter, tools: Tools) -> dict[str, Any] | None:
    """Kills one process and checks all; None if it had ended before the kill."""
    reference = tools.reference
    kill = draw(tools.dice, reference)
    print(f"{kill.kind} {kill.number:.4g}", flush=True)
    found = process(folder, kill, tools.cache)
    if found.code != -signal.SIGKILL:
        if found.code or found.summary is None:
            raise SystemExit(f"{folder} failed with code {found.code}")
        _check_releases(found.released, reference)
        return None
    _check_releases(found.released, reference)
    known.update(step for step, _ in found.released)
    ledger = on_file(folder)
    if known and ledger <= max(known):
        raise SystemExit(f"{folder}: step {max(known)} is released but not on file")
    return {
        "kind": kill.kind,
        "number": round(kill.number, 4),
        "died": found.died,
        "released": [step for step, _ in found.released],
        "ledger": ledger,
        "checkpoints": sorted(p.name for p in folder.glob("checkpoints/*")),
    } | verify(folder, reference, tools.resume)


def kills(wanted: int, out: Path, seed: int) -> None:
    """Kills until the file holds as many lines as wanted."""
    lines = out.read_text().splitlines() if out.exists() else []
    dice = random.Random(f"{seed} {len(lines)}")
    with tempfile.TemporaryDirectory(prefix="kills") as place:
        cache = Path(place) / "compiled"
        process(Path(place) / "first" / "run", Kill("never", 0), cache)
        reference = process(Path(place) / "whole" / "run", Kill("never", 0), cache)
        if reference.code or len(reference.released) != STEPS:
            raise SystemExit("the undisturbed run failed")
        tools = Tools(dice, cache, reference, Resumer(cache))
        facts = tools.resume.machine | {"commit": commit(), "config": _digest(CONFIG)}
        count, known, series = len(lines), Counter(), 0
        while count < wanted:
            folder = Path(place) / f"{series}" / "run"
            folder.parent.mkdir(exist_ok=True)
            record = one_kill(folder, known, tools)
            if record is not None:
                record["releases_of_one_step"] = max(known.values(), default=0)
                count += 1
                with out.open("a") as file:
                    file.write(json.dumps({"kill": count} | record | facts) + "\n")
            if record is None or dice.random() < 0.4:
                shutil.rmtree(folder.parent)
                series, known = series + 1, Counter()


def _digest(config: Config) -> str:
    return hashlib.sha256(repr(config).encode()).hexdigest()[:16]


def table(path: Path) -> str:
    """How many kills of each kind, and what they left."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [
        "| kill | times | before the first step | steps repeated |",
        "|---|---|---|---|",
    ]
    for kind in ("random", "operation", "saving"):
        own = [r for r in records if r["kind"] == kind]
        early = sum(not r["ledger"] for r in own)
        again = sum(bool(r["resumed"]) and r["resumed"][0] < r["ledger"] for r in own)
        rows.append(f"| {kind} | {len(own)} | {early} | {again} |")
    return "\n".join(rows)


def main() -> None:
    """Reads the arguments, kills, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=LINES)
    args = parser.parse_args()
    the_plan()
    environment._source_digest()  # of the code that was imported, before the forks
    kills(args.kills, args.out, args.seed)
    print(table(args.out))


if __name__ == "__main__":
    main()
