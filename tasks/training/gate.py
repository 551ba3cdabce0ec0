"""An evaluation against the bounds that a recipe states: it passes, or everything that stands on the model is not made.

Reads   evaluation   stats: the figures of the model
        parent       stats of the evaluation of the model it was made from, optional
Writes  gate.json    [{"figure", "found", "bound", "parent"}...]

A gate is an artifact of its own, so that another bound measures nothing anew; and the figures of a model that misses its
gate are kept, in its evaluation.
"""

from collections.abc import Iterator
from typing import Any, Self

import orjson
from pydantic import Field, model_validator

from tasks.errors import GateError, RecipeError
from tasks.store import Artifact, Built, Spec, Work, stage

# Lower is better of these; higher of the shares, and of most that the harness counts, which is named harness.<task>.<metric>.
LOSSES = ("validation_loss", "validation_bits_per_byte", "held_out_loss", "examples_loss")
SHARES = ("held_out_accuracy", "label_accuracy")
HARNESS = "harness."
# Lower is better of these metrics, as lm-eval 0.4.13 registers them.
HARNESS_LOSSES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")


class GateSpec(Spec):
    """Bounds on a model's figures, all of which must hold."""

    at_most: dict[str, float] = Field(
        default_factory=dict, description=f"bounds from above: {', '.join(LOSSES)}, {HARNESS}<task>.<metric>"
    )
    at_least: dict[str, float] = Field(
        default_factory=dict, description=f"bounds from below: {', '.join(SHARES)}, {HARNESS}<task>.<metric>"
    )
    worse_than_parent: dict[str, float] = Field(
        default_factory=dict, description="by how much a figure may be worse than that of the model this one was made from"
    )

    @model_validator(mode="after")
    def _figures_exist(self) -> Self:
        if not self.figures:
            raise ValueError("no bound given; state at_most, at_least or worse_than_parent, or leave the gate out")
        for name in sorted(self.figures):
            if name not in (*LOSSES, *SHARES) and not name.startswith(HARNESS):
                raise ValueError(f"{name}: no such figure; there are {', '.join((*LOSSES, *SHARES))}, {HARNESS}<task>.<metric>")
        for name in self.at_most:
            if is_share(name):
                raise ValueError(f"at_most.{name}: higher is better of it; state at_least")
        for name in self.at_least:
            if not is_share(name):
                raise ValueError(f"at_least.{name}: lower is better of it; state at_most")
        return self

    @property
    def figures(self) -> set[str]:
        """The names of all that is bounded."""
        return {*self.at_most, *self.at_least, *self.worse_than_parent}


@stage("gate", revision=1)
def build_gate(work: Work, spec: GateSpec, evaluation: Artifact, parent: Artifact | None = None) -> Built:
    """Compare. Raises GateError with every figure that misses its bound."""
    rows = list(compared(spec, evaluation.stats, parent.stats if parent else {}, evaluation.short))
    if missed := [row for row in rows if not row["holds"]]:
        raise GateError(
            f"{evaluation.short}: {'; '.join(map(told, missed))}: "
            "nothing that stands on this model is made; train it otherwise, or change its gate"
        )
    (work.folder / "gate.json").write_bytes(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
    return Built(stats={"num_bounds": len(rows)})


def compared(spec: GateSpec, figures: dict[str, Any], parents: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """A row a bound."""
    bounds = {**spec.at_most, **spec.at_least}
    for name, bound in sorted(bounds.items()):
        yield row(name, figure(figures, name, where), bound)
    for name, margin in sorted(spec.worse_than_parent.items()):
        before = figure(parents, name, f"{where}, parent")
        bound = before - margin if is_share(name) else before + margin
        yield row(name, figure(figures, name, where), round(bound, 6), before)


def row(name: str, found: float, bound: float, before: float | None = None) -> dict[str, Any]:
    """What was found beside what was asked."""
    holds = found >= bound if is_share(name) else found <= bound
    return {"figure": name, "found": found, "bound": bound, "parent": before, "holds": holds}


def told(missed: dict[str, Any]) -> str:
    """One missed bound, as a person reads it."""
    sign, name = "least" if is_share(missed["figure"]) else "most", missed["figure"]
    parent = "" if missed["parent"] is None else f" (the parent has {missed['parent']:g})"
    return f"{name} is {missed['found']:g}, at {sign} {missed['bound']:g} was asked{parent}"


def is_share(name: str) -> bool:
    """Whether higher is better."""
    if name.startswith(HARNESS):  # <task>.<metric>, or <task>.<metric>.<filter>
        return not set(name.removeprefix(HARNESS).split(".")[1:]).intersection(HARNESS_LOSSES)
    return name in SHARES


def figure(figures: dict[str, Any], name: str, where: str) -> float:
    """A figure by its name. Raises RecipeError where there is none."""
    found = figures.get("harness", {}).get(name.removeprefix(HARNESS)) if name.startswith(HARNESS) else figures.get(name)
    if found is None:
        raise RecipeError(f"{where}: {name} was not measured; evaluate it, or leave it out of the gate")
    return float(found)
