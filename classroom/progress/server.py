"""The page, on localhost, behind a token: Jupyter's own server with nothing in it but this page.

python -m classroom.progress FOLDER [--chapter 02] [--pseudonyms] [--port 8765] [--no-browser]
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.serverapp import ServerApp
from tornado import web

from classroom.progress import files, pseudonyms
from classroom.progress.board import MANY_TRIES, board
from classroom.progress.lesson import lesson
from course_lib.lab.chapters import CHAPTERS

PAGE = Path(__file__).resolve().parent / "page"
SECONDS = 5  # between two looks at the files
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip

Names = Callable[[list[str]], Mapping[str, str]]


def page(folder: Path, number: str, names: Names | None, now: float) -> str:
    """The page on a chapter as it is now; ``names`` gives the names to show, if not the learners' own.

    Raises
    ------
    ValueError : there is no such chapter, or the file of the invented names is damaged.
    OSError : the folder cannot be read.
    """
    asked, records = lesson(number), files.read(folder)
    shown = names([record.learner for record in records]).__getitem__ if names else str
    return TEMPLATES.get_template("page.html").render(
        board=board(asked, records, now, shown), chapters=CHAPTERS, seconds=SECONDS, many=MANY_TRIES, most=files.MOST,
        invented=names is not None,
    )  # fmt: skip


class Page(JupyterHandler):
    """The page; its script fetches it anew every few seconds."""

    def initialize(self, folder: Path, names: Names | None) -> None:
        self.folder, self.names = folder, names

    @property
    def content_security_policy(self) -> str:
        """No script, no style and no picture but the page's own, whatever gets into it."""
        own = "; ".join(f"{kind}-src 'self'" for kind in ("script", "style", "connect", "img"))
        return f"default-src 'none'; {own}; frame-ancestors 'none'"

    @web.authenticated
    async def get(self, number: str) -> None:
        if self.get_argument("token", ""):
            self.redirect(self.request.path)  # a cookie holds it now: an address bar may be projected
            return
        try:
            made = await asyncio.to_thread(page, self.folder, number, self.names, time.time())
        except (OSError, ValueError) as error:
            self.log.error(str(error))
            raise web.HTTPError(500, str(error)) from error
        self.set_header("Cache-Control", "no-store")
        await self.finish(made)


class Server(ServerApp):
    """Jupyter's server without its services: no files, no kernels, no terminals."""

    name = "class-progress"
    default_services = ("auth",)  # type: ignore[assignment]
    page_settings: dict[str, Any]

    def load_config_file(self, *_: Any, **__: Any) -> None:
        """What the instructor has set for a Jupyter of their own, such as an open address, does not count here."""

    def init_webapp(self) -> None:
        super().init_webapp()
        numbers = "|".join(chapter.nn for chapter in CHAPTERS)
        self.web_app.add_handlers(".*$", [(f"{self.base_url}progress/({numbers})", Page, self.page_settings)])


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until Ctrl-C; 2 if it cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m classroom.progress", description="Show how far a class has come.")
    parser.add_argument("folder", type=Path, help="what the class shares (COURSE_HOME), or the folder with homes/")
    parser.add_argument("--chapter", default="00", help="the chapter to begin with, such as 02")
    parser.add_argument("--pseudonyms", action="store_true", help="show invented names, for a page that is projected")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    given = parser.parse_args(arguments)
    names = None
    if given.pseudonyms:
        kept = pseudonyms.file_of(given.folder)
        print(f"Who is who stands in {kept}, for you alone.", flush=True)
        names = lambda learners: pseudonyms.names(learners, kept)  # noqa: E731
    try:
        if not hasattr(os, "O_NOFOLLOW"):
            raise OSError("the page needs Linux or macOS: elsewhere links in the learners' folders cannot be told")
        page(given.folder, given.chapter, names, time.time())  # what is wrong is said here, not in the browser
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    Server.page_settings = {"folder": given.folder.resolve(), "names": names}
    settings = {
        "ip": "localhost",
        "port": given.port,
        "port_retries": 0,
        "default_url": f"/progress/{given.chapter}",
        "extra_static_paths": [str(PAGE)],
        "root_dir": str(PAGE),
        "open_browser": not given.no_browser,
        "allow_unauthenticated_access": False,
        "allow_root": True,  # nothing is run for anybody
        "answer_yes": True,
        "log_level": "ERROR",
    }
    server = Server.instance(**settings)
    server.initialize(argv=[], find_extensions=False)
    print(f"Live progress at http://localhost:{given.port}/progress/{given.chapter} (Ctrl-C ends it)")
    print("A browser that asks for a token needs the longer address below.", flush=True)
    server.start()
    return 0
