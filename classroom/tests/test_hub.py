"""A real hub with three people, in a folder of its own: what works, and what one cannot do to another."""

import asyncio
import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import nbformat
import pytest
import yaml
from tornado import web

from classroom.hub import groups, load, roster
from classroom.hub.__main__ import free_port
from classroom.hub.client import Failed, Hub, Learner, TookTooLong, request, running, until
from classroom.hub.inside import merge_notebook
from classroom.hub.publish import BRANCH, INSIDE, TARGET, link, publish
from classroom.hub.publish import main as hand_out
from classroom.hub.room import ADDRESS, ROOT, Refused, Room, find_bwrap, own_address
from classroom.hub.spawner import ISOLATED

HUB = ROOT / "classroom" / "hub"


def why_no_namespaces() -> str:
    """Why a hub cannot run here; nothing if it can."""
    try:
        find_bwrap(ISOLATED)
    except Refused as error:
        return str(error)
    return ""


needs_namespaces = pytest.mark.skipif(bool(why_no_namespaces()), reason=f"no hub here: {why_no_namespaces()}")


# Notebooks that are handed out ----------------------------------------------------------------------------------------


def notebook(*sources: str) -> nbformat.NotebookNode:
    """A notebook of these code cells, with names that stay."""
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
    return nbformat.v4.new_notebook(cells=cells)


def release(folder: Path, **chapters: tuple[str, ...] | None) -> None:
    """Release these chapters as `make class-release` does; None takes one away."""
    for name, sources in chapters.items():
        path = folder / "release" / name / f"{name}.ipynb"
        if sources is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook(*sources), path)


# The hub --------------------------------------------------------------------------------------------------------------


@dataclass
class Class:
    """A hub with its people, two of whom have a kernel."""

    folder: Path
    hub: Hub
    passwords: dict[str, str]
    ada: Learner
    bob: Learner

    def read(self, name: str) -> list[str]:
        """The sources of a notebook in ada's folder."""
        found = nbformat.read(self.folder / "homes" / "ada" / TARGET / f"{name}.ipynb", as_version=4)
        nbformat.validate(found)
        return [cell.source for cell in found.cells]

    def save(self, name: str, content: nbformat.NotebookNode) -> None:
        """Save a notebook as ada's JupyterLab does."""
        about = {"type": "notebook", "format": "json", "content": content}
        done = self.ada.ask("PUT", f"/user/ada/api/contents/{TARGET}/{name}.ipynb", json=about)
        assert done.ok, done.text

    def opened(self, name: str) -> nbformat.NotebookNode:
        """A notebook as ada's JupyterLab opens it."""
        done = self.ada.ask("GET", f"/user/ada/api/contents/{TARGET}/{name}.ipynb")
        assert done.ok, done.text
        return nbformat.from_dict(done.json()["content"])

    def pull(self) -> str:
        """Hand out what is released, and follow the link as ada."""
        publish(Room(str(self.folder)))
        asked = parse_qs(urlparse(link(self.hub.url)).query)
        words = {"repo": asked["repo"][0], "branch": asked["branch"][0], "targetpath": asked["targetPath"][0]}
        done = self.ada.ask("GET", "/user/ada/git-pull/api", params=words)
        assert '"phase": "finished"' in done.text, done.text
        return str(done.text)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Class]:
    folder = tmp_path_factory.mktemp("class")
    release(folder, one=("a = 1", "b = 1"), two=("a = 1",), three=("a = 1",), four=("a = 1", "b = 1"), six=("a = 1",))
    names = folder / "names.txt"
    names.write_text("Ada  # in small letters from here on\nbob\n")
    with running(folder, free_port(), "--names", str(names), "--instructor", "kim") as hub:
        ada, bob = (Learner(hub.url, name, hub.passwords[name]) for name in ("ada", "bob"))
        for learner in (ada, bob):
            learner.start(300)
            learner.open(f"{TARGET}/one.ipynb")
        yield Class(folder, hub, hub.passwords, ada, bob)


