"""lm-eval over a loaded model, in the evaluator process.

Reads   a folder of task files and their data
"""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.errors import RecipeError, SettingsError
from tasks.training.generate import LanguageModel
from tasks.training.harness import figures_of

# Rows of a forward; the harness sorts its questions by length.
BATCH_ROWS = 16
NO_BOOTSTRAP = 0  # seconds, for an interval that nobody reads


def run_harness(loaded: LanguageModel, harness: dict[str, Any], seed: int) -> dict[str, Any]:
    """{"figures": {"<task>.<metric>": value}, "version": of lm-eval}.

    The working folder becomes the tasks' folder, so that their files may name data beside them.
    Raises SettingsError where lm-eval is not installed, RecipeError for a task that the folder has not.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SettingsError(f"evaluation.harness: lm-eval cannot be imported ({error}); install seqmill[eval]") from error
    os.chdir(Path(harness["folder"]).expanduser())
    manager = TaskManager(include_path=".", include_defaults=False)
    if missing := sorted(set(harness["tasks"]) - set(manager.all_tasks)):
        known = ", ".join(sorted(manager.all_tasks)) or "none"
        raise RecipeError(f"evaluation.harness.tasks: no {', '.join(missing)} in {harness['folder']}; it has {known}")
    results = simple_evaluate(
        HFLM(as_pretrained(loaded.model), tokenizer=loaded.tokenizer, batch_size=BATCH_ROWS, max_length=loaded.max_positions),
        tasks=list(harness["tasks"]),
        num_fewshot=harness["num_fewshot"],
        limit=harness["limit"],
        apply_chat_template=harness["chat"],
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=NO_BOOTSTRAP,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert results
    return {"figures": figures_of(results["results"]), "version": version("lm-eval")}


def as_pretrained(model: Any) -> Any:
    """The model with what the harness calls besides it; one with virtual tokens is a module of ours around PEFT's."""
    if not hasattr(model, "tie_weights"):
        model.tie_weights = lambda: None
        model.generate = model.adapted.generate
    return model
