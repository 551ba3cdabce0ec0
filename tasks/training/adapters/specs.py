"""The methods by which a base is adapted, each with its own fields."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tasks.store import Spec

# Targets as PEFT takes them: names of modules, one pattern, or the word that means every nn.Linear but the output layer.
Targets = tuple[str, ...] | str
ALL_LINEAR = "all-linear"


class LoraSpec(Spec):
    """Low-rank products added to weights (arXiv:2106.09685)."""

    rank: int = Field(8, ge=1, description="rank of the products")
    alpha: float = Field(32, gt=0, description="scale: a product counts alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of a product's inputs dropped in training")
    target_modules: Targets = Field(
        ("q_proj", "v_proj"),
        min_length=1,
        description="nn.Linear, nn.Embedding and nn.Conv2d modules: names, one pattern of full names, or all-linear",
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv:2312.03732)")
    use_dora: bool = Field(False, description="train the length of every weight's columns by itself (arXiv:2402.09353)")
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"] = Field(
        "kaiming",
        description="the products at the start: nothing (kaiming, gaussian, orthogonal), or the weight's principal part, by a "
        "singular value (pissa, arXiv:2404.02948; niter_16: an approximate one) or QR decomposition (olora, arXiv:2406.01775)",
    )

    @property
    def takes_from_base(self) -> bool:
        """Whether the products begin as a part of the weights, which training then takes out of them."""
        return self.init.startswith("pissa") or self.init == "olora"

    @model_validator(mode="after")
    def _init_fits(self) -> Self:
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init is orthogonal, whose halves take an even rank, rank is {self.rank}; change one of them")
        if self.use_dora and self.takes_from_base:
            raise ValueError(
                f"init is {self.init} with use_dora, whose lengths are those of the whole weights; set init to kaiming, or "
                "use_dora to false"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """A field that came later, at its default, leaves the key as it was before the field was."""
        later = {"use_dora": False, "init": "kaiming"}
        return {name: value for name, value in super().identity().items() if name not in later or later[name] != value}


class QloraSpec(LoraSpec):
    """LoRA on a base whose linear weights are held in 4 bits (arXiv:2305.14314)."""

    quantization: Literal["nf4", "fp4"] = Field("nf4", description="the 16 values that a weight of the base may take")
    double_quantization: bool = Field(True, description="hold the scales of the 4-bit weights in 8 bits")

    @model_validator(mode="after")
    def _weights_are_held_in_4_bits(self) -> Self:
        if self.takes_from_base:
            raise ValueError(f"init is {self.init}, which needs the base's weights whole; set it to kaiming, or method to lora")
        return self


class BottleneckSpec(Spec):
    """A narrow network behind a sublayer, added to what comes out of it (arXiv:1902.00751, arXiv:2005.00052)."""

    placement: Literal["houlsby", "pfeiffer"] = Field(
        "pfeiffer", description="behind attention and the feed-forward network (houlsby), or behind the latter alone"
    )
    size: int = Field(32, ge=1, description="width of the narrow network's middle")
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="of the narrow network's middle")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the middle dropped in training")
    attention_modules: tuple[str, ...] = Field(("o_proj",), min_length=1, description="names of the last linear of attention")
    feedforward_modules: tuple[str, ...] = Field(
        ("down_proj",), min_length=1, description="names of the last linear of the feed-forward network"
    )

    @property
    def target_modules(self) -> tuple[str, ...]:
        attention = self.attention_modules if self.placement == "houlsby" else ()
        return (*attention, *self.feedforward_modules)


class PrefixSpec(Spec):
    """Virtual tokens in front of every layer's keys and values (arXiv:2101.00190)."""

    num_virtual_tokens: int = Field(16, ge=1, description="virtual tokens; each takes one of the model's positions")
    projection_size: int | None = Field(
        None, ge=1, description="width of the network that the prefix is trained through; absent: it is trained itself"
    )


class PTuningSpec(Spec):
    """Virtual tokens in front of the text, trained through an encoder (arXiv:2103.10385)."""

    num_virtual_tokens: int = Field(16, ge=1, description="virtual tokens; each takes one of the model's positions")
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="what the virtual tokens' embeddings are trained through")
    encoder_size: int = Field(128, ge=1, description="width of the encoder")
    encoder_layers: int | None = Field(None, ge=1, description="layers of an lstm encoder; absent: 2")
    encoder_dropout: float | None = Field(None, ge=0, lt=1, description="dropout between an lstm encoder's layers; absent: 0")

    @model_validator(mode="after")
    def _encoder_fits(self) -> Self:
        for name in ("encoder_layers", "encoder_dropout"):
            if self.encoder == "mlp" and getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)}, the encoder is an mlp; leave it out or set encoder to lstm")
        return self


class PromptSpec(Spec):
    """Virtual tokens in front of the text, their embeddings trained themselves (arXiv:2104.08691)."""

    num_virtual_tokens: int = Field(16, ge=1, description="virtual tokens; each takes one of the model's positions")
    init: Literal["random", "vocabulary", "text"] = Field(
        "vocabulary", description="embeddings at the start: noise, those of tokens drawn from the vocabulary, those of text"
    )
    text: str | None = Field(None, min_length=1, description="for init text: cut or repeated to num_virtual_tokens tokens")

    @model_validator(mode="after")
    def _text_fits(self) -> Self:
        if (self.init == "text") != (self.text is not None):
            found = "absent" if self.text is None else "given"
            raise ValueError(f"text is {found}, init is {self.init}; text goes with init text, and only with that")
        return self


class Ia3Spec(Spec):
    """Learned factors on what modules give, or on what feed-forward modules take (arXiv:2205.05638)."""

    target_modules: tuple[str, ...] = Field(
        ("k_proj", "v_proj", "down_proj"), min_length=1, description="names of nn.Linear and nn.Conv2d modules"
    )
    feedforward_modules: tuple[str, ...] = Field(
        ("down_proj",), description="those of target_modules whose input is scaled, not their output"
    )

    @model_validator(mode="after")
    def _feedforward_modules_are_targets(self) -> Self:
        if others := [name for name in self.feedforward_modules if name not in self.target_modules]:
            raise ValueError(
                f"feedforward_modules has {', '.join(others)}, target_modules has not; add it there or leave it out here"
            )
        return self
