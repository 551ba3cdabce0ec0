"""A conversation with a loaded model: turns are remembered, answers come piece by piece.

Reads   a Hugging Face model folder, a PEFT folder: through ``tasks.training.generate``
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tasks.errors import RecipeError
from tasks.training.generate import LanguageModel, Turn, continue_ids


class Talk:
    """What was said so far, with one model."""

    def __init__(self, loaded: LanguageModel, system: str | None = None) -> None:
        self.loaded = loaded
        self.opening: list[Turn] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Turn] = []
        self.num_forgotten = 0  # turns that the model's positions have no room for any more

    def ask(self, text: str, **sampling: Any) -> Iterator[str]:
        """Say ``text`` and hear the answer; both are remembered once the answer has begun, however far it was heard.

        sampling: as ``continue_ids`` takes it. Raises RecipeError where the text alone is too long.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        prompt_ids, kept = fitted(self.loaded, self.opening, asked, sampling["max_new_tokens"])
        self.num_forgotten += len(asked) - len(kept)
        pieces: list[str] = []
        try:
            for piece in continue_ids(self.loaded, prompt_ids, **sampling):
                pieces.append(piece)
                yield piece
        finally:
            self.turns = [*kept, {"role": "assistant", "content": "".join(pieces)}]

    def reset(self) -> None:
        """Forget all that was said."""
        self.turns, self.num_forgotten = [], 0


def fitted(
    loaded: LanguageModel, opening: Sequence[Turn], turns: Sequence[Turn], max_new_tokens: int
) -> tuple[list[int], list[Turn]]:
    """The ids of the conversation, and the turns that they hold: the earliest questions are left out, each with its answer,
    until an answer of ``max_new_tokens`` has room.

    Raises RecipeError where not even the last question has any.
    """
    kept = list(turns)
    while True:
        ids = loaded.encode_turns([*opening, *kept])
        if loaded.max_positions is None or len(ids) + max_new_tokens <= loaded.max_positions:
            return ids, kept
        if len(kept) <= 2:  # the last question, and behind it what of an answer is given
            if len(ids) < loaded.max_positions:
                return ids, kept
            raise RecipeError(f"chat: {len(ids)} tokens, the model has {loaded.max_positions} positions; say it in fewer words")
        kept = kept[2:]
