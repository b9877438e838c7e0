"""Updates compiled by XLA, which equal optimizers of a process share.

XLA takes seconds for an update, and TensorFlow keeps what it has compiled until
the process ends. So an update is given its variables as arguments, and runs for
every optimizer whose update is the same graph.
"""

import collections
import hashlib
import re
import weakref
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import tensorflow as tf

from keras_blockwise.algorithm.units import Batch

Tensor = Any
# Every compiled function that an optimizer uses, by what it computes.
IN_USE: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()
# The last ones, for the next model after one is gone. They hold no variables.
LAST: collections.deque[Any] = collections.deque(maxlen=8)


class Handle(NamedTuple):
    """A variable that a function is given, as its update knows it."""

    handle: Tensor
    dtype: tf.DType
    shape: tf.TensorShape

    def read(self) -> Tensor:
        value = tf.raw_ops.ReadVariableOp(
            resource=self.handle, dtype=self.dtype
        )
        value.set_shape(self.shape)
        return value

    def assign(self, value: Tensor) -> None:
        tf.raw_ops.AssignVariableOp(resource=self.handle, value=value)


class CompiledUpdate(NamedTuple):
    """A compiled function, and the variables of one optimizer.

    Args:
        function: `(arguments, handles) -> ...`.
        handles: Those of the variables.
    """

    function: Any
    handles: list[Tensor]

    def __call__(self, *arguments: Any) -> Any:
        given = map(tf.convert_to_tensor, tf.nest.flatten(arguments))
        flat = [*given, *self.handles]
        # A call by its name checks every handle, which takes as long as a step
        # of small variables.
        return self.function._call_flat(flat, self.function.captured_inputs)


def compile_update(
    update: Callable[..., Any], batch: Batch, arguments: Sequence[Any]
) -> CompiledUpdate:
    """`update(batch, *arguments)`, compiled for all values of its arguments.

    Args:
        update: Reads and assigns the variables of a batch, which have become
            a `Handle` each, and no others.
        batch: The variables.
        arguments: Tensors, or lists of tensors.
    """
    leaves = tf.nest.flatten(batch)
    variables = list(
        {id(v): v for v in leaves if isinstance(v, tf.Variable)}.values()
    )

    def traced(arguments: Sequence[Any], handles: Sequence[Tensor]) -> Any:
        own = {
            id(v): Handle(handle, v.dtype, v.shape)
            for v, handle in zip(variables, handles)
        }
        given = [own.get(id(leaf), leaf) for leaf in leaves]
        return update(tf.nest.pack_sequence_as(batch, given), *arguments)

    handles = [variable.handle for variable in variables]
    specs = tf.nest.map_structure(
        lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype),
        (tuple(arguments), handles),
    )
    with tf.init_scope():
        function = tf.function(traced, jit_compile=True, autograph=False)
        concrete = function.get_concrete_function(*specs)
    shapes = [(v.shape, v.dtype) for v in variables]
    key = digest(f"{shapes} {graph_of(concrete)}")
    concrete = IN_USE.setdefault(key, concrete)
    if concrete not in LAST:
        LAST.append(concrete)
    return CompiledUpdate(concrete, handles)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def graph_of(function: Any) -> str:
    """The graph of a function; those it calls are numbered as they occur."""
    definition = function.graph.as_graph_def()
    library = {f.signature.name: f for f in definition.library.function}
    numbers: dict[str, int] = {}
    texts = [str(definition.node)]

    def numbered(match: re.Match[str]) -> str:
        name = match[1]
        if name not in library:
            return match[0]
        if name not in numbers:
            numbers[name] = len(numbers)
            texts.append(str(library[name]))
        return f'"{numbers[name]}"'

    # The list grows while it is read.
    return "".join(re.sub(r'"([^"\n]*)"', numbered, text) for text in texts)
