"""A training step in a file, which TFLite reads without XLA."""

import pytest
import tensorflow as tf

import keras_blockwise as kb
from helpers.cases import make_variables

pytestmark = pytest.mark.tensorflow

# Its sums are in parts, with barriers between them.
SHAPE = (256, 1024)


class Trainer(tf.Module):
    """A model with a training step of known shapes."""

    def __init__(self, optimizer):
        (self.kernel,) = make_variables({"dense/kernel": SHAPE})
        self.optimizer = optimizer
        self.optimizer.build([self.kernel])
        self.weights = self.kernel.value  # A module must know it.

    @tf.function(input_signature=[tf.TensorSpec(SHAPE)], autograph=False)
    def train(self, gradient):
        self.optimizer.apply([gradient], [self.kernel])
        return {"sum": tf.reduce_sum(self.weights)}


def needs_xla(concrete):
    functions = concrete.graph.as_graph_def().library.function
    return any("Xla" in n.op for f in functions for n in f.node_def)


def save(trainer, path):
    signatures = {"train": trainer.train}
    tf.saved_model.save(trainer, str(path), signatures=signatures)
    return tf.lite.TFLiteConverter.from_saved_model(str(path))


def hand_over(trainer, path):
    concrete = trainer.train.get_concrete_function()
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete], trainer)


@pytest.mark.parametrize(
    "converter_of", [pytest.param(save, marks=pytest.mark.slow), hand_over]
)
def test_tflite_reads_a_training_step(converter_of, tmp_path):
    converter = converter_of(Trainer(kb.BAGM()), tmp_path)
    converter.experimental_enable_resource_variables = True
    assert converter.convert()


@pytest.mark.parametrize(
    "jit_compile, called, expected",
    [
        ("auto", False, False),
        ("auto", True, True),
        (True, False, True),
        (False, True, False),
    ],
)
def test_what_only_xla_has_is_in_a_graph(jit_compile, called, expected):
    trainer = Trainer(kb.BAGM(jit_compile=jit_compile))
    if called:
        trainer.train(tf.ones(SHAPE))
    assert needs_xla(trainer.train.get_concrete_function()) == expected


def test_specifications_and_values_of_arguments():
    trainer = Trainer(kb.BAGM())
    for arguments, expected in (
        ([tf.TensorSpec(SHAPE)], False),
        ([tf.ones(SHAPE)], True),
    ):
        train = tf.function(trainer.train.python_function, autograph=False)
        assert needs_xla(train.get_concrete_function(*arguments)) == expected
