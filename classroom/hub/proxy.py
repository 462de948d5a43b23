"""The proxy in front of hub and servers: ``configurable-http-proxy`` in Python, with room for a class, and with TLS.

As it comes it passes on ten requests at a time and cuts each after 20 seconds: too few for 30 people, and too soon for
a kernel that starts on a busy machine, or for an update. It refuses certificates; what is changed here is the server
that it opens to the room, and that it says ``https`` to those behind it.
"""

import logging
import ssl
from typing import Any

from configurable_http_proxy import cli, handlers
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.httpserver import HTTPServer

from classroom.hub.room import Room

AT_ONCE = 1000
PATIENCE = 600  # seconds


def use_tls(cert: str, key: str) -> None:
    """Let the server that the room reaches speak TLS; the other one, for the hub, is on the loopback."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    options = iter([{"ssl_options": context}, {}])  # the proxy opens the room's server first
    cli.HTTPServer = lambda app: HTTPServer(app, **next(options))
    plain = handlers.ProxyHandler._get_proxy_request

    def said_to_be_https(self: Any, url: str) -> HTTPRequest:
        request = plain(self, url)
        request.headers["X-Scheme"] = "https"
        return request

    handlers.ProxyHandler._get_proxy_request = said_to_be_https


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # its own option for the level is not heeded
    AsyncHTTPClient.configure(
        None, max_clients=AT_ONCE, defaults={"connect_timeout": PATIENCE, "request_timeout": PATIENCE}
    )
    room = Room.from_environment()
    if room.cert:
        use_tls(room.cert, room.key)
    cli.main()
