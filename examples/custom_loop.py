"""A training step by hand, under the backend of Keras that is in use.

KERAS_BACKEND=jax python examples/custom_loop.py
"""

import argparse

import keras
import numpy as np

import keras_blockwise as kb

BACKEND = keras.backend.backend()
loss_of = keras.losses.MeanSquaredError()


def tensorflow_step(model, optimizer):
    import tensorflow as tf

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return step


def jax_step(model, optimizer):
    """Variables become values, which a pure function takes and returns."""
    import jax

    def forward(weights, others, x, y):
        call = model.stateless_call
        outputs, others = call(weights, others, x, training=True)
        return loss_of(y, outputs), others

    differentiate = jax.value_and_grad(forward, has_aux=True)

    @jax.jit
    def pure_step(weights, others, state, x, y):
        (loss, others), gradients = differentiate(weights, others, x, y)
        weights, state = optimizer.stateless_apply(state, gradients, weights)
        return loss, (weights, others, state)

    kinds = [model.trainable_variables, model.non_trainable_variables]
    kinds.append(optimizer.variables)

    def step(x, y):
        loss, results = pure_step(*([v.value for v in k] for k in kinds), x, y)
        for variables, values in zip(kinds, results):
            for variable, value in zip(variables, values):
                variable.assign(value)
        return loss

    return step


def torch_step(model, optimizer):
    import torch

    def step(x, y):
        model.zero_grad()
        loss = loss_of(y, model(x, training=True))
        loss.backward()
        gradients = [v.value.grad for v in model.trainable_variables]
        with torch.no_grad():
            optimizer.apply(gradients, model.trainable_variables)
        return loss.detach()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, "tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    optimizer = kb.BlockAdam(1e-2)
    optimizer.build(model.trainable_variables)
    step = globals()[f"{BACKEND}_step"](model, optimizer)
    rng = np.random.default_rng(0)
    for i in range(steps):
        x = rng.normal(size=(64, 8)).astype("float32")
        y = x[:, :1] * x[:, 1:2]
        loss = float(step(keras.ops.array(x), keras.ops.array(y)))
        if i % 20 == 0 or i == steps - 1:
            print(f"{BACKEND}, step {i:>3}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