@needs_namespaces
def test_who_may_log_in(room: Class) -> None:
    assert sorted(room.passwords) == ["ada", "bob", "kim"]
    for name, password in (("ada", room.passwords["bob"]), ("eve", room.passwords["bob"]), ("ada", "")):
        with pytest.raises(Failed, match=f"login of {name}: 403"):
            Learner(room.hub.url, name, password)
    kim = Learner(room.hub.url, "kim", room.passwords["kim"])
    assert kim.ask("GET", "/hub/api/user").json()["admin"]
    assert kim.ask("GET", "/hub/api/users").ok
    assert room.ada.ask("GET", "/hub/api/users").status_code == 403


@needs_namespaces
def test_a_cell_runs_the_course_and_progress_is_kept(room: Class) -> None:
    output = room.ada.run("import os, torch, course_lib; from course_lib.lab import check; print(os.getcwd())")
    assert (output.text, output.error) == (f"/home/learner/{TARGET}\n", "")
    output = room.ada.run('check("02.1", lambda w, g, v, lr, beta: (w - lr * (beta * v + g), beta * v + g)).state')
    assert (output.text, output.error) == ("'passed'", "")
    kept = json.loads((room.folder / "homes/ada/.craft-of-training/progress-ada.json").read_text())
    assert kept["exercises"]["02.1"]["attempts"] == 1


@needs_namespaces
def test_one_sees_neither_homes_nor_processes_nor_secrets_of_others(room: Class) -> None:
    secret = room.folder / "homes" / "ada" / "secret.txt"
    assert room.ada.run("open('/home/learner/secret.txt', 'w').write('mine')").error == ""
    assert secret.read_text() == "mine"
    seen = room.bob.run("import os; print(os.listdir('/home'), os.path.exists('/home/learner/secret.txt'))")
    assert seen.text == "['learner'] False\n"
    hidden = [
        secret,
        room.folder,
        *(room.folder / "hub" / name for name in ("roster.csv", "hub.sqlite", "cookie_secret")),
    ]
    assert all(path.exists() for path in hidden)
    seen = room.bob.run(f"print([os.path.exists(path) for path in {[str(path) for path in hidden]}])")
    assert seen.text == f"{[False] * len(hidden)}\n"
    names = room.bob.run(
        "everything = [open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit() and p != '1']\n"
        "print(sorted({w.partition('=')[2] for e in everything for w in e.split(chr(0)) if w[:15] == 'COURSE_LEARNER='"
        " or w[:15] == 'JUPYTERHUB_USER'}))"
    )
    assert names.text == "['bob']\n"


@needs_namespaces
@pytest.mark.parametrize("path", ["course_lib", "data", "handed-out.git", "inside", "etc"])
def test_nobody_writes_to_the_course(room: Class, path: str) -> None:
    assert (room.bob.run(f"open('/course/{path}/mine', 'w')")).error.startswith("OSError: [Errno 30]")


@needs_namespaces
def test_nobody_writes_to_the_interpreter(room: Class) -> None:
    assert room.bob.run("import sys; open(f'{sys.prefix}/mine', 'w')").error.startswith("OSError: [Errno 30]")


@needs_namespaces
def test_a_token_opens_its_own_server_only(room: Class) -> None:
    assert room.ada.ask("GET", "/user/ada/api/contents/secret.txt").ok
    for path in ("/user/ada/api/contents/secret.txt", "/user/ada/api/kernels", "/hub/api/users/ada"):
        assert room.bob.ask("GET", path).status_code in (403, 404)
    assert room.bob.ask("GET", "/user/ada/api/contents/secret.txt").status_code == 403
    assert room.bob.ask("DELETE", "/hub/api/users/ada/server").status_code in (403, 404)
    assert room.ada.server()["ready"]


LISTENING = r"""
import glob, os, re
mine = set()
for path in glob.glob('/proc/[0-9]*/fd/*'):
    try:
        mine.update(re.findall(r'socket:\[(\d+)\]', os.readlink(path)))
    except OSError:
        pass
rows = [line.split() for table in ('tcp', 'tcp6') for line in open(f'/proc/net/{table}').read().splitlines()[1:]]
print(sorted({int(row[1].rpartition(':')[2], 16) for row in rows if row[3] == '0A' and row[9] in mine}))
"""


