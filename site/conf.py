"""Sphinx configuration of the book's site. Sources are in chapters/, the table of contents is book.yml."""

import importlib.util
import sys
from pathlib import Path

SITE = Path(__file__).parent
ROOT = SITE.parent
sys.path[:0] = [str(SITE), str(ROOT)]

import book_pages  # noqa: E402

project = "The Logit Book"
author = ""
copyright = "The authors of The Logit Book; text and figures CC BY 4.0, code MIT"

extensions = [
    "myst_nb",
    "sphinx_external_toc",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "book_pages",
]

external_toc_path = str(ROOT / "book.yml")
external_toc_exclude_missing = False
exclude_patterns = ["**.py", "**/.ipynb_checkpoints"]
suppress_warnings = [
    "etoc.toctree",
    "mystnb.unknown_mime_type",  # claims: the ledger reads them, the page shows their HTML form
]

nb_execution_mode = "off"  # the stored outputs are the ones that the tests have checked
nb_merge_streams = True
nb_code_prompt_show = "Show the solution"  # only solutions are folded
nb_code_prompt_hide = "Hide the solution"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

bibtex_bibfiles = book_pages.write_bibliography(ROOT)
bibtex_default_style = "unsrtalpha"
bibtex_reference_style = "author_year"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_use_ivar = True
napoleon_custom_sections = [("At a glance", "params_style")]
default_role = "code"
viewcode_line_numbers = True

html_theme = "sphinx_book_theme"
html_title = "The Logit Book"
mathjax = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static"
mathjax_path = "mathjax/tex-chtml.js"  # from its package: the site makes no request to another host
html_static_path = ["static", str(mathjax), str(book_pages.write_thumbnails(ROOT))]
html_css_files = ["book.css"]
html_js_files = ["fit-math.js"]
html_favicon = "static/favicon.svg"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system says
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "footer_content_items": ["copyright.html"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_selector = "div.cell_input div.highlight pre, div.highlight-console pre"
copybutton_prompt_text = "$ "
