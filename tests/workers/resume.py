"""Trains, saves and goes on: one half of `test_resume.py` in each process.

    python tests/resume_worker.py FOLDER NUMBER...

goes on with the settings of these numbers from what is in FOLDER, and writes
there what has become of them.
"""

import os
import pickle
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any
from typing import NamedTuple

import conftest  # noqa: F401 (two devices)
import keras
import numpy as np
import tensorflow as tf
from replicas import two_replicas

import keras_blockwise as kb

OPTIMIZERS = {
    "BlockAdam": (kb.BlockAdam, {"amsgrad": True, "weight_decay": 0.01}),
    "AdamMini": (kb.AdamMini, {"momentum_dtype": "bfloat16"}),
    "BAGM": (kb.BAGM, {"accumulator": "polynomial", "blocking": "layer"}),
    "BAG": (kb.BAG, {"blocking": "model"}),
    "BlockRMSprop": (kb.BlockRMSprop, {"centered": True, "momentum": 0.5}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"use_ema": True, "ema_momentum": 0.75},
    # 6 steps before saving: in the middle of a round of 4.
    "accumulation": {"gradient_accumulation_steps": 4},
    "mixed_float16": {},
    "skip": {"skip_nonfinite": True},
}
MODES: dict[str, dict[str, Any]] = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "replicas": {},
}
# How often the state is saved in these is up to a callback.
CALLBACKS = {
    "backup": lambda folder: keras.callbacks.BackupAndRestore(
        folder / "now", delete_checkpoint=False
    ),
    "model_checkpoint": lambda folder: keras.callbacks.ModelCheckpoint(
        folder / "now" / "{epoch}.keras"
    ),
}
FORMATS = ["keras", "weights", "checkpoint", *CALLBACKS]
EPOCHS = 4  # Of three steps. The state is saved after two.


class Setting(NamedTuple):
    optimizer: str
    format: str
    mode: str
    option: str = "plain"
    resumed: str = ""  # The mode of the second process, if another.

    @property
    def id(self) -> str:
        return "-".join(filter(None, self))