LISTEN = """
import zmq
ears = []
for port in {ports}:
    for kind in (zmq.SUB, zmq.DEALER, zmq.PULL):
        ear = zmq.Context.instance().socket(kind)
        if kind == zmq.SUB:
            ear.subscribe(b'')
        ear.connect(f'tcp://127.0.0.1:{{port}}')
        ears.append(ear)
"""
HEARD = "print([ear.recv_multipart() for ear in ears if ear.poll(200)])"


@needs_namespaces
def test_nobody_hears_what_the_kernel_of_another_says(room: Class) -> None:
    """Another learner connects to all that listens beside ada's server, while her kernel speaks.

    One port is there: a kernel takes in on it what its child processes print, with a key, and says nothing on it.
    """
    server = room.ada.run("import os; print(os.environ['JUPYTERHUB_SERVICE_URL'].split(':')[2].partition('/')[0])")
    ports = [port for port in json.loads(room.ada.run(LISTENING).text) if port != int(server.text)]
    assert room.bob.run(LISTEN.format(ports=ports)).error == ""
    for _ in range(5):
        assert room.ada.run("print('between us')").text == "between us\n"
        assert room.bob.run(HEARD).text == "[]\n"
    where = "import ipykernel.connect, json; print(json.loads(ipykernel.connect.get_connection_info())['transport'])"
    assert room.ada.run(where).text == "ipc\n"
    key = f"import glob; print([path for path in glob.glob('/tmp/**', recursive=True) if {room.ada.kernel!r} in path])"
    assert len(json.loads(room.ada.run(key).text.replace("'", '"'))) >= 5
    assert room.bob.run(key).text == "[]\n"


@needs_namespaces
def test_memory_is_limited_and_the_hub_lives(room: Class) -> None:
    if any("each learner, all processes" in line for line in room.hub.said):
        pytest.skip("memory is limited as a sum here: the kernel would be killed")
    assert room.bob.run("held = bytearray(6 << 30)").error.startswith("MemoryError")
    assert room.bob.run("1 + 1").text == "2"
    assert room.ada.run("1 + 1").text == "2"


@needs_namespaces
@pytest.mark.skipif(os.geteuid() == 0, reason="Linux does not count the processes of root")
def test_processes_are_limited(room: Class) -> None:
    code = """
import threading
threading.stack_size(1 << 16)
gate, begun = threading.Event(), []
try:
    for _ in range(2000):
        thread = threading.Thread(target=gate.wait)
        thread.start()
        begun.append(thread)
except RuntimeError as error:
    print(error, len(begun) < 512)
gate.set()
[thread.join() for thread in begun]
threading.stack_size(0)
"""
    assert room.bob.run(code).text.strip().startswith("can't start new thread True")


@needs_namespaces
def test_an_update_keeps_what_was_edited(room: Class) -> None:
    """Both sides changed a notebook; one was deleted here, one there; one is new on both sides."""
    home = room.folder / "homes" / "ada" / TARGET
    edited = room.opened("one")
    edited.cells[0].source = "a = 'ada was here'"
    edited.cells[0].execution_count = 1
    edited.cells.append(nbformat.v4.new_code_cell("c = 'a cell of hers'", id="hers"))
    room.save("one", edited)
    changed = room.opened("three")
    changed.cells[0].source = "a = 'kept'"
    room.save("three", changed)
    room.save("five", notebook("hers = True"))
    (home / "two.ipynb").unlink()
    release(room.folder, one=("a = 2", "b = 2"), three=None, five=("ours = True",), six=None)
    said = room.pull()

    assert room.read("one") == ["a = 'ada was here'", "b = 2", "c = 'a cell of hers'"]
    assert room.read("two") == ["a = 1"]  # deleted by the learner: it comes back
    assert room.read("three") == ["a = 'kept'"]  # taken away by the course, but edited
    assert not (home / "six.ipynb").exists()  # taken away, and never touched
    assert room.read("five") == ["ours = True"]
    (renamed,) = home.glob("five__*.ipynb")
    assert room.read(renamed.stem) == ["hers = True"]
    assert "Renamed" in said


