"""Trains, saves and goes on: one half of `test_resume.py` in each process.

    python -m workers.resume FOLDER NUMBER...

goes on with the settings of these numbers from what is in FOLDER, and writes
there what has become of them.
"""

import itertools
import os
import pickle
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras

import keras_blockwise as kb
from helpers import devices
from helpers.arrays import to_numpy
from helpers.models import HAS_XLA
from helpers.models import mlp
from helpers.models import product_data
from helpers.models import state_of
from helpers.saving import dtype_policy
from helpers.saving import load
from helpers.saving import save
from helpers.tensorflow import scope_of
from helpers.tensorflow import strategy_of

OPTIMIZERS = {
    "BlockAdam": (kb.BlockAdam, {"amsgrad": True, "weight_decay": 0.01}),
    "AdamMini": (kb.AdamMini, {"momentum_dtype": "bfloat16"}),
    "Adalayer": (
        kb.Adalayer,
        {"sgd_learning_rate": 0.1, "output_layer": ".*bias"},
    ),
    "BlockNadam": (
        kb.BlockNadam,
        {"weight_decay": 0.01, "momentum_dtype": "int8"},
    ),
    "BAGM": (kb.BAGM, {"accumulator": "polynomial", "blocking": "layer"}),
    "BlockMuon": (kb.BlockMuon, {"output_layer": ".*bias"}),
    "BAG": (kb.BAG, {"blocking": "model"}),
    "BlockRMSprop": (kb.BlockRMSprop, {"centered": True, "momentum": 0.5}),
    "BCOS": (kb.BCOS, {}),
    "AdaBlock": (kb.AdaBlock, {"layers_per_step": 1, "seed": 1}),
    "SPAM": (kb.SPAM, {"reset_every": 4, "reset_warmup": 2}),
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
    "xla": {"jit_compile": HAS_XLA},
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
            self.state = to_numpy(state_of(self.model))
            now, middle = self.folder / "now", self.folder / "middle"
            if now.exists() and not middle.exists():
                shutil.copytree(now, middle)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.state:
            self.losses.append(logs["loss"])


def model_of(setting: Setting, mode: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = mlp()
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


def fit_from(model: keras.Model, start: int, *callbacks: Any, end: int) -> None:
    model.fit(
        *product_data(12),
        batch_size=4,
        initial_epoch=start,
        epochs=end,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )


def begin(setting: Setting, folder: Path) -> Any:
    """Trains to the end, and saves on the way."""
    folder.mkdir()
    with scope_of(strategy_of(setting.mode)):
        model = model_of(setting, setting.mode)
        recorder = Recorder(folder)
        if setting.format in CALLBACKS:
            callback = CALLBACKS[setting.format](folder)
            fit_from(model, 0, recorder, callback, end=EPOCHS)
        else:
            fit_from(model, 0, end=EPOCHS // 2)
            save(model, setting.format, folder)
            fit_from(model, EPOCHS // 2, recorder, end=EPOCHS)
    return recorder.state, recorder.losses, to_numpy(state_of(model))


def resume(setting: Setting, folder: Path) -> Any:
    """Goes on from what `begin` has saved, which was in another process."""
    mode = setting.resumed or setting.mode
    with scope_of(strategy_of(mode)):
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
            model = model_of(setting, mode)
            for variable in model.variables:
                variable.assign(variable + 1.0)
        if setting.format in ("weights", "checkpoint"):
            model.optimizer.build(model.trainable_variables)
            load(model, setting.format, folder)
        start = EPOCHS // 2
        if setting.format == "backup":
            (folder / "now").rename(folder / "end")
            shutil.copytree(folder / "middle", folder / "now")
            callbacks.append(CALLBACKS["backup"](folder))
            start = 0  # The callback knows better.
        fit_from(model, start, *callbacks, end=EPOCHS)
    return recorder.state, recorder.losses, to_numpy(state_of(model))


def outcome(function: Any, setting: Setting, folder: Path) -> Any:
    """What `function` returns, or the text of its error."""
    keras.backend.clear_session()
    mixed = setting.option == "mixed_float16"
    # Also for loading: `load_model` scales the loss by the policy it finds.
    with dtype_policy("mixed_float16" if mixed else "float32"):
        try:
            return function(setting, folder)
        except Exception:  # For the test of this setting alone.
            return traceback.format_exc()


DEFAULT = [
    Setting("BlockAdam", "keras", "eager"),
    Setting("BlockNadam", "checkpoint", "eager", "accumulation"),
    Setting("BlockRMSprop", "weights", "eager", "mixed_float16"),
    Setting("SPAM", "backup", "eager", "ema"),
    Setting("BAGM", "backup", "replicas", "ema"),
]
WAYS = [("keras", "eager"), ("weights", "xla"), ("checkpoint", "replicas")]
EVERY = {
    *(Setting("BlockAdam", format, "eager") for format in FORMATS),
    *(
        Setting(optimizer, *how)
        for optimizer, how in zip(OPTIMIZERS, itertools.cycle(WAYS))
    ),
    *(
        Setting("BlockAdam", format, "eager", option)
        for option, format in zip(
            OPTIONS, itertools.cycle(("weights", "backup"))
        )
    ),
    # Keras accumulates gradients on one device only.
    Setting("BlockAdam", "checkpoint", "replicas", "skip"),
    Setting("BlockAdam", "checkpoint", "xla", "accumulation"),
    Setting("BlockAdam", "keras", "graph", "plain", "replicas"),
    Setting("BlockAdam", "checkpoint", "replicas", "plain", "graph"),
}
SETTINGS = [*DEFAULT, *sorted(EVERY - {*DEFAULT})]


def main() -> None:
    devices.set_up()
    folder = Path(sys.argv[1])
    outcomes = {}
    for number in map(int, sys.argv[2:]):
        setting = SETTINGS[number]
        outcomes[number] = outcome(resume, setting, folder / str(number))
    (folder / f"{os.getpid()}.part").write_bytes(pickle.dumps(outcomes))
    (folder / f"{os.getpid()}.part").rename(folder / "outcomes.pickle")


if __name__ == "__main__":
    main()
