"""Who takes part: names that tables, charts and goals have in common."""

from collections.abc import Iterable
from typing import NamedTuple


class Contestant(NamedTuple):
    """Who takes the step, and how.

    Args:
        name: The optimizer; of one of ours its blocks, too, and the dtype of
            its momentum if that is not float32.
        mode: `"compiled"` by XLA or by its authors, `"graph"` or `"eager"`.
    """

    name: str
    mode: str

    @property
    def is_ours(self) -> bool:
        return self.name.startswith((*OURS, MUON_OF_OURS))


OURS = ("BlockAdam", "BAGM")
# Beside Keras's Muon alone.
MUON_OF_OURS = "BlockMuon"
FLOAT32, BFLOAT16, INT8 = MOMENTA = ("float32", "bfloat16", "int8")
ADAM = "Keras Adam"
ADAFACTOR = "Keras Adafactor"
LION = "Keras Lion"
SGD = "Keras SGD"
SGD_MOMENTUM = "Keras SGD, momentum"
MUON = "Keras Muon"
ADAMW = "PyTorch AdamW, fused"
FLOOR = "PyTorch SGD Nesterov, fused"
ADAM_MINI = "adam_mini"
ADAM_8BIT = "bitsandbytes Adam8bit"
OPTAX = "optax adam"
COPY = "copy"


def our_names(schemes: Iterable[str], momenta: Iterable[str]) -> list[str]:
    """Ours with each kind of blocks and each dtype of the momentum."""
    return [
        f"{cls} {scheme}" + ("" if dtype == FLOAT32 else f" {dtype}")
        for cls in OURS
        for scheme in schemes
        for dtype in momenta
    ]


def momentum(name: str) -> str:
    """The dtype of the momentum of one of ours."""
    _, _, *dtype = name.split()
    return dtype[0] if dtype else FLOAT32
