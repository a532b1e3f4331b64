"""The leak, shown: the published release is caught, ours is not."""

import json

import jax
import numpy as np
import pytest

import dp_ilg
from dp_ilg.experiments.audits import leak as audit_lib
from dp_ilg.experiments.audits.leak import audit
from dp_ilg.experiments.audits.scene import AuditOptions, make_scene
from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.papers.reproduce import ReproduceOptions

QUICK = AuditOptions(common=ReproduceOptions(quick=True))


def by_row(found):
    return {(row["mechanism"], row["score"]): row for row in found["rows"]}


def test_the_published_claim_is_refuted_and_ours_holds(tmp_path, capsys, caplog):
    out = tmp_path / "audit.jsonl"
    command = ["audit", "published", "--quick", "--out", str(out), "--json"]
    assert cli.main(command) == 0
    text, err = capsys.readouterr()
    found = json.loads(text)
    rows = by_row(found)
    spread = "standard deviation"
    for reading in ("printed", "divided"):
        row = rows[f"published, {reading}", spread]
        assert row["claimed_epsilon"] == pytest.approx(0.485, abs=5e-4)
        assert row["guaranteed_epsilon"] is None
        assert row["lower_bound_on_epsilon"] > 2 * row["claimed_epsilon"]
        assert row["verdict"] == "refuted"
    for score in (spread, "known difference"):
        row = rows["dp_adam_ilg", score]
        assert row["claimed_epsilon"] is None
        assert 0.48 < row["guaranteed_epsilon"] <= 0.4851
        assert row["lower_bound_on_epsilon"] <= row["guaranteed_epsilon"]
        assert row["verdict"] == "not refuted"
    assert "NO privacy guarantee" in " ".join(found["notes"])
    assert "no privacy guarantee" in caplog.text and "refuted" in err
    assert len(out.read_text().splitlines()) == len(rows) == 4


def test_the_audit_finds_too_little_noise_in_ours(monkeypatch):
    """A twentieth of the noise must be found out."""
    real = dp_ilg.dp_adam_ilg

    def leaky(rate, plan, **options):
        less = 0.05 * plan.gradient_noise_multipliers[0]
        facts = dict(delta=plan.delta, num_steps=1, noise_multiplier=less)
        sizes = dict(num_examples=plan.num_examples, batch_size=plan.batch_size)
        return real(rate, dp_ilg.plan_privacy(**facts, **sizes), **options)

    monkeypatch.setattr(audit_lib.dp_ilg, "dp_adam_ilg", leaky)
    row = by_row(audit("dp_adam_ilg", QUICK))["dp_adam_ilg", "known difference"]
    assert row["verdict"] == "refuted"


def test_the_canary_is_the_record_that_moves_the_gradient_most():
    scene = make_scene(AuditOptions(data="digits"))
    without, with_canary = (np.asarray(y) for y in scene.labels)
    assert np.sum(without != with_canary) == 1
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1, delta=1e-5, num_examples=120, batch_size=120, num_steps=1
    )
    one, other = (
        jax.tree.leaves(audit_lib._clipped(scene, plan, y).gradients)
        for y in scene.labels
    )
    norm = np.sqrt(
        sum(np.sum(np.square(a - b)) for a, b in zip(one, other, strict=True))
    )
    assert 0.9 < norm <= 2  # two clipped gradients of norm at most 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["audit"], "needs "),
        (["audit", "publishd"], "'publishd' to audit, and no method; did you mean p"),
        (["audit", "digits", "--trials", "3"], "trials is 3, but must be"),
        (["audit", "digits", "--steps", "1"], "steps is 1, but must be"),
        (["audit", "published", "--trials", "3"], "trials is 3, but must be"),
        (["audit", "published", "--data", "imdb"], "no audit on 'imdb'; known are"),
        (["audit", "published", "--data-dir", "absent"], "absent is no folder"),
    ],
)
def test_mistakes_are_one_sentence(command, words, capsys):
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert not out and words in err and err.count("\n") == 1
