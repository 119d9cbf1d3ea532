"""How the whole suite is spread over processes, and the table of slowest chapters at its end."""

from collections import defaultdict

from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# no test depends on time, and a failure seen once is seen again
settings.register_profile("book", deadline=None, derandomize=True)
settings.load_profile("book")


class NotebookScheduling(LoadScopeScheduling):
    """Keeps the cells of one notebook, and all tests of the site, in one process; spreads everything else."""

    def _split_scope(self, nodeid):
        path = nodeid.split("::")[0]
        return path if path.endswith((".ipynb", "test_site.py")) else nodeid


def pytest_xdist_make_scheduler(config, log):
    return NotebookScheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    """Print what each chapter took, in nbval and in papermill."""
    nbval, papermill = defaultdict(float), defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if not hasattr(report, "duration"):
                continue
            path = report.nodeid.split("::")[0]
            if path.endswith(".ipynb"):
                nbval[path.split("/")[-1].removesuffix(".ipynb")] += report.duration
            elif "test_runs_on_another_seed[" in report.nodeid:
                papermill[report.nodeid.split("[")[1].split("]")[0]] += report.duration
    slugs = sorted(nbval.keys() | papermill.keys(), key=lambda slug: -(nbval[slug] + papermill[slug]))
    if slugs:
        terminalreporter.section("slowest chapters (seconds)")
        for slug in slugs[:15]:
            terminalreporter.line(f"{slug:44} papermill {papermill[slug]:6.1f}   nbval {nbval[slug]:6.1f}")