class Recorder(keras.callbacks.Callback):
    """The state in the middle, and the losses after it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.state: list[Any] = []
        self.losses: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == EPOCHS // 2:
            self.state = state(self.model)
            now, middle = self.folder / "now", self.folder / "middle"
            if now.exists() and not middle.exists():
                shutil.copytree(now, middle)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.state:
            self.losses.append(logs["loss"])


def make_model(setting: Setting, mode: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="hidden"),
            keras.layers.Dense(1, name="out", dtype="float32"),
        ]
    )
    cls, kwargs = OPTIMIZERS[setting.optimizer]
    schedule = keras.optimizers.schedules.ExponentialDecay(0.02, 10, 0.5)
    # The update is compiled in all modes but one.
    jit_compile = False if mode == "eager" else "auto"
    optimizer = cls(
        schedule,
        jit_compile=jit_compile,
        **kwargs,
        **OPTIONS[setting.option],
    )
    model.compile(optimizer, "mse", **MODES[mode])
    return model


def state(model: keras.Model) -> list[Any]:
    return [v.numpy() for v in model.variables + model.optimizer.variables]


def fit(model: keras.Model, start: int, *callbacks: Any, end: int) -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(12, 3)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1] * x[:, 1:2]))
    model.fit(
        data.batch(4),
        initial_epoch=start,
        epochs=end,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )


def strategy_of(mode: str) -> Any:
    if mode != "replicas":
        return tf.distribute.get_strategy()
    return two_replicas()


def train(setting: Setting, folder: Path) -> Any:
    """Trains to the end, and saves on the way."""
    folder.mkdir()
    with strategy_of(setting.mode).scope():
        model = make_model(setting, setting.mode)
        recorder = Recorder(folder)
        if setting.format in CALLBACKS:
            callback = CALLBACKS[setting.format](folder)
            fit(model, 0, recorder, callback, end=EPOCHS)
        else:
            fit(model, 0, end=EPOCHS // 2)
            save(model, setting.format, folder)
            fit(model, EPOCHS // 2, recorder, end=EPOCHS)
    return recorder.state, recorder.losses, state(model)


def save(model: keras.Model, format: str, folder: Path) -> None:
    if format == "keras":
        model.save(folder / "model.keras")
    elif format == "weights":
        model.save_weights(folder / "model.weights.h5")
    else:
        manager_of(model, folder).save()


def manager_of(model: keras.Model, folder: Path) -> Any:
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    return tf.train.CheckpointManager(
        checkpoint, str(folder / "checkpoints"), max_to_keep=1
    )


def resume(setting: Setting, folder: Path) -> Any:
    """Goes on from what `train` has saved, which was in another process."""
    mode = setting.resumed or setting.mode
    with strategy_of(mode).scope():
        recorder = Recorder(folder)
        callbacks: list[Any] = [recorder]
        if setting.format in ("keras", "model_checkpoint"):
            name = "middle/2.keras"
            if setting.format == "keras":
                name = "model.keras"
            model = keras.models.load_model(folder / name)
            if mode != setting.mode:
                model.compile(model.optimizer, "mse", **MODES[mode])
        else:
            model = make_model(setting, mode)
            for variable in model.variables:
                variable.assign(variable + 1.0)
        if setting.format == "weights":
            model.optimizer.build(model.trainable_variables)
            model.load_weights(folder / "model.weights.h5")
        elif setting.format == "checkpoint":
            model.optimizer.build(model.trainable_variables)
            manager = manager_of(model, folder)
            path = manager.latest_checkpoint
            manager.checkpoint.restore(path).assert_consumed()
        start = EPOCHS // 2
        if setting.format == "backup":
            (folder / "now").rename(folder / "end")
            shutil.copytree(folder / "middle", folder / "now")
            callbacks.append(CALLBACKS["backup"](folder))
            start = 0  # The callback knows better.
        fit(model, start, *callbacks, end=EPOCHS)
    return recorder.state, recorder.losses, state(model)


def outcome(function: Any, setting: Setting, folder: Path) -> Any:
    """What `function` returns, or the text of its error."""
    keras.backend.clear_session()
    if setting.option == "mixed_float16":
        # Also for loading: `load_model` scales the loss by the policy it finds.
        keras.config.set_dtype_policy("mixed_float16")
    try:
        return function(setting, folder)
    except Exception:  # For the test of this setting alone.
        return traceback.format_exc()
    finally:
        keras.config.set_dtype_policy("float32")


DEFAULT = [
    *(Setting("BlockAdam", format, "eager") for format in FORMATS),
    Setting("BlockAdam", "checkpoint", "eager", "accumulation"),
    Setting("BlockRMSprop", "weights", "eager", "mixed_float16"),
    Setting("BAGM", "backup", "eager", "ema"),
    Setting("BlockAdam", "keras", "xla", "skip"),
    Setting("BAG", "weights", "xla"),
    Setting("AdamMini", "model_checkpoint", "xla", "mixed_float16"),
    Setting("BAGM", "backup", "replicas", "ema"),
    Setting("BlockRMSprop", "checkpoint", "graph", "plain", "replicas"),
    Setting("BlockAdam", "weights", "replicas", "plain", "graph"),
]
EVERY = {
    *(Setting(o, format, "eager") for o in OPTIMIZERS for format in FORMATS),
    *(Setting(o, "weights", "xla") for o in OPTIMIZERS),
    *(Setting(o, "weights", "replicas") for o in OPTIMIZERS),
    *(
        Setting("BlockAdam", format, "eager", option)
        for option in OPTIONS
        for format in FORMATS
    ),
    *(
        Setting("BlockAdam", "checkpoint", mode, option)
        for option in OPTIONS
        for mode in ("xla", "replicas")
        # Keras accumulates gradients on one device only.
        if (option, mode) != ("accumulation", "replicas")
    ),
    *(
        Setting("BlockAdam", format, mode)
        for format in FORMATS
        for mode in ("xla", "replicas")
    ),
    *(
        Setting("BlockAdam", format, one, "plain", other)
        for format in FORMATS
        for one, other in (("graph", "replicas"), ("replicas", "graph"))
    ),
}
SETTINGS = [*DEFAULT, *sorted(EVERY - {*DEFAULT})]


def main() -> None:
    folder = Path(sys.argv[1])
    outcomes = {}
    for number in map(int, sys.argv[2:]):
        setting = SETTINGS[number]
        outcomes[number] = outcome(resume, setting, folder / str(number))
    (folder / f"{os.getpid()}.part").write_bytes(pickle.dumps(outcomes))
    (folder / f"{os.getpid()}.part").rename(folder / "outcomes.pickle")


if __name__ == "__main__":
    main()
