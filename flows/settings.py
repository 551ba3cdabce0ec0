"""This machine: where the store is, how many workers and ranks, which launcher. None of it enters a key.

Every field may be set as SEQMILL_<NAME> in the environment, or as an option of the command line, which wins.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pydantic_settings
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

import deepspeed_configs
from tasks.cluster.cluster import Cluster
from tasks.cluster.parcel import Cache
from tasks.corpus.sources import ENDPOINTS
from tasks.errors import SettingsError
from tasks.machine import Machine, Nodes, Progress, TrainingSettings, quiet
from tasks.store import ArtifactStore, SharedStore, cache_folder, is_url
from tasks.training.deepspeed import load_deepspeed_config
from tasks.training.monitors import check_monitors
from tasks.training.nodes.nodes import parse_nodes
from tasks.training.plan import num_cores

ENV_PREFIX = "SEQMILL_"
LOOPBACK = "127.0.0.1"
AUTO = "auto"  # the cheapest preset that fits
LIKE_A_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")  # a slash too few, too: it would make a folder of that name
SECRETS = {"tokens", "rendezvous_secret"}  # from the environment alone, where they are


class Settings(BaseSettings):
    """What concerns this machine and can change no artifact's key."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    store: Path | str = Field(
        Path("~/.cache/seqmill"),
        description="the folder of all artifacts, or a shared store's URL (s3://, gs://, az://, file://)",
    )
    store_endpoint: str | None = Field(None, description="where a shared store's server answers; absent: as the provider has it")
    cache: Path = Field(Path("~/.cache/seqmill-shared"), description="the folder for what is read from shared stores")
    cache_gigabytes: float | None = Field(
        None, gt=0, description="what that cache may take, but for what is in use; the least recently used goes; absent: any"
    )
    num_workers: int | None = Field(None, ge=1, description="corpus workers; absent: one a core")
    pool: Literal["threads", "processes"] | None = Field(
        None, description="what corpus workers are; absent: threads of one process, up to 8 of them, else processes"
    )
    runner: Literal["pool", "ray", "dask"] = Field(
        "pool", description="where groups of the corpus's shards run: this machine's pool, or a Ray or Dask cluster"
    )
    runner_address: str | None = Field(
        None, description="the cluster's address: tcp://host:8786 of a Dask scheduler; absent: of the Ray node that runs here"
    )
    num_ranks: int | None = Field(None, ge=1, description="training ranks; absent: one a GPU, else one a core")
    micro_batch_size: int | None = Field(None, ge=1, description="rows per device per forward; absent: derived")
    threads_per_rank: int = Field(1, ge=1, description="CPU threads a rank")
    training_slots: int = Field(
        1,
        ge=1,
        description="stages that train or evaluate at the same time, where branches allow it, each on its share of the cores",
    )
    stop_seconds: float = Field(
        600,
        ge=0,
        description="from SIGTERM on, for the step under way and its checkpoint, into a bucket too; then the ranks are killed",
    )
    nodes: str | None = Field(
        None, description='machines that train together, or the least and the most of them, such as "2:4"; absent: this one alone'
    )
    node_rank: int = Field(0, ge=0, description="this node's number: 0 leads, the others join it")
    rendezvous: str | None = Field(
        None, description="host:port of node 0, as the other nodes reach it; port 29400 where it has none"
    )
    rendezvous_secret: SecretStr | None = Field(
        None,
        description="what all nodes know and nobody else, from the environment alone; absent: any node may join",
    )
    node_seconds: float = Field(600, ge=0, description="for which nodes wait for each other")
    checkpoints: Path | None = Field(
        None, description="a folder that all nodes mount, for checkpoints; absent: in the store, a folder or a bucket"
    )
    launcher: Literal["torchrun", "deepspeed"] = Field("torchrun", description="what starts the ranks")
    hostfile: Path | None = Field(None, description="DeepSpeed hostfile, for the deepspeed launcher")
    deepspeed: str = Field("zero2", description="a preset of deepspeed_configs/, the path of a DeepSpeed JSON file, or auto")
    monitors: str = Field("", description="what keeps a training run's metrics as it goes: any of jsonl,tensorboard,swanlab")
    huggingface_endpoint: str | None = Field(None, description="where the Hugging Face hub answers; absent: the public one")
    modelscope_endpoint: str | None = Field(None, description="where the ModelScope hub answers; absent: the public one")

    tokens: dict[str, SecretStr] = Field(
        {}, description='by host, what opens it, as JSON: {"host": "token"}; HF_TOKEN is the Hugging Face hub\'s'
    )

    @field_validator("store", mode="before")
    @classmethod
    def _read_store(cls, value: Any) -> Any:
        if isinstance(value, str) and is_url(value):
            parts = urlsplit(value)
            if not (parts.netloc or parts.scheme == "file"):
                raise ValueError(f"names no bucket; write {parts.scheme}://bucket/prefix")
            return value
        if LIKE_A_URL.match(str(value)):
            raise ValueError("is the address of no store; name a folder, or s3://, gs://, az:// or file://")
        return Path(value)

    @property
    def store_root(self) -> Path:
        """The store's folder on this machine; of a shared store, its cache."""
        if isinstance(self.store, str):
            return cache_folder(self.store, self.cache, self.store_endpoint)
        return self.store.expanduser().absolute()

    @property
    def cache_bytes(self) -> int | None:
        """What the cache of shared stores may take."""
        return None if self.cache_gigabytes is None else int(self.cache_gigabytes * 1e9)

    def open_store(self, progress: Progress = quiet) -> ArtifactStore:
        """The store; ``progress`` shows what a shared one transfers."""
        if isinstance(self.store, str):
            return SharedStore(
                self.store, self.cache, endpoint=self.store_endpoint, progress=progress, cache_bytes=self.cache_bytes
            )
        return ArtifactStore(self.store_root)

    @property
    def deepspeed_path(self) -> Path | None:
        """The DeepSpeed JSON file that is meant, None for "auto". Raises SettingsError where there is none."""
        if self.deepspeed == AUTO:
            return None
        presets = Path(deepspeed_configs.__file__).parent
        for path in (presets / f"{self.deepspeed}.json", Path(self.deepspeed).expanduser()):
            if path.is_file():
                return path.absolute()
        names = ", ".join(sorted(path.stem for path in presets.glob("*.json")))
        raise SettingsError(f"deepspeed: no preset and no file {self.deepspeed!r}; presets are {names}, and auto picks one")

    @property
    def monitor_names(self) -> tuple[str, ...]:
        """The monitors that are asked for. Raises SettingsError for one that there is not, or that is not installed."""
        names = tuple(filter(None, (name.strip() for name in self.monitors.split(","))))
        check_monitors(names)
        return names

    def machine(self, progress: Progress = quiet) -> Machine:
        """What the build functions are given of this machine. Raises SettingsError for a DeepSpeed file that cannot be used."""
        load_deepspeed_config(self.deepspeed_path)
        endpoints = {"huggingface": self.huggingface_endpoint, "modelscope": self.modelscope_endpoint}
        return Machine(
            num_workers=self.num_workers or num_cores(),
            pool=self.pool,
            cluster=None if self.runner == "pool" else _cluster(self.runner, self.runner_address),
            endpoints={name: url for name, url in endpoints.items() if url},
            tokens=self._tokens(),
            training=TrainingSettings(
                num_ranks=self.num_ranks,
                deepspeed_config=self.deepspeed_path,
                picks_preset=self.deepspeed == AUTO,
                launcher=self.launcher,
                hostfile=self.hostfile,
                nodes=self._nodes(),
                checkpoints=self.checkpoints.expanduser().absolute() if self.checkpoints else None,
                micro_batch_size=self.micro_batch_size,
                monitors=self.monitor_names,
                threads_per_rank=self.threads_per_rank,
                stop_seconds=self.stop_seconds,
                num_slots=self.training_slots,
            ),
            progress=progress,
        )

    def _nodes(self) -> Nodes | None:
        if self.nodes is None:
            return None
        if self.hostfile:
            raise SettingsError("hostfile: set beside nodes, where each node tells its own ranks; unset one of the two")
        secret = self.rendezvous_secret.get_secret_value() if self.rendezvous_secret else ""
        return parse_nodes(self.nodes, self.rendezvous, self.node_seconds, secret)

    def _tokens(self) -> dict[str, str]:
        hub = urlsplit(self.huggingface_endpoint or ENDPOINTS["huggingface"]).hostname
        known = {hub: os.environ["HF_TOKEN"]} if hub and os.environ.get("HF_TOKEN") else {}
        return known | {host: token.get_secret_value() for host, token in self.tokens.items()}


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by what is given and not None. Raises SettingsError."""
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except pydantic_settings.SettingsError as error:  # SEQMILL_TOKENS that is no JSON: it is not repeated
        raise SettingsError(f"settings: {error}; see seqmill settings") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SettingsError(
            f"settings: {where}: {first['msg'].lower()}, found {first['input']!r}; see seqmill settings"
        ) from None
    found = next(path for path in (settings.store_root, *settings.store_root.parents) if path.exists())
    if not found.is_dir():
        raise SettingsError(f"settings: store: {found} is a file; name a folder with --store")
    return settings


def cache_here() -> Cache:
    """Where this machine, which may be a cluster's worker, keeps what it reads of shared stores, and how much of it."""
    settings = load_settings()
    return Cache(settings.cache, settings.cache_bytes)


