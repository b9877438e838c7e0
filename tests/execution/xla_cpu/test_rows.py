"""Updates in rows: the numbers of whole ones, and where they are."""

import numpy as np
import pytest
import tensorflow as tf

from helpers.arrays import assert_close
from helpers.cases import few_classes
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.programs import compiled_functions
from helpers.programs import has_loop
from helpers.replicas import distribute
from helpers.replicas import local_values
from helpers.replicas import replica_gradients
from helpers.replicas import two_replicas
from helpers.training import falling
from helpers.training import train
from keras_blockwise import BAGM
from keras_blockwise import BlockAdam
from keras_blockwise.algorithm import rounding
from keras_blockwise.algorithm.eight_bits import Encoding
from keras_blockwise.algorithm.eight_bits import Groups
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.execution.xla_cpu import encoded
from keras_blockwise.execution.xla_cpu.rows import Pass
from keras_blockwise.execution.xla_cpu.rows import merging_axes
from keras_blockwise.execution.xla_cpu.rows import rows_of
from keras_blockwise.execution.xla_cpu.rows import rows_of_each

# Square, odd, of rank 1 to 4; the smallest is never cut.
SHAPES = {
    "dense/kernel": (8, 8),
    "dense/bias": (12,),
    "embedding/embeddings": (12, 5),
    "conv2d/kernel": (3, 3, 4, 2),
    "query/kernel": (8, 2, 3),
    "odd/kernel": (7, 3),
}
# With several groups of a momentum in 8 bits, whose rows have one or more.
IN_8_BITS = {
    "dense/kernel": (768, 8),
    "dense/bias": (12,),
    "embedding/embeddings": (12, 300),
    "conv2d/kernel": (3, 3, 64, 4),
}
# The names of variables say little of their blocks.
NAMES = pytest.mark.filterwarnings("ignore:Names and shapes")
pytestmark = [pytest.mark.tensorflow, NAMES]


@pytest.fixture
def is_cut(short_rows, cut_from):
    """Whether an update is cut into rows; if so, it has the same numbers."""

    def check(make, dtype="float32", gradients=None, atol=1e-9, shapes=SHAPES):
        gradients = gradients or make_gradients(3, shapes)
        results, loops = [], []
        for least in (1, 10**9):
            cut_from(least)
            optimizer = make(jit_compile=True)
            weights = make_variables(shapes, dtype)
            ends = train(optimizer, weights, gradients, before=falling)
            results.append(ends)
            loops.append(has_loop(compiled_functions(optimizer)[0]))
        assert not loops[1]
        assert_close(*results, 2e-6, atol)
        return loops[0]

    return check


@pytest.mark.parametrize("blocking", ["variable", "coordinate"])
@few_classes
def test_rows_have_the_numbers_of_the_whole(case, blocking, is_cut):
    def make(**kwargs):
        return case.make(weight_decay=0.1, blocking=blocking, **kwargs)

    # Each coordinate takes steps of 0.1, with their rounding, also to zero.
    atol = 1e-8 if blocking == "coordinate" else 1e-9
    cut = is_cut(make, atol=atol)
    rule = case.make().rule()
    assert cut == (
        blocking == "coordinate"
        or (rule.momentum.has_state and not rule.momentum_of_gradient)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", ["output_unit", "input_unit", "layer", "model", "none"]
)
def test_rows_of_other_blocks(scheme, is_cut):
    def make(**kwargs):
        return BAGM(blocking=scheme, **kwargs)

    assert is_cut(make)


@pytest.mark.parametrize(
    "cls, scheme, skip_nonfinite",
    [(BlockAdam, "output_unit", False), (BAGM, "variable", True)],
)
def test_rows_of_a_momentum_in_8_bits(cls, scheme, skip_nonfinite, is_cut):
    def make(**kwargs):
        return cls(
            blocking=scheme,
            momentum_dtype="int8",
            skip_nonfinite=skip_nonfinite,
            **kwargs,
        )

    gradients = make_gradients(4, IN_8_BITS)
    if skip_nonfinite:
        gradients[2][0][-1, -1] = np.inf
    assert is_cut(make, gradients=gradients, shapes=IN_8_BITS)


@pytest.mark.parametrize(
    "stored, dtype", [("momentum", "bfloat16"), ("weights", "float16")]
)
def test_no_rows_of_16_bits(stored, dtype, is_cut):
    """XLA would copy all of a variable to write one of its rows."""
    momentum_dtype, weight_dtype = {
        "momentum": (dtype, "float32"),
        "weights": ("float32", dtype),
    }[stored]

    def make(**kwargs):
        return BAGM(momentum_dtype=momentum_dtype, **kwargs)

    assert not is_cut(make, weight_dtype)


def test_rows_of_float64(is_cut):
    assert is_cut(BAGM, "float64")


def test_a_skipped_step_leaves_every_row(is_cut):
    def make(**kwargs):
        return BAGM(skip_nonfinite=True, **kwargs)

    gradients = make_gradients(3, SHAPES)
    gradients[1][0][-1, -1] = np.inf
    assert is_cut(make, gradients=gradients)


def test_an_infinite_weight_changes_its_own_row_alone(short_rows):
    """Also where it is looked at to know that it has been written."""
    results = []
    for jit_compile in (True, False):
        variables = make_variables(SHAPES)
        kernel = np.array(variables[0])
        kernel[::2, 0] = np.inf
        variables[0].assign(kernel)
        optimizer = BAGM(blocking="variable", jit_compile=jit_compile)
        results.append(train(optimizer, variables, make_gradients(1, SHAPES)))
    assert_close(*results, 2e-6)


