"""Trains under one backend of Keras: python worker.py write|read FILE..."""

import json
import sys

import keras
import numpy as np

import keras_blockwise as kb

OPTIMIZERS = {
    "block_adam": lambda: kb.BlockAdam(
        0.03, use_ema=True, weight_decay=0.1, skip_nonfinite=True
    ),
    "adam_mini": lambda: kb.AdamMini(0.03, momentum_dtype="bfloat16"),
    "adalayer": lambda: kb.Adalayer(
        0.03, sgd_learning_rate=0.1, output_layer=r".*[02468](/.*)?"
    ),
    "bagm": lambda: kb.BAGM(0.03, blocking="layer", clipnorm=0.1),
    "bag": lambda: kb.BAG(0.1, gradient_accumulation_steps=2),
    "block_rmsprop": lambda: kb.BlockRMSprop(0.03, centered=True, momentum=0.5),
    "bcos": lambda: kb.BCOS(0.03, blocking="output_unit"),
    "ada_block": lambda: kb.AdaBlock(0.03, layers_per_step=9, seed=1),
    "spam": lambda: kb.SPAM(0.03, reset_every=6, reset_warmup=2),
}


def make_model():
    """More small slots than one variable keeps, so that some are joined."""
    rng = np.random.default_rng(0)
    layers = [keras.layers.Dense(6, activation="tanh") for _ in range(18)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    for variable in model.variables:
        variable.assign(rng.normal(0.0, 0.4, variable.shape))
    return model


def train(model):
    """The loss of each of some steps."""
    rng = np.random.default_rng(1)
    losses = []
    for _ in range(4):
        x = rng.normal(size=(8, 4)).astype("float32")
        model.reset_metrics()
        losses.append(float(model.train_on_batch(x, np.tile(x[:, :1], 6))))
    return losses


def main(action, folder):
    losses = {}
    for name, make in OPTIMIZERS.items():
        path = f"{folder}/{name}.keras"
        if action == "write":
            model = make_model()
            # The compilers of Keras are not what is tested.
            model.compile(make(), loss="mse", jit_compile=False)
            train(model)
            model.save(path)
        else:
            model = keras.models.load_model(path)
        losses[name] = train(model)
    sys.stdout.write(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
