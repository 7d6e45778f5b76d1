"""What a routed layer is asked to reach on a GPU, for `biroute bench gpu` and for the page on paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from biroute.configs.schema import ModelConfig

Value = Literal["forward", "both", "descriptors", "router", "memory", "memory_of_dense"]


@dataclass(frozen=True)
class Compared:
    """A routed layer with its router beside dense attention, on one device."""

    forward: float  # how many times as fast as dense
    both: float  # the same, forward and backward together
    descriptors: float  # time with 8 descriptors over time with 1, both directions
    router: float  # share of both directions
    memory: float  # peak over dense attention's inputs, output and gradients
    memory_of_dense: float  # peak over dense attention's peak, with the buffers of its backward


@dataclass(frozen=True)
class Target:
    """A value of `Compared` for some sequence length and query block."""

    text: str
    tokens: int
    block: int
    value: Value
    at_least: bool
    asked: float

    def found(self, compared: Compared) -> float:
        """Return the value that is asked for."""
        return float(getattr(compared, self.value))

    def met(self, compared: Compared) -> bool:
        """Return whether it is reached."""
        found = self.found(compared)
        return found >= self.asked if self.at_least else found <= self.asked

    @property
    def bound(self) -> str:
        """What is asked, in words of a table."""
        return f"{'>=' if self.at_least else '<='} {self.asked:.3g}"


# Times of the whole layer that the parts of region ranks may take together, and how many times as fast as dense a
# training step is to be, by length.
PARTS_TARGET = 1.15
STEP_TARGETS = {8_192: 1.0, 32_768: 2.0, 131_072: 5.0}
# Heads as in a layer that is measured, and narrow matrices, so that a step is mostly attention.
STEP_MODEL = ModelConfig(hidden_size=1024, num_layers=4, num_heads=32, num_kv_heads=8, head_size=128)
STEP_VOCABULARY = 2048

TARGETS = (
    Target("forward, times as fast as dense", 131_072, 1, "forward", True, 5.0),
    Target("forward + backward", 131_072, 1, "both", True, 9.0),
    Target("forward", 32_768, 1, "forward", True, 1.5),
    Target("forward + backward", 32_768, 1, "both", True, 2.5),
    Target("forward", 131_072, 64, "forward", True, 12.0),
    Target("forward + backward", 131_072, 64, "both", True, 12.0),
    Target("forward", 32_768, 64, "forward", True, 4.0),
    Target("forward + backward", 32_768, 64, "both", True, 4.0),
    Target("never slower than dense: forward + backward", 8_192, 1, "both", True, 1 / 1.05),
    Target("the same", 8_192, 64, "both", True, 1 / 1.05),
    Target("8 descriptors over 1, time", 131_072, 1, "descriptors", False, 1.2),
    Target("router, share of the time", 131_072, 1, "router", False, 0.25),
    Target("peak memory over dense attention's tensors", 131_072, 1, "memory", False, 1.3),
    Target("peak memory over dense attention's peak", 131_072, 1, "memory_of_dense", False, 1.3),
)
