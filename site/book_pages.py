"""What the site makes from the book's data: paper boxes, part pages, the plan, the ledger, the library's page.

A Sphinx extension. Directives (MyST): `{parts}`, `{chapters}`, `{plan}`, `{ledger}`, `{library}`, `{losses}`, `{map}`,
`{benchmarks}`.
"""

import base64
import html
import importlib
import inspect
import json
import math
import pkgutil
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import lib
from lib.book import Chapter, all_chapters, cell_tags, load_book, read_notebook
from lib.claims import VERDICTS, read_claims

logger = logging.getLogger(__name__)
CODE_NAME = re.compile(r"(?:lib|kernels)(?:\.\w+)+")


def paper_link(paper: dict) -> str:
    """The paper in one line of Markdown."""
    line = f"{paper['authors'] or 'Authors not recorded'} ({paper['year']}). *{paper['title']}*."
    if paper["arxiv"]:
        line += f" [arXiv:{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})"
    if paper["code"]:
        line += f" · [official code]({paper['code']})"
    return line


def write_bibliography(root: Path) -> list[str]:
    """BibTeX of the chapters' papers, made from book.yml, beside the hand-written one of all other works."""
    entries = []
    for chapter in all_chapters(root):
        paper = chapter.paper
        fields = {
            "title": "{" + paper["title"] + "}",
            "author": " and ".join((paper["authors"] or "Unknown").split(", ")),
            "year": str(paper["year"]),
        }
        if paper["arxiv"]:
            fields |= {"eprint": paper["arxiv"], "archiveprefix": "arXiv"}
        body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
        entries.append(f"@misc{{{chapter.slug},\n{body}\n}}\n")
    path = root / "_build" / "papers.bib"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(entries), encoding="utf-8")
    return [str(path), str(root / "site" / "references.bib")]


def executed_chapters(chapters: tuple[Chapter, ...], warn: bool = False) -> list[tuple[Chapter, dict]]:
    """The chapters that have a notebook with outputs, with the notebook; one that failed at first has none."""
    found = []
    for chapter in chapters:
        try:
            found.append((chapter, read_notebook(chapter)))
        except (FileNotFoundError, ValueError) as problem:
            if warn:
                logger.warning("%s", problem)
    return found


def figures(notebook: dict) -> list[str]:
    """The PNG outputs of a notebook, base64; one tagged `thumbnail` comes first."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            image = output.get("data", {}).get("image/png")
            if image:
                found.insert(0 if "thumbnail" in cell_tags(cell) else len(found), image)
    return found


def write_thumbnails(root: Path) -> Path:
    """Write each chapter's thumbnail to a folder of static files, and return that folder."""
    folder = root / "_build" / "static"
    (folder / "thumbnails").mkdir(parents=True, exist_ok=True)
    for chapter, notebook in executed_chapters(all_chapters(root), warn=True):
        if images := figures(notebook):
            (folder / "thumbnails" / f"{chapter.slug}.png").write_bytes(base64.b64decode(images[0]))
    return folder


def add_paper_box(app, docname, source):
    """Put the box with paper, prerequisites and time below the title of every chapter."""
    parts = load_book()
    by_slug = {chapter.slug: chapter for part in parts for chapter in part.chapters}
    chapter = by_slug.get(docname.split("/")[-1])
    if chapter is None or docname != f"{chapter.part}/{chapter.slug}":
        return
    titles = {paper["slug"]: paper["title"] for part in parts for paper in part.planned}
    needs = [
        f"[{by_slug[slug].paper['title']}](../{by_slug[slug].part}/{slug}.ipynb)"
        if slug in by_slug
        else f"{titles[slug]} (to come)"
        for slug in chapter.paper["prerequisites"]
    ]
    notebook = json.loads(source[0])
    seconds = notebook["metadata"].get("logit_book", {}).get("seconds", "?")
    box = (
        f":::{{admonition}} The paper\n:class: note paper-box\n{paper_link(chapter.paper)}\n\n"
        f"**Prerequisites:** {'; '.join(needs) or 'none'}.\n"
        f'**Time:** about {seconds} s at `scale="ci"` on one core, imports included.\n:::'
    )
    cell = {"cell_type": "markdown", "id": "paper-box", "metadata": {}, "source": box}
    notebook["cells"].insert(1, cell)
    source[0] = json.dumps(notebook)


