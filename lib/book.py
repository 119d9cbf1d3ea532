"""The book as data: its table of contents, its chapters' cells, and the execution of stale chapters.

Everything that needs to know the chapters asks this module: the Makefile, the site and the tests. The only
table of contents is `book.yml`::

    python -m lib.book path SLUG              the notebook of a chapter
    python -m lib.book run [--fresh] [SLUG …] execute the stale chapters (or all), in parallel
    python -m lib.book new SLUG               start a planned chapter from the template
"""

import argparse
import ast
import functools
import hashlib
import io
import os
import re
import sys
import tempfile
import time
import tokenize
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAPER_KEYS = {"title", "authors", "year", "arxiv", "code", "prerequisites"}


@dataclass(frozen=True)
class Chapter:
    """One chapter: where it is and which paper it is about. `paper` holds the keys in `PAPER_KEYS`."""

    slug: str
    part: str
    paper: dict
    root: Path = ROOT

    @property
    def script(self) -> Path:
        return self.root / "chapters" / self.part / f"{self.slug}.py"

    @property
    def notebook(self) -> Path:
        return self.script.with_suffix(".ipynb")


@dataclass(frozen=True)
class Part:
    """One part: its chapters in reading order, and the papers (slug and `PAPER_KEYS`) still to be written."""

    slug: str
    title: str
    chapters: tuple[Chapter, ...]
    planned: tuple[dict, ...]


def _paper(entry: dict, where: str) -> dict:
    unknown = set(entry) - PAPER_KEYS
    missing = PAPER_KEYS - set(entry)
    if unknown or missing:
        problem = f"unknown {sorted(unknown)}" if unknown else f"missing {sorted(missing)}"
        raise ValueError(f"book.yml, {where}: {problem} in the paper's meta; it takes {sorted(PAPER_KEYS)}")
    return entry


