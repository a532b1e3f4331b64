"""The module ranks of DESIGN.md section 5, and what an import may pull in."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "dp_ilg"
RANKS = {
    -1: ["epsilon_cache", "gather", "loss_pairs", "normal", "truncation", "validation"],
    0: [
        "auditing",
        "base",
        "claims",
        "explanation",
        "groups",
        "pca",
        "factor_pca",
        "renyi",
        "sampling",
        "schedules",
        "sealing",
        "search",
        "secure_noise",
        "spectra",
        "statement",
    ],
    1: ["accounting", "composition", "layers", "per_example", "purity", "rules"]
    + ["wrappers"],
    2: ["coordinates", "geometry", "plan"],
    3: ["bookkeeping", "calibration", "clipping", "ledger", "lots", "noise"],
    4: [
        "adam",
        "aggregate",
        "averaging",
        "clip_schedule",
        "engines",
        "filters",
        "importance",
        "quantile",
        "scaling",
    ],
    5: ["balance", "gradients"],
    6: ["memory", "optimizers"],
    7: ["plain_methods", "published"],
    8: ["adaptive_methods"],
    9: ["baselines"],
    10: ["__init__"],
}
RANK_OF = {name: rank for rank, names in RANKS.items() for name in names}
CORE_DISTRIBUTIONS = {"jax", "optax", "numpy", "scipy", "dp_accounting", "jaxtyping"}
BOOKKEEPING = [
    ["magnitudes", "phases", "pool", "pooling", "program", "views"],
    ["convolution"],
    ["rules"],
    ["tape"],
    ["parts"],
    ["cost", "few", "rows"],
    ["factors"],
    ["engine"],
    ["explain"],
    ["__init__"],
]
BOOKKEEPING_RANK = {name: r for r, names in enumerate(BOOKKEEPING) for name in names}
EXPERIMENTS = [
    ["data_files", "fields", "linen_models", "run_record", "svg", "train_step"]
    + [
        "config_run",
        "gpt2",
        "lora",
        "model_sizes",
        "pca_network",
        "resnet",
        "scattering",
        "text_data",
        "word_counts",
    ]
    + ["environment", "compiling", "locks", "memory_limits", "mesh"],
    ["config_data", "feeds", "hosts", "mesh_rows", "shard_rows"],
    ["hosts_worker"],
    ["transformer_linen", "shards"],
    ["transformer_nnx"],
    [
        "data_adult",
        "data_flights",
        "data_openml",
        "encoder",
        "fine_tune",
        "nnx_models",
        "plots",
        "checkpoints",
        "reproduce",
    ],
    ["data", "models", "text_features", "report", "table2", "table_runs"],
    ["abadi", "config", "features", "projection", "sources", "table3"],
    ["export", "holdout", "recipe"],
    ["job", "audit_scene"],
    ["audit", "trainer_audit", "trainer_audit_checks", "trainer_audit_plot"],
    ["trainer_audit_residuals", "trainer_audit_sampler"],
    ["canaries", "one_run", "trainer_audit_noise", "trainer_audit_promises"]
    + ["trainer_audit_whole_run"],
    ["trainer_audit_report"],
    ["trainer_audit_command"],
    ["study_commands"],
    ["progress", "trainer", "commands"],
    ["layer_study", "layer_study_plot", "run_folder", "shard_command"],
    ["distributed"],
    ["runner"],
    ["sweep", "sweep_bench", "compare_cost"],
    ["sweep_check", "sweep_runs", "sweep_worker"],
    ["sweep_results"],
    ["sweep_board"],
    ["sweep_pool", "compare_statistics"],
    ["compare_plots"],
    ["compare_report"],
    ["compare"],
    ["compare_command"],
    ["cli"],
    ["worker"],
]
EXPERIMENT_RANK = {name: r for r, names in enumerate(EXPERIMENTS) for name in names}
PACKAGES = ("dp_ilg", "dp_ilg.clipping.bookkeeping", "dp_ilg.experiments")
HEAVY = ["flax", "orbax", "matplotlib", "tyro", "rich", "jinja2", "sklearn"]
SLOW = ["dp_accounting", "scipy"]


def imports(path):
    """Modules a file imports, as full dotted names of dp_ilg or top-level packages."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module in PACKAGES:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_core_imports_only_lower_ranks_and_core_packages(path):
    assert path.stem in RANK_OF, f"give {path.stem} a rank"
    for name in imports(path):
        top, _, inner = name.partition(".")
        if top == "dp_ilg":
            inner = inner.partition(".")[0] or "__init__"
            assert RANK_OF[inner] < RANK_OF[path.stem], f"{path.stem} imports {inner}"
        else:
            assert top in CORE_DISTRIBUTIONS | sys.stdlib_module_names, name


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "bookkeeping").glob("*.py")), ids=lambda p: p.stem
)
def test_bookkeeping_imports_only_lower_ranks(path):
    for name in imports(path):
        top, _, inner = name.partition(".")
        if name.startswith("dp_ilg.clipping.bookkeeping."):
            inner = name.split(".")[2]
            assert BOOKKEEPING_RANK[inner] < BOOKKEEPING_RANK[path.stem], inner
        elif top == "dp_ilg":
            assert RANK_OF[inner.partition(".")[0]] < RANK_OF["bookkeeping"], inner
        else:
            assert top in CORE_DISTRIBUTIONS | sys.stdlib_module_names, name


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "experiments").glob("[!_]*.py")), ids=lambda p: p.stem
)
def test_experiments_import_only_lower_ranks(path):
    for name in imports(path):
        if name.startswith("dp_ilg.experiments."):
            inner = name.split(".")[2]
            assert EXPERIMENT_RANK[inner] < EXPERIMENT_RANK[path.stem], inner


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_modules_stay_short(path):
    assert path.read_text().count("\n") <= 360


def test_accounting_needs_no_jax():
    for name in ("accounting", "schedules", "statement"):
        assert not any(m.startswith("jax") for m in imports(PACKAGE / f"{name}.py"))


def loaded_by(code, names):
    """Which of the named modules a fresh process holds after running `code`."""
    code += f"; import sys; print(sorted(m for m in {names} if m in sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return out.stdout.splitlines()[-1]


def test_importing_the_package_pulls_in_no_extra_and_no_accounting():
    assert loaded_by("import dp_ilg", [*HEAVY, *SLOW]) == "[]"


def test_help_waits_for_nothing_it_does_not_need():
    """dp_accounting and SciPy took most of the four seconds before `--help`."""
    code = "from dp_ilg.experiments.cli import main; main(['train', '--help'])"
    others = sorted({*HEAVY, *SLOW} - {"tyro", "rich"})
    assert loaded_by(code, others) == "[]"


def test_public_names_exist_are_sorted_and_documented():
    import dp_ilg

    assert dp_ilg.__all__ == sorted(dp_ilg.__all__)
    for name in dp_ilg.__all__:
        assert getattr(dp_ilg, name).__doc__, name


def test_an_installed_wheel_has_every_file_that_is_read():
    here = pathlib.Path(__file__).parent.parent
    pyproject = tomllib.loads((here / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]
    for path in (here / "dp_ilg").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(here).parts)
            assert any(path.match(p) for p in patterns.get(package, [])), path
