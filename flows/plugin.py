"""What Prefect loads as it starts: `prefect deployment run NAME` goes without the flow's name where one deployment has it.

Prefect asks for <flow>/<deployment>. It loads this module by the entry point "prefect.plugins" where its setting
PREFECT_PLUGINS_ENABLED is on, which `seqmill up` puts into the profile.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from prefect.plugins import register_hook

ReadByName = Callable[[Any, str], Awaitable[Any]]


@register_hook
def setup_environment(*, ctx: Any) -> None:
    """Prefect's hook: teach its client to look a bare name up."""
    from prefect.client.orchestration import PrefectClient

    PrefectClient.read_deployment_by_name = taking_bare_names(PrefectClient.read_deployment_by_name)


def taking_bare_names(read: ReadByName) -> ReadByName:
    """``read``, which also takes a deployment's name alone. Raises ValueError where several deployments have that name."""

    async def read_by_name(client: Any, name: str) -> Any:
        if "/" in name:
            return await read(client, name)
        matches = await client.read_deployments(deployment_filter=_named(name))
        if len(matches) > 1:
            flows = [(await client.read_flow(match.flow_id)).name for match in matches]
            raise ValueError(f"{name}: several deployments have this name: {', '.join(f'{flow}/{name}' for flow in flows)}")
        return matches[0] if matches else await read(client, f"{name}/{name}")

    return read_by_name


def _named(name: str) -> Any:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    return DeploymentFilter(name=DeploymentFilterName(any_=[name]))
