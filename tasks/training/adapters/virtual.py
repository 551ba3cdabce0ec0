"""Virtual tokens: rows without company for training, and a model that puts them in front of every row.

What is packed into one row cannot share virtual tokens: PEFT puts them in front of the row, whose first example alone sees them.

Shapes: B rows of a batch, T positions, N virtual tokens.
"""

from typing import Any

import torch
from torch import nn

from tasks.schemas import IGNORED_LABEL

Batch = dict[str, torch.Tensor]


def one_example_a_row(batch: Batch) -> Batch:
    """The examples packed into a batch's rows, one a row, filled up at the right to the longest.

    Without position_ids and mask: positions then count on from the virtual tokens, and what stands right is seen by nothing.
    Padding, and an example without a supervised token, is left out; one row stays, so that every rank has its forward.
    """
    starts = (batch["position_ids"] == 0).nonzero().tolist()
    ends = [*starts[1:], [-1, 0]]
    width = batch["position_ids"].shape[1]
    spans = [(row, start, end if row == of else width) for (row, start), (of, end) in zip(starts, ends, strict=True)]
    labels_BT = batch["labels"]
    taught = [(row, start, end) for row, start, end in spans if (labels_BT[row, start:end] != IGNORED_LABEL).any()]
    taught = taught or spans[:1]
    longest = max(end - start for _, start, end in taught)
    filled = {"input_ids": 0, "labels": IGNORED_LABEL}
    rows = {name: labels_BT.new_full((len(taught), longest), fill) for name, fill in filled.items()}
    for place, (row, start, end) in enumerate(taught):
        for name, table in rows.items():
            table[place, : end - start] = batch[name][row, start:end]
    rows["labels"][:, 0] = IGNORED_LABEL  # nothing stands in front of it that could foretell it
    return rows


class WithVirtualTokens(nn.Module):
    """A model with trained virtual tokens in front of every row; called as the model itself is, it answers as that does."""

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.adapted = adapted
        self.num_virtual_tokens: int = adapted.active_peft_config.num_virtual_tokens
        self.is_prefix = adapted.active_peft_config.peft_type == "PREFIX_TUNING"
        self.config, self.generation_config = adapted.config, adapted.generation_config

    @property
    def device(self) -> torch.device:
        found: torch.device = self.adapted.device
        return found

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """Logits of the rows' own tokens. The cache holds the virtual tokens too, so later calls need not repeat them."""
        (num_rows, width), num_virtual = input_ids.shape, self.num_virtual_tokens
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(num_rows, num_virtual), attention_mask], dim=1)
        if position_ids is not None:
            position_ids = position_ids + num_virtual
        given: dict[str, Any] = {"input_ids": input_ids}
        if past_key_values is None and self.is_prefix:
            past_key_values = self.adapted.get_prompt(num_rows)
        elif past_key_values is None:
            embedded = self.adapted.word_embeddings(input_ids)
            prompt = self.adapted.get_prompt(num_rows).to(embedded.dtype)
            given = {"inputs_embeds": torch.cat([prompt, embedded], dim=1)}
            if position_ids is not None:
                first = torch.arange(num_virtual, device=position_ids.device).expand(num_rows, -1)
                position_ids = torch.cat([first, position_ids], dim=1)
        places = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        told = self.adapted.get_base_model()(**given, **places, **options)
        told.logits = told.logits[:, -width:]
        return told


def positions_left(model: Any) -> int | None:
    """The positions that a model has for text: all but those of its virtual tokens; None where its config sets no limit."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None else positions - getattr(model, "num_virtual_tokens", 0)


def as_called(adapted: Any) -> Any:
    """A loaded PEFT model as a caller of the base expects it."""
    return WithVirtualTokens(adapted) if adapted.active_peft_config.is_prompt_learning else adapted
