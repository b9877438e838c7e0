"""The optimizers of `quality`, and where each looks for its learning rate."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import keras

import keras_blockwise as kb
from benchmarks import contestants
from benchmarks.tasks import LOGITS

WARM_UP = 20
HALF_DECADES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
DOUBLES = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1)


@dataclass(frozen=True)
class Setting:
    """An optimizer with its default arguments but for these.

    Args:
        cls: The class.
        rate: Peak learning rate to begin with, one of `rates`.
        scheme: Blocks of one of ours; `None` for others.
        arguments: Other arguments.
        rates: What there is to choose from.
    """

    cls: Any
    rate: float
    scheme: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[float] = HALF_DECADES

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


OPTIMIZERS = {
    contestants.ADAM: Setting(keras.optimizers.Adam, 1e-2),
    # Its documentation asks for the name of the output layer.
    contestants.MUON: Setting(
        keras.optimizers.Muon,
        1e-2,
        arguments={"exclude_layers": [LOGITS]},
    ),
    "BlockMuon": Setting(kb.BlockMuon, 2e-2, "output_unit", rates=DOUBLES),
    "BlockAdam": Setting(kb.BlockAdam, 1e-2, "output_unit"),
    "BlockNadam": Setting(kb.BlockNadam, 1e-2, "output_unit"),
    # The steps of a constant gradient grow to ten times this.
    "BAGM": Setting(kb.BAGM, 1e-3, "output_unit"),
    "AdamMini": Setting(kb.AdamMini, 1e-2, "adam_mini"),
    "Adalayer": Setting(kb.Adalayer, 3e-3, "adalayer"),
    "SPAM": Setting(kb.SPAM, 1e-2, "coordinate"),
    "BCOS": Setting(kb.BCOS, 3e-3, "coordinate"),
    "AdaBlock": Setting(kb.AdaBlock, 1e-2, "adablock"),
    "BlockRMSprop": Setting(kb.BlockRMSprop, 3e-3, "output_unit"),
    # From zero, as published: 0.1 is far above the squares of these gradients.
    "BAG": Setting(
        kb.BAG,
        3e-2,
        "output_unit",
        {"initial_accumulator_value": 0.0},
    ),
    "Keras AdamW": Setting(keras.optimizers.AdamW, 1e-2),
    "Keras Nadam": Setting(keras.optimizers.Nadam, 1e-2),
    "Keras SGD Nesterov": Setting(
        keras.optimizers.SGD,
        3e-1,
        arguments={"momentum": 0.9, "nesterov": True},
    ),
}
