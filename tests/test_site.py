"""The built site: links, and the pages as a reader's browser shows them."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from lib.book import ROOT, all_chapters, cell_tags, load_book, read_script
from lib.claims import read_claims

sys.path.append(str(ROOT / "site"))

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without a warning."""
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "site", "chapters", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


class Page(HTMLParser):
    """The links and anchors of one page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.sources = [], {""}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        for key in ("src", "href") if tag in ("img", "script", "link") else ():
            if attributes.get(key):
                self.sources.append(attributes[key])


def test_links_resolve(site):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    broken = []
    for path, page in pages.items():
        for link in page.links + page.sources:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if link in page.sources and link not in page.links:
                    broken.append(f"{path.name}: loads {link} from another host")
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.exists() or (
                target in pages and unquote(url.fragment) not in pages[target].anchors
            ):
                broken.append(f"{path.name}: {link}")
    assert not broken
    assert len(pages) > 20


def test_every_chapter_has_its_box_and_its_place(site):
    for part in load_book():
        index = (site / part.slug / "index.html").read_text(encoding="utf-8")
        for chapter in part.chapters:
            page = (site / chapter.part / f"{chapter.slug}.html").read_text(encoding="utf-8")
            assert f"arxiv.org/abs/{chapter.paper['arxiv']}" in page
            assert "Prerequisites:" in page and "Time:" in page
            assert f"thumbnails/{chapter.slug}" in index or f"{chapter.slug}.png" in index
        for paper in part.planned:
            assert paper["title"].split("'")[0].split("&")[0] in index


def test_ledger_lists_every_claim(site):
    from lib.book import read_notebook

    ledger = (site / "ledger.html").read_text(encoding="utf-8")
    expected = sum(len(read_claims(read_notebook(chapter))) for chapter in all_chapters())
    assert ledger.count("<tr><td>") == expected > 0


def test_part_pages_draw_the_prerequisites_and_list_the_losses(site):
    from book_pages import public_losses

    losses = (site / "losses" / "index.html").read_text(encoding="utf-8")
    table = losses[losses.index('id="all-losses-of-the-book"') :]
    for name, _ in public_losses():
        assert f'library.html#{name}"' in table
    for part in ("logits", "losses"):
        page = (site / part / "index.html").read_text(encoding="utf-8")
        (chapters,) = (entry for entry in load_book() if entry.slug == part)
        drawing = page[page.index('class="map"') : page.index('id="the-chapters"')]
        for chapter in chapters.chapters:
            assert f"{chapter.slug}.html" in drawing


# --- in the browser


def find_browser():
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    message = "no Chromium or Chrome was found, so the pages are not tested in a browser"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def address(site):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.problems = []
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(  # leaving a page aborts what is still loading
        "requestfailed",
        lambda request: (
            request.failure == "net::ERR_ABORTED" or page.problems.append(f"{request.failure}: {request.url}")
        ),
    )
    page.on(
        "request",
        lambda request: (
            request.url.startswith((address, "data:", "blob:")) or page.problems.append(request.url)
        ),
    )
    yield page
    context.close()


def typeset(page):
    """Wait until the mathematics of the page is typeset."""
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
        page.evaluate("MathJax.startup.promise")


def test_pages_load_and_mathematics_is_typeset(site, address, page):
    typeset_pages = 0
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        if name.startswith(("_static", "_modules/")):
            continue
        page.goto(f"{address}/{name}")
        typeset(page)
        formulas = page.locator(".math").count()
        assert page.locator("mjx-container").count() >= formulas, name
        assert page.locator("mjx-merror").count() == 0, name
        page.wait_for_function(  # displayed equations are fitted to the text: none is cut off
            "[...document.querySelectorAll('div.math')].every(box => box.scrollWidth <= box.clientWidth + 1)"
        )
        assert not page.problems, (name, page.problems)
        assert page.locator("h1").count() >= 1, name
        typeset_pages += formulas > 0
    assert typeset_pages >= len(all_chapters())


def test_pages_fit_a_phone(address, page):
    page.set_viewport_size(PHONE)
    names = ["index", "ledger", "plan", "library", "bibliography"] + [
        f"{chapter.part}/{chapter.slug}" for chapter in all_chapters()
    ]
    for name in names:
        page.goto(f"{address}/{name}.html")
        typeset(page)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], f"{name} is wider than a phone"
        start = page.evaluate(
            "Math.min(0, ...[...document.querySelectorAll('mjx-container')].map(f => f.getBoundingClientRect().left))"
        )
        assert start >= 0, f"{name}: an equation begins outside the page"


def test_copy_button_gives_exactly_the_cell(address, page):
    for chapter in all_chapters():
        page.goto(f"{address}/{chapter.part}/{chapter.slug}.html")
        cells = [cell for cell in read_script(chapter).cells if cell.cell_type == "code"]
        boxes = page.locator("div.cell > div.cell_input, div.cell details div.cell_input")
        assert boxes.count() == len(cells)
        for number, cell in enumerate(cells):
            if "reference" not in cell_tags(cell):
                continue
            boxes.nth(number).hover()
            boxes.nth(number).locator("button.copybtn").click()
            copied = page.evaluate("navigator.clipboard.readText()")
            assert copied.strip() == cell.source.strip(), chapter.slug
            exec(compile(copied, chapter.slug, "exec"), {"__name__": "copied"})


def test_solutions_are_folded_and_open(address, page):
    chapter = all_chapters()[0]
    page.goto(f"{address}/{chapter.part}/{chapter.slug}.html")
    fold = page.locator("details.hide").first
    assert not fold.locator("div.cell_input").is_visible()
    fold.locator("summary").click()
    assert fold.locator("div.cell_input").is_visible()


def test_dark_mode_and_search(address, page):
    page.goto(f"{address}/index.html")
    for theme in ("dark", "light"):
        page.locator("button.theme-switch-button:visible").first.click()
        page.locator(f"button.theme-change-button[data-mode={theme}]:visible").click()
        assert page.evaluate("document.documentElement.dataset.theme") == theme
    page.goto(f"{address}/search.html?q=softmax")
    page.locator("#search-results li").first.wait_for()
    assert not page.problems


def test_code_names_link_to_their_source(site):
    library = (site / "library.html").read_text(encoding="utf-8")
    chapters = [(site / c.part / f"{c.slug}.html").read_text(encoding="utf-8") for c in all_chapters()]
    assert all('href="../library.html#lib.' in text for text in chapters)
    assert 'href="_modules/lib/claims.html#Ledger"' in library
    assert Path(site / "_modules/lib/claims.html").exists()
