"""`report.html`: the run as one self-contained page, made as it goes and final at its end.

reading.py    what the run folder holds, whatever state it is in
curves.py     metrics -> charts; charts.py charts -> Vega-Lite, and the library in the page
graph.py      the chain as a picture
results.py    models side by side, frontier, answers; stages.py a stage's part
page.py       all of it -> page.html, body.html, style.css, page.js
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import RunFolder, write_text
from stages.storage import push

if TYPE_CHECKING:
    from pipeline.report.charts import Library  # with what makes the page; imported when there is one to be written

EVERY_S, AT_LEAST_S = 15.0, 1.0  # between two writings: while nothing happens but training, and while much happens
AT_MOST = 0.05  # of the time of a run goes into its page, however long its metrics have become


def write_report(folder: RunFolder, gone: bool = False) -> Path:
    """Write the page from what the run folder holds now."""
    from pipeline.report.charts import Library

    library = Library()
    try:
        return _write(folder, library, wait=True, gone=gone)
    finally:
        library.close()


def report_again(path: str) -> Path:
    """`raylign report`: the page of a run that may be damaged, or whose process may be gone.

    Raises:
        DataError: it is no run.
    """
    from pipeline.report.reading import open_run

    folder = open_run(path)
    return write_report(folder, gone=not folder.is_locked())


def _write(folder: RunFolder, library: Library, wait: bool, gone: bool = False) -> Path:
    from pipeline.report.page import page_of

    file = folder.path / "report.html"
    write_text(file, page_of(folder, library, wait, gone))
    push(file)
    return file


class LiveReport:
    """The page of a run that goes on. Never raises: a page that cannot be written does not end a run.

    Args:
        tell: called with one line where it cannot be written, once for each reason.
    """

    def __init__(self, folder: RunFolder, tell: Callable[[str], None]) -> None:
        self.folder, self.tell = folder, tell
        self.library: Library | None = None
        self.written, self.taken = 0.0, 0.0
        self.changed = True
        self.told: set[str] = set()

    def change(self) -> None:
        """A stage has come to another state: the page is due."""
        self.changed = True

    def follow(self) -> None:
        """Write the page if it is due."""
        wait = max(AT_LEAST_S if self.changed else EVERY_S, self.taken / AT_MOST)
        if time.monotonic() - self.written > wait:
            self.write()

    def write(self, final: bool = False) -> None:
        """Write the page now; the final one waits for what draws its charts."""
        begun = time.monotonic()
        try:
            if self.library is None:
                from pipeline.report.charts import Library

                self.library = Library()
            _write(self.folder, self.library, wait=final)
        except Exception as error:
            said = f"report.html could not be written ({type(error).__name__}: {error})"
            if said not in self.told:
                self.told.add(said)
                self.tell(said)
        finally:
            self.written, self.changed = time.monotonic(), False
            self.taken = self.written - begun
            if final and self.library is not None:
                self.library.close()