@lru_cache(maxsize=1)
def _cluster(kind: Literal["ray", "dask"], address: str | None) -> Cluster:
    """One connection a process, which knows how long items took."""
    return Cluster(kind, address, cache_here)


def export_settings(settings: Settings) -> None:
    """Put settings into the environment, where flows and what they start read them."""
    for name, value in settings.model_dump(exclude=SECRETS).items():
        if value is not None:
            os.environ[ENV_PREFIX + name.upper()] = str(_from_anywhere(value))
    if settings.deepspeed != AUTO:
        os.environ[f"{ENV_PREFIX}DEEPSPEED"] = str(settings.deepspeed_path)


def _from_anywhere(value: Any) -> Any:
    """A path that means the same in another working folder: runs of a worker work in the clone."""
    return value.expanduser().absolute() if isinstance(value, Path) else value


def prefect_environment(settings: Settings, api_url: str | None, verbose: bool) -> dict[str, str]:
    """The environment that Prefect is imported under: its home in the store, its console quiet, our loggers heard."""
    environment = {
        "PREFECT_HOME": str(settings.store_root / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks",
        # What a thread of no run says, such as the one that welcomes nodes, is for the console alone, and no warning.
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "NOTSET" if verbose else "CRITICAL",
        "DO_NOT_TRACK": "1",
        **({"PREFECT_API_URL": api_url} if api_url else {}),
    }
    if api_url:  # a page of another origin, open in the user's browser, is not to start runs on loopback
        port = urlsplit(api_url).port
        environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = f"http://{LOOPBACK}:{port},http://localhost:{port}"
    environment = {name: value for name, value in environment.items() if name not in os.environ}
    return {**environment, **(_past_the_proxy() if api_url else {})}


def _past_the_proxy() -> dict[str, str]:
    """Our own server is on loopback: a proxy that the environment names cannot reach it."""
    return {name: ",".join(filter(None, [os.environ.get(name), LOOPBACK])) for name in ("NO_PROXY", "no_proxy")}


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for this process and what it starts, until the end of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def prefect_api_url() -> str | None:
    """The Prefect server that the user has chosen, if any."""
    return os.environ.get("PREFECT_API_URL") or None


def is_started_by_worker() -> bool:
    """Whether a Prefect worker started this process for one flow run."""
    return "PREFECT__FLOW_RUN_ID" in os.environ


def inherited_environment() -> dict[str, str]:
    """A copy of this process's environment, for a process to be started."""
    return dict(os.environ)


def free_bytes(folder: Path) -> int:
    """Bytes free on the file system that holds, or would hold, ``folder``."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
