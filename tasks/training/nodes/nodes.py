"""Several machines in one training: how ranks are shared out over them, and how one's plan is read by another."""

import fcntl
import re
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.errors import SettingsError
from tasks.machine import Nodes
from tasks.store.cache import Cache

NUMBERS = re.compile(r"(\d+)(?::(\d+))?")
DEFAULT_PORT = 29400  # torchrun's for a rendezvous
SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface

STORE, CHECKPOINTS = "store", "checkpoints"


def parse_nodes(nodes: str, rendezvous: str | None, wait_seconds: float, secret: str = "") -> Nodes:
    """``nodes`` as torchrun takes it, "4" or "2:4"; ``rendezvous``: "host" or "host:port". Raises SettingsError."""
    found = NUMBERS.fullmatch(nodes)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise SettingsError(f"nodes: {nodes!r}; give their number, such as 4, or the least and the most, such as 2:4")
    if not rendezvous:
        raise SettingsError("rendezvous: not set; give host:port of the node with the number 0, as the other nodes reach it")
    host, _, port = rendezvous.rpartition(":") if ":" in rendezvous else (rendezvous, "", str(DEFAULT_PORT))
    if not (host and port.isdecimal() and int(port) < 1 << 16):
        raise SettingsError(f"rendezvous: {rendezvous!r}; give host:port of the node with the number 0")
    return Nodes(least, most, host, int(port), wait_seconds, secret=secret)


def share_out(slots: Sequence[int], global_batch_size: int) -> list[int]:
    """The ranks of every node, of at most ``slots`` each: the most that divide the batch, evenly; 0 for a node that waits.

    The first node leads and always takes part. As many ranks on few nodes come before the same on many.
    """
    best = [0] * len(slots)
    for each in range(1, max(slots) + 1):
        able = [node for node, own in enumerate(slots) if own >= each]
        if able[:1] != [0]:  # the first has fewer
            break
        taken = max((number for number in range(1, len(able) + 1) if global_batch_size % (number * each) == 0), default=0)
        if taken and taken * each >= sum(best):
            best = [each if node in able[:taken] else 0 for node in range(len(slots))]
    assert sum(best), "one rank divides every batch"
    return best


def portable(plan: Any, roots: Mapping[str, Path], cache: Cache | None = None) -> Any:
    """A plan whose paths below one of ``roots`` are told by the root's name: "store:blocks-shard/...".

    cache: the store's, where that is no folder which all nodes see.
    """

    def told(path: str) -> str:
        for name, root in roots.items():
            if path == str(root):
                return f"{name}:"
            if path.startswith(f"{root}/"):
                below = path[len(str(root)) + 1 :]
                return f"{name}:{cache.told(below) if cache and name == STORE else below}"
        return path

    return _each_string(plan, told)


def localized(plan: Any, roots: Mapping[str, Path], cache: Cache | None = None) -> Any:
    """The same plan on another node, with its ``roots`` and cache. Raises SettingsError for a path that leads out of them."""

    def read(text: str) -> str:
        name, colon, path = text.partition(":")
        if not colon or name not in (STORE, CHECKPOINTS):
            return text
        if name not in roots:
            raise SettingsError(f"{name}: the node that leads has set it, this one has not; give all nodes the same settings")
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise SettingsError(f"{text}: a path that leads out of the {name}; let only nodes of this training reach each other")
        return str(roots[name] / (cache.here(path) if cache and name == STORE else path))

    return _each_string(plan, read)


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_string(inner, change) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_each_string(inner, change) for inner in value]
    return value


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 ``address``; None where there is none."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
        if socket.inet_ntoa(answer[20:24]) == address:
            return name
    return None


@dataclass(frozen=True)
class Launch:
    """What one node is to start: its number, the ranks of every node, and where rank 0 waits for the others."""

    node: int
    ranks: Sequence[int]
    host: str
    port: int
    launcher: str

    def command(self, module: str, plan_path: Path) -> list[str]:
        """The launcher of this node's ranks, as `python -m` takes it; DeepSpeed's gets a hostfile beside the plan."""
        if self.launcher == "deepspeed":
            hostfile = plan_path.with_name("hostfile")
            hostfile.write_text("".join(f"node-{node} slots={ranks}\n" for node, ranks in enumerate(self.ranks)))
            several = ["--node_rank", str(self.node), "--master_addr", self.host, "--master_port", str(self.port), "--no_ssh"]
            own = ["--hostfile", str(hostfile), "--no_local_rank", "--module"]
            return ["deepspeed.launcher.runner", *several, *own, module, str(plan_path)]
        several = ["--node-rank", str(self.node), "--master-addr", self.host, "--master-port", str(self.port)]
        ranks = ["--nnodes", str(len(self.ranks)), "--nproc-per-node", str(self.ranks[self.node])]
        return ["torch.distributed.run", *ranks, *several, "-m", module, str(plan_path)]

    def environment(self) -> list[str]:
        """NAME=VALUE of what the ranks find in their environment, unless the user has set it."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self.host, self.port))  # nothing is sent
            interface = interface_of(probe.getsockname()[0])
        # gloo takes the address that the host's name has, which on many machines is 127.0.1.1.
        return [f"GLOO_SOCKET_IFNAME={interface}"] if interface else []
