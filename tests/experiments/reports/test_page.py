"""The report: what it shows, what it must never show, and what it refuses."""

import functools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.experiments.reports import figures
from dp_ilg.experiments.reports.history import History
from dp_ilg.experiments.reports.page import render_report, write_overview, write_report
from dp_ilg.experiments.reports.record import read_run
from dp_ilg.experiments.reports.svg import CSS_VARIABLES, inline_svg, short_names

BANDS = (0, 10, 24, 57, 136, 322, 765, 1815, 10_000)
IMDB = {
    **{f"embed[{a}:{b}]": 16 * (b - a) for a, b in zip(BANDS, BANDS[1:], strict=False)},
    "hidden": 272,
    "head": 17,
}
HOSTILE = "<script>alert('x')</script>"
CONFIG = """[data]
name = "imdb"

[model]
name = "embedding"
hidden = [16]

[privacy]
epsilon = 2.0
delta = 1e-05
batch_size = 2048
num_steps = 300

[optimizer]
learning_rate = 0.1
importance = "min_noise_energy"
"""


def a_plan(stages=((300, 3.22),), **changes) -> PrivacyPlan:
    fields = {
        "num_examples": 25_000,
        "batch_size": 2048,
        "num_steps": sum(count for count, _ in stages),
        "delta": 1e-5,
        "l2_clip_norm": 1.0,
        "score_budget": 0.01,
        "stages": stages,
        "accountant": "rdp",
        "target_epsilon": 2.0,
    }
    return PrivacyPlan(**{**fields, **changes})


def evaluations(plan, until, layers=IMDB, every=10, seed=0):
    """Lines of metrics as the trainer writes them, from a made-up run."""
    rng = np.random.default_rng(seed)
    sizes = np.array(list(layers.values()), float)
    goal = sizes**0.3 * rng.lognormal(0, 1, len(sizes))
    goal, share = goal / goal.sum(), np.full(len(sizes), 1 / len(sizes))
    for step in range(every, until + 1, every):
        noisy = np.maximum(goal * rng.lognormal(0, 0.15, len(sizes)), 1e-4)
        share = 0.8 * share + 0.2 * noisy / noisy.sum()
        weights = np.sqrt(share) ** 0.5 * sizes**-0.25
        weights *= np.sqrt((share / weights**2).sum())
        z = float(plan.noise_multipliers[step - 1])
        part = step / plan.num_steps
        epsilon = (plan.target_epsilon or 2.0) * part**0.5 if z > 0 else np.inf
        yield {
            "step": step,
            "epsilon": epsilon,
            "test_accuracy": 0.5 + 0.33 * (1 - np.exp(-6 * part)) + rng.normal(0, 3e-3),
            "seconds": 0.8 * step,
            "noise_multiplier": z,
            "layers": {
                "names": list(layers),
                "sizes": [int(size) for size in sizes],
                "importance": share.tolist(),
                "weights": weights.tolist(),
                "noise_stddev": (
                    z * plan.l2_clip_norm / plan.batch_size * weights
                ).tolist(),
            },
        }