def load_book(root: Path = ROOT) -> tuple[Part, ...]:
    """Read and check `book.yml`.

    Raises:
        FileNotFoundError: there is no `book.yml`.
        ValueError: it is malformed: an unknown or missing key, a slug that stands twice, a prerequisite that
            is in no part. The message names the entry.
    """
    try:
        # libyaml's loader is ten times as fast, where PyYAML has been built with it
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        data = yaml.load((root / "book.yml").read_text(encoding="utf-8"), loader)
    except yaml.YAMLError as error:
        raise ValueError(f"book.yml is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError("book.yml must be a mapping with the keys root, meta and subtrees")
    if unknown := set(data) - {"root", "meta", "defaults", "subtrees"}:
        raise ValueError(
            f"book.yml: unknown keys {sorted(unknown)} at the top; it takes root, meta, defaults, subtrees"
        )
    planned_by_part = dict((data.get("meta") or {}).get("planned") or {})
    parts, seen = [], {}

    def note(slug: str, where: str) -> None:
        if slug in seen:
            raise ValueError(f"book.yml: {slug!r} stands twice, in {seen[slug]} and in {where}")
        seen[slug] = where

    for entry in data["subtrees"][0]["entries"]:
        part = entry["file"].split("/")[0]
        note(part, "the parts")
        chapters = []
        for item in entry.get("entries", ()):
            where = item.get("file", "an entry without file")
            if unknown := set(item) - {"file", "meta"}:
                raise ValueError(
                    f"book.yml, {where}: unknown keys {sorted(unknown)}; a chapter takes file and meta"
                )
            if not re.fullmatch(rf"{part}/[a-z0-9-]+", where):
                raise ValueError(f"book.yml, {where}: a chapter of this part must be {part}/<slug>")
            slug = where.split("/")[1]
            note(slug, where)
            chapters.append(Chapter(slug, part, _paper(item.get("meta") or {}, where), root))
        planned = []
        for item in planned_by_part.pop(part, ()):
            paper = dict(item)
            slug = paper.pop("slug", None)
            if not slug:
                raise ValueError(f"book.yml, meta.planned.{part}: an entry has no slug: {item}")
            note(slug, f"meta.planned.{part}")
            planned.append({"slug": slug, **_paper(paper, f"meta.planned.{part}, {slug}")})
        parts.append(Part(part, entry["title"], tuple(chapters), tuple(planned)))
    if planned_by_part:
        raise ValueError(f"book.yml, meta.planned: no such parts: {sorted(planned_by_part)}")
    papers = [(c.slug, c.paper) for p in parts for c in p.chapters] + [
        (d["slug"], d) for p in parts for d in p.planned
    ]
    for slug, paper in papers:
        for needed in paper["prerequisites"]:
            if needed not in seen:
                raise ValueError(f"book.yml, {slug}: the prerequisite {needed!r} is not in the book")
    return tuple(parts)


def all_chapters(root: Path = ROOT) -> tuple[Chapter, ...]:
    """The written chapters in reading order."""
    return tuple(chapter for part in load_book(root) for chapter in part.chapters)


def introductions(root: Path = ROOT) -> tuple[Chapter, ...]:
    """The introductions of parts that are notebooks (`<part>/index.py` and `.ipynb`) and not plain text; they run as chapters do."""
    pages = (Chapter("index", part.slug, {}, root) for part in load_book(root))
    return tuple(page for page in pages if page.script.exists())


def find_chapter(slug: str, root: Path = ROOT) -> Chapter:
    """The chapter called `slug`; `<part>/index` is the introduction of a part.

    Raises:
        ValueError: `book.yml` has no such chapter; the message says whether it is planned, or what comes close.
    """
    parts = load_book(root)
    for page in introductions(root):
        if slug == f"{page.part}/index":
            return page
    for part in parts:
        for chapter in part.chapters:
            if chapter.slug == slug:
                return chapter
        if any(paper["slug"] == slug for paper in part.planned):
            raise ValueError(
                f"book.yml: the chapter {slug!r} is planned but not written; start it with `make new C={slug}`"
            )
    import difflib

    near = difflib.get_close_matches(slug, [c.slug for p in parts for c in p.chapters], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see book.yml for the slugs"
    raise ValueError(f"book.yml: there is no chapter {slug!r}; {hint}")


def read_script(chapter: Chapter) -> nbformat.NotebookNode:
    """The chapter's script as a notebook without outputs.

    Raises:
        FileNotFoundError: the script is missing.
    """
    if not chapter.script.is_file():
        shown = chapter.script.relative_to(chapter.root)
        raise FileNotFoundError(
            f"{shown} is missing; restore it, or remake it from the notebook with "
            f"`jupytext --to py:percent {shown.with_suffix('.ipynb')}`"
        )
    return jupytext.read(chapter.script)


def read_notebook(chapter: Chapter) -> nbformat.NotebookNode:
    """The chapter's stored notebook, with outputs.

    Raises:
        FileNotFoundError: the notebook is missing.
        ValueError: it is not a notebook, or it holds no outputs.
    """
    shown = chapter.notebook.relative_to(chapter.root)
    if not chapter.notebook.is_file():
        raise FileNotFoundError(f"{shown} is missing; make it with `make book`")
    try:
        notebook = nbformat.read(chapter.notebook, as_version=4)
    except Exception as error:
        raise ValueError(
            f"{shown} is not a readable notebook ({error}); remake it with `make book`"
        ) from error
    if not any(cell.get("outputs") for cell in notebook.cells):
        raise ValueError(f"{shown} holds no outputs; execute it with `make book`")
    return notebook


def cell_tags(cell: nbformat.NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.get("metadata", {}).get("tags", [])


def load_reference(slug: str, name: str, root: Path = ROOT):
    """The object `name` from the `reference` cells of a chapter, each cell run alone in an empty namespace.

    Raises:
        ValueError: no such chapter, or none of its reference cells defines `name`.
    """
    chapter = find_chapter(slug, root)
    found = []
    for cell in read_script(chapter).cells:
        if "reference" in cell_tags(cell):
            namespace = {"__name__": f"reference:{slug}"}
            exec(compile(cell.source, str(chapter.script), "exec"), namespace)
            if name in namespace:
                return namespace[name]
            found += [key for key in namespace if not key.startswith("__")]
    raise ValueError(
        f"{chapter.script.relative_to(root)}: no reference cell defines {name!r}; they define {sorted(found)}"
    )


# --- staleness: a notebook is stale when its script, or code of lib or kernels that it reaches, has changed


@functools.cache
def _code_and_imports(path: Path, root: Path) -> tuple[str, tuple[Path, ...]]:
    """The module's text without comments and docstrings, which change no output, and the modules it imports.

    Text and not a dump of the syntax tree, since dumps differ between versions of Python.
    """
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                first, last = node.body[0].lineno - 1, node.body[0].end_lineno
                lines[first:last] = [""] * (last - first)
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return code, _local_imports(tree, root)


def _local_imports(tree: ast.AST, root: Path) -> tuple[Path, ...]:
    """The files of lib and kernels behind the imports of a module."""
    paths = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                paths |= _module_files(alias.name, root)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                paths |= _named_files(node.module, alias.name, root)
    return tuple(sorted(paths))


def _named_files(module: str, name: str, root: Path) -> set[Path]:
    """The files that `from module import name` stands for, seen through packages that only pass names on."""
    if module.split(".")[0] not in ("lib", "kernels"):
        return set()
    if files := _module_files(f"{module}.{name}", root):
        return files
    exports = _exports(root.joinpath(*module.split(".")) / "__init__.py")
    return _named_files(*exports[name], root) if name in exports else _module_files(module, root)


def _module_files(name: str, root: Path) -> set[Path]:
    """A module is one file; a package whose names are not asked for answers for all its modules."""
    stem = root.joinpath(*name.split("."))
    if name.split(".")[0] not in ("lib", "kernels"):
        return set()
    if stem.with_suffix(".py").is_file():
        return {stem.with_suffix(".py")}
    if not (stem / "__init__.py").is_file():
        return set()
    return {stem / "__init__.py"} if stem.parent == root else set(stem.glob("*.py"))


def _exports(path: Path) -> dict[str, tuple[str, str]]:
    """Where each name comes from that a package passes on; nothing, if the package has code of its own."""
    exports = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            exports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif not (
            isinstance(node, ast.Expr | ast.Assign) and isinstance(node.value, ast.Constant | ast.List)
        ):
            return {}
    return exports


def inputs_hash(chapter: Chapter) -> str:
    """A hash of what the chapter's outputs depend on: its code, and the modules of lib and kernels it reaches."""
    code = "\n".join(cell.source for cell in read_script(chapter).cells if cell.cell_type == "code")
    digest = hashlib.sha256(code.encode())
    todo, seen = list(_local_imports(ast.parse(_without_magics(code)), chapter.root)), set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += _code_and_imports(path, chapter.root)[1]
    for path in sorted(seen):
        digest.update(path.relative_to(chapter.root).as_posix().encode())
        digest.update(_code_and_imports(path, chapter.root)[0].encode())
    return digest.hexdigest()[:16]


def _without_magics(code: str) -> str:
    return re.sub(r"(?m)^[%!].*$", "", code)


def is_stale(chapter: Chapter) -> bool:
    """Whether the stored notebook is missing, has no outputs or no longer belongs to its script and library."""
    try:
        stored = read_notebook(chapter)
    except (FileNotFoundError, ValueError):
        return True
    return stored.metadata.get("logit_book", {}).get("inputs") != inputs_hash(chapter)


def cells_hash(notebook: nbformat.NotebookNode) -> str:
    """A hash of the cells as written (kind, source, tags), whatever their outputs."""
    cells = [(cell.cell_type, cell.source, cell_tags(cell)) for cell in notebook.cells]
    return hashlib.sha256(repr(cells).encode()).hexdigest()[:16]


def refuse_edited(chapter: Chapter) -> None:
    """Raise if the notebook holds edits that its script lacks, since executing the script would lose them.

    Raises:
        ValueError: it does; the message says how to bring them together.
    """
    try:
        stored = read_notebook(chapter)
    except (FileNotFoundError, ValueError):
        return
    recorded = stored.metadata.get("logit_book", {}).get("cells")
    if recorded not in (None, cells_hash(stored)) and cells_hash(stored) != cells_hash(read_script(chapter)):
        shown = chapter.notebook.relative_to(chapter.root)
        raise ValueError(
            f"{shown} was edited apart from its script, and nothing was overwritten; "
            f"bring the two together with `jupytext --sync {shown}`"
        )


# --- execution


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook atomically: an interruption leaves either the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".ipynb")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            nbformat.write(notebook, file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def execute(chapter: Chapter) -> tuple[float, str | None]:
    """Execute a chapter from its script and store the notebook beside it.

    Text-only edits keep the stored outputs. On a failure nothing is written.

    Returns:
        The seconds it took, and None or the failing cell with its traceback.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    start = time.perf_counter()
    notebook = read_script(chapter)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # stable ids keep the differences between versions readable
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(chapter.script.parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return time.perf_counter() - start, str(error)
    seconds = time.perf_counter() - start
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["logit_book"] = {
        "inputs": inputs_hash(chapter),
        "cells": cells_hash(notebook),
        "seconds": round(seconds),
    }
    notebook.metadata.setdefault("language_info", {}).pop("version", None)
    write_notebook(notebook, chapter.notebook)
    return seconds, None


def refresh_text(chapter: Chapter) -> None:
    """Bring the markdown cells of a notebook that is not stale up to date with the script, outputs untouched."""
    script, stored = read_script(chapter), read_notebook(chapter)
    if cells_hash(script) == cells_hash(stored):
        return
    outputs = [(cell.outputs, cell.execution_count) for cell in stored.cells if cell.cell_type == "code"]
    for number, cell in enumerate(script.cells):
        cell["id"] = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = outputs.pop(0)
    script.metadata = stored.metadata
    script.metadata["logit_book"]["cells"] = cells_hash(script)
    write_notebook(script, chapter.notebook)


def run(chapters: tuple[Chapter, ...], fresh: bool = False, jobs: int | None = None) -> int:
    """Execute the stale chapters among `chapters` (all when `fresh`), in parallel, one thread each.

    Prints a line per chapter; a failing chapter is reported and does not stop the others.

    Returns:
        The number of chapters that failed.
    """
    todo, failures = [], []
    for chapter in chapters:
        try:
            refuse_edited(chapter)
        except (FileNotFoundError, ValueError) as problem:
            print(problem, flush=True)
            failures.append(chapter)
            continue
        if fresh or is_stale(chapter):
            todo.append(chapter)
        else:
            refresh_text(chapter)
    print(f"{len(chapters)} chapters, {len(todo)} to execute", flush=True)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TQDM_DISABLE="1")
    with ProcessPoolExecutor(max_workers=jobs or os.cpu_count() or 1) as pool:
        futures = {pool.submit(execute, chapter): chapter for chapter in todo}
        for done, future in enumerate(as_completed(futures), 1):
            chapter = futures[future]
            try:
                seconds, problem = future.result()
            except Exception as error:  # a missing script, a kernel that died: name it, go on
                seconds, problem = 0.0, f"{type(error).__name__}: {error}"
            if problem:
                failures.append(chapter)
            state = "FAILED" if problem else "ok"
            print(
                f"[{done:3}/{len(todo)}] {f'{chapter.part}/{chapter.slug}':60} {state:6} {seconds:6.1f} s",
                flush=True,
            )
            if problem:
                print(problem, flush=True)
    for chapter in failures:
        print(f"failed: {chapter.script.relative_to(chapter.root)}", flush=True)
    return len(failures)


def new_chapter(slug: str, root: Path = ROOT) -> Path:
    """Start a planned chapter: copy the template to its place. `book.yml` lists it once it is finished.

    Raises:
        ValueError: the slug is not among the planned chapters.
        FileExistsError: its script exists already.
    """
    for part in load_book(root):
        for paper in part.planned:
            if paper["slug"] == slug:
                script = Chapter(slug, part.slug, paper, root).script
                if script.exists():
                    raise FileExistsError(
                        f"{script.relative_to(root)} exists already; nothing was overwritten"
                    )
                script.parent.mkdir(parents=True, exist_ok=True)
                text = (root / "site" / "chapter_template.py").read_text(encoding="utf-8")
                script.write_text(
                    text.replace("SLUG", slug).replace("TITLE", paper["title"]), encoding="utf-8"
                )
                return script
    find_chapter(slug, root)  # raises with a hint when the slug is unknown
    raise ValueError(f"the chapter {slug!r} is written already")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.book", description=__doc__.splitlines()[0].rstrip(":.")
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("path").add_argument("slug")
    commands.add_parser("new").add_argument("slug")
    runner = commands.add_parser("run")
    runner.add_argument("slugs", nargs="*")
    runner.add_argument("--fresh", action="store_true")
    runner.add_argument("--jobs", type=int)
    options = parser.parse_args(arguments)
    try:
        if options.command == "path":
            chapter = find_chapter(options.slug)
            read_script(chapter)
            print(chapter.notebook.relative_to(ROOT))
        elif options.command == "new":
            print(new_chapter(options.slug).relative_to(ROOT))
        else:
            chapters = tuple(map(find_chapter, options.slugs)) or all_chapters() + introductions()
            return 1 if run(chapters, options.fresh, options.jobs) else 0
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; every finished chapter is stored", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
