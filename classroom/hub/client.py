"""A hub and its learners as programs: log in, start a server, run cells over the websocket. For tests and load tests.

Nothing of it waits for a fixed time: what is waited for is a state, with a limit.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import requests
import websocket

from classroom.hub.room import ROOT

T = TypeVar("T")


class Failed(Exception):
    """Something that the client asked for did not come about."""


class TookTooLong(Failed):
    """A cell had not ended when its time was up."""


def until(look: Callable[[], T], what: str, seconds: float = 60, every: float = 0.1) -> T:
    """Wait until ``look()`` is true; its value.

    Raises
    ------
    Failed : it was not within ``seconds``.
    """
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise Failed(f"not within {seconds:g} seconds: {what}")
        time.sleep(every)
    return found


def request(method: str, url: str, **words: Any) -> requests.Response:
    """A request that neither cookies nor the environment's proxies and certificates have a part in."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, **words)


@dataclass
class Hub:
    """A hub that runs as a process of its own; what it prints is kept in ``said``."""

    process: subprocess.Popen[str]
    url: str
    said: list[str] = field(default_factory=list)

    @property
    def passwords(self) -> dict[str, str]:
        """The passwords that it printed."""
        lines = (re.fullmatch(r"(\S+) +([a-z0-9]{4}(?:-[a-z0-9]{4}){2})", line) for line in self.said)
        return {match[1]: match[2] for match in lines if match}

    def stop(self, how: int = signal.SIGTERM, seconds: float = 60) -> int:
        """End it; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Failed(f"the hub did not end within {seconds:g} seconds") from None


@contextmanager
def running(folder: Path, port: int, *words: str, verify: bool | str = True) -> Iterator[Hub]:
    """A hub of the class in ``folder``; it has ended, with all servers, when the block is left.

    Raises
    ------
    Failed : it does not start; the words say what it printed.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "classroom.hub", "--folder", str(folder), "--port", str(port), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    hub = Hub(process, f"{'https' if '--cert' in words else 'http'}://127.0.0.1:{port}")
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    reader = threading.Thread(target=lambda: hub.said.extend(line.rstrip("\n") for line in lines), daemon=True)
    reader.start()

    def up() -> bool:
        if process.poll() is not None:
            reader.join(5)
            raise Failed("the hub ended: " + "\n".join(hub.said[-20:]))
        try:
            return request("GET", f"{hub.url}/hub/api/", timeout=5, verify=verify).ok
        except requests.RequestException:
            return False

    try:
        until(up, f"the hub answers at {hub.url}", 300, every=0.5)
        yield hub
    finally:
        hub.stop()
        reader.join(5)
        process.stdout.close()


@dataclass
class Output:
    """What a cell printed and showed, and the name of the error that it ended in."""

    text: str = ""
    error: str = ""
    seconds: float = 0.0