def fake_run(folder: Path, plan=None, *, charged=None, config=CONFIG, **kinds) -> Path:
    """Writes a run folder; with `charged` steps it is an unfinished one."""
    plan = plan or a_plan()
    folder.mkdir(parents=True, exist_ok=True)
    steps = plan.num_steps if charged is None else charged
    lines = list(evaluations(plan, steps, **kinds))
    (folder / "config.toml").write_text(config)
    (folder / "plan.json").write_text(plan.to_json())
    with PrivacyLedger(folder / "ledger.jsonl", plan) as ledger:
        for step in range(steps):
            ledger.record(step)
    write_lines(folder / "metrics.jsonl", lines)
    if charged is None:
        last = {
            name: lines[-1][name] for name in ("test_accuracy", "epsilon", "seconds")
        }
        summary = {
            **last,
            "delta": plan.delta,
            "steps": steps,
            "params_sha256": "0" * 64,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_lines(path: Path, values) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


BLOCK = "encoder/layers/block_{:02d}/attention/{}"
PARTS = ("query/kernel", "key/kernel", "value/kernel", "out/kernel", "norm/scale")
SIXTY = {
    BLOCK.format(i, part): 64 if "norm" in part else 4096 * (1 + i)
    for i in range(12)
    for part in PARTS
}
STAGES = ((50, 3.9), (50, 3.5), (50, 3.2), (50, 3.0), (50, 2.8), (50, 2.6))
RUNS = {
    "finished": {"every": 20},
    "one layer": {"layers": {"dense": 650}},
    "sixty long names": {"layers": SIXTY, "plan": a_plan(STAGES), "every": 60},
    "unfinished": {"plan": a_plan(STAGES), "charged": 115},
    "no step yet": {"charged": 0},
    "no scores": {"plan": a_plan(((30, 3.22),), score_budget=0.0), "every": 30},
    "no privacy": {"plan": a_plan(((30, 0.0),), target_epsilon=None)},
    "hostile": {
        "layers": {HOSTILE: 10, "$\\alpha$ & <b>\x00\ud800": 10, "层/核": 5},
        "config": f'[data]\nname = "{HOSTILE}"\n# {HOSTILE}',
        "every": 300,
    },
}


@pytest.fixture(scope="module")
def report_of(tmp_path_factory):
    """Gives the page of a run of the table, drawn once."""

    @functools.cache
    def written(name: str) -> str:
        folder = tmp_path_factory.mktemp("runs") / "run&lt;"
        path = write_report(fake_run(folder, **RUNS[name]))
        assert path == folder / "report.html"
        return path.read_text(encoding="utf-8")

    return written


@pytest.fixture(params=RUNS, ids=lambda name: name.replace(" ", "_"))
def report(request, report_of) -> str:
    return report_of(request.param)


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on unbalanced tags."""

    VOID = ("meta", "wbr", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def page_of(run: Path) -> Page:
    return Page(render_report(read_run(run)))


def test_page_is_self_contained_and_well_formed(report):
    page, text = Page(report), report
    assert not {"script", "iframe", "link", "object", "embed", "a"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    pointers = [
        v[1:] for _, name, v in page.attributes if name == "href" and v[0] == "#"
    ]
    pointers += re.findall(r"url\(#([^)]*)\)", text)
    assert set(pointers) <= set(ids)


def test_figures_follow_the_colour_scheme_of_the_page(report):
    styles, _, body = report.partition("</style>")
    assert styles.count("--page:") == 2  # light and dark
    assert set(re.findall(r"var\((--\w+)\)", body)) <= set(
        re.findall(r"(--\w+):", styles)
    )
    for fixed in CSS_VARIABLES:
        assert fixed not in body


def test_page_shows_what_the_run_reached(tmp_path):
    run = fake_run(tmp_path / "run", a_plan(STAGES))
    summary = json.loads((run / "summary.json").read_text())
    added = {"seed_note": f"A note {HOSTILE}.", "versions": {"jax": "9.9.9"}}
    (run / "summary.json").write_text(json.dumps({**summary, **added}))
    page = page_of(run)
    statement = a_plan(STAGES).statement().as_dict()
    for shown in (
        "Private training on imdb",
        f"{100 * summary['test_accuracy']:.1f} %",
        "1e-5",
        "of 300 planned",
        "4 min 00 s",
        "embed[0:10]",
        "130,960",
        "scores 1\xa0%",
        'importance = "min_noise_energy"',
        *statement["not_covered"],
        f"A note {HOSTILE}.",
        "9.9.9",
    ):
        assert shown in page.text
    guarantee, _, _ = statement["text"].partition("The guarantee does not cover")
    assert guarantee.strip() in page.text
    assert "Unfinished" not in page.text


def test_everything_from_the_folder_is_escaped(report_of):
    page = Page(report_of("hostile"))
    assert "Run run&lt; ·" in page.text
    assert page.text.count(HOSTILE) >= 5  # title, heading, tile, map, table, config
    assert "script" not in page.tags and page.tags.count("b") == 9  # our own
    assert "$\\alpha$ & <b>\ufffd\ufffd" in page.text


def test_unfinished_run_says_so_and_charges_the_whole_ledger(report_of, tmp_path):
    page = Page(report_of("unfinished"))
    assert "Unfinished run." in page.text
    assert "115 of 300 steps" in page.text
    run = fake_run(tmp_path / "run", **RUNS["unfinished"])
    assert history_of(run).steps[-1] == 110
    assert read_run(run).epsilon_charged() == a_plan(STAGES).epsilon(115)


def test_recorded_private_loss_is_warned_of(tmp_path):
    shown = CONFIG + "\n[run]\nshow_private_loss = true\n"
    assert "Warning." in page_of(fake_run(tmp_path / "a", charged=0, config=shown)).text
    assert "Warning." not in page_of(fake_run(tmp_path / "b", charged=0)).text


def test_run_without_privacy_never_claims_any(report_of):
    page = Page(report_of("no privacy"))
    assert "Training without privacy on imdb" in page.text
    assert "Nothing is guaranteed" in page.text and "NO PRIVACY" in page.text
    assert "Private training" not in page.text


def test_same_folder_gives_same_bytes_whatever_the_users_style(tmp_path):
    record = read_run(fake_run(tmp_path / "run", charged=20))
    plain = render_report(record)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        assert render_report(record) == plain
        assert dict(matplotlib.rcParams) == before


def test_line_cut_by_a_kill_is_left_out(tmp_path):
    run = fake_run(tmp_path / "run", charged=40)
    for name, keep in (("metrics.jsonl", 30), ("ledger.jsonl", 39)):
        path = run / name
        path.write_bytes(path.read_bytes()[:-9])
        before = path.read_bytes()
        assert keep in (history_of(run).steps[-1], read_run(run).steps_charged)
        assert path.read_bytes() == before


def test_evaluation_repeated_by_a_resumed_run_counts_once(tmp_path):
    run = fake_run(tmp_path / "run", charged=30)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines, *lines[1:]]))
    assert history_of(run).steps.tolist() == [10, 20, 30]


def replaced(old: str, new: str):
    return lambda text: text.replace(old, new, 1)


DAMAGE = {
    "no config": ("config.toml", None),
    "no plan": ("plan.json", None),
    "no ledger": ("ledger.jsonl", None),
    "no metrics": ("metrics.jsonl", None),
    "config is no TOML": ("config.toml", lambda text: "= ="),
    "config without a data set": ("config.toml", lambda text: "data = 3"),
    "config is no text": ("config.toml", lambda text: "\udcff"),
    "plan is no JSON": ("plan.json", lambda text: text[:-5]),
    "plan lacks a field": ("plan.json", replaced("delta", "gamma")),
    "plan of other noise": ("plan.json", replaced("3.22", "3.32")),
    "ledger damaged early": ("ledger.jsonl", replaced('"step": 3', '"step": 7')),
    "metrics damaged early": ("metrics.jsonl", replaced("{", "[")),
    "metrics hold a number": ("metrics.jsonl", lambda text: "3\n" + text),
    "no epsilon": ("metrics.jsonl", replaced('"epsilon"', '"eps"')),
    "negative accuracy": ("metrics.jsonl", replaced('y": 0.', 'y": -0.')),
    "infinite noise": ("metrics.jsonl", replaced('stddev": [', 'stddev": [Infinity, ')),
    "missing weight": ("metrics.jsonl", replaced('weights": [', 'weights": [1.0, ')),
    "layers change": ("metrics.jsonl", replaced('"head"', '"tail"')),
    "evaluation past the ledger": ("metrics.jsonl", replaced('p": 30', 'p": 31')),
    "summary is no object": ("summary.json", lambda text: "[]"),
    "summary is no JSON": ("summary.json", lambda text: "{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_raises_one_sentence(tmp_path, damage):
    run = fake_run(tmp_path / "run", a_plan(((30, 3.22),)))
    name, change = DAMAGE[damage]
    if change is None:
        (run / name).unlink()
    else:
        text = change((run / name).read_text())
        assert text != (run / name).read_text()
        (run / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as caught:
        write_report(run)
    message = str(caught.value)
    assert str(run) in message and message.endswith(".") and "\n" not in message
    assert not (run / "report.html").exists()


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "run", charged=0)
    (run / "report.html").write_text("old")

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(ValueError, match="No space left on device"):
        write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".report-*"))


def history_of(run: Path) -> History:
    history = read_run(run).history
    assert history is not None
    return history


def figures_of(run: Path):
    plan, history = read_run(run).plan, history_of(run)
    yield figures.noise_multiplier_figure(
        plan.noise_multipliers,
        plan.gradient_noise_multipliers,
        plan.score_noise_multipliers,
        read_run(run).steps_charged,
    )
    yield figures.accuracy_figure(history, plan.target_epsilon)
    yield figures.layers_figure(history)
    yield figures.layers_figure(history, stacked=True)
    yield figures.overview_figure(history, plan.target_epsilon)


def drawn_labels(labels, renderer):
    shown = [label for label in labels if label.get_visible() and label.get_text()]
    boxes = [label.get_window_extent(renderer) for label in shown]
    return [box for box in boxes if box.width > 0]


@pytest.mark.parametrize("name", ["one layer", "sixty long names"])
def test_nothing_sticks_out_of_a_figure_and_labels_do_not_touch(tmp_path, name):
    for figure in figures_of(fake_run(tmp_path / "run", **RUNS[name])):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        tight = figure.get_tightbbox(renderer)
        width, height = figure.get_size_inches()
        assert tight.x0 > -0.05 and tight.y0 > -0.05
        assert tight.x1 < width + 0.05 and tight.y1 < height + 0.05
        for axes in figure.axes:
            rows = drawn_labels(axes.get_yticklabels(), renderer)
            columns = drawn_labels(axes.get_xticklabels(), renderer)
            edges = sorted((box.y0, box.y1) for box in rows)
            for (_, end), (start, _) in zip(edges, edges[1:], strict=False):
                assert end <= start + 2
            edges = sorted((box.x0, box.x1) for box in columns)
            for (_, end), (start, _) in zip(edges, edges[1:], strict=False):
                assert end < start


def test_figures_draw_the_recorded_numbers(tmp_path):
    history = history_of(fake_run(tmp_path / "run"))
    axes = figures.accuracy_figure(history, 2.0).axes[0]
    curve, target = axes.lines
    np.testing.assert_allclose(np.array(curve.get_xdata()), history.epsilons)
    np.testing.assert_allclose(np.array(curve.get_ydata()), 100 * history.answers)
    assert np.array(target.get_xdata()).tolist() == [2.0, 2.0]
    bars_and_maps = figures.layers_figure(history).axes
    maps = [axes for axes in bars_and_maps if axes.get_xlabel() == "step"]
    shares, stddevs = (np.array(axes.collections[0].get_array()) for axes in maps)
    np.testing.assert_allclose(shares, 100 * history.shares.T)
    np.testing.assert_allclose(stddevs, history.noise_stddevs.T)
    labels = [label.get_text() for label in maps[0].get_yticklabels()]
    assert labels == list(history.layer_names)


def test_long_names_stay_distinct():
    for width in (12, 22, 40):
        labels = short_names(list(SIXTY), width)
        assert len(set(labels)) == 60
        assert max(map(len, labels)) <= width + len(" #60")


def test_overview_is_the_same_file_each_time(tmp_path):
    run = fake_run(tmp_path / "run", charged=30)
    first = write_overview(run, tmp_path / "a.svg").read_bytes()
    assert write_overview(run, tmp_path / "b.svg").read_bytes() == first
    assert b"embed[0:10]" in first and b"test accuracy" in first


def test_overview_without_an_evaluation_raises(tmp_path):
    run = fake_run(tmp_path / "run", charged=5)
    with pytest.raises(ValueError, match="no evaluation yet"):
        write_overview(run, tmp_path / "overview.png")


def test_a_long_plan_stays_a_small_figure():
    multipliers = np.repeat([1.3, 1.2, 1.1], 100_000)
    figure = figures.noise_multiplier_figure(
        multipliers, multipliers / 0.99, multipliers / 0.1, 1_000
    )
    assert len(inline_svg(figure, "a", "noise")) < 20_000
