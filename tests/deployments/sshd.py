"""Hosts that open each other by ssh without a password: Debian's sshd on machines that are network namespaces.

The keys are made for the test and trusted there alone; no file of the user's own is read.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.deployments.machines import Machines, machines, wait_for

SERVER = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
CLIENT = """
Host *
  IdentityFile {folder}/user_key
  UserKnownHostsFile {folder}/known_hosts
  BatchMode yes
"""


def is_ssh_here() -> bool:
    path = f"{os.environ['PATH']}:/usr/sbin"
    return all(shutil.which(program, path=path) for program in ("sshd", "ssh", "ssh-keygen"))


@contextmanager
def ssh_hosts(names: Sequence[str], folder: Path) -> Iterator[Machines]:
    """Hosts of these names, each of which is reached from the others by `ssh NAME`."""
    with machines(names, folder) as hosts:
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        _, kind, key = "host", *(folder / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text("".join(f"{name},{hosts.address(name)} {kind} {key}\n" for name in names))
        (folder / "sshd_config").write_text(SERVER.format(folder=folder))
        (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
        hosts.files["/etc/ssh/ssh_config"] = folder / "ssh_config"
        Path("/run/sshd").mkdir(exist_ok=True)  # as Debian's service does
        for name in names:
            command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
            hosts.start(name, command, folder / f"sshd-{name}.log")
        for name in names:
            log = folder / f"sshd-{name}.log"
            wait_for(lambda log=log: "Server listening" in log.read_text(), f"sshd: {log}", 20)  # type: ignore[misc]
        yield hosts
