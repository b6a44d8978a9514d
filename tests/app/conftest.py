"""What tests of the application share: a machine without a network."""

import socket

import datasets
import pytest
from huggingface_hub import close_session, constants


@pytest.fixture
def no_network(monkeypatch):
    """The hosts that are looked up, in vain, while nobody has forbidden the hub's library to try."""
    hosts = []

    def nowhere(host, *_, **__):
        hosts.append(host)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    # That library waits between its attempts.
    monkeypatch.setattr("time.sleep", lambda _: None)
    for settings in (constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    close_session()
    yield hosts
    close_session()
