"""Runs in a learner's namespaces: limits, the update of the learner's folder, then the server in its place.

    python /course/inside/start.py REPOSITORY BRANCH TARGET PROCESSES [words for the server …]

An update that fails is told to the learner in a file, and the server starts all the same.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

PATIENCE = 120  # seconds for an update
NOTE = "course-was-not-updated.txt"


def update(repository: str, branch: str, target: str, home: Path) -> None:
    """Bring ``home/target`` up to date; what the learner has edited stays."""
    folder, note = home / target, home / NOTE
    if folder.exists() and not (folder / ".git").is_dir():  # not a folder that can be updated: it is kept, beside
        number = next(n for n in range(1, 10**6) if not (home / f"{target}-{n}").exists())
        folder.rename(home / f"{target}-{number}")
    # Nothing else of this learner runs yet, so that a lock is one that a killed server left
    (folder / ".git" / "index.lock").unlink(missing_ok=True)
    words = [sys.executable, "-m", "nbgitpuller.pull", repository, branch, target]
    try:
        done = subprocess.run(
            words, cwd=home, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
        )
        trouble = "" if done.returncode == 0 else done.stdout[-2000:] + done.stderr[-2000:]
    except subprocess.TimeoutExpired:
        trouble = f"it took longer than {PATIENCE} seconds"
    if trouble:
        print(trouble, flush=True)
        note.write_text(f"Your folder is as it was. Show this to the instructor:\n\n{trouble}\n", encoding="utf-8")
    else:
        note.unlink(missing_ok=True)


def main(words: list[str]) -> None:
    """Limit, update, and become the server."""
    repository, branch, target, processes, *rest = words
    # Counted in this user namespace, so it has to be set here
    resource.setrlimit(resource.RLIMIT_NPROC, (int(processes), int(processes)))
    home = Path.home()
    try:
        update(repository, branch, target, home)
    except OSError as error:  # such as a full disk: the server may still be of use
        print(f"not updated: {error}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "jupyterhub.singleuser", *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
