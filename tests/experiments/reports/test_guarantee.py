"""The five bullets, who a page is by, what of the settings it shows, and its print."""

import datetime
import json
import re

import pytest

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.statements.membership import right_guesses_of
from dp_ilg.experiments.config.schema import Config, config_to_toml
from dp_ilg.experiments.reports.guarantee import bullets
from dp_ilg.experiments.reports.record import read_run
from dp_ilg.experiments.reports.settings import as_text, used
from tests.experiments.reports.test_page import STAGES, a_plan, fake_run, page_of

tomllib = pytest.importorskip("tomllib")


def test_five_bullets_with_the_numbers_of_the_plan():
    plan = a_plan()
    found = dict(bullets(plan, 300))
    assert len(found) == 5
    text = " ".join(found.values())
    share = float(re.search(r"right at most ([\d.]+) %", text)[1]) / 100  # type: ignore
    assert right_guesses_of(plan) <= share <= right_guesses_of(plan) + 1e-3
    assert "1e-5" in text and "300 steps" in text and "25,000" in text
    assert "planned steps" not in text


def test_a_run_that_stopped_quotes_both_epsilons():
    plan = a_plan(STAGES)
    early = dict(bullets(plan, 115))
    assert "115 of 300 planned steps" in early["Where it ends"]
    shown = float(re.search(r"ε = ([\d.]+)", early["The promise"])[1])  # type: ignore
    assert plan.epsilon(115) <= shown < plan.epsilon() <= shown * 3
    whole = float(early["Where it ends"].rstrip(".").rpartition(" ")[2])
    assert plan.epsilon() <= whole <= plan.epsilon() * 1.0011


@pytest.mark.parametrize("epsilon", ["tiny", "huge"])
def test_no_share_is_rounded_to_certainty(epsilon):
    plan = a_plan(((30, 20.0 if epsilon == "tiny" else 0.35),), target_epsilon=None)
    text = dict(bullets(plan, 30))["What that means"]
    shares = [float(share) for share in re.findall(r"([\d.]+) %", text)]
    assert len(shares) == 3 and all(50 <= share <= 100 for share in shares)


def test_replaced_examples_have_their_own_words():
    text = dict(bullets(a_plan(neighboring_relation="replace_one"), 300))
    assert "which of two examples" in text["What that means"]


def test_without_privacy_there_is_nothing_to_list():
    assert bullets(PrivacyPlan(**{**vars(a_plan()), "stages": ((300, 0.0),)}), 5) == []


def test_the_page_names_who_answers_and_what_it_belongs_to(tmp_path):
    named = '\n[report]\nresponsible = "A. <b>Person</b>"\ncontact = "a@b.org"\n'
    run = fake_run(tmp_path / "run", config=fake_config(named))
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"finished": "2026-11-30T21:00:00+01:00", "params_sha256": "ab" * 32}
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(run)
    origin = read_run(run).origin
    for shown in ("2026-11-30 20:00 UTC", "A. <b>Person</b>", "a@b.org", "ab" * 32):
        assert shown in page.text
    assert origin.ledger_sha256 in page.text and len(origin.ledger_sha256) == 64
    assert "responsible" not in as_text(read_run(run).settings)


def fake_config(more: str) -> str:
    from tests.experiments.reports.test_page import CONFIG

    return CONFIG + more


def test_what_is_not_given_is_said_to_be(tmp_path):
    run = fake_run(tmp_path / "run", charged=20)
    page, origin = page_of(run), read_run(run).origin
    assert page.text.count("not given") == 2 and not origin.model_sha256
    began = datetime.datetime.fromtimestamp(0, datetime.UTC)
    assert origin.date > f"{began:%Y-%m-%d}"  # of the ledger's last step


@pytest.mark.parametrize("table", [{"report": 3}, {"report": {"contact": 7}}])
def test_a_strange_report_section_does_no_harm(tmp_path, table):
    lines = "report = 3\n" if table["report"] == 3 else ""
    rest = "" if lines else "[report]\ncontact = 7\n"
    run = fake_run(tmp_path / "run", charged=0, config=lines + fake_config("\n" + rest))
    assert "not given" in page_of(run).text


def test_settings_that_do_nothing_are_left_out():
    table = tomllib.loads(config_to_toml(Config()))
    found = used(table)
    assert found["data.name"] == "digits" and found["privacy.l2_clip_norm"] == 1.0
    assert found["optimizer.ema_decay"] == 0.9
    gone = ("data.features", "privacy.num_stages", "optimizer.blocks", "run.engine")
    assert not set(gone) & set(found)
    assert not {"metrics.budget", "metrics.smooth_steps"} & set(found)
    table["optimizer"] |= {"method": "dp_sgd", "momentum": 0.9}
    table["privacy"]["schedule"] = {"name": "linear", "end": 0.5}
    found = used(table)
    assert found["optimizer.momentum"] == 0.9 and found["privacy.num_stages"] == 16
    assert not {"optimizer.b1", "optimizer.importance", "optimizer.adam"} & set(found)
    table["optimizer"]["method"] = "mine.py:method"  # whose options are not known
    assert "optimizer.b1" in used(table)


def test_lines_of_settings_are_toml_again():
    found = used(tomllib.loads(config_to_toml(Config())))
    again = tomllib.loads(as_text(found))
    assert again["privacy"]["epsilon"] == 8.0
    assert again["privacy"]["schedule"]["name"] == "constant"


def test_nothing_long_refuses_to_be_broken_in_print(tmp_path):
    """A long block that may not break leaves the page before it empty."""
    from dp_ilg.experiments.reports.page import render_report

    text = render_report(read_run(fake_run(tmp_path / "run", charged=0)))
    print_rules = text[text.index("@media print") : text.index("</style>")]
    before = text[: text.index("@media print")]
    unbroken = re.findall(r"([^{}/]+)\{[^}]*break-inside: avoid", print_rules)
    named = {name.strip() for rule in unbroken for name in rule.split(",")}
    assert named == {".facts", ".digests div", ".bullets li", ".notice"}
    always = re.findall(r"(\S+) \{[^}]*break-inside: avoid", before)
    assert sorted(always) == ["figure", "tr"]
    assert "break-before" not in text and "page-break" not in text


def test_the_model_card_says_the_same_and_is_escaped(tmp_path):
    from dp_ilg.experiments.reports.page import write_report
    from tests.experiments.reports.test_page import HOSTILE, RUNS

    run = write_report(fake_run(tmp_path / "run")).parent
    card = (run / "model_card.md").read_text()
    for _, text in bullets(a_plan(), 300):
        assert text in card
    assert read_run(run).origin.ledger_sha256 in card and "not given" in card
    hostile = write_report(fake_run(tmp_path / "hostile", **RUNS["hostile"])).parent
    before, _, _ = (hostile / "model_card.md").read_text().partition("## Training")
    assert "<script" not in before and HOSTILE not in before
    bare = write_report(fake_run(tmp_path / "bare", **RUNS["no privacy"])).parent
    assert "NO PRIVACY" in (bare / "model_card.md").read_text()
