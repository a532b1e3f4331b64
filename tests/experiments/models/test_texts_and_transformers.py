"""Texts to continue, transformers, and the study of a task's layers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_ilg.experiments.config.schema import Config, ModelConfig, PrivacyConfig
from dp_ilg.experiments.data import texts
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.texts import UNKNOWN, WINDOW, read_windows
from dp_ilg.experiments.models.networks import build_model
from dp_ilg.experiments.models.sizes import Facts
from dp_ilg.experiments.models.transformer_linen import Transformer, attend, visible
from dp_ilg.experiments.runs.evaluation import answer_fn, perplexity_fn
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.keys import run_keys
from dp_ilg.experiments.runs.trainer import start
from dp_ilg.experiments.sweeps.layer_study import measure, noise_energy_ratio

TEXT = Facts(jnp.zeros(6, jnp.int32), num_classes=30, num_tokens=30)
LABEL = Facts(jnp.zeros(6, jnp.int32), num_classes=2, num_tokens=30)
TINY: Any = dict(embed_dim=4, depth=1, heads=2)


@pytest.fixture
def library(tmp_path):
    """Twenty files; a word of file k is k times in it."""
    for k in range(20):
        words = " ".join(f"common word{chr(97 + k)}" for _ in range(9 + k))
        (tmp_path / f"m{k:02}.py").write_text(f'"""{words}"""\n# said here\nx = {k}\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "aside.py").write_text('"""' + "secret " * 50 + '"""')
    return tmp_path


def test_windows_are_words_by_frequency(library):
    windows = read_windows(library)
    assert windows.train.shape[1] == WINDOW + 1 and windows.train.dtype == np.int32
    known, counts = np.unique(windows.train[windows.train > 0], return_counts=True)
    assert known.max() < texts.NUM_TOKENS
    assert counts[:50].mean() > 3 * counts[-50:].mean()
    with pytest.raises(ValueError, match="read-only"):
        windows.train[0] = 0


def test_test_windows_come_from_other_files_than_the_vocabulary(library, monkeypatch):
    monkeypatch.setattr(texts, "_texts", lambda root: iter(_texts()))
    windows = read_windows.__wrapped__(library)
    assert windows.train.tolist() == [[1] * 17]
    assert windows.test.tolist() == [[UNKNOWN] * 17]  # 'b' is in no training file


def _texts():
    yield False, ["a"] * 20  # three words too many for one window
    yield True, ["b"] * 18
    yield False, ["a"] * 16  # one too few


def test_a_paragraph_counts_once_and_tests_of_python_not_at_all(library):
    (library / "copy.py").write_text((library / "m05.py").read_text())
    sources = [" ".join(words) for _, words in texts._texts(library)]
    assert sum("wordf" in text for text in sources) == 1
    assert sum("said here" in text for text in sources) == 1
    assert not any("secret" in text for text in sources)


def test_a_word_sees_earlier_ones_only():
    sizes: Any = dict(tokens=30, width=4, depth=1, heads=2, length=6, outputs=30)
    network = Transformer(**sizes, scale=1.0, is_causal=True)
    one = jnp.array([3, 4, 5, 6, 7, 8])
    pair = jnp.stack([one, one.at[4].set(20)])
    logits, _ = jax.jit(network.init_with_output)(jax.random.key(0), pair)
    np.testing.assert_allclose(logits[0, :4], logits[1, :4], atol=1e-6)
    assert np.abs(logits[0, 4:] - logits[1, 4:]).max() > 1e-3


def test_the_loss_of_a_text_is_the_mean_over_its_words():
    model = build_model("language_model", TEXT, **TINY)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    loss = model.loss_fn(params, (jnp.arange(6), jnp.arange(6)))
    np.testing.assert_allclose(loss, np.log(30.0), rtol=1e-6)


def test_padding_does_not_change_a_label():
    model = build_model("transformer", LABEL, **TINY)
    params = model.init(jax.random.key(0))
    short = build_model("transformer", LABEL, **TINY, length=4)
    cut = jax.tree.map(lambda a: a, params) | {"places": params["places"][:4]}
    ids = jnp.array([5, 9, 3, 8, 0, 0])
    loss = model.loss_fn(params, (ids, jnp.int32(1)))
    assert loss == pytest.approx(float(short.loss_fn(cut, (ids, jnp.int32(1)))), 1e-5)
    longer = ids.at[4].set(7)  # the control: a fifth word does count, unless cut off
    assert abs(float(model.loss_fn(params, (longer, jnp.int32(1))) - loss)) > 1e-4
    assert float(short.loss_fn(cut, (longer, jnp.int32(1)))) == pytest.approx(
        float(loss), 1e-5
    )


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("name", "facts"), [("transformer", LABEL), ("language_model", TEXT)]
)
def test_what_a_transformer_adds_up_starts_as_small_as_asked(name, facts, framework):
    sizes: Any = dict(embed_dim=16, depth=2, heads=2, framework=framework)
    spread = {}
    for init in (1.0, 0.1):
        model = build_model(name, facts, **sizes, embed_init=init)
        params = model.init(jax.random.key(0))
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        spread[init] = {jax.tree_util.keystr(p): float(a.std()) for p, a in leaves}
    plain = build_model(name, facts, **sizes).init(jax.random.key(0))
    assert [float(a.std()) for a in jax.tree.leaves(plain)] == [*spread[1.0].values()]
    for path, large in spread[1.0].items():
        is_added = any(
            part in path for part in ("embedding", "places", "mix", "narrow")
        )
        ratio = 0.1 if is_added and "bias" not in path else 1.0
        assert spread[0.1][path] == pytest.approx(ratio * large, rel=1e-5), path


def test_attention_is_that_of_one_head_written_out():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 5, 4))
    found = attend(q, k, v, visible(jnp.ones(5, jnp.int32), True), heads=1)
    scores = np.tril(np.exp(np.asarray(q @ k.T) / 2.0))
    np.testing.assert_allclose(
        found, scores / scores.sum(1, keepdims=True) @ np.asarray(v), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "facts", "options", "words"),
    [
        (
            "transformer",
            TEXT,
            {},
            "not for 30 classes of 30 tokens; use language_model",
        ),
        ("language_model", LABEL, {}, "not for 2 classes of 30 tokens; use transf"),
        ("transformer", LABEL, {"embed_dim": 6}, "which 4 heads do not divide"),
        ("language_model", Facts(jnp.zeros((8, 8)), 10), {}, "takes token ids"),
        ("group_norm_cnn", Facts(jnp.zeros((4, 4, 1)), 10), {}, "do not allow"),
        ("linear", LABEL, {"hidden": (3,)}, "has no size hidden; it takes none"),
    ],
)
def test_what_does_not_fit_is_one_sentence(name, facts, options, words):
    with pytest.raises(ValueError, match=words):
        build_model(name, facts, **options)


def test_a_model_of_labels_refuses_a_text_to_continue():
    model = build_model("mlp", Facts(jnp.zeros(6), num_classes=30), hidden=(2,))
    params = model.init(jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"\(30,\) where labels have shape \(6,\); use"
    ):
        model.loss_fn(params, (jnp.zeros(6), jnp.zeros(6, jnp.int32)))


def small_job(model, data):
    privacy = PrivacyConfig(batch_size=16, num_steps=2, accountant="rdp")
    config = Config(model=model, privacy=privacy)
    return build_job(config, data=data)


def words(size=64):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 30, (size, 6)).astype(np.int32)
    return Dataset("words", x, x, x[:8], x[:8], 30, note="", num_tokens=30)


def test_accuracy_and_perplexity_are_over_words():
    job = small_job(ModelConfig("language_model", **TINY), words())
    params = job.model.init(jax.random.key(0))
    found = np.asarray(job.model.predict(params, job.data.x_test))
    assert answer_fn(job)(params) == np.mean(found == job.data.y_test)
    perplexity = perplexity_fn(job)
    assert perplexity is not None
    zero = jax.tree.map(jnp.zeros_like, params)
    assert perplexity(zero) == pytest.approx(30.0, rel=1e-5)


@pytest.fixture(scope="module")
def studied():
    privacy = PrivacyConfig(batch_size=64, num_steps=2, accountant="rdp")
    job = build_job(Config(privacy=privacy))
    position = start(job, run_keys(job, 0))
    return job, position, measure(job, position, rows=128)


def test_a_study_measures_what_the_definitions_say(studied):
    job, position, found = studied
    hidden = found["layers"][0]
    assert hidden["size"] == 64 * 64 + 64
    batch = (job.data.x_train[:128], job.data.y_train[:128])
    per_example = jax.jit(jax.vmap(jax.grad(job.model.loss_fn), (None, 0)))
    grads = per_example(position.params, batch)["hidden_0"]
    rows = np.concatenate([g.reshape(128, -1) for g in grads.values()], 1)
    norms = np.linalg.norm(rows, axis=1)
    assert hidden["importance"] == pytest.approx(norms.mean(), rel=1e-4)
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1.0)
    halves = rows[:64].mean(0) @ rows[64:].mean(0)
    assert hidden["mean_gradient_norm"] == pytest.approx(halves**0.5, rel=1e-3)
    plan, uniform = job.plan, hidden["uniform"]
    stddev = plan.gradient_noise_multipliers[0] * plan.l2_clip_norm / 64
    assert uniform["weight"] == pytest.approx(1.0)
    assert uniform["noise"] == pytest.approx(stddev * hidden["size"] ** 0.5, rel=1e-5)
    assert uniform["snr"] == pytest.approx(uniform["signal"] / uniform["noise"])
    json.dumps(found)


def test_the_ratio_is_what_the_rule_does_to_the_noise(studied):
    _, _, found = studied
    energy = {
        rule: sum(layer[rule]["noise"] ** 2 for layer in found["layers"])
        for rule in ("uniform", "min_noise_energy")
    }
    ratio = energy["min_noise_energy"] / energy["uniform"]
    assert ratio == pytest.approx(found["noise_energy_ratio"], rel=1e-3)
    assert ratio < 0.95  # most parameters in one layer, most of the norm in the other


def test_no_split_of_shares_does_better_than_the_overlap_says():
    rng = np.random.default_rng(0)
    sizes, shares = np.array([1000.0, 50.0, 3.0]), np.array([0.2, 0.5, 0.3])
    best = noise_energy_ratio(sizes, shares)
    for raw in rng.lognormal(0, 1, (500, 3)):
        weights = raw * np.sqrt((shares / raw**2).sum())
        assert (sizes * weights**2).sum() / sizes.sum() >= best * (1 - 1e-9)
    weights = (shares / sizes) ** 0.25
    weights = weights * np.sqrt((shares / weights**2).sum())
    assert (sizes * weights**2).sum() / sizes.sum() == pytest.approx(best)


def test_the_figure_shows_every_task(tmp_path):
    pytest.importorskip("matplotlib")
    from dp_ilg.experiments.reports.svg import save_figure
    from dp_ilg.experiments.sweeps.layer_plot import plot_layers

    rule = {"snr": 0.5}
    layer = {"name": "a", "size": 3, "share": 0.5, "uniform": rule}
    layer |= {"min_noise_energy": {"snr": 0.0}}
    record = {"step": 3, "noise_energy_ratio": 0.25, "layers": [layer] * 2}
    figure = plot_layers([{"task": t} | record for t in ("one", "two")])
    save_figure(figure, tmp_path / "a.svg")
    text = Path(tmp_path / "a.svg").read_text()
    assert "one: noise energy x 0.25" in text and "two: noise" in text


def test_dataset_fields_are_as_promised(library, monkeypatch):
    from dp_ilg.experiments.data import datasets

    monkeypatch.setattr(
        texts, "read_windows", lambda: read_windows.__wrapped__(library)
    )
    found = datasets.load_dataset("python_docs")
    np.testing.assert_array_equal(
        np.asarray(found.x_train)[:, 1:], found.y_train[:, :-1]
    )
    assert found.num_tokens == found.num_classes == texts.NUM_TOKENS
    assert dataclasses.is_dataclass(found) and "not covered" in found.note
