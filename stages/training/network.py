"""The network workers talk over: the interface that has their node's own address.

gloo takes the interface that the host's name resolves to, which in a container or on a machine with several networks may be one
the other nodes cannot reach; NCCL takes the first it finds.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from ray.train.torch import TorchConfig

SIOCGIFADDR = 0x8915  # Linux: the address of an interface (netdevice(7))


class OnNodeInterface(TorchConfig):
    """Ray's set-up of torch.distributed, with the interface chosen first: by the time a worker's function is called its process
    group is there already."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """Name the interface of this node's address to gloo and NCCL, where the user has not named another."""
    import ray.util

    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if not nccl_is_configured():
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # `=`: this one, not all that begin so


def nccl_is_configured() -> bool:
    """Whether the machine's own NCCL configuration names interfaces, which the environment would override."""
    files = [Path("/etc/nccl.conf"), Path.home() / ".nccl.conf"]
    return any("NCCL_SOCKET_IFNAME" in file.read_text() for file in files if file.is_file())


def interface_of(address: str) -> str | None:
    """The interface that has an address (`eth0`); None where it cannot be told: not Linux, or an address of none."""
    if not sys.platform.startswith("linux"):
        return None
    if ":" in address:
        return _interface_of_6(socket.inet_pton(socket.AF_INET6, address).hex())
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _interface_of_6(address: str) -> str | None:
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        found, *_, name = line.split()
        if found == address:
            return name
    return None
