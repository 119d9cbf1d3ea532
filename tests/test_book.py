"""The table of contents, staleness and execution, on small books made for the purpose."""

import subprocess
import sys

import nbformat
import pytest
import yaml

from lib import book

PAPER = {
    "title": "A Paper",
    "authors": "A, B",
    "year": 2020,
    "arxiv": "2001.00001",
    "code": None,
    "prerequisites": [],
}
HEADER = """# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
"""
CHAPTER = HEADER + "\n# %% [markdown]\n# # Title\n\n# %%\nfrom lib.small import value\n\nprint(value)\n"


def write_book(root, chapters=("one",), planned=("two",), **changes):
    entry = {"file": "part/index", "title": "Part"}
    entry["entries"] = [{"file": f"part/{slug}", "meta": dict(PAPER)} for slug in chapters]
    data = {
        "root": "index",
        "subtrees": [{"entries": [entry]}],
        "meta": {"planned": {"part": [{"slug": slug, **PAPER} for slug in planned]}},
    }
    data.update(changes)
    (root / "book.yml").write_text(yaml.safe_dump(data))
    return data


@pytest.fixture
def root(tmp_path):
    write_book(tmp_path)
    (tmp_path / "chapters" / "part").mkdir(parents=True)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").write_text("")
    (tmp_path / "lib" / "small.py").write_text('"""A docstring."""\n\nvalue = 1  # one\n')
    (tmp_path / "chapters" / "part" / "one.py").write_text(CHAPTER)
    book._code_and_imports.cache_clear()
    return tmp_path


def executed(chapter):
    """Store a notebook as execution would, without a kernel."""
    notebook = book.read_script(chapter)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text="1\n")]
    notebook.metadata["logit_book"] = {
        "inputs": book.inputs_hash(chapter),
        "cells": book.cells_hash(notebook),
    }
    book.write_notebook(notebook, chapter.notebook)


def test_the_real_book():
    parts = book.load_book()
    assert len(parts) == 15
    assert sum(len(part.chapters) + len(part.planned) for part in parts) == 176
    for chapter in book.all_chapters():
        assert chapter.script.is_file() and chapter.notebook.is_file()


def test_scripts_on_disk_are_listed():
    on_disk = {
        path.relative_to(book.ROOT / "chapters").as_posix()
        for path in (book.ROOT / "chapters").glob("*/*.py")
    }
    listed = book.all_chapters() + book.introductions()
    assert on_disk == {f"{chapter.part}/{chapter.slug}.py" for chapter in listed}


def test_an_introduction_may_be_a_notebook(root):
    assert book.introductions(root) == ()
    (root / "chapters/part/index.py").write_text(HEADER + "\n# %%\nprint(2)\n")
    (page,) = book.introductions(root)
    assert page == book.find_chapter("part/index", root)
    assert page not in book.all_chapters(root)
    assert book.is_stale(page) and book.run((page,)) == 0 and not book.is_stale(page)
    assert book.read_notebook(page).cells[-1].outputs[0].text == "2\n"


def test_find_chapter(root):
    assert book.find_chapter("one", root).script == root / "chapters/part/one.py"
    with pytest.raises(ValueError, match="did you mean 'one'"):
        book.find_chapter("onne", root)
    with pytest.raises(ValueError, match="planned but not written"):
        book.find_chapter("two", root)


def test_duplicates_unknown_and_missing_keys(root):
    def problem():
        with pytest.raises(ValueError, match=r"book\.yml") as caught:
            book.load_book(root)
        return str(caught.value)

    write_book(root, planned=("one",))
    assert "'one' stands twice" in problem()
    write_book(root, extra=1)
    assert "unknown keys ['extra']" in problem()
    data = write_book(root)
    entry = data["subtrees"][0]["entries"][0]["entries"][0]
    for change, expected in (
        ({"meta": {**PAPER, "tittle": "x"}}, "unknown ['tittle']"),
        ({"meta": {"title": "x"}}, "missing"),
        ({"options": {}}, "unknown keys ['options']"),
        ({"file": "elsewhere/one"}, "must be part/<slug>"),
        ({"meta": {**PAPER, "prerequisites": ["nowhere"]}}, "'nowhere' is not in the book"),
    ):
        data["subtrees"][0]["entries"][0]["entries"][0] = {**entry, **change}
        (root / "book.yml").write_text(yaml.safe_dump(data))
        assert expected in problem()
    (root / "book.yml").write_text("root: [")
    assert "not valid YAML" in problem()


def test_missing_pair_and_missing_outputs(root):
    chapter = book.find_chapter("one", root)
    with pytest.raises(FileNotFoundError, match=r"part/one\.ipynb is missing; make it with `make book`"):
        book.read_notebook(chapter)
    book.write_notebook(book.read_script(chapter), chapter.notebook)
    with pytest.raises(ValueError, match=r"part/one\.ipynb holds no outputs"):
        book.read_notebook(chapter)
    chapter.notebook.write_text("{")
    with pytest.raises(ValueError, match="not a readable notebook"):
        book.read_notebook(chapter)
    chapter.script.unlink()
    with pytest.raises(FileNotFoundError, match=r"part/one\.py is missing; restore it"):
        book.read_script(chapter)


