"""Who takes part: names that tables, charts and goals have in common."""

from typing import NamedTuple


class Contestant(NamedTuple):
    """Who takes the step, and how.

    Args:
        name: The optimizer, with its blocks if it is one of ours.
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
ADAM = "Keras Adam"
MUON = "Keras Muon"
ADAMW = "PyTorch AdamW, fused"
FLOOR = "PyTorch SGD Nesterov, fused"
ADAM_MINI = "adam_mini"
OPTAX = "optax adam"
COPY = "copy"
