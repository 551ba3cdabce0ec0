"""The loss without the logits of a whole batch: a model's head and the cross-entropy over it, a chunk of tokens at a time.

A row of 2,048 ids over a vocabulary of 151,936 has 1.2 GB of logits in fp32, and training holds them three times. Here a
chunk of them lives at a time, and the head's gradients are made on the way (docs/decisions/0013).

Shapes: B rows of a batch, T block_size, N supervised tokens, H hidden, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from tasks.errors import RecipeError, SettingsError
from tasks.schemas import IGNORED_LABEL
from tasks.training.memory import CHUNK_LOGITS

LOSS_POSITIONS = 512  # at once through the softmax, which takes the memory of the logits twice more

SummedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden (N, H), weight (V, H), labels (N,)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of ``hidden @ weight.T``, in fp32; gradients are made in the forward pass, logits not kept."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        hidden_grad = torch.empty_like(hidden_NH) if wants_hidden else None
        # fp32, since a sum of many chunks in bf16 would lose the small ones.
        weight_grad = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        for part in chunks(len(labels_N), len(weight_VH)):
            log_probs = _log_probs(hidden_NH[part], weight_VH)
            loss -= log_probs.gather(1, labels_N[part, None]).sum()
            # d loss / d logits is the softmax, less one at the label.
            grad = log_probs.exp_().scatter_add_(1, labels_N[part, None], log_probs.new_full((len(log_probs), 1), -1.0))
            grad = grad.to(weight_VH.dtype)
            if hidden_grad is not None:
                torch.mm(grad, weight_VH, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad += grad.T @ hidden_NH[part]
        ctx.grads = hidden_grad, None if weight_grad is None else weight_grad.to(weight_VH.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return (*(None if grad is None else grad.mul_(outer[0]) for grad in grads), None)


def chunked(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """The summed cross-entropy, a chunk of tokens at a time."""
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(hidden_NH, weight_VH, labels_N)
    loss = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
    for part in chunks(len(labels_N), len(weight_VH)):
        loss -= _log_probs(hidden_NH[part], weight_VH).gather(1, labels_N[part, None]).sum()
    return loss


def liger(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """The same by Liger's kernel, for GPUs."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise SettingsError(
            f"loss: liger cannot be imported ({error}); pip install liger-kernel on a machine with GPUs"
        ) from error
    if not hidden_NH.is_cuda:
        raise SettingsError("loss: liger needs a GPU, the model is on CPU; set loss: chunked in the recipe")
    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VH, hidden_NH, labels_N)
    return loss


FUNCTIONS: dict[str, SummedLoss] = {"chunked": chunked, "liger": liger}


def chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    """Which tokens are taken at once."""
    size = max(1, CHUNK_LOGITS // vocab_size)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _log_probs(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
    return torch.log_softmax((hidden_NH @ weight_VH.T).float(), dim=1)


class HeadLoss:
    """Stands in a model's forward: where there are labels, its head returns the summed loss in place of logits.

    It works inside the head's own call, where ZeRO-3 has gathered the head's weight.
    """

    def __init__(self, model: Any, head: nn.Linear, summed: SummedLoss, where: str) -> None:
        self.head, self.summed, self.where = head, summed, where
        self.model_forward, self.head_forward = model.forward, head.forward
        self.labels_BT: Tensor | None = None
        self.loss: Tensor | None = None
        self.is_checked = False
        # With the signature of the model's own, which Trainer reads.
        model.forward = functools.wraps(model.forward)(functools.partial(self._forward_model))
        head.forward = self._forward_head
        model.loss_function = self._mean

    def _forward_model(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        self.labels_BT = labels
        try:
            return self.model_forward(*args, labels=labels, **kwargs)
        finally:
            self.labels_BT = self.loss = None

    def _forward_head(self, hidden_BTH: Tensor) -> Tensor:
        if self.labels_BT is None:
            logits: Tensor = self.head_forward(hidden_BTH)
            return logits
        following_BT = pad(self.labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
        is_learned_BT = following_BT != IGNORED_LABEL
        loss = self.summed(hidden_BTH[is_learned_BT], self.head.weight, following_BT[is_learned_BT])
        self.loss = loss.detach()
        return loss

    def _mean(self, logits: Tensor, labels: Tensor, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Tensor:
        """What the model calls as its loss function; ``logits`` is what the head has returned."""
        if not self.is_checked:
            self._check(logits)
        return logits / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != IGNORED_LABEL).sum())

    def _check(self, logits: Tensor) -> None:
        """Raise RecipeError for a model that scales or caps its logits: here that would be done to the loss."""
        if self.loss is None or not torch.allclose(logits.detach(), self.loss, rtol=0, atol=0, equal_nan=True):
            raise RecipeError(f"{self.where}.loss: the model changes its logits behind its head; set {self.where}.loss: plain")
        # Nought is nought however it is scaled; what is no number is for the watch over the loss to find.
        self.is_checked = bool(self.loss) and bool(self.loss.isfinite())


def add_head_loss(model: Any, name: str, where: str) -> None:
    """Let ``model`` make its loss as ``name`` says: plain, chunked or liger.

    A head with a bias, and one that an adapter changes, keep the plain way.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    if name != "plain" and type(head) is nn.Linear and head.bias is None:
        model.head_loss = HeadLoss(inner, head, FUNCTIONS[name], where)


def summed_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The summed loss of a batch in nats, and over how many tokens: float64 (2,)."""
    labels_BT = batch["labels"][:, 1:]
    count = (labels_BT != IGNORED_LABEL).sum().double()
    if hasattr(model, "head_loss"):
        return torch.stack([model(**batch, use_cache=False, num_items_in_batch=1).loss.double(), count])
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    # Virtual tokens, whose logits stand in front of the row's own, foretell nothing.
    logits_BTV = model(**inputs, use_cache=False).logits[:, -labels_BT.shape[1] - 1 : -1]
    loss = labels_BT.new_zeros((), dtype=torch.float64)
    for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True):
        loss += row_loss(logits_TV, labels_T)
    return torch.stack([loss, count])


def row_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over a row: float64, a scalar."""
    loss = labels_T.new_zeros((), dtype=torch.float64)
    for logits, labels in zip(logits_TV.split(LOSS_POSITIONS), labels_T.split(LOSS_POSITIONS), strict=True):
        loss += cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return loss