class Learner:
    """Somebody with a browser.

    Raises
    ------
    Failed : the login was refused.
    """

    def __init__(self, url: str, name: str, password: str, *, verify: bool | str = True):
        self.url, self.name = url, name
        self.browser = requests.Session()
        self.browser.verify, self.browser.trust_env = verify, False
        self.browser.get(f"{url}/hub/login", timeout=60).raise_for_status()
        words = {"username": name, "password": password, "_xsrf": self._xsrf()}
        done = self.browser.post(f"{url}/hub/login", data=words, allow_redirects=False, timeout=120)
        if done.status_code != 302:
            raise Failed(f"login of {name}: {done.status_code}")
        token = self.browser.post(
            f"{url}/hub/api/users/{name}/tokens", headers={"X-XSRFToken": self._xsrf(), "Referer": f"{url}/hub/home"},
            json={"note": "client", "expires_in": 86400}, timeout=60,
        )  # fmt: skip
        token.raise_for_status()
        self.headers = {"Authorization": f"token {token.json()['token']}"}
        self.socket: websocket.WebSocket | None = None
        self.kernel = ""

    def _xsrf(self) -> str:
        return next(cookie.value or "" for cookie in self.browser.cookies if cookie.name == "_xsrf")

    def ask(self, method: str, path: str, **words: Any) -> requests.Response:
        """A request with this learner's token; ``path`` from the hub's address on."""
        return requests.request(
            method, self.url + path, headers=self.headers, timeout=120, verify=self.browser.verify, **words
        )

    def server(self) -> dict[str, Any]:
        """What the hub knows of the learner's server; nothing if there is none."""
        servers: dict[str, dict[str, Any]] = self.ask("GET", f"/hub/api/users/{self.name}").json()["servers"]
        return servers.get("", {})

    def start(self, seconds: float = 120) -> None:
        """Start the server, and wait until it is ready.

        Raises
        ------
        Failed : it did not start.
        """
        done = self.ask("POST", f"/hub/api/users/{self.name}/server")
        if done.status_code not in (201, 202):
            raise Failed(f"server of {self.name}: {done.status_code} {done.text[:300]}")

        def ready() -> bool:
            server = self.server()
            if not server:
                raise Failed(f"the server of {self.name} ended while it started")
            return bool(server["ready"])

        until(ready, f"the server of {self.name} is ready", seconds, every=0.3)

    def stop(self) -> None:
        """End the server, and wait until it is gone."""
        self.ask("DELETE", f"/hub/api/users/{self.name}/server")
        until(lambda: not self.server(), f"the server of {self.name} is gone")

    def open(self, path: str = "") -> None:
        """Start a kernel as a browser does that opens the notebook at ``path``, and connect to it."""
        about = {"path": path or "untitled.ipynb", "name": "", "type": "notebook", "kernel": {"name": "python3"}}
        done = self.ask("POST", f"/user/{self.name}/api/sessions", json=about)
        if not done.ok:
            raise Failed(f"kernel of {self.name}: {done.status_code} {done.text[:300]}")
        self.kernel = done.json()["kernel"]["id"]
        where = re.sub("^http", "ws", f"{self.url}/user/{self.name}/api/kernels/{self.kernel}/channels")
        self.socket = websocket.create_connection(
            f"{where}?session_id={uuid.uuid4().hex}", header=self.headers, timeout=120,
            sslopt={"ca_certs": self.browser.verify} if isinstance(self.browser.verify, str) else None,
        )  # fmt: skip

    def run(self, source: str, seconds: float = 600) -> Output:
        """Run one cell; what came of it.

        Raises
        ------
        TookTooLong : the kernel did not answer within ``seconds``.
        Failed : it is gone.
        """
        assert self.socket is not None, "open() comes first"
        key, output, begin = uuid.uuid4().hex, Output(), time.monotonic()
        header = {"msg_id": key, "msg_type": "execute_request", "username": self.name, "session": key,
                  "version": "5.3", "date": ""}  # fmt: skip
        content = {"code": source, "silent": False, "store_history": True, "user_expressions": {},
                   "allow_stdin": False, "stop_on_error": True}  # fmt: skip
        try:
            self.socket.send(json.dumps(
                {"header": header, "parent_header": {}, "metadata": {}, "channel": "shell", "buffers": [],
                 "content": content}
            ))  # fmt: skip
            while True:
                left = begin + seconds - time.monotonic()
                if left <= 0:
                    raise TookTooLong(f"a cell of {self.name} took longer than {seconds:g} seconds")
                self.socket.settimeout(left)
                said = self.socket.recv()
                if not said:
                    raise Failed(f"the kernel of {self.name} closed the connection")
                if isinstance(said, bytes):  # with buffers: pictures of widgets
                    continue
                message = json.loads(said)
                if message["msg_type"] == "status" and message["content"]["execution_state"] in ("restarting", "dead"):
                    raise Failed(f"the kernel of {self.name} died")
                if message["parent_header"].get("msg_id") == key and _take(message, output):
                    output.seconds = time.monotonic() - begin
                    return output
        except websocket.WebSocketTimeoutException:
            raise TookTooLong(f"a cell of {self.name} took longer than {seconds:g} seconds") from None
        except (OSError, websocket.WebSocketException) as error:
            raise Failed(f"the kernel of {self.name}: {type(error).__name__}: {error}") from None

    def close(self) -> None:
        """Close the browser; the server stays."""
        if self.socket is not None:
            self.socket.close()
        self.browser.close()


def _take(message: dict[str, Any], output: Output) -> bool:
    """Add a message to the output; whether it was the last one."""
    content = message["content"]
    match message["msg_type"]:
        case "stream":
            output.text += content["text"]
        case "execute_result":
            output.text += content["data"].get("text/plain", "")
        case "error":
            output.error = f"{content['ename']}: {content['evalue']}"
        case "status":
            return bool(content["execution_state"] == "idle")
    return False
