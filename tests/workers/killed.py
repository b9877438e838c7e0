"""Trains a model, kills the training eight times, and resumes it.

    python -m workers.killed FOLDER

writes what has become of it, and of a training that nobody killed, to
FOLDER/report.json, FOLDER/killed/end.npz and FOLDER/whole/end.npz.

Every training is a process of its own, forked from one that has imported
TensorFlow and done nothing with it: importing takes longer than all the rest.
"""

import itertools
import json
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_blockwise as kb
from helpers.models import mlp
from helpers.models import product_data
from helpers.models import state_of

KILLS = 8
STEPS_PER_EPOCH = 15
EPOCHS = 14
STEPS = EPOCHS * STEPS_PER_EPOCH


def batch_of(step: int) -> tuple[Any, Any]:
    """The batch of a step, whichever process asks for it."""
    return product_data(4, seed=step)


def new_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = mlp()
    schedule = keras.optimizers.schedules.CosineDecay(0.05, STEPS)
    optimizer = kb.BlockAdam(schedule, weight_decay=0.01, use_ema=True)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse")
    return model


def mend(folder: Path) -> None:
    """Mends what `BackupAndRestore` trips over.

    It writes its two files in place. Weights that cannot be opened it replaces
    by those before, if there are any, but a kill can also leave a file that
    HDF5 opens and cannot read. The file of the epoch does not matter here.
    """
    weights = folder / "latest.weights.h5"
    before = folder / "latest.weights.h5.bkp"
    epoch = folder / "training_metadata.json"
    if weights.exists():
        try:
            new_model().load_weights(weights)
        except (OSError, RuntimeError, KeyError):  # What h5py raises.
            if before.exists():
                shutil.copy(before, weights)
            else:
                weights.unlink()
    if epoch.exists():
        try:
            json.loads(epoch.read_text())
        except ValueError:
            epoch.unlink()


class Progress(keras.callbacks.Callback):
    """Tells the parent of each step, and stops after the last."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self.pipe = pipe

    def tell(self) -> int:
        step = int(self.model.optimizer.iterations)
        os.write(self.pipe, struct.pack("q", step))
        return step

    def on_train_begin(self, logs: Any = None) -> None:
        self.tell()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.tell() == STEPS:
            # Resumed within an epoch, Keras begins with a whole one.
            self.model.stop_training = True


def train_in(folder: Path, pipe: int) -> None:
    # This raises an error if TensorFlow had started before the fork.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    mend(folder / "backup")
    model = new_model()
    optimizer = model.optimizer

    def batches() -> Iterator[Any]:
        # Keras restores the epoch, not the batch; the optimizer has counted.
        return map(batch_of, itertools.count(int(optimizer.iterations)))

    data = tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec((4, 3), tf.float32),
            tf.TensorSpec((4, 1), tf.float32),
        ),
    )
    backup = keras.callbacks.BackupAndRestore(
        str(folder / "backup"),
        save_freq=4,
        double_checkpoint=True,
        delete_checkpoint=False,
    )
    model.fit(
        data,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        shuffle=False,
        verbose=0,
        callbacks=[backup, Progress(pipe)],
    )
    np.savez(folder / "end.npz", *map(np.array, state_of(model)))


def start(folder: Path) -> tuple[int, int]:
    """A new process that trains: its id, and the pipe it tells its steps."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    try:
        os.close(reader)
        train_in(folder, writer)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def steps_of(pipe: int) -> Iterator[int]:
    while message := os.read(pipe, 8):
        yield struct.unpack("q", message)[0]
    os.close(pipe)


def run(folder: Path, rng: random.Random | None) -> dict[str, int]:
    """Trains until the end, or until it is killed if there is an `rng`."""
    process, pipe = start(folder)
    steps = steps_of(pipe)
    seen = [next(steps)]
    if rng is not None:
        # Not always far enough for another backup, and often within one.
        seen += itertools.islice(steps, rng.randrange(10))
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(process, signal.SIGKILL)
    seen += steps
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return {"first": seen[0], "last": seen[-1], "status": status}


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "killed").mkdir()
    (folder / "whole").mkdir()
    rng = random.Random(0)
    report = {
        "whole": run(folder / "whole", None),
        "killed": [run(folder / "killed", rng) for _ in range(KILLS)],
        "end": run(folder / "killed", None),
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