@needs_namespaces
def test_an_update_under_an_open_notebook_keeps_what_is_saved_then(room: Class) -> None:
    opened = room.opened("four")
    release(room.folder, four=("a = 1", "b = 2"))
    room.pull()
    assert room.read("four") == ["a = 1", "b = 2"]
    opened.cells[0].source = "a = 'written meanwhile'"
    room.save("four", opened)  # JupyterLab asks before it does this
    room.pull()
    assert room.read("four")[0] == "a = 'written meanwhile'"
    release(room.folder, four=("a = 1", "b = 2", "c = 3"))
    room.pull()
    assert room.read("four")[0] == "a = 'written meanwhile'"
    assert "c = 3" in room.read("four")


@needs_namespaces
def test_a_reset_holds_at_once(room: Class) -> None:
    path = room.folder / "hub" / "roster.csv"
    new = roster.reset(path, "kim")
    with pytest.raises(Failed, match="403"):
        Learner(room.hub.url, "kim", room.passwords["kim"])
    assert Learner(room.hub.url, "kim", new).ask("GET", "/hub/api/user").json()["name"] == "kim"
    room.passwords["kim"] = new


@needs_namespaces
def test_secrets_are_the_hubs_own(room: Class) -> None:
    for name in ("", "roster.csv", "cookie_secret", "logs"):
        mode = stat.S_IMODE((room.folder / "hub" / name).stat().st_mode)
        assert not mode & 0o077, name
    for path in (room.folder / "hub").rglob("*"):
        if path.is_file():
            assert not any(password.encode() in path.read_bytes() for password in room.passwords.values()), path


@needs_namespaces
def test_load_is_measured_with_its_errors(room: Class) -> None:
    room.hub.said.append(f"kim  {room.passwords['kim']}")
    met, peak = load.together(room.hub, {"kim": 0.0}, f"{TARGET}/one.ipynb", ["x = bytearray(10**8)", "1 / 0"], 300)
    (kim,) = met
    assert kim.failures == ["cell 2: ZeroDivisionError: division by zero"]
    assert len(kim.cells) == 2
    assert kim.kernel_bytes > 10**8
    assert kim.server_bytes > 3 * 10**7
    assert peak > kim.kernel_bytes + kim.server_bytes
    assert kim.cpu > 0
    rows = load.table(met, kim)
    assert rows["slower"].dropna().eq(1).all()
    Learner(room.hub.url, "kim", room.passwords["kim"]).stop()


def test_a_cell_that_takes_too_long_is_no_failure_of_the_kernel(room: Class) -> None:
    with pytest.raises(TookTooLong, match="a cell of ada took longer than 0.5 seconds"):
        room.ada.run("import time; time.sleep(2)", 0.5)
    assert room.ada.run("print(6 * 7)").text.strip() == "42"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=room -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True)
    return folder


@needs_namespaces
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM, then start again", "Ctrl-C"])
def test_it_ends_without_traces_and_finds_everything_again(room: Class, certificate: Path, how: signal.Signals) -> None:
    """The first round ends the hub of all tests above; the second is a hub with TLS, that ends what idles."""
    if how == signal.SIGTERM:
        ended(room.hub, how, room.folder)
        return
    release(room.folder, seven=("new = True",))
    tls = ["--cert", str(certificate / "cert.pem"), "--key", str(certificate / "key.pem")]
    idle = ["--kernel-idle", "0.05", "--server-idle", "0.3"]
    (room.folder / "hub_config.py").write_text('c.JupyterHub.template_vars = {"announcement_login": "Room 101"}\n')
    with running(room.folder, free_port(), *tls, *idle, verify=str(certificate / "cert.pem")) as hub:
        assert not hub.passwords  # all are known already
        ada = Learner(hub.url, "ada", room.passwords["ada"], verify=str(certificate / "cert.pem"))
        assert (
            "Room 101" in request("GET", f"{hub.url}/hub/login", verify=str(certificate / "cert.pem"), timeout=60).text
        )
        ada.start(300)
        assert room.read("one")[0] == "a = 'ada was here'"
        assert room.read("seven") == ["new = True"]  # taken in by the start of the server
        assert {cookie.name: cookie.secure for cookie in ada.browser.cookies}["jupyterhub-hub-login"]
        ada.open(f"{TARGET}/one.ipynb")  # over wss
        log = room.folder / "hub" / "logs" / "ada.log"
        until(
            lambda: f"Culling 'idle' kernel 'python3' ({ada.kernel})" in log.read_text(), "an idle kernel is ended", 120
        )
        until(lambda: not ada.server(), "an idle server is ended", 120)
        ended(hub, how, room.folder)