class LinkCodeNames(SphinxTransform):
    """Make `lib.x.y` in prose a link to the library's page, which links on to the source."""

    default_priority = 400

    def apply(self, **kwargs):
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext().removesuffix("()")
            if CODE_NAME.fullmatch(name) and not isinstance(
                node.parent, addnodes.pending_xref | nodes.reference
            ):
                link = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=name, refexplicit=False, refwarn=False
                )
                node.replace_self(link)
                link += node


class BookDirective(SphinxDirective):
    """A directive whose content is Markdown made from the book's data."""

    def run(self):
        self.env.note_dependency(str(Path(self.env.app.confdir).parent / "book.yml"))
        self.env.note_reread()  # depends on all notebooks, not on this page's text
        return self.parse_text_to_nodes(self.markdown(), allow_section_headings=True)


class Parts(BookDirective):
    """Cards of all parts."""

    def markdown(self):
        cards = [":::::{grid} 1 2 2 3\n:gutter: 2\n"]
        for number, part in enumerate(load_book(), 1):
            title, _, subtitle = part.title.partition(": ")
            total = len(part.chapters) + len(part.planned)
            cards.append(
                f"::::{{grid-item-card}} {number}. {title}\n:link: {part.slug}/index\n:link-type: doc\n"
                f"{subtitle[:1].upper() + subtitle[1:]}\n\n:::{{card-footer}}\n{len(part.chapters)} of {total} chapters\n:::\n::::\n"
            )
        return "\n".join([*cards, ":::::"])


class Chapters(BookDirective):
    """Cards of the chapters of one part, with thumbnails, and its papers still to come."""

    required_arguments = 1

    def markdown(self):
        part = next(part for part in load_book() if part.slug == self.arguments[0])
        lines = []
        if part.chapters:
            lines.append(":::::{grid} 1 1 2 2\n:gutter: 3\n")
            for chapter, notebook in executed_chapters(part.chapters):
                image = ""
                if (
                    Path(self.env.app.confdir).parent / f"_build/static/thumbnails/{chapter.slug}.png"
                ).exists():
                    image = f":img-top: /../_build/static/thumbnails/{chapter.slug}.png\n"
                verdicts = [record["verdict"] for record in read_claims(notebook)]
                counts = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS if v in verdicts)
                lines.append(
                    f"::::{{grid-item-card}} {chapter.paper['title']}\n:link: {chapter.slug}\n:link-type: doc\n"
                    f":class-card: paper-card\n{image}"
                    f"{chapter.paper['authors']}, {chapter.paper['year']}\n\n:::{{card-footer}}\nClaims: {counts}\n:::\n::::\n"
                )
            lines.append(":::::\n")
        if part.planned:
            lines.append("\n:::{rubric} Still to come\n:::\n")
            lines += [f"- {paper_link(paper)}" for paper in part.planned]
        return "\n".join(lines)


