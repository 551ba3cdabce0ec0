"""Network namespaces that pass for machines: each has a name of its own, and finds the others by theirs.

They share this machine's files, processors and users.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.training.netns import Nodes, nodes

# Of a process's own, then gone with it: the name, and other files where those of /etc are read.
ENTER = 'hostname "$1" && while [[ $2 != -- ]]; do mount --bind "$2" "$3" && set -- "$1" "${@:4}"; done && exec "${@:3}"'
PATIENCE_SECONDS = 400.0


class Machines:
    """Machines by their names. ``files``: what takes the place of a file of the system, on all of them."""

    def __init__(self, net: Nodes, names: Sequence[str], folder: Path) -> None:
        self.net, self.names = net, list(names)
        self.files = {"/etc/hosts": folder / "hosts"}
        lines = ["127.0.0.1 localhost", *(f"{net.address(node)} {name}" for node, name in enumerate(names))]
        self.files["/etc/hosts"].write_text("\n".join(lines) + "\n")

    def command(self, name: str, *command: str) -> list[str]:
        """What starts a command on a machine; the process that does so becomes it."""
        files = [part for there, here in self.files.items() for part in (str(here), there)]
        inside = ["ip", "netns", "exec", self.namespace(name), "unshare", "--uts", "--mount"]
        return [*inside, "bash", "-c", ENTER, "enter", name, *files, "--", *command]

    def start(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> "Process":
        with log.open("ab") as target:
            return subprocess.Popen(
                self.command(name, *command), stdin=subprocess.DEVNULL, stdout=target, stderr=subprocess.STDOUT, env=environment
            )

    def address(self, name: str) -> str:
        return self.net.address(self.names.index(name))

    def namespace(self, name: str) -> str:
        return self.net.names[self.names.index(name)]

    def processes(self, name: str, words: str = "") -> list[int]:
        """What runs on a machine with ``words`` in its command line."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace(name)], check=True, capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split() if words in command_line(int(pid))]

    def kill(self, name: str, words: str = "", number: int = signal.SIGKILL) -> None:
        """Everything of the machine, as its power's loss would, or what has ``words`` in its command line."""
        while pids := self.processes(name, words):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            if number != signal.SIGKILL:
                return
            time.sleep(0.1)


Process = subprocess.Popen[bytes]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""


@contextmanager
def machines(names: Sequence[str], folder: Path) -> Iterator[Machines]:
    """Machines of these names, with whose end everything ends that was started on them."""
    with nodes(len(names)) as net:
        made = Machines(net, names, folder)
        try:
            yield made
        finally:
            for name in names:
                made.kill(name)


def wait_for(happened: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until something is to be seen; ``what`` is told where it is not."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not seen after {seconds:g} s: {what}"
        time.sleep(0.2)