def update(shape, *inputs):
    *arrays, values = (np.broadcast_to(0.0, i) for i in (*inputs, shape, shape))
    return Pass(None, tuple(arrays), (values,), in_rows=True)


@pytest.mark.parametrize(
    "shape, scale, axes",
    [
        ((6, 4), (1, 1), 2),
        ((6, 4), (1, 4), 1),
        ((6, 4), (6, 1), 1),
        ((6, 4), (6, 4), 2),
        ((3, 3, 8, 4), (1, 1, 1, 4), 3),
        ((3, 3, 8, 4), (1, 1, 8, 1), 2),
        ((1, 6, 4), (1, 6, 1), 2),
        ((6, 1, 4), (1, 1, 4), 2),
        ((1, 1), (1, 1), 2),
        ((), (), 0),
    ],
)
def test_axes_that_can_be_one(shape, scale, axes):
    assert merging_axes(update(shape, scale)) == axes


def test_how_many_rows():
    # 2 ** 15 entries in each, or fewer if that is not a divisor.
    assert rows_of(update((1024, 1024), (1, 1))) == 32
    assert rows_of(update((1024, 1024), (1, 1024))) == 32
    assert rows_of(update((768, 768), (1, 1))) == 18
    assert rows_of(update((768, 3072), (1, 3072))) == 96
    assert rows_of(update((50257, 768), (50257, 1))) == 1733
    assert rows_of(update((2**20,))) == 32
    # Less than 2 ** 18 entries, rows of less than 2 ** 13, more than 2 ** 15.
    assert rows_of(update((512, 512), (1, 1))) == 8
    assert rows_of(update((511, 512), (1, 1))) == 1
    assert rows_of(update((1031, 1024), (1, 1024))) == 1
    assert rows_of(update((4, 2**18), (1, 2**18))) == 1
    assert rows_of(update((1024, 1024))._replace(in_rows=False)) == 1


def with_groups(shape, block_shape):
    """An update whose momentum is kept in 8 bits."""
    *rows, n = shape
    partition = Partition(shape, block_shape)
    scale = tuple(n // b for n, b in zip(shape, block_shape))
    encoding = Encoding(
        Groups.of(partition),
        (np.empty((*rows, 1)), np.empty((*(1 for _ in rows), n))),
    )
    return update(shape, scale)._replace(encoding=encoding)


def test_rows_have_whole_groups():
    # Of 256 neighbours in a column.
    assert rows_of(with_groups((768, 3072), (768, 1))) == 3
    assert rows_of(with_groups((3, 3, 256, 256), (3, 3, 256, 1))) == 9
    # Of 256 neighbours in a row: at least 2 ** 13 entries, and whole rows of
    # the variable, since random numbers are drawn from each of these.
    assert rows_of(with_groups((50257, 768), (1, 768))) == 1733
    assert rows_of(with_groups((1024, 1024), (1024, 1024))) == 128
    # More than 2 ** 20 entries, one group in a column, a shorter one at its
    # end, and groups whose largest entries are not found in two loops.
    assert rows_of(with_groups((512, 2**13), (512, 1))) == 1
    assert rows_of(with_groups((256, 1024), (256, 1))) == 1
    assert rows_of(with_groups((1031, 1024), (1031, 1))) == 1
    assert rows_of(with_groups((2048, 241), (1, 241))) == 1


def test_what_is_cut():
    bias, large = update((1024,), (1,)), update((1024, 1024), (1, 1))
    assert rows_of_each([bias, *[large] * 16], cores=2) == {
        i: 32 for i in range(1, 17)
    }
    # Too few loops for the cores, of which no more than four make any.
    assert not rows_of_each([bias, *[large] * 15], cores=2)
    assert not rows_of_each([bias, *[large] * 16], cores=3)
    assert len(rows_of_each([bias, *[large] * 32], cores=64)) == 32
    # The smallest is left, and what would keep one of the cores too long.
    assert not rows_of_each([large] * 16, cores=2)
    assert 0 not in rows_of_each([large] * 17, cores=2)
    larger = update((2**15, 1024), (1, 1))
    assert 17 not in rows_of_each([bias, *[large] * 16, larger], cores=2)
    assert 17 in rows_of_each([bias, *[large] * 16, larger], cores=1)


def test_a_step_under_a_strategy_is_cut_on_each_replica(short_rows):
    strategy = two_replicas()
    with strategy.scope():
        optimizer = BAGM(0.1, blocking="variable", jit_compile=True)
        variables = make_variables(SHAPES)
        optimizer.build(variables)
    (replicas,), sums = replica_gradients(strategy, 1, SHAPES)

    @tf.function(autograph=False)
    def step(*given):
        strategy.run(lambda *given: optimizer.apply(given), given)

    step(*distribute(strategy, list(map(tensors, replicas))))
    twin = BAGM(0.1, blocking="variable", jit_compile=False)
    expected = train(twin, make_variables(SHAPES), sums)
    assert len(compiled_functions(optimizer)) == 2
    assert all(map(has_loop, compiled_functions(optimizer)))
    for variable, value in zip(variables, expected):
        assert_close(local_values(strategy, variable), [value, value], 2e-5)


def test_nearest_is_that_of_the_plain_path():
    most = 127 * rounding.UNIT
    x = np.linspace(-most, most, 10001, dtype=np.float32)
    x = np.concatenate([x, [-1.5, -0.5, -0.25, -0.0, 0.5, 1.5, 2.5]])
    compiled = tf.function(encoded.nearest, jit_compile=True)
    for function in (encoded.nearest, compiled):
        received = function(tf.constant(x, tf.float32))
        assert received.dtype == tf.int32
        np.testing.assert_array_equal(received, rounding.nearest(x))
