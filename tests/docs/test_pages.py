"""Code and numbers on pages about the idea are those of the library."""

import math
import pathlib
import re

import pytest

import dp_ilg
from dp_ilg import accounting

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs"
RUN = {"delta": 1e-5, "num_examples": 60_000, "batch_size": 600, "num_steps": 1000}


def epsilon(noise_multiplier: float) -> float:
    plan = dp_ilg.plan_privacy(noise_multiplier=noise_multiplier, score_budget=0, **RUN)
    return plan.epsilon()


def test_the_first_example_runs_as_printed_and_learns(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.S)
    exec(compile(code, "docs/index.md", "exec"), {})  # noqa: S102
    printed = re.search(r"epsilon ([\d.]+), loss ([\d.]+)", capsys.readouterr().out)
    assert printed is not None
    assert 1.98 <= float(printed[1]) <= 2.0 and float(printed[2]) < 0.1


def test_epsilons_of_the_pitfalls_are_those_of_the_accountant():
    page = (DOCS / "pitfalls.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert [int(row[0]) for row in rows] == [1, 2, 4, 10]
    right = epsilon(1.1)
    for layers, reported, true in rows:
        assert float(reported) == pytest.approx(right, abs=0.006)
        assert float(true) == pytest.approx(
            epsilon(1.1 / int(layers) ** 0.5), abs=0.006
        )


def test_two_events_and_disjoint_batches_are_those_of_the_pitfalls():
    import dp_accounting

    page = (DOCS / "pitfalls.md").read_text()
    half = dp_accounting.GaussianDpEvent(1.1 * math.sqrt(2))
    halves = dp_accounting.PoissonSampledDpEvent(0.01, half)
    disjoint = dp_accounting.GaussianDpEvent(1.1)  # an example is in one batch an epoch
    for event, times, words in (
        (halves, 2000, "report epsilon {:.2f} where 1.52 is true"),
        (disjoint, 10, "costs epsilon {:.1f}."),
    ):
        whole = dp_accounting.SelfComposedDpEvent(event, times)
        cost = accounting.epsilon(whole, 1e-5)
        assert words.format(cost) in " ".join(page.split())


def test_one_percent_for_scores_makes_the_noise_half_a_percent_larger():
    plan = dp_ilg.plan_privacy(noise_multiplier=1.0, score_budget=0.01, **RUN)
    ratio = plan.gradient_noise_multipliers[0] / plan.noise_multipliers[0]
    assert f"{100 * (ratio - 1):.1f} % larger" in (DOCS / "idea.md").read_text()


def test_least_noise_energy_is_the_formula_of_the_page():
    sizes, shares = (1000.0, 10.0, 200.0), (0.2, 0.5, 0.3)
    weights = [s**0.25 * n**-0.25 for s, n in zip(shares, sizes, strict=True)]
    norm = sum(s / w**2 for s, w in zip(shares, weights, strict=True))
    energy = norm * sum(n * w**2 for n, w in zip(sizes, weights, strict=True))
    parts = [math.sqrt(n / 1210 * s) for s, n in zip(shares, sizes, strict=True)]
    assert energy / 1210 == pytest.approx(sum(parts) ** 2)
    page = re.sub(r"</?su[bp]>", "", (DOCS / "idea.md").read_text())
    assert "( Σj √(pj · sj) )²" in page
