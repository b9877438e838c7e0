"""What is known of a variable: its path and shape, its layer, its axes."""

from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

from keras_blockwise.blocking.partition import Shape


@dataclass(frozen=True)
class Axes:
    """What the axes of a variable index in the map that it parametrises.

    Args:
        output: Axes that index the units of the map's output.
        input: Axes that index the units of its input. A depthwise kernel's
            channel axis is both.
        spatial: Axes that index a position in a convolution window.
        head: Axes that index the heads of an attention layer, in the
            projections to query, key, value and gate.
        kind: What the variable is: `"dense"`, `"conv"`, `"recurrent"`,
            `"embedding"`, `"query"`, `"key"`, `"value"`, `"bias"`, `"norm"`,
            `"shift"` (of a normalization), `"vector"`, or `"unknown"`.
        groups: How many groups the units on the last axis form, each with
            inputs of its own, as in a grouped convolution.
        gates: How many maps the units on the last axis are the outputs of, one
            after the other, as the gates of an LSTM.

    `Axes()` says that nothing is known, or nothing is to be told apart.
    """

    output: Shape = ()
    input: Shape = ()
    spatial: Shape = ()
    head: Shape = ()
    kind: str = "unknown"
    groups: int = 1
    gates: int = 1


class Weight(NamedTuple):
    """The path and the shape of a variable."""

    path: str
    shape: Shape

    @classmethod
    def of(cls, variable: Any) -> "Weight":
        return cls(path_of(variable), tuple(int(n) for n in variable.shape))

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def layer_path(self) -> str:
        return self.path.rpartition("/")[0]


def path_of(variable: Any) -> str:
    """Of a `keras.Variable`, or of a `tf.Variable`, which has no path."""
    path: str | None = getattr(variable, "path", None)
    return path or str(variable.name).partition(":")[0]


class Meaning(NamedTuple):
    """The role of a variable: its layer, and what its axes may mean.

    Args:
        layer: Name of the layer that owns it, unique among the layers.
        axes: Every meaning of its axes that is possible, the likeliest first.
        sure_of_layer: Whether `layer` is certain.
    """

    layer: str
    axes: tuple[Axes, ...]
    sure_of_layer: bool = True
