"""How fast a model speaks: tokens a second behind a short prompt, one row, as a person would read it.

This module imports torch: import it where it is used.
"""

import time
from statistics import median
from typing import Any

import torch

from tasks.training.generate import Decoding, LanguageModel

PROMPT_TOKENS = 16
NUM_TOKENS = 32  # of a try: 16 s of a model of 1.5 billion parameters on two cores
NUM_TRIES = 3  # the median of them: one may meet a busy neighbor


def decoding_speed(loaded: LanguageModel) -> dict[str, Any]:
    """Seconds to the first token and tokens a second after it; nothing where the positions leave no room.

    The tokens are what they are: nothing stops at an end marker.
    """
    room = PROMPT_TOKENS + NUM_TOKENS if loaded.max_positions is None else loaded.max_positions
    num_tokens = min(NUM_TOKENS, room - PROMPT_TOKENS)
    if num_tokens < 1:
        return {}
    prompt = (loaded.encode("", chat=False) * PROMPT_TOKENS)[:PROMPT_TOKENS]
    _one_try(loaded, prompt, 1)  # what is loaded and compiled at the first call
    tries = [_one_try(loaded, prompt, num_tokens) for _ in range(NUM_TRIES)]
    first, rest = (median(values) for values in zip(*tries, strict=True))
    return {"seconds_to_first_token": round(first, 4), "tokens_per_second": round(num_tokens / rest, 1)}


def _one_try(loaded: LanguageModel, prompt: list[int], num_tokens: int) -> tuple[float, float]:
    decoding = Decoding(loaded.model, [prompt])
    started = time.perf_counter()
    chosen = int(decoding.logits().argmax())
    first = time.perf_counter()
    for _ in range(num_tokens):
        decoding.append(torch.tensor([chosen]))
        chosen = int(decoding.logits().argmax())  # asks the device for the number, and so waits for it
    return first - started, time.perf_counter() - first
