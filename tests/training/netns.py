"""Network namespaces as nodes: each has an address of its own on one bridge, and reaches the others through it alone."""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

SUBNET = "10.231.7"
BRIDGE = 254
CLONE_NEWNET = 0x40000000  # linux/sched.h


def can_make_nodes() -> bool:
    """Whether this process may make namespaces: root, with iproute2, on Linux."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"seqmill-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode == 0
    if made:
        ip("netns", "del", probe)
    return made


def ip(*arguments: str, within: str | None = None) -> None:
    inside = ["-n", within] if within else []
    subprocess.run(["ip", *inside, *arguments], check=True, capture_output=True)


class Nodes:
    """Nodes 0, 1, 2 ...; what is started on one runs with its network alone."""

    def __init__(self, number: int) -> None:
        self.prefix = f"seqmill-{os.getpid()}"
        self.names = [f"{self.prefix}-{node}" for node in range(number)]
        self.bridge = f"{self.prefix}-bridge"

    def address(self, node: int) -> str:
        return f"{SUBNET}.{node + 1}"

    def listen(self) -> socket.socket:
        """A socket of this process's that the nodes reach, at an address of the bridge's own."""
        made: list[socket.socket] = []

        def enter() -> None:
            # A thread has a network of its own; a socket stays in the one that it was made in.
            with Path("/var/run/netns", self.bridge).open() as namespace:
                assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) == 0
            made.append(socket.create_server((f"{SUBNET}.{BRIDGE}", 0), backlog=64))

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return made[0]

    def start(self, node: int, arguments: Sequence[str], log: Path, **variables: str) -> "subprocess.Popen[bytes]":
        """`python ARGUMENTS` on a node; what it says goes to ``log``. `ip netns exec` becomes the process that it starts."""
        with log.open("ab") as target:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], sys.executable, *arguments],
                stdin=subprocess.DEVNULL, stdout=target, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            )  # fmt: skip

    def unplug(self, node: int) -> None:
        """As a machine that lost its power, or its cable: nothing comes from it any more, not even an end of connections."""
        ip("link", "set", f"node{node}", "down", within=self.bridge)

    def make(self) -> None:
        ip("netns", "add", self.bridge)
        ip("link", "add", "bridge", "type", "bridge", within=self.bridge)
        ip("addr", "add", f"{SUBNET}.{BRIDGE}/24", "dev", "bridge", within=self.bridge)
        ip("link", "set", "bridge", "up", within=self.bridge)
        for node in range(len(self.names)):
            self._add(node)

    def replace(self, node: int) -> None:
        """Take a node away, whose processes have ended, and put a new one in its place, which has its address."""
        ip("link", "del", f"node{node}", within=self.bridge)
        ip("netns", "del", self.names[node])
        self._add(node)

    def _add(self, node: int) -> None:
        name = self.names[node]
        ip("netns", "add", name)
        ip("link", "add", f"node{node}", "type", "veth", "peer", "name", "eth0", "netns", name, within=self.bridge)
        ip("link", "set", f"node{node}", "master", "bridge", "up", within=self.bridge)
        ip("addr", "add", f"{self.address(node)}/24", "dev", "eth0", within=name)
        for device in ("eth0", "lo"):
            ip("link", "set", device, "up", within=name)

    def remove(self) -> None:
        for name in (*self.names, self.bridge):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


@contextmanager
def nodes(number: int) -> Iterator[Nodes]:
    made = Nodes(number)
    try:
        made.make()
        yield made
    finally:
        made.remove()
