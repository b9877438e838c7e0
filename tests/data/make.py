"""Makes the saved states of this folder; `test_old_state.py` loads them.

    python tests/data/make.py

A state that users have saved must load in every later version. So make a new
folder for what a new version adds, and leave these files as they are.

All versions of Keras must load them, too: make them with the oldest, those of
`.ci/oldest.txt`. The ones here are of Keras 3.15, and what 3.10 lacks has been
taken from the layers in their `config.json`, where it was `null`:
`quantization_config`, and `input_axes` and `output_axes` of initializers.
That of `BlockMuon` is compressed.
"""

import json
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_blockwise as kb

FOLDER = Path(__file__).parent
OPTIMIZERS: dict[str, Any] = {
    "block_adam": lambda: kb.BlockAdam(
        0.05,
        amsgrad=True,
        use_ema=True,
        gradient_accumulation_steps=2,
        skip_nonfinite=True,
        jit_compile=False,
    ),
    "adam_mini": lambda: kb.AdamMini(
        0.05, momentum_dtype="bfloat16", weight_decay=0.01, jit_compile=False
    ),
    "block_nadam": lambda: kb.BlockNadam(
        0.05,
        blocking=kb.Blocking("output_unit", {r".*/bias": "none"}),
        learning_rate_multipliers={r".*/out/.*": 0.5},
        jit_compile=False,
    ),
    "bagm": lambda: kb.BAGM(
        0.05, accumulator="polynomial", blocking="layer", jit_compile=False
    ),
    "block_muon": lambda: kb.BlockMuon(
        0.05, output_layer="net/out", weight_decay=0.01, jit_compile=False
    ),
    "bag": lambda: kb.BAG(
        0.05,
        blocking=kb.Blocking("model", {r".*/out/kernel": (2, None)}),
        jit_compile=False,
    ),
    "block_rmsprop": lambda: kb.BlockRMSprop(
        keras.optimizers.schedules.ExponentialDecay(0.05, 10, 0.5),
        centered=True,
        momentum=0.5,
        blocking="input_unit",
        jit_compile=False,
    ),
    "bcos": lambda: kb.BCOS(0.05, jit_compile=False),
    "ada_block": lambda: kb.AdaBlock(
        0.05, bounds=(20.0, 0.01), layers_per_step=1, seed=1, jit_compile=False
    ),
    "spam": lambda: kb.SPAM(
        0.05, reset_every=7, reset_warmup=3, jit_compile=False
    ),
}

# Also saved without the model: two are enough.
WEIGHTS = ["block_adam", "bag"]


def make_model(name: str) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="hidden"),
            keras.layers.Dense(1, name="out"),
        ],
        name="net",
    )
    model.compile(OPTIMIZERS[name](), "mse", run_eagerly=True)
    return model


def train(model: keras.Model, steps: int) -> list[float]:
    """The loss of each step."""
    x = np.float32(np.arange(24).reshape(8, 3) % 7 / 7)
    y = x[:, :1] * x[:, 1:2]
    losses = []
    for _ in range(steps):
        model.reset_metrics()
        losses.append(float(model.train_on_batch(x, y)))
    return losses


def describe(model: keras.Model) -> list[Any]:
    """Path, dtype and values of each weight and state variable, in order.

    The name of the model is in the paths of a new model alone.
    """
    return [
        [
            re.sub(r"\bnet[/_]", "", variable.path),
            variable.dtype,
            variable.numpy().astype("float64").tolist(),
        ]
        for variable in model.variables + model.optimizer.variables
    ]


def main() -> None:
    expected = {}
    for name in OPTIMIZERS:
        model = make_model(name)
        train(model, 5)
        model.save(FOLDER / f"{name}.keras")
        if name in WEIGHTS:
            model.save_weights(FOLDER / f"{name}.weights.h5")
        expected[name] = {"state": describe(model), "losses": train(model, 4)}
    text = json.dumps(expected, indent=0)
    (FOLDER / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
