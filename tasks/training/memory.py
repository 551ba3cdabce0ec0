"""How much memory a rank takes: weights, gradients, optimizer, activations, logits.

Arithmetic over a model's shape and a DeepSpeed file: what PyTorch keeps for the backward pass, and what DeepSpeed 0.19.8 holds
of the training state. `python -m benchmarks.training_memory` prints it beside what ranks are measured to take.

Letters: P weights, N ranks, H hidden, V vocabulary; "b" is the bytes of a number in the precision of computation.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from tasks.training.adapters.limits import UNSPREAD
from tasks.training.deepspeed import zero_stage
from tasks.training.optimization import OptimizationSpec

# Logits that the chunked loss makes at once: 134 MB in fp32, held up to three times. A constant: it decides the order in
# which numbers are summed.
CHUNK_LOGITS = 1 << 25
FP32 = 4
# Python, torch, Transformers and DeepSpeed on CPU, and what a training run of no size holds besides; measured: 0.57-0.66 GB.
PROCESS_BYTES = 650_000_000
# A CUDA context and NCCL's buffers. Not measured here: makers and users tell of 0.5-1 GB.
CONTEXT_BYTES = 1 << 30
# Of the weights, that an adapter trains: more than the adapters of the recipes have.
ADAPTED_SHARE = 0.01
TWO_MATRIX_MLP = {"gpt2", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "gpt_bigcode", "starcoder2"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Shape:
    """What of a decoder's config decides memory."""

    hidden: int
    num_layers: int
    num_heads: int
    query: int  # width of all queries
    key_value: int  # width of all keys, and of all values
    intermediate: int
    num_mlp_matrices: int
    vocab_size: int
    is_tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], vocab_size: int | None = None) -> Self | None:
        """The shape that a Transformers config spells; None for one that is not understood, or has experts."""

        def number(*names: str) -> int | None:
            return next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)

        hidden, layers = number("hidden_size", "n_embd", "d_model"), number("num_hidden_layers", "n_layer", "num_layers")
        heads = number("num_attention_heads", "n_head", "num_heads")
        vocabulary = number("vocab_size") or vocab_size
        if not (hidden and layers and heads and vocabulary) or any(config.get(name) for name in EXPERTS):
            return None
        head_dim = number("head_dim") or hidden // heads
        return cls(
            hidden=hidden,
            num_layers=layers,
            num_heads=heads,
            query=heads * head_dim,
            key_value=(number("num_key_value_heads") or heads) * head_dim,
            intermediate=number("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
            num_mlp_matrices=2 if config.get("model_type") in TWO_MATRIX_MLP else 3,
            vocab_size=vocabulary,
            is_tied=bool(config.get("tie_word_embeddings", config.get("model_type") == "gpt2")),
        )

    @property
    def num_embedding(self) -> int:
        return self.vocab_size * self.hidden

    @property
    def num_parameters(self) -> int:
        attention = self.hidden * (2 * self.query + 2 * self.key_value)
        mlp = self.num_mlp_matrices * self.hidden * self.intermediate
        return self.num_embedding * (1 if self.is_tied else 2) + self.num_layers * (attention + mlp + 2 * self.hidden)


@dataclass(frozen=True)
class Load:
    """What a rank is asked to train."""

    block_size: int
    num_rows: int  # of a micro batch
    num_ranks: int
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    loss: str = "chunked"
    attention: str = "sdpa"
    trained_share: float = 1.0  # of the weights; of an adapter's about a hundredth
    most_zero_stage: int = 3  # under which it trains
    is_on_gpu: bool = False

    @classmethod
    def of(cls, spec: OptimizationSpec, block_size: int, attention: str) -> Self:
        """Of a spec, an adapter's too; rows and ranks are still to be filled in."""
        method = getattr(spec, "method", "full")
        return cls(
            block_size=block_size,
            num_rows=1,
            num_ranks=1,
            precision=spec.precision,
            gradient_checkpointing=spec.gradient_checkpointing,
            loss=spec.loss,
            attention=attention,
            trained_share=1.0 if method == "full" else ADAPTED_SHARE,
            most_zero_stage=2 if method in UNSPREAD else 3,
        )

    @property
    def num_tokens(self) -> int:
        return self.block_size * self.num_rows

    @property
    def num_bytes(self) -> int:
        """Of a number in the precision of computation."""
        return 2 if self.precision == "bf16" else FP32


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank at its peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int  # DeepSpeed's, and copies that live for a moment
    process: int
    checkpoint: int  # a copy of the training state, in host memory while it is written
    offloaded: int  # of weights and optimizer, in host memory

    @property
    def on_device(self) -> int:
        """Bytes in a GPU's memory."""
        return int(sum(asdict(self).values())) - self.on_host

    @property
    def on_host(self) -> int:
        """Bytes beside a GPU's memory."""
        return self.checkpoint + self.offloaded

    @property
    def total(self) -> int:
        """Bytes of a rank without a GPU."""
        return self.on_device + self.on_host

    def row(self) -> dict[str, int]:
        """For JSON."""
        return {**asdict(self), "total": self.total}


def estimate(shape: Shape, load: Load, deepspeed: dict[str, Any]) -> Estimate:
    """What a rank takes under a DeepSpeed file.

    The training state of P weights over N ranks in bf16: weights 2P, gradients 4P, AdamW's fp32 weights and moments 12P, of
    which a ZeRO stage spreads a part.
    """
    zero, stage, size, ranks = deepspeed.get("zero_optimization", {}), zero_stage(deepspeed), load.num_bytes, load.num_ranks
    every, trained = shape.num_parameters, int(shape.num_parameters * load.trained_share)
    stepped = trained // ranks if stage >= 1 else trained  # by this rank's AdamW
    has_copy = size < FP32 or stage >= 1  # AdamW steps on an fp32 copy
    weights = size * (every // ranks if stage == 3 else every)
    gradients = (FP32 if stage >= 1 else size) * (trained // ranks if stage >= 2 else trained)
    optimizer = FP32 * (3 if has_copy else 2) * stepped
    step = FP32 * stepped if has_copy else 0  # the gradients once more, as AdamW takes them
    offloaded = 0
    if _is_offloaded(zero, "offload_optimizer"):
        offloaded, gradients, optimizer, step = gradients + optimizer + step, 0, 0, 0
    if _is_offloaded(zero, "offload_param"):
        offloaded, weights = offloaded + weights, 0
    activations, logits = activation_bytes(shape, load), logit_bytes(shape, load)
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        # When AdamW steps, activations and logits are gone: what is larger counts.
        buffers=_bucket_bytes(zero, shape, load, trained) + max(step - activations - logits, _gathered_bytes(zero, load, every)),
        process=CONTEXT_BYTES if load.is_on_gpu else PROCESS_BYTES,
        checkpoint=FP32 * 3 * trained // ranks,
        offloaded=offloaded,
    )


def _is_offloaded(zero: dict[str, Any], name: str) -> bool:
    return bool((zero.get(name) or {}).get("device") == "cpu")


def _numbers(zero: dict[str, Any], name: str, shape: Shape, otherwise: float) -> int:
    """A count of numbers that a file may leave out, or leave to Transformers by "auto", which makes it hidden times hidden."""
    value = zero.get(name, otherwise)
    return shape.hidden**2 if value == "auto" else int(value)


def _bucket_bytes(zero: dict[str, Any], shape: Shape, load: Load, num_trained: int) -> int:
    """Gradients on their way to other ranks; on CPU only as many as there are are touched."""
    stage = zero.get("stage", 0)
    numbers = _numbers(zero, "reduce_bucket_size", shape, 5e8) if stage >= 1 else 0
    copies = 2 if zero.get("overlap_comm") and stage >= 2 else 1
    return copies * load.num_bytes * (numbers if load.is_on_gpu else min(numbers, num_trained))


def _gathered_bytes(zero: dict[str, Any], load: Load, num_weights: int) -> int:
    """Weights of other ranks, which ZeRO-3 keeps for a while."""
    if zero.get("stage", 0) < 3:
        return 0
    of_others = num_weights - num_weights // load.num_ranks
    return load.num_bytes * min(of_others, int(zero.get("stage3_max_live_parameters", 1e9)))


def activation_bytes(shape: Shape, load: Load) -> int:
    """What PyTorch keeps of the layers for the backward pass, and the gradients of one layer.

    Counted with autograd's saved tensors on Qwen2 in both precisions: per token and layer two norms, the attention's inputs and
    output, the MLP's inputs and output.
    """
    size, tokens = load.num_bytes, load.num_tokens
    norms = 16 if size < FP32 else 24  # of each hidden number, for two norms that compute in fp32
    layer = norms * shape.hidden + size * (2 * shape.query + 2 * shape.key_value)
    layer += size * shape.intermediate * (4 if shape.num_mlp_matrices == 3 else 2)
    if load.attention == "eager":
        layer += (2 * size + FP32) * shape.num_heads * load.block_size
    kept = size * shape.hidden * shape.num_layers + layer if load.gradient_checkpointing else layer * shape.num_layers
    passing = size * (3 * shape.intermediate + 4 * shape.hidden)
    return tokens * (kept + passing + norms // 2 * shape.hidden)


def logit_bytes(shape: Shape, load: Load) -> int:
    """The logits, their copies, and the gradient of the head that is made with them."""
    size, trained = load.num_bytes, 1 if load.trained_share == 1 else 0
    if load.loss == "plain":
        # fp32 log-probabilities and their gradient; logits, and the gradient in the precision of computation.
        return load.num_tokens * shape.vocab_size * (2 * FP32 + max(2 * size, FP32)) + trained * size * shape.num_embedding
    at_once = min(load.num_tokens, max(1, CHUNK_LOGITS // shape.vocab_size))
    hidden = 2 * size * load.num_tokens * shape.hidden
    return at_once * shape.vocab_size * 2 * FP32 + trained * (FP32 + size) * shape.num_embedding + hidden
