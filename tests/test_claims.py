import json

import pytest

from lib.claims import MIME, ClaimError, Ledger, about, read_claims, table


@pytest.fixture
def emitted(monkeypatch):
    bundles = []
    monkeypatch.setattr("lib.claims.display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def state(ledger, checks, fails=None):
    ledger.claim("it works", paper="2", measured="≈ 2", checks=checks, fails=fails)


@pytest.mark.parametrize(
    ("checks", "fails", "verdict"),
    [
        ({"a": True, "b": True}, None, "reproduced"),
        ({"a": True, "b": False}, {"b": "too small"}, "partly"),
        ({"a": False}, {"a": "too small"}, "not at this scale"),
    ],
)
def test_verdict_follows_from_the_checks(emitted, checks, fails, verdict):
    state(Ledger("x"), checks, fails)
    record = json.loads(emitted[0][MIME])
    assert record["verdict"] == verdict
    assert record["reason"] == ("too small" if fails else "")
    assert verdict in emitted[0]["text/html"]
    assert verdict.upper() in emitted[0]["text/plain"]


def test_a_claim_that_does_not_hold_raises(emitted):
    with pytest.raises(ClaimError, match="'a' does not hold"):
        state(Ledger("x"), {"a": False})
    assert not emitted


def test_a_recorded_failure_that_goes_away_raises(emitted):
    with pytest.raises(ClaimError, match="recorded as failing but holds"):
        state(Ledger("x"), {"a": True}, {"a": "too small"})


def test_full_scale_reports_and_does_not_assert(emitted):
    ledger = Ledger("x", "full")
    state(ledger, {"a": True}, {"a": "too small"})
    state(ledger, {"a": False})
    assert [record["verdict"] for record in ledger.records] == ["reproduced", "not at this scale"]
    assert ledger.records[0]["reason"] == ""
    assert ledger.records[1]["reason"]


def test_untested_needs_a_reason(emitted):
    with pytest.raises(ValueError, match="why it cannot be tested"):
        Ledger("x").untested("big", paper="71 %", reason=" ")
    Ledger("x").untested("big", paper="71 %", reason="needs ImageNet")
    assert json.loads(emitted[0][MIME])["verdict"] == "not at this scale"


@pytest.mark.parametrize(
    ("checks", "fails", "message"),
    [
        ({}, None, "at least one check"),
        ({"a": True}, {"b": "r"}, "'b'"),
        ({"a": False}, {"a": ""}, "needs a reason"),
    ],
)
def test_malformed_claims(emitted, checks, fails, message):
    with pytest.raises(ValueError, match=message):
        state(Ledger("x"), checks, fails)


@pytest.mark.parametrize("arguments", [("big", 0), ("ci", -1), ("ci", "0")])
def test_unknown_scale_or_seed(arguments):
    with pytest.raises(ValueError, match="chapter x: (scale|seed) must be"):
        Ledger("x", *arguments)


def test_html_is_escaped(emitted):
    ledger = Ledger("x")
    ledger.claim("a < b", paper="<i>", measured="&", checks={"c < d": True})
    for text in (emitted[0]["text/html"], ledger._repr_html_()):
        assert "a &lt; b" in text and "<i>" not in text


def test_claims_are_read_back_from_stored_outputs(emitted):
    state(Ledger("x"), {"a": True})
    notebook = {"cells": [{"cell_type": "markdown"}, {"outputs": [{"data": emitted[0]}, {"text": "noise"}]}]}
    assert [record["claim"] for record in read_claims(notebook)] == ["it works"]


def test_about():
    assert about(0.12345) == "≈ 0.123"
    assert about(1234567, 2, "B") == "≈ 1.2e+06 B"
    assert about(float("nan")) == "≈ nan"


def test_table_is_markdown_and_wants_rows_of_one_length():
    assert table(["name", "bits"], ["a", 3], ("b", about(0.5))).data.splitlines() == [
        "| name | bits |",
        "|---|---|",
        "| a | 3 |",
        "| b | ≈ 0.5 |",
    ]
    with pytest.raises(ValueError, match=r"one length.*\[2, 1\]"):
        table(["name", "bits"], ["a"])
    with pytest.raises(ValueError, match="one length"):
        table()
