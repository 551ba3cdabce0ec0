from pathlib import Path

import orjson

from tasks.corpus.support import DIGESTS, build_support_messages
from tasks.store import digest_file


def rows(path: Path) -> list[dict[str, str]]:
    messages = [orjson.loads(line)["messages"] for line in path.read_bytes().splitlines()]
    return [{"question": said[0]["content"], "answer": said[1]["content"]} for said in messages]


def test_messages_to_ask_share_no_sentence_with_those_to_learn_from_and_every_department_has_as_many(tmp_path: Path) -> None:
    built = build_support_messages(tmp_path)
    learned, asked = rows(built.conversations), rows(built.held_out)
    assert (len(learned), len(asked)) == (200, 40)
    assert len({row["question"] for row in (*learned, *asked)}) == 240
    departments = {"billing", "shipping", "returns", "technical", "account"}
    for part, share in ((learned, 40), (asked, 8)):
        assert {name: sum(row["answer"] == name for row in part) for name in departments} == dict.fromkeys(departments, share)
    assert "Answer with one word: billing, shipping, returns, technical, account." in asked[0]["question"]


def test_they_are_the_same_bytes_every_time_and_those_that_the_recipe_states(tmp_path: Path) -> None:
    from flows.recipe import load_recipe

    built = build_support_messages(tmp_path)
    recipe = load_recipe("adapt-smollm2")
    assert recipe.conversations
    assert recipe.held_out
    assert digest_file(built.conversations) == recipe.conversations.sha256 == DIGESTS["conversations.jsonl"]
    assert digest_file(built.held_out) == recipe.held_out.sha256 == DIGESTS["held-out.jsonl"]
