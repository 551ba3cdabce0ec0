"""What is timed when a model speaks; how long it takes is nobody's business here."""

import pytest

from tasks.training.generate import LanguageModel, load_language_model
from tasks.training.speed import NUM_TOKENS, NUM_TRIES, PROMPT_TOKENS, decoding_speed
from tests.training.tiny import save_tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_tiny_model(tmp_path_factory.mktemp("model")))


def limited(loaded: LanguageModel, max_positions: int) -> LanguageModel:
    return LanguageModel(loaded.model, loaded.tokenizer, loaded.stop_ids, max_positions)


def test_every_try_speaks_as_many_tokens_whatever_they_are(loaded: LanguageModel) -> None:
    widths: list[int] = []
    handle = loaded.model.register_forward_pre_hook(
        lambda module, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    told = decoding_speed(loaded)
    handle.remove()
    assert set(told) == {"seconds_to_first_token", "tokens_per_second"}
    assert widths == [PROMPT_TOKENS, 1] + [PROMPT_TOKENS, *[1] * NUM_TOKENS] * NUM_TRIES


def test_no_more_is_spoken_than_there_are_positions(loaded: LanguageModel) -> None:
    assert decoding_speed(limited(loaded, PROMPT_TOKENS + 2))["tokens_per_second"] > 0
    assert decoding_speed(limited(loaded, PROMPT_TOKENS)) == {}
