"""The optimizers of `quality`, and the learning rates that each may choose."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import keras

import keras_blockwise as kb
from benchmarks import contestants
from benchmarks.tasks import LOGITS

WARM_UP = 20


@dataclass(frozen=True)
class Setting:
    """An optimizer with its default arguments but for these.

    Args:
        cls: The class.
        rates: Peak learning rates to choose from, the likeliest in the middle.
        scheme: Blocks of one of ours; `None` for others.
        arguments: Other arguments.
    """

    cls: Any
    rates: tuple[float, float, float]
    scheme: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.scheme is not None

    def make(self, model: keras.Model, rate: float, steps: int) -> Any:
        """A new optimizer: warm-up to the rate, and a cosine to zero."""
        warm_up = min(WARM_UP, steps // 2)
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0, steps - warm_up, warmup_target=rate, warmup_steps=warm_up
        )
        arguments = dict(self.arguments)
        if self.scheme:
            arguments["blocking"] = kb.Blocking.from_model(model, self.scheme)
        return self.cls(schedule, **arguments)


ADAM_RATES = (3e-3, 1e-2, 3e-2)
OPTIMIZERS = {
    contestants.ADAM: Setting(keras.optimizers.Adam, ADAM_RATES),
    # Its documentation asks for the name of the output layer.
    contestants.MUON: Setting(
        keras.optimizers.Muon,
        ADAM_RATES,
        arguments={"exclude_layers": [LOGITS]},
    ),
    "BlockMuon": Setting(kb.BlockMuon, (1e-2, 2e-2, 4e-2), "output_unit"),
    "BlockAdam": Setting(kb.BlockAdam, ADAM_RATES, "output_unit"),
    "BlockNadam": Setting(kb.BlockNadam, ADAM_RATES, "output_unit"),
    # The steps of a constant gradient grow to ten times this.
    "BAGM": Setting(kb.BAGM, (3e-4, 1e-3, 3e-3), "output_unit"),
    "AdamMini": Setting(kb.AdamMini, ADAM_RATES, "adam_mini"),
    "Adalayer": Setting(kb.Adalayer, (1e-3, 3e-3, 1e-2), "adalayer"),
    "SPAM": Setting(kb.SPAM, ADAM_RATES, "coordinate"),
    "BCOS": Setting(kb.BCOS, ADAM_RATES, "coordinate"),
    "AdaBlock": Setting(kb.AdaBlock, ADAM_RATES, "adablock"),
    "BlockRMSprop": Setting(kb.BlockRMSprop, (1e-3, 3e-3, 1e-2), "output_unit"),
    # From zero, as published: 0.1 is far above the squares of these gradients.
    "BAG": Setting(
        kb.BAG,
        (1e-2, 3e-2, 1e-1),
        "output_unit",
        {"initial_accumulator_value": 0.0},
    ),
    "Keras AdamW": Setting(keras.optimizers.AdamW, ADAM_RATES),
    "Keras Nadam": Setting(keras.optimizers.Nadam, ADAM_RATES),
    "Keras SGD Nesterov": Setting(
        keras.optimizers.SGD,
        (1e-1, 3e-1, 1.0),
        arguments={"momentum": 0.9, "nesterov": True},
    ),
}
