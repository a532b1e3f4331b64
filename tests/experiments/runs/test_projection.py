"""A run whose inputs are projected privately: price, folder, resuming and refusals."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dp_ilg.experiments.audits import subject
from dp_ilg.experiments.cli.audit import _read
from dp_ilg.experiments.cli.main import main
from dp_ilg.experiments.config.data import DataConfig, ProjectionConfig
from dp_ilg.experiments.config.schema import Config, config_from_mapping, config_to_toml
from dp_ilg.experiments.runs import projection, runner, trainer
from dp_ilg.experiments.runs.export import export_parameters
from dp_ilg.experiments.runs.job import build_job, ready
from dp_ilg.experiments.runs.keys import derived_keys, identity, run_keys
from dp_ilg.projection.factor_pca import factor_releases

CHOSEN = ProjectionConfig(channels=12, positions=3, noise_multiplier=40.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("DP_ILG_CACHE", str(cache))


def config(steps=6, **run):
    base = Config()
    return dataclasses.replace(
        base,
        data=DataConfig("digits", features="scattering", projection=CHOSEN),
        model=dataclasses.replace(base.model, name="linear"),
        privacy=dataclasses.replace(base.privacy, num_steps=steps, accountant="rdp"),
        run=dataclasses.replace(base.run, seed=1, **run),
    )


def test_the_plan_pays_for_the_projection_first():
    plan = build_job(config()).plan
    assert plan.prior_releases == factor_releases(40.0)
    assert 0 < plan.epsilon(0) < plan.epsilon(1) <= plan.epsilon() <= 8.0
    names = plan.statement().text
    assert "channel moments" in names


def test_the_inputs_of_a_run_are_projections_of_its_maps():
    job = build_job(config())
    assert job.data.x_train.shape == (1437, 36) and job.raw is not None
    key = run_keys(job, 1).sampler
    done = ready(job, key)
    basis = projection.fit(job.raw, CHOSEN, key)
    np.testing.assert_array_equal(
        done.data.x_train, basis.project(np.asarray(job.raw.x_train))
    )
    np.testing.assert_array_equal(done.data.x_test, basis.project(job.raw.x_test))
    np.testing.assert_array_equal(done.data.y_train, job.data.y_train)
    other = ready(job, run_keys(job, 2).sampler)
    assert not np.array_equal(other.data.x_train, done.data.x_train)


def test_its_noise_is_under_a_key_of_its_own():
    """No step of the sampler and no use of the run's keys derives the same key."""
    key = derived_keys(1, {}).sampler
    own = jax.random.fold_in(key, projection._USE)
    steps = jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(key, t)))(
        np.arange(100_000)
    )
    assert not (np.asarray(steps) == np.asarray(jax.random.key_data(own))).all(1).any()


def test_inputs_that_are_not_projected_are_not_trained_on(tmp_path):
    job = build_job(config())
    assert not np.asarray(job.data.x_train).any()
    with pytest.raises(ValueError, match="not projected"):
        keys = run_keys(job, 1)
        trainer.train(job, trainer.start(job, keys), _Nobody(), trainer.Watch())


class _Nobody:
    def record(self, step, *, released_from=None):
        raise AssertionError("a step was charged")


