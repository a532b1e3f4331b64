"""The floors of the package: who may import whom, and what an import may pull in."""

import ast
import functools
import itertools
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "dp_ilg"
FLOORS = [
    ["base", "validation", "registry"],
    ["accounting", "geometry", "sampling", "auditing"],
    ["clipping", "noise"],
    ["optimizers", "projection"],
    ["baselines"],
    ["training"],
    ["dp_ilg"],
    ["experiments.config"],
    ["experiments.data", "experiments.models", "experiments.reports"],
    ["experiments.runs"],
    ["experiments.papers"],
    ["experiments.audits", "experiments.sweeps"],
    ["experiments.cli"],
]
"""From the ground up; a room may import what lies below it, and itself."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PUBLIC = FLOOR["dp_ilg"]
WITHOUT_JAX = ["accounting", "registry"]
AT_THE_ROOT = {"__init__", "base", "validation"}
CORE_DISTRIBUTIONS = {"jax", "optax", "numpy", "scipy", "dp_accounting", "jaxtyping"}
HEAVY = ["flax", "orbax", "matplotlib", "tyro", "rich", "jinja2", "sklearn"]
SLOW = ["dp_accounting", "scipy"]
MOST_FILES, MOST_LINES = 17, 360
FILES = sorted(PACKAGE.rglob("*.py"))


def dotted(path):
    """The module of a file: `dp_ilg.noise` for the package of that name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def room_of(module):
    """The room a module lives in, as `FLOORS` names it."""
    parts = module.split(".")[1:]
    if not parts:
        return "dp_ilg"
    return ".".join(parts[:2]) if parts[0] == "experiments" else parts[0]


@functools.cache
def imports(path):
    """Modules a file imports: of dp_ilg as they are called, of others the top."""
    return imported(ast.parse(path.read_text()))


def imported(tree):
    """What the import statements of a tree name, as `imports` says."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & set(MODULES)) or {node.module}
    return {m if m.startswith("dp_ilg") else m.partition(".")[0] for m in found}


def ours(path):
    """The modules of this package that a file imports."""
    return {module for module in imports(path) if module.startswith("dp_ilg")}


def climbs(module, other):
    """Whether an import leads to the same floor's neighbour, or up."""
    here, there = room_of(module), room_of(other)
    return here != there and FLOOR[there] >= FLOOR[here]


def test_arrows_point_down_only():
    front = ("dp_ilg", "dp_ilg.experiments")
    pairs = [(m, o) for m, p in MODULES.items() if m not in front for o in ours(p)]
    assert len(pairs) > 300
    assert not [f"{m} imports {o}" for m, o in pairs if climbs(m, o)]


def test_an_arrow_up_would_be_seen():
    assert climbs("dp_ilg.noise.normal", "dp_ilg.optimizers.adam")
    assert climbs("dp_ilg.noise.normal", "dp_ilg.clipping.clip")
    assert climbs("dp_ilg.training.feeds", "dp_ilg.experiments.config.schema")
    assert climbs("dp_ilg.baselines.plain", "dp_ilg")
    assert climbs("dp_ilg.training.step", "dp_ilg")
    assert not climbs("dp_ilg.optimizers.adam", "dp_ilg.noise.normal")
    assert not climbs("dp_ilg.noise.normal", "dp_ilg.noise.secure")


