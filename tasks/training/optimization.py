"""The fields that every training stage shares: batch, steps, optimizer, schedule, precision."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from tasks.store import Spec, unkeyed


class OptimizationSpec(Spec):
    """How a model is trained; the same on one core and on many nodes, which only derive how a step's rows are shared out."""

    global_batch_size: int = Field(ge=1, description="rows of block_size ids per step, over all ranks")
    num_steps: int | None = Field(None, ge=1, description="steps; exactly one of num_steps and num_epochs")
    num_epochs: float | None = Field(None, gt=0, description="passes over the training rows; the last step is filled up")
    learning_rate: float = Field(gt=0, description="the highest, reached after warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the learning rate after warm-up, to 0")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on weight matrices only")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment, per step")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment, per step")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's term for numerical stability")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient's L2 norm is clipped to this")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of computation and of the saved weights; AdamW keeps fp32")
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass, to save memory")
    loss: Literal["chunked", "plain", "liger"] = Field(
        "chunked",
        description="how logits become a loss: chunked holds few of them at a time, plain all of a micro batch, as the model's "
        "own class does it; liger is Liger's kernel, for GPUs",
    )
    adamw: Literal["fused", "looped"] | None = Field(
        None, description="how AdamW steps: one kernel over all weights, or a weight after the other; absent: fused"
    )
    compiled: Literal["layers"] | None = Field(
        None, description="torch.compile, of every layer by itself; absent: nothing is compiled"
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="of initial weights, data order and dropout")
    checkpoint_steps: int = unkeyed(100, description="steps between checkpoints")
    logging_steps: int = unkeyed(5, description="steps between two reports of metrics")
    loss_jump: float | None = unkeyed(
        None, description="a step whose loss is more than so many times the median of the 100 before ends the run; absent: none"
    )
    evaluation_steps: int | None = unkeyed(None, description="steps between validations; absent: only after the last step")
    max_evaluation_rows: int | None = unkeyed(None, description="validation rows read each time, the first ones; absent: all")

    @field_validator("adamw")
    @classmethod
    def _absent_is_fused(cls, value: str | None) -> str | None:
        # One spelling of what needs no field: said or not, the key is the same.
        return None if value == "fused" else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(f"num_steps is {self.num_steps}, num_epochs is {self.num_epochs}; give exactly one of them")
        if self.num_steps is not None and self.warmup_steps > self.num_steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, more than num_steps {self.num_steps}; lower it")
        for name in ("checkpoint_steps", "logging_steps", "evaluation_steps", "max_evaluation_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if self.loss_jump is not None and self.loss_jump <= 1:
            raise ValueError(f"loss_jump is {self.loss_jump}; give more than 1, such as 3")
        return self

    def steps(self, num_rows: int) -> int:
        """How many steps to train on ``num_rows`` rows."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None
        rows = self.num_epochs * num_rows
        # A product such as 0.1 * 30 lies a hair above its whole number: that hair is not a step.
        return max(1, -int(-(rows - 1e-6) // self.global_batch_size))
