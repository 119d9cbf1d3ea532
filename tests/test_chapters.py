"""Every chapter: anatomy, pairing, reference cells alone, exercises, and papermill on another seed."""

import re

import nbformat
import papermill
import pytest

from lib.book import (
    all_chapters,
    cell_tags,
    cells_hash,
    introductions,
    is_stale,
    read_notebook,
    read_script,
)
from lib.claims import read_claims

HEADINGS = [
    "Setup", "The problem", "Derivation", "Reference implementation", "The library", "Experiment", "Claims",
    "What is different from the paper", "Exercises", "Summary",
]  # fmt: skip
OTHER_SEED = 1

every_chapter = pytest.mark.parametrize("chapter", all_chapters(), ids=lambda chapter: chapter.slug)
every_page = pytest.mark.parametrize(
    "chapter",
    all_chapters() + introductions(),
    ids=lambda page: page.slug if page.paper else f"{page.part}-{page.slug}",
)


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and tag in cell_tags(cell)]


@every_page
def test_pair(chapter):
    assert cells_hash(read_script(chapter)) == cells_hash(read_notebook(chapter)), (
        f"{chapter.notebook.name} and {chapter.script.name} differ: `make book` executes the script"
    )
    assert not is_stale(chapter), f"{chapter.notebook.name} is stale: `make book` executes it again"


@every_chapter
def test_anatomy(chapter):
    notebook = read_notebook(chapter)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"(?m)^## (.+)$", text) == HEADINGS
    assert len(re.findall(r"(?m)^# ", text)) == 1
    assert tagged(notebook, "parameters")[0].source == 'scale = "ci"\nseed = 0'
    assert tagged(notebook, "reference")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure"
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"], (
        "warnings in the outputs"
    )
    assert {record["chapter"] for record in read_claims(notebook)} == {chapter.slug}
    assert len(read_claims(notebook)) >= 2
    for cell in notebook.cells:  # a skipped cell must say why, in the cell
        if "NBVAL_SKIP" in cell.source or "nbval-skip" in cell_tags(cell):
            assert re.search(r"# NBVAL_SKIP: \w+", cell.source), f"skipped without a reason:\n{cell.source}"


@every_chapter
def test_reference_cells_stand_alone(chapter):
    cells = tagged(read_script(chapter), "reference")
    for cell in cells:
        assert not re.search(r"(?m)^\s*(from|import) (lib|kernels)\b", cell.source), (
            "a reference cell imports lib"
        )
        namespace = {"__name__": "alone"}
        exec(compile(cell.source, str(chapter.script), "exec"), namespace)
        assert [key for key in namespace if not key.startswith("__")]


def numbered(cells, pattern):
    return {match for cell in cells for match in re.findall(pattern, cell.source, re.M)}


@every_chapter
def test_every_exercise_has_a_solution_that_is_checked(chapter):
    notebook = read_script(chapter)
    checks = numbered(tagged(notebook, "exercise"), r"^def (check_\d+)\(")
    assert 2 <= len(checks) <= 4
    solutions = tagged(notebook, "solution")
    assert numbered(solutions, r"^(check_\d+)\(") == checks
    assert all("hide-cell" in cell_tags(cell) for cell in solutions), (
        "solutions are folded by the tag hide-cell"
    )


@every_page
def test_runs_on_another_seed(chapter, tmp_path):
    """Papermill runs the chapter as a user would; each check then refuses an answer that does nothing."""
    notebook = read_notebook(chapter)
    checks = sorted(numbered(tagged(notebook, "exercise"), r"^def (check_\d+)\("))
    for check in checks:
        refusal = (
            f"try:\n    {check}(lambda *args, **kwargs: None)\nexcept Exception:\n    pass\n"
            f"else:\n    raise AssertionError('{check} accepts an answer that does nothing')"
        )
        notebook.cells.append(nbformat.v4.new_code_cell(refusal))
    source, target = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    nbformat.write(notebook, source)
    papermill.execute_notebook(
        source, target, {"scale": "ci", "seed": OTHER_SEED}, cwd=chapter.script.parent, progress_bar=False
    )
    claims = read_claims(nbformat.read(target, as_version=4))
    assert [claim["claim"] for claim in claims] == [claim["claim"] for claim in read_claims(notebook)]


def test_unknown_scale_is_refused(tmp_path):
    chapter = all_chapters()[0]
    with pytest.raises(
        papermill.PapermillExecutionError, match=r"scale must be one of \('ci', 'full'\), got 'huge'"
    ):
        papermill.execute_notebook(
            chapter.notebook,
            tmp_path / "out.ipynb",
            {"scale": "huge"},
            cwd=chapter.script.parent,
            progress_bar=False,
        )