class Map(SphinxDirective):
    """Which chapters of a part build on which: a drawing of the prerequisites, and a line with those that have none."""

    required_arguments = 1
    width, height, column_gap, row_gap = 148, 40, 38, 12

    def run(self):
        self.env.note_dependency(str(Path(self.env.app.confdir).parent / "book.yml"))
        parts = load_book()
        home = {chapter.slug: part.slug for part in parts for chapter in part.chapters}
        part = next(part for part in parts if part.slug == self.arguments[0])
        papers = [(chapter.slug, chapter.paper) for chapter in part.chapters]
        papers += [(paper["slug"], paper) for paper in part.planned]
        edges = [(before, slug) for slug, paper in papers for before in paper["prerequisites"]]
        drawn = list(dict.fromkeys(slug for edge in edges for slug in edge))
        if not drawn:
            return self.parse_text_to_nodes("Every chapter of this part can be read by itself.")
        alone = [slug for slug, _ in papers if slug not in drawn]
        column = {}

        def depth(slug):
            if slug not in column:
                column[slug] = 1 + max(
                    (depth(before) for before, after in edges if after == slug), default=-1
                )
            return column[slug]

        position, rows = {}, {}
        for slug in sorted(drawn, key=depth):
            rows[depth(slug)] = number = rows.get(depth(slug), -1) + 1
            position[slug] = (
                depth(slug) * (self.width + self.column_gap) + 1,
                number * (self.height + self.row_gap) + 1,
            )
        size = [max(xy[axis] for xy in position.values()) for axis in (0, 1)]
        pieces = [
            f'<svg class="map" role="img" aria-label="Which chapters build on which" '
            f'viewBox="0 0 {size[0] + self.width + 1} {size[1] + self.height + 1}" width="{size[0] + self.width + 1}">'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z"/></marker></defs>'
        ]
        for before, after in edges:
            (x1, y1), (x2, y2) = position[before], position[after]
            x1, y1, y2 = x1 + self.width, y1 + self.height / 2, y2 + self.height / 2
            bend = (x1 + x2) / 2
            pieces.append(
                f'<path class="edge" marker-end="url(#tip)" d="M{x1} {y1}C{bend} {y1} {bend} {y2} {x2} {y2}"/>'
            )
        for slug, (x, y) in position.items():
            kind = "written" if slug in home else "planned"
            lines = two_lines(slug)
            text = "".join(
                f'<text x="{x + self.width / 2}" y="{y + self.height * (number + 1) / (len(lines) + 1)}">{line}</text>'
                for number, line in enumerate(lines)
            )
            box = f'<rect class="{kind}" x="{x}" y="{y}" width="{self.width}" height="{self.height}" rx="5"/>{text}'
            pieces.append(f'<a href="../{home[slug]}/{slug}.html">{box}</a>' if slug in home else box)
        found = [nodes.raw("", "".join(pieces) + "</svg>", format="html")]
        if alone:
            links = [f"[{slug}](/{home[slug]}/{slug}.ipynb)" if slug in home else slug for slug in alone]
            found += self.parse_text_to_nodes("To be read by themselves: " + ", ".join(links) + ".")
        return found


def two_lines(slug: str) -> list[str]:
    """A slug on one line if it is short, else broken at the hyphen nearest to its middle."""
    if len(slug) <= 20:
        return [slug]
    breaks = [match.end() for match in re.finditer("-", slug)]
    middle = min(breaks, key=lambda at: abs(at - len(slug) / 2))
    return [slug[:middle], slug[middle:]]


class Plan(BookDirective):
    """All papers of the book, part by part."""

    def markdown(self):
        lines = []
        for number, part in enumerate(load_book(), 1):
            lines.append(f"\n## {number}. {part.title}\n")
            for chapter in part.chapters:
                lines.append(f"- **[read](/{part.slug}/{chapter.slug})** {paper_link(chapter.paper)}")
            lines += [f"- {paper_link(paper)}" for paper in part.planned]
        return "\n".join(lines)


