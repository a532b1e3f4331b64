"""The README's example runs, is short, and its commands are those of CI."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def test_flax_example_runs_as_printed(tmp_path, monkeypatch):
    pytest.importorskip("flax")
    pytest.importorskip("sklearn")
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    assert "epsilon" in str(names["plan"].statement())
    logits = names["model"].apply({"params": names["state"].params}, names["data"][0])
    assert (logits.argmax(-1) == names["data"][1]).mean() > 0.75
    assert (tmp_path / "ledger.jsonl").exists()


def test_spelt_out_chain_builds():
    import jax
    import optax

    import dp_ilg
    from tests.helpers.models import plan

    k1, k2 = jax.random.split(jax.random.key(0))
    names = {"dp_ilg": dp_ilg, "optax": optax, "plan": plan(), "k1": k1, "k2": k2}
    exec(compile(blocks("python")[1], "README.md", "exec"), names)  # noqa: S102
    state = names["tx"].init({"embedding": jax.numpy.zeros((100, 2))})
    assert len(names["tx"].geometry(state).groups.names) == 8


def test_exactly_two_set_up_commands_and_ci_runs_them():
    commands = blocks("bash")
    assert len(commands) == 2 and all(
        len(c.strip().splitlines()) == 1 for c in commands
    )
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[dev]"' in ci and '-e ".[dev]"' in commands[1]
    assert 'pytest -n 2 -m "not slow"' in ci
    assert 'pytest -n 2 -m "not slow"' in commands[1]


def test_every_core_module_is_in_the_map():
    table = TEXT[TEXT.index("## Where things are") :]
    modules = {p.stem for p in (ROOT / "dp_ilg").glob("*.py")}
    for name in modules - {"__init__", "base", "validation", "search"}:
        assert f"`{name}`" in table, name


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", TEXT, re.S):
        assert (ROOT / path).stat().st_size > 1000
