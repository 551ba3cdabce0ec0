"""A connection to the engine that the settings name; its package is imported here and nowhere else."""

from typing import Literal

from tasks.cluster.engine import Engine
from tasks.errors import SettingsError


def connect(kind: Literal["ray", "dask"], address: str | None) -> Engine:
    """A connection. Raises SettingsError where the engine is not installed, or nobody answers at ``address``."""
    try:
        if kind == "dask":
            from tasks.cluster.on_dask import DaskEngine

            return DaskEngine(address)
        from tasks.cluster.on_ray import RayEngine

        return RayEngine(address)
    except ImportError as error:
        raise SettingsError(f"runner: {kind} is not installed ({error}); pip install 'seqmill[{kind}]'") from error
