"""Which WebUI this process is."""

from __future__ import annotations

from i2l_ext.webui.hosts.a1111 import A1111Host
from i2l_ext.webui.hosts.forge import ForgeHost
from i2l_ext.webui.hosts.forge_neo import ForgeNeoHost
from i2l_ext.webui.hosts.sdnext import SDNextHost
from i2l_ext.webui.hosts.webui import WebUIHost

KINDS: tuple[type[WebUIHost], ...] = (SDNextHost, ForgeNeoHost, ForgeHost, A1111Host)
"""The special before the general."""


def running_host() -> WebUIHost:
    """The Host of the WebUI in whose process we are."""
    return next(kind for kind in KINDS if kind.is_running())()
