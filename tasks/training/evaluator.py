"""The evaluator process: `python -m tasks.training.evaluator PLAN.json`.

Reads   PLAN.json     an EvaluatorPlan
Writes  result.json   see tasks.training.evaluate
"""

import os
from pathlib import Path
from typing import Any

from tasks.training.evaluation import EvaluatorPlan
from tasks.training.rank import run_rank


def work(plan: dict[str, Any]) -> None:
    """Carry out a plan, on every core."""
    # Read once, when torch loads its threads. By default they spin while they wait, and beside a busy neighbor take the core
    # from the thread they wait for: 128 held-out answers on 2 cores under load took 31 s, so 4.3 s, on 1 thread 7.6 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if plan["spec"]["harness"]:
        # Read once too, when anything imports datasets: what it makes of a task's data is not for the user's cache, nor to be
        # asked of a hub.
        os.environ |= {"HF_DATASETS_CACHE": str(Path(plan["result_path"]).with_name("datasets")), "HF_DATASETS_OFFLINE": "1"}
    from tasks.training.evaluate import evaluate

    evaluate(EvaluatorPlan(**plan))


if __name__ == "__main__":
    run_rank(work)