def ended(hub: Hub, how: int, folder: Path) -> None:
    """End a hub, and see that nothing is left of it."""
    there = load.processes()
    before = {process.number for process in load.tree(hub.process.pid, there)}
    assert len(before) >= 3  # the hub, its proxy, its culler
    hub.stop(how, 120)
    until(lambda: not before & set(load.processes()), "all processes of the hub have ended", 30)
    assert not [process for process in load.processes().values() if f"{folder}/homes" in process.words]


# Without a hub --------------------------------------------------------------------------------------------------------


def test_a_roster_changes_one_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "hub" / "roster.csv"
    first = roster.add(path, ["ada", "Bob"])
    before = roster.read(path)
    assert roster.add(path, ["ada", "cleo"]).keys() == {"cleo"}
    assert {name: roster.read(path)[name] for name in before} == before
    again = roster.reset(path, "ada")
    assert again != first["ada"]
    after = roster.read(path)
    assert after["bob"] == before["bob"]
    assert roster.hashed(again, after["ada"].salt) == after["ada"].scrypt
    roster.remove(path, "bob")
    assert sorted(roster.read(path)) == ["ada", "cleo"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(password in path.read_text() for password in [again, *first.values()])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "é", "a" * 33, "a\nb", "a,b"])
def test_a_name_that_cannot_be_a_folder_is_refused_and_nobody_is_added(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match="a learner's name has at most 32 signs"):
        roster.add(tmp_path / "roster.csv", ["ada", name])
    assert roster.read(tmp_path / "roster.csv") == {}
    with pytest.raises(Refused, match="is not in"):
        roster.reset(tmp_path / "roster.csv", name)


def test_guessing_is_slowed_down(tmp_path: Path) -> None:
    password = roster.add(tmp_path / "roster.csv", ["ada"])["ada"]
    now = [0.0]
    who = roster.RosterAuthenticator(roster=str(tmp_path / "roster.csv"))
    who.guard = roster.Guard(clock=lambda: now[0])

    def login(word: str) -> Any:
        return asyncio.run(who.authenticate(None, {"username": "ada", "password": word}))

    for _ in range(roster.FREE_TRIES):
        assert login("wrong") is None
    with pytest.raises(web.HTTPError, match="429"):
        login(password)  # right, but too soon
    now[0] += roster.PAUSE
    assert login("wrong") is None
    with pytest.raises(web.HTTPError, match="429"):
        login(password)
    now[0] += roster.PAUSE
    assert login(password) == {"name": "ada", "admin": False}
    assert login("wrong") is None  # counted from the beginning again
    assert login(password) is not None


def test_a_reset_or_a_removal_ends_a_session(tmp_path: Path) -> None:
    path = tmp_path / "roster.csv"
    password = roster.add(path, ["ada"])["ada"]
    who = roster.RosterAuthenticator(roster=str(path))
    ada = type("User", (), {"name": "ada"})
    asyncio.run(who.authenticate(None, {"username": "ada", "password": password}))
    assert asyncio.run(who.refresh_user(ada))
    roster.reset(path, "ada")
    assert not asyncio.run(who.refresh_user(ada))
    roster.remove(path, "ada")
    assert not asyncio.run(who.refresh_user(ada))


@pytest.mark.parametrize(("words", "match"), [
    ({"memory": 0}, "memory must be above 0, got 0"), ({"port": 70000}, "port must be from 1 to 65535, got 70000"),
    ({"key": "a.pem"}, "TLS needs both files"), ({"key": "no", "cert": "no"}, "key='no': there is no such file"),
    ({"threads": 0}, "threads must be 1 or more, got 0"), ({"most": -1}, "most must be 0"),
])  # fmt: skip
def test_settings_that_cannot_be_are_named(words: dict[str, Any], match: str) -> None:
    with pytest.raises(Refused, match=match):
        Room("class", **words)


def test_what_cannot_be_handed_out_is_said(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="nothing has been released yet; `make class-release"):
        publish(Room(str(tmp_path)))
    release(tmp_path, one=("a = 1",))
    (tmp_path / "release" / "two").mkdir()
    (tmp_path / "release" / "two" / "one.ipynb").write_text("{}")
    with pytest.raises(Refused, match=r"two/one.ipynb: another chapter brings"):
        publish(Room(str(tmp_path)))


