"""Start the ranks of one worker: `python -m tasks.training.agent PARENT THREADS [NAME=VALUE ...] MODULE [ARGUMENT ...]`.

Runs MODULE (torch's or DeepSpeed's launcher, or a worker itself) in this process, after tying this process's life to
PARENT's: the ranks tie theirs to this one, so that nothing outlives a launcher that was killed.
"""

import os
import runpy
import socket
import sys

from tasks.machine import die_with_parent

# What every rank finds in its environment, unless the user has set it.
DEFAULTS = {
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A rank is given files alone: nothing it does may ask a server.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # glibc gives large blocks back to the kernel at every free, and logits are large: on CPU, a quarter of the time of
    # a demo's step went into page faults (sys 15 s of 61, and 3 s of 47 with these). Bytes.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


def main() -> None:
    """Prepare the environment, then become MODULE."""
    parent, threads, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    defaults = dict(DEFAULTS)
    while "=" in arguments[0]:
        name, _, value = arguments.pop(0).partition("=")
        defaults[name] = value
    module = arguments.pop(0)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ["SEQMILL_AGENT"] = str(os.getpid())
    if not module.startswith(("torch.", "deepspeed.")):
        os.environ.update(only_rank())
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def only_rank() -> dict[str, str]:
    """What torchrun would tell a rank that is alone."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def free_port(address: str = "127.0.0.1") -> int:
    """A port of an address of this host's that nothing uses now."""
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