def test_staleness_follows_code_not_comments(root):
    chapter = book.find_chapter("one", root)
    assert book.is_stale(chapter)
    executed(chapter)
    assert not book.is_stale(chapter)
    module = root / "lib" / "small.py"
    for text, stale in (('"""Another."""\nvalue = 1\n', False), ("value = 2\n", True)):
        module.write_text(text)
        book._code_and_imports.cache_clear()
        assert book.is_stale(chapter) == stale
    executed(chapter)
    chapter.script.write_text(CHAPTER.replace("print(value)", "print(value + 1)"))
    assert book.is_stale(chapter)


def test_staleness_sees_through_packages_that_pass_names_on(root):
    package = root / "lib" / "many"
    package.mkdir()
    files = {
        "__init__": '"""Doc."""\n\nfrom lib.many.a import one\nfrom lib.many.b import two as deux\n\n__all__ = ["one"]\n',
        "a": "from lib.small import value as one\n",
        "b": "two = 2\n",
        "c": "three = 3\n",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    chapter = book.find_chapter("one", root)

    def changing(import_line, name, text):
        (package / f"{name}.py").write_text(files[name])
        chapter.script.write_text(HEADER + f"\n# %%\n{import_line}\n")
        book._code_and_imports.cache_clear()
        before = book.inputs_hash(chapter)
        (package / f"{name}.py").write_text(text)
        book._code_and_imports.cache_clear()
        return book.inputs_hash(chapter) != before

    assert changing("from lib.many import one", "a", "one = 7\n")
    assert changing("from lib.many import deux", "b", "two = 7\n")
    assert not changing("from lib.many import one", "b", "two = 7\n")
    assert not changing("from lib.many import deux", "c", "three = 7\n")
    assert changing("from lib.many import c", "c", "three = 7\n")
    assert changing("import lib.many", "c", "three = 7\n")
    # a package with code of its own answers for all its modules
    files["__init__"] += "print('imported')\n"
    (package / "__init__.py").write_text(files["__init__"])
    assert changing("from lib.many import one", "c", "three = 7\n")


def test_text_edits_keep_outputs(root):
    chapter = book.find_chapter("one", root)
    executed(chapter)
    chapter.script.write_text(CHAPTER.replace("# # Title", "# # Another title"))
    assert not book.is_stale(chapter)
    assert book.run((chapter,)) == 0
    stored = book.read_notebook(chapter)
    assert stored.cells[0].source == "# Another title"
    assert stored.cells[1].outputs[0].text == "1\n"


def test_edits_made_in_the_notebook_alone_are_not_overwritten(root, capsys):
    chapter = book.find_chapter("one", root)
    executed(chapter)
    notebook = book.read_notebook(chapter)
    notebook.cells[1].source += "\nprint('mine')"
    book.write_notebook(notebook, chapter.notebook)
    before = chapter.notebook.read_bytes()
    assert book.run((chapter,)) == 1
    assert "jupytext --sync" in capsys.readouterr().out
    assert chapter.notebook.read_bytes() == before


def test_a_failing_chapter_is_named_and_stops_no_other(root, capsys):
    write_book(root, chapters=("one", "bad", "gone"))
    (root / "chapters/part/one.py").write_text(HEADER + "\n# %%\nprint(1)\n")
    (root / "chapters/part/bad.py").write_text(
        HEADER + "\n# %%\nprint(1)\n\n# %%\nraise KeyError('the culprit')\n"
    )
    chapters = book.all_chapters(root)
    assert book.run(chapters) == 2
    output = capsys.readouterr().out
    assert "failed: chapters/part/bad.py" in output and "failed: chapters/part/gone.py" in output
    assert "raise KeyError('the culprit')" in output  # the cell with its traceback
    assert "chapters/part/gone.py is missing" in output
    assert book.read_notebook(chapters[0]).cells[0].outputs[0].text == "1\n"
    assert not chapters[1].notebook.exists()
    assert not list((root / "chapters/part").glob(".*"))  # no temporary file stays


def test_interrupted_write_keeps_the_old_notebook(root, monkeypatch):
    chapter = book.find_chapter("one", root)
    executed(chapter)
    before = chapter.notebook.read_bytes()

    def interrupted(notebook, file):
        file.write("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(book.nbformat, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        book.write_notebook(book.read_script(chapter), chapter.notebook)
    assert chapter.notebook.read_bytes() == before
    assert [path.name for path in chapter.notebook.parent.glob("*one*")].count("one.ipynb") == 1
    assert not list(chapter.notebook.parent.glob(".one*"))


def test_load_reference(root):
    (root / "chapters/part/one.py").write_text(
        HEADER + '\n# %% tags=["reference"]\ndef two():\n    return 2\n'
    )
    assert book.load_reference("one", "two", root)() == 2
    with pytest.raises(ValueError, match=r"no reference cell defines 'three'; they define \['two'\]"):
        book.load_reference("one", "three", root)


def test_new_chapter(root):
    (root / "site").mkdir()
    template = (book.ROOT / "site/chapter_template.py").read_text()
    (root / "site/chapter_template.py").write_text(template)
    script = book.new_chapter("two", root)
    assert "# # A Paper" in script.read_text() and "SLUG" not in script.read_text()
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        book.new_chapter("two", root)
    with pytest.raises(ValueError, match="is written already"):
        book.new_chapter("one", root)
    with pytest.raises(ValueError, match="no chapter 'three'"):
        book.new_chapter("three", root)


def test_commands_answer_bad_input_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "lib.book", "path", "no-such-chapter"],
        capture_output=True,
        text=True,
        cwd=book.ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no-such-chapter" in done.stderr
