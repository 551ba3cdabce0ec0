"""Use a model in the store: which folders its reference means, and what is loaded of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import RefError, StoreError
from tasks.store import Artifact, ArtifactStore

if TYPE_CHECKING:
    from tasks.training.generate import LanguageModel

MODELS = ("finetuned", "pretrained", "published")


def generate_text(store: ArtifactStore, artifact: Artifact, prompt: str, chat: bool | None, **sampling: Any) -> Iterator[str]:
    """The model's text after ``prompt``, piece by piece.

    ``chat`` None: through the chat template where there is one, unless the model was only pretrained.
    ``sampling``: max_new_tokens, temperature, top_p, seed.
    Raises RefError where the artifact is no model, StoreError where an adapter's base is no longer in the store.
    """
    from tasks.training.generate import generate

    model_dir, adapter_dir = folders_of(store, artifact)
    is_chat = False if chat is None and artifact.kind == "pretrained" else chat
    return generate(model_dir, prompt, adapter_dir=adapter_dir, **sampling, chat=is_chat)


def load(store: ArtifactStore, artifact: Artifact) -> "LanguageModel":
    """The model, ready to be asked. Raises as ``generate_text`` does."""
    from tasks.training.generate import load_language_model

    return load_language_model(*folders_of(store, artifact))


def folders_of(store: ArtifactStore, artifact: Artifact) -> tuple[Path, Path | None]:
    """The model folder that a model consists of, and the PEFT folder on it; as long as this process lives, none is collected.

    Raises StoreError where they are not whole.
    """
    from tasks.training.adapter import adapted_folders

    if artifact.kind == "adapter":
        return adapted_folders(_in_use(store, base_of(store, artifact)), _in_use(store, artifact))
    if artifact.kind not in MODELS:
        raise RefError(f"{artifact.short}: not a model; name an artifact of kind {', '.join(MODELS)} or adapter")
    return _in_use(store, artifact).path, None


def _in_use(store: ArtifactStore, artifact: Artifact) -> Artifact:
    """The artifact as a find gives it, which takes this process's lease: `seqmill gc` leaves what was found since."""
    found = store.find(artifact.kind, artifact.key)
    if found is None:
        raise StoreError(
            f"{artifact.short}: damaged, or collected just now; `seqmill verify {artifact.kind}` tells, a run rebuilds it"
        )
    return found


def base_of(store: ArtifactStore, adapter: Artifact) -> Artifact:
    """The model that an adapter was trained on, by content."""
    content = adapter.manifest.identity["inputs"]["base"]
    for kind in MODELS:
        for artifact in store.artifacts(kind):
            if artifact.content == content:
                return artifact
    raise StoreError(f"{adapter.short}: its base (content {content[:12]}) is not in the store; run its recipe again")