@pytest.fixture
def one_step():
    """Runs of one configuration share their job and what is compiled of their step."""
    build, make = functools.cache(runner.build_job), trainer.make_tools
    made: dict = {}

    def make_tools(job):
        found = make(job)
        return found._replace(step=made.setdefault(id(job.grad_fn), found.step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "build_job", build)
        patch.setattr(trainer, "make_tools", make_tools)
        patch.setattr(runner, "write_report", lambda path: path)
        yield


def test_a_run_resumes_with_the_projection_in_its_folder(
    tmp_path, monkeypatch, one_step
):
    whole = runner.run_training(config(), tmp_path / "whole")
    asked = iter([False, False, True])
    monkeypatch.setattr(
        runner, "stop_requests", lambda: _Context(lambda: next(asked, True))
    )
    with pytest.raises(runner.Interrupted):
        runner.run_training(config(), tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(projection, "fit", _forbidden)
    again = runner.run_training(config(), tmp_path / "cut", resume=True)
    assert again["params_sha256"] == whole["params_sha256"]
    assert whole["test_accuracy"] > 0.2 and "factor PCA" in whole["data_note"]
    out = export_parameters(tmp_path / "whole", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        assert file["projection/mean"].shape == (81, 4)
        assert out["arrays"] == len(file.files) == 2 + 5
    for damage in (lambda path: path.write_bytes(b"no"), lambda path: path.unlink()):
        damage(tmp_path / "whole" / projection.FILE)
        with pytest.raises(ValueError, match="missing or not what this run released"):
            export_parameters(tmp_path / "whole", tmp_path / "without.npz")
    assert not (tmp_path / "without.npz").exists()


def _forbidden(*_):
    raise AssertionError("released twice")


class _Context:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return None


def test_a_projection_that_is_not_the_runs_is_refused(tmp_path, one_step):
    runner.run_training(config(2), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / projection.FILE
    basis = projection.from_bytes(path.read_bytes())
    other = projection.to_bytes(basis._replace(mean=basis.mean[::-1]))
    for content in (None, b"", b"PK nonsense", other):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}.*restore it from a copy"):
            runner.run_training(config(2), tmp_path / "run", resume=True)


def test_other_images_of_the_same_shape_are_refused(tmp_path):
    """The stand-in for projected inputs must not stand in for them in digests."""
    job = build_job(config(2))
    assert job.raw is not None
    x = np.array(job.raw.x_train)
    x[5, 7] += 1
    other = dataclasses.replace(job, raw=dataclasses.replace(job.raw, x_train=x))
    assert identity(other)["data"] != identity(job)["data"]


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(channels=3), "needs all three or none"),
        (dict(channels=3, positions=2, noise_multiplier=0.0), "noise_multiplier"),
        (dict(channels=0, positions=2, noise_multiplier=9.0), "channels"),
        (dict(whitening=0.9, channels=3, positions=2, noise_multiplier=9.0), "0.9"),
    ],
)
def test_wrong_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        config_from_mapping(
            {"data": {"name": "digits", "projection": fields}}, source="c"
        )


MAPS = ["--data.features", "scattering"]


def sizes(channels, positions):
    given = {"channels": channels, "positions": positions}
    flags = [(f"--data.projection.{name}", str(n)) for name, n in given.items()]
    return [word for pair in flags for word in pair]


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "needs all three or none"),
        (sizes(9, 3), "needs feature maps"),
        ([*sizes(9, 5), *MAPS], "have 4; choose at most 4"),
        ([*sizes(9, 3), *MAPS, "--epsilon", "0.01"], "epsilon"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, capsys, flags, words):
    noise = ["--data.projection.noise-multiplier", "5"]
    code = main(["train", "--run-dir", str(tmp_path / "r"), *noise, *flags])
    assert code == 2 and not (tmp_path / "r").exists()
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_a_chunk_larger_than_the_data_is_refused_before_anything_is_written():
    base = config()
    run = dataclasses.replace(base.run, chunk_size=99_999_999_999)
    with pytest.raises(ValueError, match="run.chunk_size is 99999999999.*1437"):
        build_job(dataclasses.replace(base, run=run))


def test_an_audit_makes_its_projection_of_few_rows(monkeypatch):
    """Fitting all of MNIST took minutes; the audited claim leaves the release out."""
    fitted, fit = [], projection.fit

    def counting(data, chosen, key):
        fitted.append((len(data.x_train), chosen.noise_multiplier))
        return fit(data, chosen, key)

    monkeypatch.setattr(projection, "fit", counting)
    monkeypatch.setattr(subject, "_FITTED", 200)
    audited = subject.audited_trainer(config(chunk_size=1000), max_steps=2)
    assert fitted == [(200, pytest.approx(40.0 * 200 / 1437))]
    assert audited.examples[0].shape == (audited.plan.num_examples, 36)
    assert np.isfinite(audited.examples[0]).all() and audited.examples[0].std() > 0.1


def test_an_audit_of_a_run_takes_the_projection_it_released(tmp_path, monkeypatch):
    job = build_job(config(2))
    assert job.raw is not None
    basis = projection.fit(job.raw, CHOSEN, derived_keys(5, {}).sampler)
    (tmp_path / "config.toml").write_text(config_to_toml(config(2)))
    (tmp_path / "plan.json").write_text(job.plan.to_json())
    with pytest.raises(ValueError, match="projects its inputs; restore it"):
        _read(str(tmp_path))
    (tmp_path / projection.FILE).write_bytes(projection.to_bytes(basis))
    found, plan, kept = _read(str(tmp_path))
    monkeypatch.setattr(projection, "fit", _forbidden)
    audited = subject.audited_trainer(found, plan=plan, basis=kept, max_steps=2)
    count = audited.plan.num_examples
    np.testing.assert_array_equal(
        audited.examples[0], basis.project(np.asarray(job.raw.x_train[:count]))
    )