def test_handing_out_again_changes_nothing(tmp_path: Path) -> None:
    release(tmp_path, one=("a = 1",))
    assert publish(Room(str(tmp_path))) == "handed out: 1 files, 1 of them new or changed"
    assert publish(Room(str(tmp_path))) == "handed out: 1 files, as before"
    release(tmp_path, one=("a = 2",), two=("a = 1",))
    assert publish(Room(str(tmp_path))) == "handed out: 2 files, 2 of them new or changed"


def test_learners_are_told_an_address_that_a_browser_can_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everywhere = Room(str(tmp_path), host="0.0.0.0", port=9000)
    assert everywhere.url == "http://0.0.0.0:9000"  # where it listens
    assert everywhere.address == f"http://{own_address()}:9000"
    assert own_address() not in ("", "0.0.0.0", "::")
    assert Room(str(tmp_path), host="10.1.2.3").address == "http://10.1.2.3:8000"
    release(tmp_path, one=("a = 1",))
    assert hand_out(["--folder", str(tmp_path)]) == 0
    assert "http://127.0.0.1:8000/" in capsys.readouterr().out  # no hub has been started yet
    (tmp_path / "hub" / ADDRESS).write_text("https://10.1.2.3:8443")
    assert hand_out(["--folder", str(tmp_path)]) == 0
    assert "https://10.1.2.3:8443/" in capsys.readouterr().out
    assert hand_out(["--folder", str(tmp_path), "--url", "https://hub.example.org/"]) == 0
    assert "https://hub.example.org/" in capsys.readouterr().out


def test_a_merge_that_is_no_notebook_any_more_keeps_the_learners(tmp_path: Path) -> None:
    base, mine, theirs, path = (tmp_path / name for name in ("base", "mine", "theirs", "one.ipynb"))
    nbformat.write(notebook("a = 1"), base)
    mine.write_bytes(b"not json any more")
    nbformat.write(notebook("a = 2"), theirs)
    merge_notebook.merge(base, mine, theirs, path)
    assert mine.read_bytes() == b"not json any more"
    assert (tmp_path / "one-new.ipynb").read_bytes() == theirs.read_bytes()
    theirs.write_bytes(b"a third one")
    merge_notebook.merge(base, mine, theirs, path)
    assert (tmp_path / "one-new-1.ipynb").read_bytes() == b"a third one"


@pytest.mark.parametrize(("before", "after"), [
    ("cell-1", "cell-0"), ('"outputs": [],', ""), ('"cells": [', '"cells": [{}, '), ("[", ""),
    ('"nbformat": 4', '"nbformat": 3'), ('"cell_type": "code"', '"cell_type": "markdown"'),
])  # fmt: skip
def test_what_a_merge_can_break_is_no_notebook(before: str, after: str) -> None:
    right = nbformat.writes(notebook("a = 1", "b = 1"))
    assert merge_notebook.is_notebook(right.encode())
    assert before in right
    assert not merge_notebook.is_notebook(right.replace(before, after, 1).encode())


def test_a_group_is_divided_and_entered(tmp_path: Path) -> None:
    """On a folder that looks like a cgroup: no cgroup of version 2 is writable in most places where tests run."""
    group = tmp_path / "user.slice" / "run.scope"
    (group / "hub").mkdir(parents=True)
    for folder, inside in ((tmp_path, ""), (group, str(os.getpid()))):
        (folder / "cgroup.controllers").write_text("cpu memory pids")
        (folder / "cgroup.procs").write_text(inside)
    assert groups.divide(tmp_path, "/user.slice/run.scope") == (str(group), "")
    assert (group / "hub" / "cgroup.procs").read_text() == str(os.getpid())
    assert (group / "cgroup.subtree_control").read_text() == "+memory +pids"
    groups.enter(str(group), "ada", 3 * 2**30, 512)
    mine = group / "learner-ada"
    assert [(mine / name).read_text() for name in ("memory.max", "pids.max", "cgroup.procs")] == [
        "3221225472", "512", str(os.getpid()),
    ]  # fmt: skip
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n1\n999999")
    assert "other programs run" in groups.divide(tmp_path, "/user.slice/run.scope")[1]
    (group / "cgroup.controllers").write_text("cpu pids")
    assert "has no control of memory" in groups.divide(tmp_path, "/user.slice/run.scope")[1]
    assert "no cgroups of version 2" in groups.divide(tmp_path / "user.slice")[1]


