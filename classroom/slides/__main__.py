"""The command line of the slides: ``python -m classroom.slides 02 [--out FOLDER] [--pdf]``."""

import argparse
import sys
from pathlib import Path

from classroom.slides import Refused
from classroom.slides.writing import browser, write, write_pdf
from course_lib.lab.chapters import CHAPTERS


def main(arguments: list[str] | None = None) -> int:
    """Write what the command line asks for: 0 if done, 2 if it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m classroom.slides", description="Write a chapter's slides.")
    parser.add_argument("chapter", help="a chapter's number, such as 02, or all")
    parser.add_argument("--out", type=Path, default=Path("class") / "slides", help="the folder for the decks")
    parser.add_argument("--pdf", action="store_true", help="print it as well (needs Chromium or Chrome)")
    given = parser.parse_args(arguments)
    numbers = [chapter.nn for chapter in CHAPTERS] if given.chapter == "all" else [given.chapter]
    try:
        if given.pdf:
            browser()  # before anything is written
        for number in numbers:
            path = write(number, given.out)
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MB", flush=True)
            if given.pdf:
                print(write_pdf(path), flush=True)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
