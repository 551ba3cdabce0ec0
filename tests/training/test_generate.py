"""Streaming, sampling and batched answers, on fakes and on a tiny model with random weights."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tasks.errors import CorpusError, RecipeError
from tasks.training.generate import (
    LanguageModel,
    batches_by_length,
    choose,
    continue_text,
    generate,
    greedy_answers,
    load_language_model,
    sample_ids,
    whole_characters,
)
from tests.training.tiny import CHATML, END_ID, NUM_POSITIONS, save_tiny_adapter, save_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LanguageModel:
    return load_language_model(model_dir)


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def decode_words(ids: Sequence[int]) -> str:
    """As a SentencePiece decoder: every token carries the space before it, and the first space is dropped."""
    return "".join([" a", " b", " c"][token] for token in ids)[1:]


class Counting:
    """A fake model: behind any token t it says t + 1."""

    def __init__(self) -> None:
        self.device = "cpu"

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.nn.functional.one_hot((input_ids[:, -1:] + 1) % 10, 10).float()
        return SimpleNamespace(logits=logits, past_key_values=None)


def counting(stop_id: int) -> LanguageModel:
    return LanguageModel(Counting(), tokenizer=None, stop_ids=frozenset({stop_id}), max_positions=None)


def test_pieces_never_end_inside_a_character() -> None:
    assert list(whole_characters("你a好".encode(), decode_bytes)) == ["你", "a", "好"]


def test_half_a_character_at_the_end_is_left_out() -> None:
    assert list(whole_characters("好你".encode()[:-1], decode_bytes)) == ["好"]


def test_bytes_that_are_no_character_do_not_hold_back_what_follows() -> None:
    assert "".join(whole_characters(b"\xffab", decode_bytes)) == "\ufffdab"


def test_a_space_in_front_of_a_later_token_is_kept() -> None:
    assert list(whole_characters([0, 1, 2], decode_words)) == ["a", " b", " c"]


def test_a_stop_id_ends_the_text_and_is_not_told() -> None:
    assert list(sample_ids(counting(stop_id=6), [3], 10, lambda logits: int(logits.argmax()))) == [4, 5]


def test_a_text_ends_at_max_new_tokens() -> None:
    assert list(sample_ids(counting(stop_id=0), [3], 2, lambda logits: int(logits.argmax()))) == [4, 5]


def test_each_row_of_a_batch_stops_by_itself() -> None:
    assert greedy_answers(counting(stop_id=8), [[1, 2], [6], [1, 1, 5], [7]], 4, batch_size=4) == [[3, 4, 5, 6], [7], [6, 7], []]


def test_batches_hold_prompts_of_like_length_and_advance_counts_them() -> None:
    assert list(batches_by_length([5, 1, 3, 1], batch_size=2)) == [[1, 3], [2, 0]]
    told: list[int] = []
    greedy_answers(counting(stop_id=0), [[1], [1], [1]], 1, batch_size=2, advance=told.append)
    assert told == [2, 1]


def test_long_prompts_make_smaller_batches() -> None:
    assert list(batches_by_length([20_000, 20_000, 10], batch_size=64)) == [[2], [0], [1]]


def test_temperature_0_takes_the_likeliest() -> None:
    assert choose(torch.tensor([0.1, 3.0, 2.9]), 0, 1.0, torch.Generator()) == 1


@pytest.mark.parametrize("temperature", [1e-9, 1e-44, 1e-300])
def test_next_to_no_temperature_is_none(temperature: float) -> None:
    assert choose(torch.tensor([0.5, 90.0, 2.0]), temperature, 1.0, torch.Generator()) == 1


def test_top_p_never_draws_outside_the_likeliest_mass() -> None:
    dice = torch.Generator().manual_seed(0)
    drawn = {choose(torch.tensor([0.6, 0.3, 0.1]).log(), 1.0, 0.7, dice) for _ in range(200)}
    assert drawn == {0, 1}


def test_batched_answers_equal_answers_one_by_one(loaded: LanguageModel) -> None:
    dice = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 256, (length,), generator=dice).tolist() for length in (1, 17, 5, 17, 40)]
    alone = [greedy_answers(loaded, [prompt], 6, batch_size=1)[0] for prompt in prompts]
    assert greedy_answers(loaded, prompts, 6, batch_size=3) == alone
    assert greedy_answers(loaded, prompts, 6, batch_size=64) == alone
    streamed = [list(sample_ids(loaded, prompt, 6, lambda logits: int(logits.argmax()))) for prompt in prompts]
    assert streamed == alone
    assert any(len(answer) == 6 for answer in alone)


def test_answers_equal_those_of_transformers_generate(loaded: LanguageModel) -> None:
    prompt = [5, 9, 120, 33]
    expected = loaded.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=END_ID)
    answer = greedy_answers(loaded, [prompt], 12, batch_size=1)[0]
    assert [token for token in expected[0, len(prompt) :].tolist() if token not in loaded.stop_ids] == answer


def test_the_same_seed_gives_the_same_text_and_another_seed_another(loaded: LanguageModel) -> None:
    texts = ["".join(continue_text(loaded, "你好", max_new_tokens=20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_begins_a_document(loaded: LanguageModel) -> None:
    assert loaded.encode("", chat=False) == [END_ID]


def test_chat_wraps_the_prompt_as_a_user_turn(loaded: LanguageModel) -> None:
    ids = loaded.encode("hi", chat=True)
    assert loaded.decode(ids, special=True) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_generate_from_a_folder_is_what_the_loaded_model_says(model_dir: Path, loaded: LanguageModel) -> None:
    assert "".join(generate(model_dir, "ab", max_new_tokens=8)) == "".join(continue_text(loaded, "ab", max_new_tokens=8))


def test_generate_with_an_adapter_says_something_else(model_dir: Path, tmp_path: Path) -> None:
    adapter_dir = save_tiny_adapter(model_dir, tmp_path)
    with_adapter = "".join(generate(model_dir, "ab", adapter_dir=adapter_dir, max_new_tokens=16))
    assert with_adapter != "".join(generate(model_dir, "ab", max_new_tokens=16))


def test_text_ends_where_the_models_positions_end(loaded: LanguageModel) -> None:
    prompt = "a" * (NUM_POSITIONS - 1)
    assert len("".join(continue_text(loaded, prompt, max_new_tokens=9))) <= 1


def test_a_prompt_longer_than_the_models_positions_is_refused(loaded: LanguageModel) -> None:
    with pytest.raises(RecipeError, match=f"{NUM_POSITIONS} tokens, the model has {NUM_POSITIONS} positions"):
        continue_text(loaded, "a" * NUM_POSITIONS, max_new_tokens=1)


def test_text_is_tokenized_as_tokenizer_json_says_whatever_the_model_type_is_known_for(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")  # of type qwen2, of which Transformers has rules of its own
    tokenizer = sentence_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_language_model(folder)
    text = "问题 one\n12 好"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert loaded.tokenizer.encode(text, add_special_tokens=False) == ids
    assert loaded.decode(ids) == text


def sentence_tokenizer() -> Tokenizer:
    """Blanks are written as a sign of their own, as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(["问题 one\n12 好"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    return tokenizer


def test_what_closes_an_answer_in_the_chat_template_ends_a_text(tmp_path: Path) -> None:
    plain = load_language_model(save_tiny_model(tmp_path / "plain", chat_template="{{ messages[0]['content'] }}"))
    template = CHATML.replace("<|im_end|>", "<|im_start|>")  # any special token that is not known as an end otherwise
    closing = load_language_model(save_tiny_model(tmp_path / "closing", chat_template=template))
    assert closing.stop_ids - plain.stop_ids == {257}


def test_a_template_that_refuses_a_plain_conversation_adds_no_end(tmp_path: Path) -> None:
    loaded = load_language_model(save_tiny_model(tmp_path, chat_template="{{ raise_exception('no') }}"))
    assert loaded.stop_ids == {END_ID, 258}


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    plain = load_language_model(save_tiny_model(tmp_path, chat_template=None))
    with pytest.raises(RecipeError, match="no chat template"):
        continue_text(plain, "hi", max_new_tokens=1, chat=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -1.0}, "temperature: -1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_p": 0.0}, "top_p: 0"),
        ({"seed": 1 << 64}, "seed: 18446744073709551616"),
    ],
)
def test_a_number_that_cannot_be_used_is_refused(loaded: LanguageModel, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        continue_text(loaded, "a", **{"max_new_tokens": 1, **changed})


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="not a model that can be loaded") as caught:
        load_language_model(tmp_path)
    assert "\n" not in str(caught.value)
