"""Models that nobody here wrote, and what all of them must pass."""

from pathlib import Path

import keras
import numpy as np

import keras_blockwise as kb
from helpers.processes import run_script
from keras_blockwise.blocking.schemes import SCHEMES

# Trained in this process and in another one, on one step each.
SCRIPT = """
import json
import sys

import keras
from helpers import devices
from helpers.real_models import example_batch
from helpers.real_models import described
from helpers.real_models import step

{imports}
import keras_blockwise

devices.set_up()  # As many threads: another order of sums changes a sign here.
keras.utils.set_random_seed(1)
for path in sys.argv[1:]:
    model = keras.models.load_model(path)
    before = described(model.optimizer)
    loss = step(model, *example_batch(model))
    print(json.dumps([path, before, loss]))
"""


def example_batch(model):
    """Two examples that fit the inputs of a model."""
    rng = np.random.default_rng(0)
    x = {}
    for tensor in model.inputs:
        shape = (2, *(8 if n is None else n for n in tensor.shape[1:]))
        if "mask" in tensor.name:
            x[tensor.name] = np.ones(shape, "int32")
        elif "int" in tensor.dtype:
            top = 2 if "segment" in tensor.name else 32
            x[tensor.name] = rng.integers(top, size=shape)
        else:
            x[tensor.name] = rng.normal(size=shape).astype("float32")
    x = x if isinstance(model.input, dict) else next(iter(x.values()))
    return x, np.array([0, 1])


def step(model, x, y):
    return model.fit(x, y, verbose=0).history["loss"][0]


def described(optimizer):
    return [
        [list(p.shape), list(p.block_shape), p.group]
        for p in optimizer.partitions
    ]


def block_adam(model, scheme):
    return kb.BlockAdam(blocking=kb.Blocking.from_model(model, scheme))


def compile_with(model, optimizer):
    """Eager, since a graph of a whole model takes longer than its step."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, run_eagerly=True)


def check_partitions(model):
    """Every variable has blocks under every scheme, and none by guess.

    A guess would be a warning, and that an error.
    """
    variables = model.trainable_variables
    for scheme in SCHEMES:
        rows = kb.Blocking.from_model(model, scheme).resolve(variables)
        assert len(rows) == len(variables)
        for row, variable in zip(rows, variables):
            assert row.kind != "unknown", variable.path
            assert row.partition.shape == tuple(variable.shape)


def check_tiles(model, expected):
    """Some tiles, by scheme and by what the path of a variable ends with."""
    for scheme, tiles in expected.items():
        blocking = kb.Blocking.from_model(model, scheme)
        rows = blocking.resolve(model.trainable_variables)
        paths = [variable.path for variable in model.trainable_variables]
        for end, tile in tiles.items():
            received = {
                (row.partition.shape, row.partition.block_shape)
                for path, row in zip(paths, rows)
                if path.endswith(end)
            }
            assert received == {tile}, (scheme, end)


def check_steps(model):
    """Steps of blocks of each kind, of gradients that are computed once."""
    x, y = example_batch(model)
    weights = model.get_weights()
    before = [np.array(v) for v in model.trainable_variables]
    compile_with(model, keras.optimizers.SGD(1.0))
    assert np.isfinite(step(model, x, y))
    gradients = [
        keras.ops.convert_to_tensor(old - np.array(new))
        for old, new in zip(before, model.trainable_variables)
    ]
    for scheme in ("output_unit", "layer", "adam_mini"):
        model.set_weights(weights)
        optimizer = block_adam(model, scheme)
        optimizer.apply(gradients, model.trainable_variables)
        for variable in model.trainable_variables:
            assert np.all(np.isfinite(variable)), variable.path
        moved = [
            np.any(old != new)
            for old, new in zip(before, model.trainable_variables)
        ]
        # Some have no gradient, such as the bias of a key.
        assert np.mean(moved) > 0.8


def check_saving(models, folder, imports=""):
    """Save, load in a new process and continue there.

    Args:
        models: Name to a model and the scheme of its optimizer.
        folder: Where they are saved.
        imports: What the other process must import.
    """
    expected = {}
    for name, (make, scheme) in models.items():
        model = make()
        compile_with(model, optimizer := block_adam(model, scheme))
        x, y = example_batch(model)
        step(model, x, y)
        path = str(Path(folder) / f"{name}.keras")
        model.save(path)
        expected[path] = [described(optimizer), step(model, x, y)]
    results = run_script(SCRIPT.format(imports=imports), *expected)
    received = {path: result for path, *result in results}
    assert received.keys() == expected.keys()
    for path, (partitions, loss) in expected.items():
        assert received[path][0] == partitions, path
        np.testing.assert_allclose(
            received[path][1], loss, rtol=1e-4, err_msg=path
        )
