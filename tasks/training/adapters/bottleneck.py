"""Bottleneck adapters (arXiv:1902.00751) as a method of PEFT, which has none: importing this module makes PEFT know them.

From then on PEFT adds, trains, saves and loads them as it does its own.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BOTTLENECK = "BOTTLENECK"
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def _add_peft_type(name: str) -> None:
    """Give PEFT's closed enumeration of methods one more member."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


@dataclass
class BottleneckConfig(PeftConfig):
    """Where the networks stand and how wide they are."""

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "modules behind which a network stands"}
    )
    size: int = field(default=32, metadata={"help": "width of a network's middle"})
    activation: str = field(default="relu", metadata={"help": "of a network's middle"})
    dropout: float = field(default=0.0, metadata={"help": "share of the middle dropped in training"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(BOTTLENECK)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer with a narrow network behind it, whose result is added to the layer's; it begins as nothing added."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_middle = nn.ModuleDict()  # without a weight, so no part of what is saved
        self._active_adapter = name
        self.update_layer(name, config)

    def update_layer(self, name: str, config: BottleneckConfig) -> None:
        layer = self.get_base_layer()
        width = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        self.bottleneck_down[name] = nn.Linear(width, config.size)
        self.bottleneck_up[name] = up = nn.Linear(config.size, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_middle[name] = nn.Sequential(ACTIVATIONS[config.activation](), nn.Dropout(config.dropout))
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                narrow = down(self._cast_input_dtype(result, down.weight.dtype))
                result = result + up(self.bottleneck_middle[name](narrow)).to(result.dtype)
        return result


class BottleneckModel(BaseTuner):
    """A model with networks behind the modules that a config names. They are not linear: nothing can be merged."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(  # noqa: PLR0917  # PEFT passes them by place
        self, config: Any, name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str, **_: Any
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(name, config)
        elif isinstance(target, nn.Linear | Conv1D):
            self._replace_module(parent, target_name, BottleneckLayer(target, name, config), target)
        else:
            raise ValueError(f"{current_key} is a {type(target).__name__}; a bottleneck stands behind a linear module")


if BOTTLENECK not in PeftType.__members__:
    _add_peft_type(BOTTLENECK)
    register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
