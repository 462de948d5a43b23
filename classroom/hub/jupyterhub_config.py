"""JupyterHub for one room: `python -m classroom.hub` starts it and tells it the settings."""

import os
import sys
from pathlib import Path

from classroom.hub.publish import TARGET
from classroom.hub.room import Room
from classroom.hub.roster import RosterAuthenticator
from classroom.hub.spawner import RoomSpawner

c = get_config()  # type: ignore[name-defined]  # noqa: F821
room = Room.from_environment()

# Where it listens, by TLS if there is a certificate (see `proxy`); its own parts speak on the loopback only
c.JupyterHub.bind_url = room.url
c.JupyterHub.hub_bind_url = f"http://127.0.0.1:{room.hub_port}"
c.ConfigurableHTTPProxy.api_url = f"http://127.0.0.1:{room.proxy_port}"
c.ConfigurableHTTPProxy.command = [sys.executable, "-m", "classroom.hub.proxy"]
c.ConfigurableHTTPProxy.pid_file = str(room.hub / "proxy.pid")

# What it keeps
c.JupyterHub.db_url = f"sqlite:///{room.hub / 'hub.sqlite'}"
c.JupyterHub.cookie_secret_file = str(room.hub / "cookie_secret")
c.Application.log_level = "WARN"

# Who may log in. Set on the class, so that another authenticator begins with its own rules
c.JupyterHub.authenticator_class = RosterAuthenticator
c.RosterAuthenticator.roster = str(room.roster)
c.RosterAuthenticator.allow_all = True  # the roster has decided already

# Learners' servers
c.JupyterHub.spawner_class = RoomSpawner
c.RoomSpawner.room = room
c.RoomSpawner.at_once = room.at_once
c.JupyterHub.concurrent_spawn_limit = 0  # nobody is sent away: servers wait for their turn in `RoomSpawner`
c.JupyterHub.active_server_limit = room.most
c.JupyterHub.allow_named_servers = False
c.Spawner.start_timeout = 900  # the wait included
c.Spawner.http_timeout = 120
c.Spawner.disable_user_config = True
c.Spawner.default_url = f"/lab/tree/{TARGET}"
c.Spawner.args = [
    "--KernelManager.transport=ipc",  # over TCP, anybody on the machine could listen
    f"--MappingKernelManager.cull_idle_timeout={round(room.kernel_idle * 60)}",
    f"--MappingKernelManager.cull_interval={max(1, round(min(60, room.kernel_idle * 15)))}",
    "--MappingKernelManager.cull_connected=True",  # a browser that was left open counts as nobody
    "--ServerApp.terminals_enabled=False",
]

# Servers that nobody uses
every = max(2, round(min(120, room.server_idle * 15)))
c.JupyterHub.services = [
    {
        "name": "culler",
        "command": [
            sys.executable, "-m", "jupyterhub_idle_culler", f"--timeout={round(room.server_idle * 60)}",
            f"--cull-every={every}", "--logging=warning",
        ],
    }
]  # fmt: skip
c.JupyterHub.load_roles = [
    {
        "name": "culler",
        "scopes": ["list:users", "read:users:activity", "read:servers", "delete:servers"],
        "services": ["culler"],
    }
]

yours = Path(room.folder) / "hub_config.py"
if os.path.exists(yours):
    load_subconfig(str(yours))  # type: ignore[name-defined]  # noqa: F821
