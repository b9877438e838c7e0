"""Updates in rows: the numbers of whole ones, in place, and where they are."""

import re
from functools import partial

import numpy as np
import pytest
import tensorflow as tf
from cases import CASES
from cases import SCHEMES
from cases import make_gradients
from cases import make_variables
from cases import program_of
from replicas import two_replicas

from keras_blockwise import BAGM
from keras_blockwise import BlockAdam
from keras_blockwise import entries
from keras_blockwise.entries import EntryUpdate
from keras_blockwise.entries import is_divided_unevenly
from keras_blockwise.entries import merging_axes
from keras_blockwise.entries import rows_of
from keras_blockwise.entries import rows_of_each

# Square, odd, of rank 1 to 4; the smallest is never cut.
SHAPES = {
    "dense/kernel": (8, 8),
    "dense/bias": (12,),
    "embedding/embeddings": (12, 5),
    "conv2d/kernel": (3, 3, 4, 2),
    "query/kernel": (8, 2, 3),
    "odd/kernel": (7, 3),
}
# The names of variables say little of their blocks.
pytestmark = pytest.mark.filterwarnings("ignore:Names and shapes")
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture
def short_rows(monkeypatch):
    """Cuts whatever gains from it, but for the smallest, however small."""
    monkeypatch.setattr(entries, "SHORTEST", 1)
    monkeypatch.setattr(entries, "LONGEST", 16)
    monkeypatch.setattr(entries, "LARGE", 1)
    monkeypatch.setattr(entries, "PER_CORE", 0)


def train(make, gradients, dtype="float32", shapes=SHAPES):
    """The weights and the state after some steps of another learning rate."""
    optimizer = make(jit_compile=True)
    variables = make_variables(shapes, dtype)
    for step, values in enumerate(gradients):
        optimizer.learning_rate = 0.1 / (1 + step)
        optimizer.apply([tf.constant(g, dtype) for g in values], variables)
    function = next(iter(optimizer._cache.functions.values()))
    return [np.float64(v) for v in variables + optimizer.variables], function


def has_loop(function):
    return any(
        op.type.endswith("While") for op in function.graph.get_operations()
    )


def check(
    make, monkeypatch, dtype="float32", steps=3, gradients=None, atol=1e-9
):
    gradients = gradients or make_gradients(steps, SHAPES)
    in_rows, function = train(make, gradients, dtype)
    with monkeypatch.context() as context:
        context.setattr(entries, "LARGE", 10**9)
        whole, whole_function = train(make, gradients, dtype)
    assert not has_loop(whole_function)
    assert len(in_rows) == len(whole)
    for actual, expected in zip(in_rows, whole):
        np.testing.assert_allclose(actual, expected, 2e-6, atol)
    return has_loop(function)


@pytest.mark.parametrize("blocking", ["variable", "coordinate"])
@by_case
def test_rows_have_the_numbers_of_the_whole(
    case, blocking, short_rows, monkeypatch
):
    def make(**kwargs):
        return case.make(weight_decay=0.1, blocking=blocking, **kwargs)

    # Each coordinate takes steps of 0.1, with their rounding, also to zero.
    atol = 1e-8 if blocking == "coordinate" else 1e-9
    cut = check(make, monkeypatch, atol=atol)
    rule = case.make().rule()
    assert cut == (
        blocking == "coordinate"
        or (rule.momentum.has_state and not rule.momentum_of_gradient)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_every_scheme(scheme, short_rows, monkeypatch):
    def make(**kwargs):
        return BAGM(blocking=scheme, **kwargs)

    assert check(make, monkeypatch)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["momentum", "weights"])
def test_no_rows_of_16_bits(stored, dtype, short_rows, monkeypatch):
    """XLA would copy all of a variable to write one of its rows."""
    momentum_dtype, weight_dtype = {
        "momentum": (dtype, "float32"),
        "weights": ("float32", dtype),
    }[stored]

    def make(**kwargs):
        return BAGM(momentum_dtype=momentum_dtype, **kwargs)

    assert not check(make, monkeypatch, weight_dtype)


def test_rows_of_float64(short_rows, monkeypatch):
    assert check(BAGM, monkeypatch, "float64")


def test_a_skipped_step_leaves_every_row(short_rows, monkeypatch):
    def make(**kwargs):
        return BAGM(skip_nonfinite=True, **kwargs)

    gradients = make_gradients(3, SHAPES)
    gradients[1][0][-1, -1] = np.inf
    assert check(make, monkeypatch, gradients=gradients)


def test_an_infinite_weight_changes_its_own_row_alone(short_rows):
    """Also where it is looked at to know that it has been written."""
    variables = make_variables(SHAPES)
    kernel = np.array(variables[0])
    kernel[::2, 0] = np.inf
    variables[0].assign(kernel)
    optimizer = BAGM(blocking="variable", jit_compile=True)
    gradients = make_gradients(1, SHAPES)[0]
    optimizer.apply([tf.constant(g, "float32") for g in gradients], variables)
    twin = BAGM(blocking="variable", jit_compile=False)
    expected = make_variables(SHAPES)
    expected[0].assign(kernel)
    twin.apply([tf.constant(g, "float32") for g in gradients], expected)
    for actual, value in zip(variables, expected):
        np.testing.assert_allclose(actual, value, 2e-6)
    for actual, value in zip(optimizer.variables, twin.variables):
        np.testing.assert_allclose(actual, value, 2e-6)


