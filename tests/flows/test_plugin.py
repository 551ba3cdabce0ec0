"""A deployment's bare name, as `prefect deployment run` gets it."""

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from flows.plugin import taking_bare_names


@dataclass
class Client:
    """As much of Prefect's client as a name takes to be looked up."""

    names: list[str]

    async def read_deployments(self, deployment_filter: Any) -> list[Any]:
        (asked,) = deployment_filter.name.any_
        return [SimpleNamespace(flow_id=name.split("/")[0], name=name) for name in self.names if name.split("/")[1] == asked]

    async def read_flow(self, flow_id: str) -> Any:
        return SimpleNamespace(name=flow_id)


async def read_whole_name(client: Any, name: str) -> Any:
    return f"looked up {name}"


def read(name: str, *names: str) -> Any:
    return asyncio.run(taking_bare_names(read_whole_name)(Client(list(names)), name))


def test_a_bare_name_is_the_one_deployment_of_that_name() -> None:
    assert read("pretrain-flow", "pretrain-flow/pretrain-flow", "sft-flow/sft-flow").name == "pretrain-flow/pretrain-flow"
    assert read("nightly", "pretrain-flow/nightly").name == "pretrain-flow/nightly"


def test_a_whole_name_is_read_as_prefect_reads_it() -> None:
    assert read("pretrain-flow/nightly", "pretrain-flow/nightly") == "looked up pretrain-flow/nightly"


def test_a_name_that_no_deployment_has_is_refused_as_prefect_refuses_it() -> None:
    assert read("nightly") == "looked up nightly/nightly"


def test_a_name_that_several_have_is_refused_with_their_whole_names() -> None:
    with pytest.raises(ValueError, match="nightly: several deployments have this name: pretrain-flow/nightly, sft-flow/nightly"):
        read("nightly", "pretrain-flow/nightly", "sft-flow/nightly")
