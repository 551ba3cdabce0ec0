"""Use a model in the store: which folders its reference means."""

from collections.abc import Iterator
from typing import Any

from tasks.errors import StoreError
from tasks.store import Artifact, ArtifactStore
from tasks.training.adapter import adapted_folders
from tasks.training.generate import generate


def generate_text(store: ArtifactStore, artifact: Artifact, prompt: str, chat: bool | None, **sampling: Any) -> Iterator[str]:
    """The model's text after ``prompt``, piece by piece. ``chat`` None: through the chat template unless only pretrained.

    ``sampling``: max_new_tokens, temperature, top_p, seed.
    Raises StoreError where the artifact is not a model, or an adapter's base is no longer in the store.
    """
    model_dir, adapter_dir = artifact.path, None
    if artifact.kind == "adapter":
        model_dir, adapter_dir = adapted_folders(base_of(store, artifact), artifact)
    elif artifact.kind not in {"pretrained", "finetuned"}:
        raise StoreError(f"{artifact.ref}: a {artifact.kind} is no model; name a pretrained, finetuned or adapter artifact")
    return generate(
        model_dir,
        prompt,
        adapter_dir=adapter_dir,
        **sampling,
        chat=artifact.kind != "pretrained" if chat is None else chat,
    )


def base_of(store: ArtifactStore, adapter: Artifact) -> Artifact:
    """The model that an adapter was trained on, by content."""
    content = adapter.manifest.identity["inputs"]["base"]
    for kind in ("finetuned", "pretrained"):
        for artifact in store.artifacts(kind):
            if artifact.content == content:
                return artifact
    raise StoreError(f"{adapter.ref}: its base (content {content[:12]}) is not in the store; run its recipe again")
