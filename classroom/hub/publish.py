"""What has been released, as a git repository from which ``nbgitpuller`` updates each learner's folder.

    python -m classroom.hub.publish --folder class

A learner's folder is updated when the server starts, and by the link that is printed, without losing an edit. All
chapters lie side by side, so that their links to each other hold.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlencode

from classroom.hub.room import ADDRESS, Refused, Room

BRANCH = "main"
INSIDE = "file:///course/handed-out.git"  # where a learner's server sees it
TARGET = "course"  # the folder in the learner's own


def publish(room: Room) -> str:
    """Hand out what lies in ``release/``; a line that says what is new.

    Raises
    ------
    Refused : nothing has been released, two chapters bring a file of the same name, or git fails.
    """
    released = Path(room.folder) / "release"
    files = sorted(path for path in released.glob("*/*") if not path.name.startswith("."))
    if not any(path.suffix == ".ipynb" for path in files):
        raise Refused(f"{released}: nothing has been released yet; `make class-release NB=02` does (without NB, all)")
    room.make_folders()
    with tempfile.TemporaryDirectory() as stage:
        for path in files:
            to = Path(stage) / path.name
            if to.exists():
                raise Refused(
                    f"{path}: another chapter brings a file {path.name} as well; give one of them another name"
                )
            shutil.copytree(path, to) if path.is_dir() else shutil.copyfile(path, to)
        if not room.repository.exists():
            _git(room, stage, "init", "--quiet", "--bare", f"--initial-branch={BRANCH}", str(room.repository))
        _git(room, stage, "add", "--all", "--force", ".")
        changed = [line for line in _git(room, stage, "status", "--porcelain").splitlines() if line[:1].strip()]
        if not changed:
            return f"handed out: {len(files)} files, as before"
        _git(room, stage, "commit", "--quiet", "--message", f"{len(changed)} files handed out")
    return f"handed out: {len(files)} files, {len(changed)} of them new or changed"


def link(url: str) -> str:
    """The address that updates a learner's folder while the server runs."""
    words = {"repo": INSIDE, "branch": BRANCH, "targetPath": TARGET, "urlpath": f"lab/tree/{TARGET}"}
    return f"{url}/hub/user-redirect/git-pull?{urlencode(words)}"


def _git(room: Room, stage: str, *words: str) -> str:
    """Run git on the repository, whatever the user's own settings of git are."""
    environment = {
        "PATH": os.environ.get("PATH", ""), "HOME": stage, "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
           for what, value in (("NAME", "The course"), ("EMAIL", "course@localhost"))},
    }  # fmt: skip
    where = [] if words[0] == "init" else [f"--git-dir={room.repository}", f"--work-tree={stage}"]
    done = subprocess.run(
        ["git", *where, *words], cwd=stage, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Refused(f"git {words[0]}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    """Hand out, and print the link."""
    parser = argparse.ArgumentParser(prog="python -m classroom.hub.publish", description="Hand out what is released.")
    parser.add_argument("--folder", type=Path, default=Path("class"), help="the class's folder")
    parser.add_argument("--url", help="where learners reach the hub (default: where it was started last)")
    given = parser.parse_args(arguments)
    try:
        room = Room(str(given.folder.resolve()))
        print(publish(room))
        known = room.hub / ADDRESS
        url = given.url or (known.read_text(encoding="utf-8") if known.exists() else room.address)
        print(f"a learner takes it in with the next start of the server, or now: {link(url.rstrip('/'))}")
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
