"""Measures a report, as a recipe's run left it: `python -m benchmarks.report STORE [report/KEY]`."""

from collections.abc import Mapping
from typing import Any

from benchmarks.measure import measure
from benchmarks.rebuild import Rebuild, read_rebuild
from tasks.report.report import ReportSpec, build_report


def run(told: Rebuild) -> Mapping[str, Any]:
    report = told.build(build_report, ReportSpec)
    return {"bytes": report.num_bytes, "num_plots": report.stats["num_plots"]}


if __name__ == "__main__":
    with read_rebuild(__doc__, "report") as told:
        measure("report", lambda: run(told))
