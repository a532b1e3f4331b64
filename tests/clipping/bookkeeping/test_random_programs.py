"""Random programs: the book-keeping engine equals the vmap engine on all of them."""

from typing import Any

import jax
import pytest

from tests.helpers.agreement import QUICK, assert_agree, compared
from tests.zoo.random_programs import OPERATIONS, VIEWS, Program, program

FAST, REST, SLOW, GROUP = 10, 100, 1000, 5
SHORT, LONG = 3, 7


def check(seed: int, most_lines: int) -> None:
    """Compares both engines on one program, in float64."""
    with jax.enable_x64(True):
        made = program(seed, most_lines)
        run = jax.jit(
            compared(made.loss, made.geometry, (made.clip_mode,)),
            compiler_options=QUICK,
        )
        try:
            (want, got) = run(made.params, made.batch)[made.clip_mode]
            assert_agree(want, got, 1e-9)
        except Exception as error:
            raise AssertionError(report(seed, made, error)) from error


def report(seed: int, made: Program, error: Exception) -> str:
    """What to paste into an issue."""
    shapes = {name: value.shape for name, value in made.params.items()}
    groups = {leaf.path: leaf.groups for leaf in made.geometry.groups.leaves}
    edges = {leaf.path: (leaf.axis, leaf.edges) for leaf in made.geometry.groups.leaves}
    lines: list[Any] = [
        f"seed {seed}: {type(error).__name__}: {error}",
        made.source,
        f"shapes {shapes}",
        f"groups {groups}",
        f"edges {edges}",
        f"clip mode {made.clip_mode}",
        f"x {made.batch[0].shape}",
    ]
    return "\n".join(map(str, lines))


def check_all(seeds: range, most_lines: int) -> None:
    """Checks every seed, then reports all failures at once."""
    failures = []
    for seed in seeds:
        try:
            check(seed, most_lines)
        except AssertionError as error:
            failures.append(str(error))
    if failures:
        head = f"{len(failures)} of {len(seeds)} programs differ"
        pytest.fail("\n\n".join([head, *failures]), pytrace=False)


@pytest.mark.parametrize("start", range(0, FAST, GROUP))
def test_random_programs(start):
    check_all(range(start, start + GROUP), SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(FAST, REST, GROUP))
def test_more_short_programs(start):
    check_all(range(start, start + GROUP), SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(REST, REST + SLOW, 10 * GROUP))
def test_more_random_programs(start):
    check_all(range(start, start + 10 * GROUP), LONG)


def test_the_fuzzer_reaches_every_operation_and_view():
    """Every operation and view occurs in short programs, and programs repeat."""
    text = "\n".join(program(seed, SHORT).source for seed in range(REST))
    words = ["einsum", "conv(", "[ids]", "scan(", "cond(", "checkpoint(", "own_dense("]
    words += [
        ".T",
        ".reshape(",
        "concatenate(",
        "jnp.array(",
        "unit(",
        "** 2",
        "ids[0]",
    ]
    words += ["vmap(", "mapped(", "jax.jit(", "softmax(", "norm(", "sort(", "reverse"]
    missing = [word for word in words if word not in text]
    assert not missing and len(OPERATIONS) == 22 and len(VIEWS) == 10
    assert program(7, LONG).source == program(7, LONG).source


def test_a_failure_prints_the_seed_and_the_program():
    made = program(3, SHORT)
    text = report(3, made, ValueError("reason"))
    assert "seed 3: ValueError: reason" in text and made.source in text
