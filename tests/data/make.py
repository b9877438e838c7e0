"""Makes the saved states of this folder; `test_old_state.py` loads them.

    python tests/data/make.py

A state that users have saved must load in every later version. So make a new
folder for what a new version adds, and leave these files as they are.

All versions of Keras must load them, too: a layer's argument that the oldest,
of `.ci/oldest.txt`, does not know is left out of their `config.json`.
"""

import json
import re
import zipfile
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
    "adalayer": lambda: kb.Adalayer(
        0.05, sgd_learning_rate=0.5, output_layer="net/out", jit_compile=False
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

# Arguments of layers that Keras 3.10 lacks; `null` is what it does without.
UNKNOWN = {"quantization_config", "input_axes", "output_axes"}

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


def config_for_all(text: str | bytes) -> Any:
    """A model's configuration without what older versions do not know."""

    def known(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: v for k, v in pairs if k not in UNKNOWN or v is not None}

    return json.loads(text, object_pairs_hook=known)


def save(model: keras.Model, path: Path) -> None:
    """Saves for all versions of Keras, compressed."""
    model.save(path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    config = config_for_all(parts["config.json"])
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, part in parts.items():
            file.writestr(name, part)


def main() -> None:
    expected = {}
    for name in OPTIMIZERS:
        model = make_model(name)
        train(model, 5)
        save(model, FOLDER / f"{name}.keras")
        if name in WEIGHTS:
            model.save_weights(FOLDER / f"{name}.weights.h5")
        expected[name] = {"state": describe(model), "losses": train(model, 4)}
    text = json.dumps(expected, indent=1)
    (FOLDER / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
