"""A real Slurm: munged, slurmctld and a slurmd on each of a few machines that are network namespaces.

Debian's packages slurm-wlm and munge. Nothing of it is outside its folder: not the configuration, the key, nor a log.
"""

import os
import secrets
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.deployments.machines import Machines, Process, machines, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
LOGIN = "login"  # where jobs are submitted, and the controller runs

CONFIG = """
ClusterName=seqmill
SlurmctldHost=login
AuthType=auth/munge
# Seconds: a job that is queued again starts no sooner than its credential has expired; 120 where nobody says.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroup is to be had here: processes are known by their parents.
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
MailProg=/bin/true
# Seconds, all of them: a node is looked after often, since a test waits for what comes of it.
SlurmdTimeout=10
InactiveLimit=0
KillWait=30
MinJobAge=600
SchedulerParameters=batch_sched_delay=0,bf_interval=5,sched_interval=5
NodeName={nodes} CPUs=2 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=gpu Nodes={nodes} Default=NO MaxTime=INFINITE State=UP
"""


def is_slurm_here() -> bool:
    path = f"{os.environ['PATH']}:/usr/sbin"
    return all(shutil.which(program, path=path) for program in PROGRAMS)


class Slurm:
    """The cluster; ``environment`` is that of whoever works with it."""

    def __init__(self, hosts: Machines, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.nodes = [name for name in hosts.names if name != LOGIN]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SEQMILL_", "SLURM_"))}
        self.environment = {**inherited, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{inherited['PATH']}:/usr/sbin"}
        self.daemons: dict[str, Process] = {}

    def start(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, nodes=",".join(self.nodes)))
        # A GPU is a device file; any will do where nobody is kept from it.
        devices = [self.folder / f"gpu{number}" for number in range(2)]
        for device in devices:
            os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # /dev/null's
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        # By its name, since the one to be found needs a mounted /sys/fs/cgroup; no plugin of CONFIG asks anything of it.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._daemon(LOGIN, "munged", *self._munge())
        wait_for((self.folder / "munge.socket").exists, "munge's socket")
        self._daemon(LOGIN, "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self.tell("sinfo", "-h", "-o", "%D %t").split() == [str(len(self.nodes)), "idle"], "idle nodes")

    def start_node(self, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._daemon(node, "slurmd", "-D")

    def _munge(self) -> list[str]:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        where = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munged.log"}
        files = [f"--{name}={self.folder / path}" for name, path in {**where, "seed-file": "munge.seed"}.items()]
        return ["--foreground", "--force", *files]

    def _daemon(self, host: str, *command: str) -> None:
        name = f"{command[0]}-{host}"
        self.daemons[name] = self.hosts.start(host, command, self.folder / f"{name}.out", self.environment)

    def tell(self, *command: str, **variables: str) -> str:
        """What a command on the login node prints."""
        told = subprocess.run(
            self.hosts.command(LOGIN, *command),
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.returncode == 0, (command, told.stdout, told.stderr)
        return told.stdout

    def can(self, *command: str) -> bool:
        """Whether a command on the login node ends without a mistake."""
        return subprocess.run(self.hosts.command(LOGIN, *command), capture_output=True, check=False).returncode == 0

    def submit(self, clone: Path, script: str, *options: str, environment: Mapping[str, str]) -> str:
        """`sbatch` in a clone; the job's number."""
        told = self.tell("env", f"--chdir={clone}", "sbatch", "--parsable", *options, script, **environment)
        return told.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, BatchHost, ..."""
        told = self.tell("scontrol", "show", "job", number, "--oneliner")
        return dict(part.split("=", 1) for part in told.split() if "=" in part)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def end(self, number: str) -> dict[str, str]:
        """The job, when it has ended."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
        wait_for(lambda: self.state(number) in ended, f"the end of job {number}: {self.job(number)}")
        return self.job(number)


@contextmanager
def slurm(folder: Path, num_nodes: int = 2) -> Iterator[Slurm]:
    """A cluster of so many nodes, c1, c2, ..., that is gone with the block."""
    names = [LOGIN, *(f"c{number}" for number in range(1, num_nodes + 1))]
    with machines(names, folder) as hosts:
        made = Slurm(hosts, folder)
        made.start()
        yield made
