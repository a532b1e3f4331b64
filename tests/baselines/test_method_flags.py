"""Every baseline from the command line: `dp-ilg train --optimizer.method NAME`."""

import json

import pytest

from dp_ilg.baselines.table import BASELINES
from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.config.schema import Config, OptimizerConfig, PrivacyConfig
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.recipe import method_options

TINY = [
    *("--num-steps", "2", "--batch-size", "32", "--privacy.accountant", "rdp"),
    *("--model.hidden", "4", "--run.eval-every", "1", "--seed", "1", "--json"),
]
FALLING = ["--privacy.schedule.name", "linear", "--privacy.schedule.end", "0.5"]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(BASELINES))
def test_every_method_trains_and_is_accounted(method, tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["train", "--run-dir", str(folder), "--optimizer.method", method, *TINY]
    assert cli.main(command + FALLING * (method == "dp_sgd_decay")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 2 and 0 < summary["epsilon"] <= 8
    saved = json.loads((folder / "plan.json").read_text())
    budget = saved.get("plan", saved)["score_budget"]
    assert (budget > 0) == BASELINES[method].spends_scores()
    metrics = [
        json.loads(x) for x in (folder / "metrics.jsonl").read_text().split("\n") if x
    ]
    assert all(s > 0 for s in metrics[-1]["layers"]["noise_stddev"])
    assert f'method = "{method}"' in (folder / "config.toml").read_text()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--optimizer.method", "dpsgd"], "optimizer.method is 'dpsgd', which is unkn"),
        (
            ["--optimizer.method", "dp_sgd", "--importance", "paper"],
            "optimizer.method is dp_sgd, which has no option importance; leave "
            "optimizer.importance out.",
        ),
        (
            ["--optimizer.method", "adadp", "--optimizer.floor", "0.1"],
            "leave optimizer.floor out.",
        ),
        (
            ["--optimizer.method", "dp_adam", "--privacy.clip-mode", "normalize"],
            "which has no option clip_mode; leave privacy.clip_mode out.",
        ),
        (["--optimizer.momentum", "0.9"], "dp_adam_ilg, which has no option momentum"),
        (["--optimizer.method", "dp_sgd_decay"], "constant or rises, but dp_sgd_decay"),
        (
            ["--optimizer.method", "quantile_clipping", "--privacy.score-budget", "0"],
            "the plan's score_budget is 0; make the plan with",
        ),
        (
            ["--optimizer.method", "dp_sgd", "--optimizer.momentum", "1"],
            "momentum is 1",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(flags, words, tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(["train", "--run-dir", str(folder), *flags, *TINY]) == 2
    out, err = capsys.readouterr()
    assert words in err and "Traceback" not in err and not out
    assert not folder.exists()


def test_the_clip_mode_of_the_method_reaches_the_gradients():
    privacy = PrivacyConfig(num_steps=2, batch_size=32, accountant="rdp")
    for method, gamma, mode in (
        ("automatic_clipping", 0.5, "normalize"),
        ("quantile_clipping_per_layer", None, "per_layer"),
    ):
        optimizer = OptimizerConfig(method=method, gamma=gamma)
        job = build_job(Config(privacy=privacy, optimizer=optimizer))
        assert job.grad_fn.clip_mode.name == mode
        options = method_options(job.config)
        assert options == ({} if gamma is None else {"gamma": 0.5})