def test_a_room_is_planned_from_what_was_measured() -> None:
    alone = load.Seen("alone", 0, server=1, kernel=1, cells=[8.0], cpu=5.0)
    met = [load.Seen(name, 0, server_bytes=10**8, kernel_bytes=size, cpu=54.0) for name, size in
           (("ada", 9 * 10**8), ("bob", 5 * 10**8), ("gone", 0))]  # fmt: skip
    fit, need = load.plan(met, alone, 2 * 10**8, 0)
    assert fit.loc[8, "learners"] == int((0.9 * 8 * 2**30 - 2e8) // 1e9) == 7
    assert need.loc[30, "GiB"] == pytest.approx((30e9 + 2e8) / 0.9 / 2**30)
    assert need.loc[30, "cores, all compute at once"] == pytest.approx(15)
    assert need.loc[30, "cores, spread over a lesson"] == pytest.approx(30 * 54 / 5400)
    more, _ = load.plan(met, alone, 2 * 10**8, 4 * 10**9 + 2 * 10**8)  # cells needed more than what was left of them
    assert more.loc[8, "learners"] == 3
    alone.kernel_bytes = 2 * 10**9  # nobody else had time for the cells that need most
    assert load.plan(met, alone, 2 * 10**8, 0)[0].loc[8, "learners"] == int((0.9 * 8 * 2**30 - 2e8) // 2e9)


def test_cells_end_before_the_first_exercise() -> None:
    cells = load.cells_of(ROOT / "notebooks" / "02_optimizers.ipynb", 0)
    assert len(cells) > 10
    assert not any('check("02' in source for source in cells)
    assert load.cells_of(ROOT / "notebooks" / "02_optimizers.ipynb", 3) == cells[:3]


def test_a_load_test_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--folder", str(tmp_path), "--chapter", "99"]) == 2
    assert "there is no such chapter" in capsys.readouterr().err
    assert load.main(["--folder", str(tmp_path), "--learners", "0"]) == 2
    assert "--learners must be 1 or more" in capsys.readouterr().err


# What was not built here ----------------------------------------------------------------------------------------------


def test_the_image_installs_what_the_kit_pins() -> None:
    text = (HUB / "Dockerfile").read_text()
    steps = re.sub(r"\\\n", " ", text)
    assert "--requirement classroom/requirements-classroom.txt" in steps
    copied = {word for line in re.findall(r"^COPY (.*)$", steps, re.MULTILINE) for word in line.split()[:-1]}
    assert {"requirements.txt", "pyproject.toml", "course_lib/", "classroom/requirements-classroom.txt"} <= copied
    assert all((ROOT / word).exists() for word in copied if not word.startswith("--"))
    users = re.findall(r"^USER (.*)$", steps, re.MULTILINE)
    assert users[-1] == "1000"
    assert not re.search(r"pip install.*[a-z]==", steps), "pins stand in the requirement files only"


def test_the_values_of_the_chart_agree_with_the_kit() -> None:
    values = yaml.safe_load((HUB / "values.yaml").read_text())
    pins = dict(
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "classroom/requirements-classroom.txt").read_text(), re.MULTILINE)
    )
    single = values["singleuser"]
    assert single["memory"] == {"limit": "4G", "guarantee": "1G"}
    assert values["cull"]["timeout"] == Room("class").server_idle * 60
    assert single["extraEnv"]["COURSE_DATA"] == "/course/data"
    (pull,) = re.findall(
        r"gitpuller (\S+) (\S+) (\S+)", " ".join(single["lifecycleHooks"]["postStart"]["exec"]["command"])
    )
    assert pull[1:] == (BRANCH, TARGET)
    assert INSIDE.startswith("file:///course/")
    assert f"jupyterhub {pins['jupyterhub']}" in (HUB / "kubernetes.md").read_text().lower()
