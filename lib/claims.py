"""Claims of a paper and what became of them: the book's own module.

A chapter opens one `Ledger`, states each claim of its paper through `Ledger.claim` in a cell of its own and
shows the ledger as a table at the end. Every claim is emitted as a structured output (`MIME`), which the site
collects into the page called the ledger.
"""

import html
import json
from collections.abc import Mapping

from IPython.display import Markdown, display

MIME = "application/vnd.logit-book.claim+json"
SCALES = ("ci", "full")
VERDICTS = ("reproduced", "partly", "not at this scale")


class ClaimError(AssertionError):
    """A claim did not come out as the chapter says it does."""


def about(value: float, digits: int = 3, unit: str = "") -> str:
    """Format a number that may differ between machines, rounded and marked with `≈`.

    The mark is the rule by which the tests know such numbers: whatever follows `≈` is not compared. Numbers
    printed without it must come out the same on every processor.

    >>> about(0.12345), about(12345.6), about(0.05, unit="s")
    ('≈ 0.123', '≈ 1.23e+04', '≈ 0.05 s')
    """
    return f"≈ {value:.{digits}g}" + (f" {unit}" if unit else "")


def table(*rows) -> Markdown:
    """A table, to be shown as the output of a cell.

    Args:
        rows: sequences of cells, all of one length, the first one the head; a cell is shown as `str` makes it.

    Raises:
        ValueError: no rows, or rows of different lengths.
    """
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError(f"rows must have one length, the first being the head, got {[len(r) for r in rows]}")
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return Markdown("\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]))


class Ledger:
    """The claims of one chapter, tested at one scale and seed.

    Args:
        slug: the chapter's slug in `book.yml`.
        scale: `"ci"` (seconds on one core; verdicts are asserted) or `"full"` (the paper's size; verdicts are
            computed and reported, since the recorded failures are statements about the small scale).
        seed: the seed that the chapter runs with.

    Raises:
        ValueError: an unknown scale, or a seed that is not a non-negative integer.
    """

    def __init__(self, slug: str, scale: str = "ci", seed: int = 0):
        if scale not in SCALES:
            raise ValueError(f"chapter {slug}: scale must be one of {SCALES}, got {scale!r}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"chapter {slug}: seed must be a non-negative integer, got {seed!r}")
        self.slug, self.scale, self.seed = slug, scale, seed
        self.records: list[dict] = []

    def claim(
        self,
        text: str,
        *,
        paper: str,
        measured: str,
        checks: Mapping[str, bool],
        fails: Mapping[str, str] | None = None,
    ) -> None:
        """State a claim, assert its verdict and emit it.

        The verdict follows from `checks` alone: *reproduced* when all hold, *partly* when some do, *not at
        this scale* when none does. At scale `"ci"` the checks named in `fails` must fail and all others must
        hold; so a failure is recorded together with its reason, and noticed when it goes away.

        Args:
            text: the claim in words.
            paper: the paper's figure, or its statement where there is no figure.
            measured: the figure measured here; numbers that vary between machines through `about`.
            checks: what was checked, in words, with the outcome.
            fails: for each check that is known to fail here, the reason.

        Raises:
            ClaimError: a check did not come out as recorded.
            ValueError: no checks, or `fails` names a check that is not there or gives no reason.
        """
        checks, fails = {name: bool(ok) for name, ok in checks.items()}, dict(fails or {})
        if not checks:
            raise ValueError(f"claim {text!r}: give at least one check, or record it with `untested`")
        for name, reason in fails.items():
            if name not in checks:
                raise ValueError(f"claim {text!r}: fails names {name!r}, which is not one of {list(checks)}")
            if not reason.strip():
                raise ValueError(f"claim {text!r}: the failing check {name!r} needs a reason")
        if self.scale == "ci":
            for name, ok in checks.items():
                if ok == (name in fails):
                    said = "is recorded as failing but holds" if ok else "does not hold"
                    raise ClaimError(f"claim {text!r}: the check {name!r} {said} (measured: {measured})")
        held = sum(checks.values())
        verdict = VERDICTS[0] if held == len(checks) else VERDICTS[2] if held == 0 else VERDICTS[1]
        reason = " ".join(fails.get(name, f"{name}: failed.") for name, ok in checks.items() if not ok)
        self._emit(text, paper, measured, verdict, reason, checks)

    def untested(self, text: str, *, paper: str, reason: str) -> None:
        """Record a claim that cannot be tested here, with the reason. Its verdict is *not at this scale*.

        Raises:
            ValueError: no reason was given.
        """
        if not reason.strip():
            raise ValueError(f"claim {text!r}: say why it cannot be tested here")
        self._emit(text, paper, "not measured", VERDICTS[2], reason, {})

    def _emit(self, text, paper, measured, verdict, reason, checks):
        record = {
            "chapter": self.slug, "claim": text, "paper": paper, "measured": measured, "verdict": verdict,
            "reason": reason, "checks": checks, "scale": self.scale,
        }  # fmt: skip
        self.records.append(record)
        # JSON as text: notebook validation sanitises strings only, and `measured` holds machine-dependent numbers
        text_form = f"{verdict.upper()}: {text}\n  paper: {paper}\n  here:  {measured}"
        text_form += "".join(f"\n  [{'x' if ok else ' '}] {name}" for name, ok in checks.items())
        text_form += f"\n  because {reason}" if reason else ""
        bundle = {
            MIME: json.dumps(record, ensure_ascii=False),
            "text/html": _card(record),
            "text/plain": text_form,
        }
        display(bundle, raw=True)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("Claim", "Paper", "Here", "Verdict"))
        rows = "".join(
            "<tr>"
            + "".join(f"<td>{html.escape(record[key])}</td>" for key in ("claim", "paper", "measured"))
            + f"<td>{_badge(record['verdict'])}<br>{html.escape(record['reason'])}</td></tr>"
            for record in self.records
        )
        table = f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        return f'<div class="table-scroll">{table}</div>'

    def __repr__(self) -> str:
        return "\n".join(f"{record['verdict']}: {record['claim']}" for record in self.records)


def _badge(verdict: str) -> str:
    return f'<span class="verdict verdict-{VERDICTS.index(verdict)}">{verdict}</span>'


def _card(record: dict) -> str:
    checks = "".join(
        f'<li class="check-{int(ok)}">{"✓" if ok else "✗"} {html.escape(name)}</li>'
        for name, ok in record["checks"].items()
    )
    reason = f"<p><em>{html.escape(record['reason'])}</em></p>" if record["reason"] else ""
    return (
        f'<div class="claim">{_badge(record["verdict"])} <strong>{html.escape(record["claim"])}</strong>'
        f"<p>Paper: {html.escape(record['paper'])}<br>Here: {html.escape(record['measured'])}</p>"
        f"<ul>{checks}</ul>{reason}</div>"
    )


def read_claims(notebook: Mapping) -> list[dict]:
    """All claims emitted by the stored outputs of a notebook (a mapping in nbformat 4), in order."""
    return [
        json.loads(output["data"][MIME])
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        if MIME in output.get("data", ())
    ]