@pytest.mark.parametrize("scheme", ["variable", "output_unit"])
def test_rows_are_written_in_place(scheme, short_rows):
    """A copy for every row would make the step a hundred times slower."""
    program = program_of(BAGM(blocking=scheme), (512, 8), "ab")
    made = re.findall(r"= \w+\[([\d,]*)\]\S* (copy|fusion)\(", program)
    large = [
        operation
        for dims, operation in made
        if np.prod([int(n) for n in dims.split(",") if n]) == 512 * 8
    ]
    assert " while(" in program
    assert large == ["fusion"] * 4  # Two kernels, and the momentum of each.


@pytest.mark.parametrize("count", [3, 16], ids=["alone", "together"])
@pytest.mark.parametrize("scheme", ["variable", "output_unit"])
def test_a_sum_stands_next_to_the_momentum(scheme, count):
    """In the order of the program, the gradient is still in the cache."""
    layers = [f"dense_{i}" for i in range(count)]
    program = program_of(BlockAdam(blocking=scheme), (96, 64), layers)
    main = program[program.index("ENTRY") :]
    # What reads a gradient, in order, and whether it makes a whole variable.
    reads = re.findall(r"= f32\[([\d,]*)\]\S* fusion\(%arg(\d+)\.", main)
    whole = [
        (dims == "96,64", int(gradient))
        for dims, gradient in reads
        if 2 <= int(gradient) < 2 + count
    ]
    assert whole == [(m, 2 + i) for i in range(count) for m in (False, True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cls", [BlockAdam, BAGM])
def test_a_narrow_momentum_needs_no_copy(cls, dtype):
    optimizer = cls(momentum_dtype="bfloat16")
    program = program_of(optimizer, (96, 64), "abc", dtype)
    main = program[program.index("ENTRY") :]
    made = re.findall(r"= (\w+)\[96,64\]\S* (?!parameter)(\w+)\(", main)
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    # The weights and the momentum of three kernels, and nothing else.
    assert sorted(made) == sorted([(kind, "fusion"), ("bf16", "fusion")] * 3)


@pytest.mark.parametrize("cls", [BlockAdam, BAGM])
def test_blocks_of_one_entry_need_no_other_memory(cls):
    """What the weights and the momentum both need is made twice, not kept."""
    program = program_of(cls(blocking="coordinate"), (96, 64), "abc")
    main = program[program.index("ENTRY") :]
    made = re.findall(r"= f32\[96,64\]\S* (?!parameter)(\w+)\(", main)
    # The weights, the momentum and the velocity of three kernels.
    assert made == ["fusion"] * 9


# Vectors of odd lengths, but for the last.
ODD = {
    "dense/bias": (7,),
    "embedding/embeddings": (9, 1),
    "dense_1/kernel": (1, 5),
    "dense_2/kernel": (3, 3),
}


@pytest.fixture
def two_cores(monkeypatch):
    """As if there were two, which share the smallest vector."""
    monkeypatch.setattr(
        tf.config.threading, "get_intra_op_parallelism_threads", lambda: 2
    )
    monkeypatch.setattr(entries, "DIVIDED", 2)


def parts(function):
    """How many parts of variables are written."""
    operations = function.graph.get_operations()
    return sum(op.type == "XlaDynamicUpdateSlice" for op in operations)


@pytest.mark.parametrize("blocking", ["variable", "coordinate"])
@by_case
def test_two_parts_have_the_numbers_of_the_whole(
    case, blocking, two_cores, monkeypatch
):
    def make(**kwargs):
        return case.make(weight_decay=0.1, blocking=blocking, **kwargs)

    gradients = make_gradients(3, ODD)
    in_parts, function = train(make, gradients, shapes=ODD)
    assert parts(function)
    monkeypatch.setattr(entries, "DIVIDED", 10)
    whole, function = train(make, gradients, shapes=ODD)
    assert not parts(function)
    for actual, expected in zip(in_parts, whole, strict=True):
        np.testing.assert_allclose(actual, expected, 2e-6, 1e-8)


def test_a_skipped_step_leaves_both_parts(two_cores):
    optimizer = BAGM(blocking="coordinate", skip_nonfinite=True)
    variables = make_variables(ODD)
    gradients = [np.ones(shape, "float32") for shape in ODD.values()]
    gradients[0][-1] = np.inf
    optimizer.apply([tf.constant(g) for g in gradients], variables)
    assert parts(next(iter(optimizer._cache.functions.values())))
    for actual, value in zip(variables, make_variables(ODD)):
        np.testing.assert_array_equal(actual, value)
    assert not any(np.any(v) for v in optimizer.variables if len(v.shape))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("blocking", ["variable", "coordinate"])
def test_no_parts_of_16_bits(blocking, dtype, two_cores):
    """XLA would copy all of a variable to write a part of it."""
    gradients = make_gradients(1, ODD)
    for stored in ((dtype, "float32"), ("float32", dtype)):
        momentum_dtype, weight_dtype = stored
        make = partial(BAGM, blocking=blocking, momentum_dtype=momentum_dtype)
        assert not parts(train(make, gradients, weight_dtype, ODD)[1])


def test_no_parts_of_several_variables(two_cores):
    """Each may have a weight decay of its own, entry by entry."""
    shapes = {f"dense_{i}/bias": (8 if i == 0 else 7,) for i in range(17)}
    gradients = make_gradients(1, shapes)
    # Sixteen are together, in a vector of 113; one is left over.
    assert parts(train(BAGM, gradients, shapes=shapes)[1]) == 2 * 3


@pytest.mark.parametrize("shape", [(4999,), (4999, 1), (1, 4999)])
@pytest.mark.parametrize("blocking", ["variable", "coordinate"])
@pytest.mark.parametrize("cls", [BlockAdam, BAGM])
def test_parts_are_written_in_place(cls, blocking, shape, two_cores):
    program = program_of(cls(blocking=blocking), shape, "abc")
    main = program[program.index("ENTRY") :]
    made = re.findall(
        r"= f32\[[\d,]*4999[\d,]*\]\S* (?!parameter|bitcast)(\w+)\(", main
    )
    numbers = {"variable": 2, "coordinate": 3}[blocking]
    # Two parts of the weights, of the momentum and perhaps of the velocity.
    assert made == ["fusion"] * 3 * 2 * numbers


@pytest.mark.parametrize(
    "shape, cores, divided",
    [
        ((25_001,), 2, True),
        ((1, 25_001, 1), 2, True),
        ((25_002,), 4, True),
        ((25_002,), 2, False),
        ((25_001,), 1, False),
        ((24_999,), 2, False),
        ((25_001, 3), 2, False),
        ((), 2, False),
    ],
)
def test_which_vectors_are_divided_unevenly(shape, cores, divided):
    vector = update(shape)
    assert is_divided_unevenly(vector, cores) == divided
    assert not is_divided_unevenly(vector._replace(in_parts=False), cores)


def body_of_loop(program):
    name = re.search(r" while\(.* body=(%[\w.]+)", program)[1]
    return re.search(rf"^{re.escape(name)} .*?^}}", program, re.M | re.S)[0]


def update(shape, *inputs):
    tensors = tuple(np.broadcast_to(0.0, i) for i in (*inputs, shape))
    return EntryUpdate(None, shape, tensors, (), in_parts=True, in_rows=True)


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


def test_loops_share_no_memory(short_rows):
    """Otherwise XLA would run them one after the other."""
    program = program_of(BAGM(blocking="output_unit"), (512, 8), "abc")
    made = re.findall(
        r"= (\w+\[[\d,]*\])\S* (fusion|copy)\(", body_of_loop(program)
    )
    # The kernel, its momentum, the next row, and whether there is one: the
    # state, which has the next row twice.
    assert sorted(made) == sorted([
        *[("f32[256,2,8]", "fusion")] * 2,
        ("f32[]", "fusion"), ("f32[]", "copy"), ("pred[]", "fusion"),
    ])  # fmt: skip
    # One kernel reads that of both loops when they have ended.
    main = program[program.index("ENTRY") :]
    scalar = (
        r"(%[\w.]+) = (?:f32|pred)\[\]\S* get-tuple-element\(%(?:while|call)"
    )
    state = set(re.findall(scalar, main))
    operands = re.findall(r"= f32\[512,8\]\S* fusion\((.*?)\)", main)
    assert len(state) == 2 * 3
    assert any(state <= set(re.findall(r"%[\w.]+", own)) for own in operands)


def test_a_step_under_a_strategy_is_cut_on_each_replica(short_rows):
    strategy = two_replicas()
    with strategy.scope():
        optimizer = BAGM(0.1, blocking="variable")
        variables = make_variables(SHAPES)
        optimizer.build(variables)
    values = make_gradients(2, SHAPES)

    @tf.function
    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        gradients = [
            tf.cast(tf.where(replica == 0, a, b), tf.float32)
            for a, b in zip(*values)
        ]
        optimizer.apply(gradients, variables)

    strategy.run(step)
    twin = BAGM(0.1, blocking="variable", jit_compile=False)
    expected = make_variables(SHAPES)
    twin.apply(
        [tf.constant(a + b, "float32") for a, b in zip(*values)], expected
    )
    assert len(optimizer._cache.functions) == 2
    assert all(map(has_loop, optimizer._cache.functions.values()))
    for actual, value in zip(variables, expected):
        for copy in strategy.experimental_local_results(actual.value):
            np.testing.assert_allclose(copy, value, 2e-5)