def cycle(graph):
    """A module that reaches itself, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return module
        if module in done:
            return None
        path.append(module)
        found = next(filter(None, map(visit, sorted(graph.get(module, ())))), None)
        path.pop()
        done.add(module)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_no_cycle():
    inits = {dotted(p) for p in FILES if p.name == "__init__.py"}
    graph = {m: ours(p) - inits for m, p in MODULES.items() if m not in inits}
    assert cycle(graph) is None
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def test_core_needs_only_core_packages():
    rooms = {dotted(p): room_of(dotted(p)) for p in FILES}
    core = [p for p in FILES if FLOOR.get(rooms[dotted(p)], PUBLIC + 1) <= PUBLIC]
    core = [p for p in core if rooms[dotted(p)] != "training"]  # see the next test
    allowed = CORE_DISTRIBUTIONS | sys.stdlib_module_names | {"dp_ilg"}
    tops = {(p, m.partition(".")[0]) for p in core for m in imports(p)}
    assert len(core) > 50
    assert not [(p, top) for p, top in tops if top not in allowed]


def test_the_front_door_imports_an_extra_only_where_it_is_needed():
    """`import dp_ilg` reaches this room, and must need nothing but the core."""
    allowed = CORE_DISTRIBUTIONS | sys.stdlib_module_names | {"dp_ilg"}
    files = sorted((PACKAGE / "training").rglob("*.py"))
    files = [p for p in files if p.stem not in ("lora", "fine_tune")]  # Flax's own
    assert len(files) > 10
    for path in files:
        body = ast.parse(path.read_text()).body
        top: list[ast.stmt] = [
            node for node in body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        module = ast.Module(top, type_ignores=[])
        names = {name.partition(".")[0] for name in imported(module)}
        assert not [(path, name) for name in names if name not in allowed]


@pytest.mark.parametrize("room", WITHOUT_JAX)
def test_rooms_without_jax(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files and not [path for path in files if "jax" in imports(path)]


SHORT_TAILED = re.compile(r"random\.(normal|multivariate_normal|laplace)\b|erf_inv")
DRAWS_NO_NOISE = {"training/lora.py", "experiments/papers/pca_network.py"}
"""These draw initial parameters, from no data."""


def short_tailed(root, code=None):
    """Files that draw float32 normal numbers, which end at 5.42 deviations."""
    found = set()
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text() if code is None else code)
        names = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        if any(SHORT_TAILED.search(name) and "np." not in name for name in names):
            found.add(str(path.relative_to(PACKAGE)))
    return found


def test_no_noise_is_drawn_with_a_short_tail():
    assert short_tailed(PACKAGE) <= DRAWS_NO_NOISE
    planted = "import jax\ny = x + jax.random.normal(key, x.shape)"
    assert short_tailed(PACKAGE / "base.py", planted) == {"base.py"}
    assert short_tailed(PACKAGE / "base.py", "from jax import lax\nlax.erf_inv(u)")


def test_at_most_two_modules_at_the_root():
    assert {p.stem for p in PACKAGE.glob("*.py")} == AT_THE_ROOT
    assert {p.stem for p in (PACKAGE / "experiments").glob("*.py")} == {"__init__"}


def rooms():
    """Every folder of the package that holds modules."""
    return sorted({path.parent for path in FILES} - {PACKAGE, PACKAGE / "experiments"})


@pytest.mark.parametrize("room", rooms(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_says_what_it_is_for(room):
    name = room_of(dotted(room / "__init__.py"))
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    assert 3 <= doc.count("\n") + 1 <= 8
    assert f"Floor {FLOOR[name]}" in doc and "Enter by" in doc
    assert 2 <= len(list(room.glob("*.py"))) <= MOST_FILES


def apart(a, b):
    """Whether two names differ by more than a letter, or a plural or -ing."""
    if abs(len(a) - len(b)) > 3:
        return True
    close = re.sub(r"(ing|s|ed)$", "", a) == re.sub(r"(ing|s|ed)$", "", b)
    changed = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    return not (close or changed <= 1)


def test_names_of_a_room_are_told_apart():
    for room in rooms():
        pairs = itertools.combinations([p.stem for p in room.glob("*.py")], 2)
        assert not [(room, a, b) for a, b in pairs if not apart(a, b)]
    assert not apart("pool", "pooling") and not apart("table2", "table3")


def test_modules_stay_short():
    lines = {path: path.read_text().count("\n") for path in FILES}
    assert not [path for path, count in lines.items() if count > MOST_LINES]


def test_what_is_cited_is_in_the_repository():
    """Laws are called by their names, and nothing cites papers of our own."""
    absent = re.compile(r"\blaws? \d|DESIGN\.md|HOUSE\.md")
    assert absent.search("law 3") and absent.search("see DESIGN.md")
    assert not [path for path in FILES if absent.search(path.read_text())]


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
    code = "from dp_ilg.experiments.cli.main import main; main(['train', '--help'])"
    others = sorted({*HEAVY, *SLOW} - {"tyro", "rich"})
    assert loaded_by(code, others) == "[]"


def test_public_names_exist_are_sorted_and_documented():
    import dp_ilg

    assert dp_ilg.__all__ == sorted(dp_ilg.__all__)
    for name in dp_ilg.__all__:
        assert getattr(dp_ilg, name).__doc__, name


def test_an_installed_wheel_has_every_file_that_is_read():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(path.match(p) for p in patterns.get(package, [])), path
