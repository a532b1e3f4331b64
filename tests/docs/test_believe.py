"""The page of claims: every claim has its parts, and all that it names exists."""

import pathlib
import re

import pytest

from dp_ilg.experiments.audits.report import CHECKS

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "believe.md").read_text(encoding="utf-8")
PARTS = ("Proof", "Test", "Audit", "Control")
CLAIMS = {
    section.split("\n", 1)[0]: section
    for section in PAGE.split("\n## ")[1:]
    if "*Proof:*" in section
}
FAULTS = (ROOT / "tests/experiments/audits/test_planted_faults.py").read_text("utf-8")


def part(section: str, name: str) -> str:
    """What a claim says under one of its four words."""
    (found,) = re.findall(rf"- \*{name}:\* (.*?)(?=\n- \*|\n\n|\Z)", section, re.DOTALL)
    return found


def quoted(text: str) -> list[str]:
    return [" ".join(name.split()) for name in re.findall(r'"([^"]+)"', text)]


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_names_a_proof_a_test_an_audit_and_a_control(claim):
    for name in PARTS:
        assert part(CLAIMS[claim], name)


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_tests_that_a_claim_names_exist(claim):
    named = re.findall(r"`(tests/[^`]+)`", CLAIMS[claim])
    assert named
    for path, test in (name.split("::") for name in named):
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_check_of_the_audit_stands_behind_a_claim():
    named = [name for text in CLAIMS.values() for name in quoted(part(text, "Audit"))]
    assert sorted(set(named)) == sorted(CHECKS)


def test_every_planted_fault_is_the_control_of_a_claim():
    planted = re.findall(r'^    "([^"]+)": \(', FAULTS, re.MULTILINE)
    named = [name for text in CLAIMS.values() for name in quoted(part(text, "Control"))]
    assert len(planted) > 20
    assert sorted(set(named)) == sorted(planted)