class LedgerTable(SphinxDirective):
    """Every claim of every chapter with its verdict, collected from the stored outputs."""

    def run(self):
        self.env.note_reread()
        rows, totals = [], dict.fromkeys(VERDICTS, 0)
        for chapter, notebook in executed_chapters(all_chapters()):
            for record in read_claims(notebook):
                totals[record["verdict"]] += 1
                verdict = VERDICTS.index(record["verdict"])
                cells = (record["claim"], record["paper"], record["measured"])
                rows.append(
                    f'<tr><td><a href="{chapter.part}/{chapter.slug}.html#claims">{html.escape(chapter.slug)}</a></td>'
                    + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
                    + f'<td><span class="verdict verdict-{verdict}">{VERDICTS[verdict]}</span></td>'
                    + f"<td>{html.escape(record['reason'])}</td></tr>"
                )
        head = "".join(
            f"<th>{name}</th>" for name in ("Chapter", "Claim", "Paper", "Here", "Verdict", "Reason")
        )
        summary = ", ".join(f"{count} {verdict}" for verdict, count in totals.items())
        table = (
            f"<p><strong>{len(rows)} claims: {summary}.</strong></p>"
            '<div class="table-scroll"><table class="claims ledger">'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
        return [nodes.raw("", table, format="html")]


GLANCE = ("formula", "gradient", "consistency", "cost")


def at_a_glance(documented) -> dict[str, str]:
    """The entries of the docstring section "At a glance:", which every loss has; empty where there is none."""
    text = inspect.getdoc(documented) or ""
    section = re.search(r"(?m)^At a glance:\n((?:[ ]+\S.*\n?|\n(?=[ ]))+)", text)
    if not section:
        return {}
    entries = re.findall(r"(?m)^ {4}(\w+): ((?:.+\n?)(?: {8,}.+\n?)*)", section[1])
    return {name: " ".join(words.split()) for name, words in entries}


def public_losses() -> list[tuple[str, object]]:
    """Everything that `lib` makes public and that has a section "At a glance", by its public name."""
    found = []
    for info in pkgutil.walk_packages(lib.__path__, "lib."):
        module = importlib.import_module(info.name)
        for name in sorted(getattr(module, "__all__", ()) if info.ispkg else ()):
            if at_a_glance(getattr(module, name)):
                found.append((f"{info.name}.{name}", getattr(module, name)))
    return found


class Losses(BookDirective):
    """One table of all losses, from their docstrings."""

    def markdown(self):
        lines = [
            "| loss | formula | gradient | what its minimiser is | cost |",
            "|---|---|---|---|---|",
        ]
        for name, loss in public_losses():
            glance = at_a_glance(loss)
            cells = [glance[key].replace("|", "\\|") for key in GLANCE]
            lines.append("| " + " | ".join([f"{{py:obj}}`~{name}`", *cells]) + " |")
        return ":::{div} table-scroll losses\n" + "\n".join(lines) + "\n:::"


class Library(BookDirective):
    """The reference pages of all modules of lib and kernels, from their docstrings."""

    def markdown(self):
        import kernels

        lines = []
        for package in (lib, kernels):
            lines.append(f"\n## {package.__name__}\n\n{package.__doc__.strip()}\n")
            for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                module = importlib.import_module(info.name)
                parent_name, _, leaf = info.name.rpartition(".")
                parent = importlib.import_module(parent_name)
                if leaf.startswith("_") or callable(getattr(parent, leaf, None)):
                    continue  # private, or named like the one function that it holds
                if parent_name == "kernels.bench":
                    continue  # one operation of the harness, not for import
                own = [
                    name
                    for name, value in vars(module).items()
                    if not name.startswith("_") and getattr(value, "__module__", None) == info.name
                ]
                if any(hasattr(parent, name) for name in own):
                    continue  # its package shows what it exports
                lines.append(
                    f"\n### {info.name}\n\n```{{eval-rst}}\n.. automodule:: {info.name}\n   :members:\n```\n"
                )
        return "\n".join(lines)


def ratio_cell(ratio: float | None, amount: str) -> str:
    """A table cell: the ratio, a bar from 1 on a scale of logarithms (a full half is a factor of 16), the amount."""
    if ratio is None:
        return "<td></td>"
    reach = max(-1.0, min(1.0, math.log(max(ratio, 1e-9), 16)))
    kind = "better" if ratio < 1 else "worse"
    end = 60 + 60 * reach
    bar = (
        f'<svg class="ratio" viewBox="0 0 120 12" aria-hidden="true">'
        f'<path class="{kind}" d="M60 1H{end:.1f}V11H60Z"/><path class="one" d="M60 0V12"/></svg>'
    )
    number = f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"
    return f"<td>{bar} ×{number} <small>{amount}</small></td>"


def quantity(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """A number in the largest unit that it fills, as "12 MiB"."""
    size, unit = next(((size, unit) for size, unit in units if value >= size), units[-1])
    return f"{value / size:.3g} {unit}"


MILLISECONDS = ((1000, "s"), (1, "ms"), (1e-3, "µs"))
BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1g} %"


class Benchmarks(SphinxDirective):
    """What the benchmark harness measured, every result as ratios to plain PyTorch in the same run."""

    def run(self):
        self.env.note_reread()
        folder = Path(lib.__file__).parents[1] / "kernels" / "results"
        reports = {path: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
        sections = []
        if not any(report["kind"] == "cuda" for report in reports.values()):
            words = (
                "No figure from a GPU exists yet: what the kernels would gain there is counted, not measured."
            )
            sections.append(nodes.paragraph("", "", nodes.strong("", words)))
        for path, report in reports.items():
            found = nodes.section(ids=[path.stem])
            found += nodes.title("", report["device"])
            found += nodes.raw("", self.machine(report) + self.tables(report), format="html")
            sections.append(found)
        return sections

    def machine(self, report):
        limits = report["limits"]
        versions = ", ".join(f"{html.escape(name)} {version}" for name, version in report["versions"].items())
        return (
            f"<p>{html.escape(report['device'])}, {report['threads']} of {report['cores']} processor cores. A copy moves "
            f"{limits['bytes_per_second'] / 1e9:.3g} GB/s, a product of matrices does "
            f"{limits['flops_per_second'] / 1e12:.3g} TFLOP/s here. Versions: {versions}.</p>"
        )

    def tables(self, report):
        pieces, cuda = [], report["kind"] == "cuda"
        for operation in dict.fromkeys(record["operation"] for record in report["results"]):
            records = [record for record in report["results"] if record["operation"] == operation]
            heads = ["", "forward", "forward + backward", "peak memory"]
            heads += ["share of copy / product"] if cuda else []
            rows, last = [], None
            for record in records:
                size = ", ".join(f"{key} {value}" for key, value in record["size"].items())
                if size != last:
                    rows.append(f'<tr><th colspan="{len(heads)}">{html.escape(size)}</th></tr>')
                last, cells = size, f"<td>{html.escape(record['peer'])}</td>"
                if "error" in record:
                    cells += f'<td colspan="{len(heads) - 1}">{html.escape(record["error"])}</td>'
                else:
                    for title in ("forward", "forward_backward"):
                        amount = quantity(record.get(f"{title}_ms", 0), MILLISECONDS)
                        cells += ratio_cell(record.get(f"{title}_time_ratio"), amount)
                    cells += ratio_cell(record["memory_ratio"], quantity(record["peak_bytes"], BYTES))
                    title = "forward_backward" if "forward_backward_ms" in record else "forward"
                    shares = [record.get(f"{title}_{unit}_fraction") for unit in ("bytes", "flops")]
                    shown = "" if None in shares else " / ".join(map(percent, shares))
                    cells += f"<td>{shown}</td>" if cuda else ""
                rows.append(f"<tr>{cells}</tr>")
            dates = sorted({record["date"] for record in records})
            head = "".join(f"<th>{title}</th>" for title in heads)
            pieces.append(
                f"<h3>{operation}</h3><p><small>{records[0]['dtype']}, {' and '.join(dates)}</small></p>"
                f'<div class="table-scroll"><table class="claims benchmarks"><thead><tr>{head}</tr></thead>'
                f"<tbody>{''.join(rows)}</tbody></table></div>"
            )
        return "".join(pieces)


def escape_docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in backticks: keep mathematics such as |x|, a*b and x_ from being markup."""
    literal = None  # the indentation of the paragraph that announced a literal block by "::"
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and (not line.strip() or indent > literal):
            continue
        literal = indent if line.endswith("::") else None
        pieces = re.split(r"(`[^`]*`)", line)
        pieces[::2] = [re.sub(r"([|*]|(?<=\w)_(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
        lines[number] = "".join(pieces)


def setup(app):
    # it does not declare itself, and works on the finished environment only
    app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)  # before napoleon, at 500
    app.connect("source-read", add_paper_box)
    app.add_transform(LinkCodeNames)
    app.add_directive("parts", Parts)
    app.add_directive("chapters", Chapters)
    app.add_directive("plan", Plan)
    app.add_directive("ledger", LedgerTable)
    app.add_directive("library", Library)
    app.add_directive("losses", Losses)
    app.add_directive("map", Map)
    app.add_directive("benchmarks", Benchmarks)
    return {"version": "1", "parallel_read_safe": True}
