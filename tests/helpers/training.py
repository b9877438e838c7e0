"""Steps of an optimizer, by itself or of a model, on every backend."""

import keras
import numpy as np

from helpers.arrays import to_numpy
from helpers.cases import tensors
from helpers.tensorflow import tf


def eager(optimizer):
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scales and keras.backend.backend() == "jax":
        return graph(optimizer)  # Keras's own cannot be run otherwise.
    return optimizer.apply


def graph(optimizer):
    """`apply` of a built optimizer as a training loop compiles it, if it does.

    A `tf.function`, not compiled by XLA; `jax.jit` of `stateless_apply`; and
    `apply` itself with PyTorch.
    """
    if keras.backend.backend() == "tensorflow":
        return tf.function(optimizer.apply, autograph=False)
    if keras.backend.backend() != "jax":
        return optimizer.apply
    import jax

    step = jax.jit(optimizer.stateless_apply)

    def apply(gradients):
        variables = [optimizer.variables, optimizer._trainable_variables]
        state, weights = ([v.value for v in vs] for vs in variables)
        weights, state = step(state, gradients, weights)
        for values, own in zip((state, weights), variables):
            for value, variable in zip(values, own, strict=True):
                variable.assign(value)

    return apply


def built(optimizer, variables):
    optimizer.build(variables)
    return optimizer


def falling(optimizer, step):
    """Sets another learning rate in each step."""
    optimizer.learning_rate = 0.1 / (1 + step)


def train(optimizer, variables, gradients, wrap=eager, before=None):
    """Weights and state after one step for each list of gradients.

    Args:
        optimizer: The optimizer.
        variables: What it is built on.
        gradients: Those of each step, as arrays; `None` if there is none.
        wrap: Makes the function that steps of the optimizer.
        before: Called with the optimizer and the number of each step.
    """
    optimizer.build(variables)
    step = wrap(optimizer)
    for number, given in enumerate(gradients):
        if before:
            before(optimizer, number)
        step(tensors(given, [v.dtype for v in variables]))
    return to_numpy([*variables, *optimizer.variables])


def gradients_of(function, variables):
    """The gradients of each number that `function` returns, as arrays.

    Args:
        function: Returns a list of scalars.
        variables: Keras variables.

    Returns:
        For each number, an array per variable: zeros if it does not depend on
        it.
    """
    variables = list(variables)
    if not variables:
        return []
    backend = {
        "tensorflow": tensorflow_gradients,
        "jax": jax_gradients,
        "torch": torch_gradients,
    }[keras.backend.backend()]
    return [
        [
            np.zeros(v.shape, v.dtype)
            if g is None
            else keras.ops.convert_to_numpy(g)
            for g, v in zip(gradients, variables, strict=True)
        ]
        for gradients in backend(function, variables)
    ]


def tensorflow_gradients(function, variables):
    with tf.GradientTape(persistent=True) as tape:
        numbers = function()
    values = [v.value for v in variables]
    return [
        # Embeddings have sparse ones.
        [g if g is None else tf.convert_to_tensor(g) for g in gradients]
        for gradients in (tape.gradient(number, values) for number in numbers)
    ]


def jax_gradients(function, variables):
    import jax

    def numbers(values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return function()

    return jax.jacrev(numbers)([v.value for v in variables])


def torch_gradients(function, variables):
    import torch

    values = [v.value for v in variables]
    return [
        torch.autograd.grad(
            number, values, retain_graph=True, allow_unused=True
        )
        if number.requires_grad
        else [None] * len(values)
        for number in function()
    ]


def train_on_batch(model, x, y):
    """The loss of one batch: older versions of Keras return a mean over calls.

    They reset metrics in `fit` alone.
    """
    model.reset_metrics()
    return float(model.train_on_batch(x, y))


def train_by_hand(model, optimizer, x, y, steps):
    """What `fit` does with full batches, but with dense gradients."""
    loss = keras.losses.MeanSquaredError()
    variables = model.trainable_variables
    for _ in range(steps):
        (gradients,) = gradients_of(
            lambda: [loss(y, model(x, training=True))], variables
        )
        optimizer.apply(tensors(gradients), variables)
