"""The server that the demo starts."""

import socket

import pytest

from cocktail_serve.cli.demo import pools as demo_pools
from cocktail_serve.cli.demo.pools import prepare
from cocktail_serve.cli.demo.server import DemoServer
from cocktail_serve.errors import ServerError


def test_a_port_in_use_is_told_from_the_servers_log(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_pools, "_tune_encoders", lambda out: None)  # takes most of a minute, and none is served
    monkeypatch.setattr(demo_pools, "CHAT_PACKAGES", ("no_such_package",))
    pools = prepare(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with DemoServer(pools, port=port, keep=False) as server, pytest.raises(ServerError, match="in use"):
            server.wait_until_ready()
