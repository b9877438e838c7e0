"""One compiled update, traced once, the same on every kind of strategy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_blockwise as kb
from helpers.arrays import assert_near
from helpers.arrays import to_numpy
from helpers.cases import CASES
from helpers.cases import Case
from helpers.cases import few_classes
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import marks_of
from helpers.cases import tensors
from helpers.programs import compiled_functions
from helpers.programs import count_traces
from helpers.programs import is_xla
from helpers.replicas import check_replicas
from helpers.replicas import distribute
from helpers.replicas import local_values
from helpers.replicas import replica_gradients
from helpers.replicas import train_plain
from helpers.replicas import train_replicas
from helpers.replicas import two_replicas
from helpers.training import falling
from helpers.training import graph
from helpers.training import train
from keras_blockwise.execution import tensorflow as execution
from keras_blockwise.execution.tensorflow import PLAIN_STEPS

pytestmark = pytest.mark.tensorflow
STEPS = 3
each_jit_compile = pytest.mark.parametrize("jit_compile", [True, False])


# Traces.

LEARNING_RATES = {
    "variable": 0.1,
    "schedule": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5),
    "callable": lambda: 0.1,
}


@pytest.mark.parametrize("kind", LEARNING_RATES)
def test_eager_steps_are_traced_once(kind):
    optimizer = kb.BAGM(LEARNING_RATES[kind], jit_compile=True)
    traces = count_traces(optimizer)
    variables = make_variables()
    for step, gradients in enumerate(make_gradients(6)):
        if kind == "variable":
            falling(optimizer, step)
        optimizer.apply(tensors(gradients), variables)
    assert int(optimizer.iterations) == 6
    assert len(traces) == len(compiled_functions(optimizer)) == 1


def test_eager_steps_do_not_print_the_gradients(monkeypatch):
    """As the text of an error does that TensorFlow itself catches."""
    optimizer = kb.BAGM(jit_compile=True)
    variables = make_variables()
    first, second = map(tensors, make_gradients(2))
    optimizer.apply(first, variables)
    printed = []
    kind = type(second[0])
    monkeypatch.setattr(kind, "__repr__", lambda x: printed.append(x) or "")
    optimizer.apply(second, variables)
    assert not printed
    repr(second[0])
    assert printed


def test_the_plain_update_is_run_each_time():
    """So that counting is known to count."""
    optimizer = kb.BAGM(jit_compile=False)
    traces = count_traces(optimizer)
    train(optimizer, make_variables(), make_gradients(4))
    assert len(traces) == 4
    assert not compiled_functions(optimizer)


@each_jit_compile
def test_steps_in_a_function_are_traced_once(jit_compile):
    optimizer = kb.BAGM(jit_compile=jit_compile)
    traces = count_traces(optimizer)
    train(optimizer, make_variables(), make_gradients(6), graph, falling)
    assert len(traces) == 1


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_one_trace_per_set_of_gradients():
    optimizer = kb.BAGM(blocking="model", jit_compile=True)
    traces = count_traces(optimizer)
    variables = make_variables()
    numbers = []
    for step, gradients in enumerate(make_gradients(8)):
        if step % 2:
            gradients[step % 3] = None
        optimizer.apply(tensors(gradients), variables)
        numbers.append(len(traces))
    # Missing are in turn: none, 1, none, 0, none, 2, none, 1.
    assert numbers == [1, 2, 2, 3, 3, 4, 4, 4]


def test_fit_traces_once():
    model = make_normalized()
    optimizer = kb.BAGM(LEARNING_RATES["schedule"], jit_compile=True)
    traces = count_traces(optimizer)
    model.compile(optimizer, loss="mse", jit_compile=False)
    model.fit(*DATA, batch_size=8, epochs=3, verbose=0)
    assert int(optimizer.iterations) == 6
    assert len(traces) == 1


def test_order_of_the_variables_has_no_effect():
    given = make_gradients(STEPS)
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        optimizer = kb.BAGM(0.1, blocking="layer")
        variables = make_variables()
        optimizer.build(variables)
        for gradients in map(tensors, given):
            optimizer.apply(
                [gradients[i] for i in order], [variables[i] for i in order]
            )
        results.append(to_numpy(variables))
    assert_near(*results)


# XLA.


def test_the_update_is_compiled_by_xla():
    optimizer = kb.BAGM(jit_compile=True)
    optimizer.apply(tensors(make_gradients(1)[0]), make_variables())
    (function,) = compiled_functions(optimizer)
    assert is_xla(function)


def test_steps_by_themselves_are_compiled_once_there_are_many():
    """By default; the numbers are those of the plain path before and after."""
    auto, plain = kb.BAGM(0.1), kb.BAGM(0.1, jit_compile=False)
    ends = []
    for optimizer in (auto, plain):
        variables = make_variables()
        for number, gradients in enumerate(make_gradients(PLAIN_STEPS + 2)):
            expected = number > PLAIN_STEPS and optimizer is auto
            assert len(compiled_functions(optimizer)) == expected
            optimizer.apply(tensors(gradients), variables)
        ends.append(to_numpy([*variables, *optimizer.variables]))
    assert_near(*ends)
    assert all(map(is_xla, compiled_functions(auto)))


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_each_set_of_gradients_is_counted_by_itself():
    optimizer = kb.BAGM()
    variables = make_variables()
    optimizer.build(variables)
    (gradients,) = make_gradients(1)
    for number in range(2 * PLAIN_STEPS):
        given = tensors(gradients)
        given[number % 2] = None
        optimizer.apply(given)
    assert not compiled_functions(optimizer)
    optimizer.apply(given)
    assert len(compiled_functions(optimizer)) == 1


@pytest.mark.parametrize(
    "jit_compile, large, expected",
    [(True, 100, 1), ("auto", 100, 0), ("auto", 1, 1), (False, 1, 0)],
)
def test_the_update_in_a_function_is_compiled_by_xla(
    jit_compile, large, expected, monkeypatch
):
    """By default if the variables are large, on average."""
    monkeypatch.setattr(execution, "LARGE", large)
    optimizer = kb.BAGM(jit_compile=jit_compile)
    optimizer.build(make_variables())
    apply = tf.function(optimizer.apply, autograph=False)
    graph = apply.get_concrete_function(tensors(make_gradients(1)[0])).graph
    functions = graph.as_graph_def().library.function
    compiled = [f for f in functions if f.attr["_XlaMustCompile"].b]
    assert len(compiled) == expected


@pytest.mark.parametrize("shape", [None, (None, 2)])
def test_a_gradient_whose_shape_a_graph_does_not_know(shape):
    ends = []
    for spec in ((3, 2), shape):
        optimizer = kb.BAGM(0.1, blocking="variable")
        variable = keras.Variable(np.ones((3, 2)))
        optimizer.build([variable])
        apply = tf.function(
            lambda g, o=optimizer: o.apply([g]),
            input_signature=[tf.TensorSpec(spec, tf.float32)],
            autograph=False,
        )
        apply(np.float32([[1, 2], [3, 4], [5, 6]]))
        ends.append(to_numpy([variable]))
    assert_near(*ends)


def test_the_names_of_the_update_come_after_those_of_the_gradients():
    optimizer = kb.BAGM(clipvalue=1.0, jit_compile=True)
    variables = make_variables()
    optimizer.build(variables)

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v**2) for v in variables])
        optimizer.apply(tape.gradient(loss, variables))

    operations = step.get_concrete_function().graph.get_operations()
    last_gradient = max(
        op.name for op in operations if op.name.startswith("gradient_tape/")
    )
    names = [op.name for op in operations if "PartitionedCall" in op.type]
    assert len(names) == 1
    assert names[0] > last_gradient


# Keras's training loop.

DATA = np.random.default_rng(0).normal(size=(2, 16, 3)).astype("float32")


def make_normalized():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(3),
        ]
    )


def fitted(optimizer, model=None, jit_compile=False):
    """Losses of each epoch, then the weights."""
    model = model or make_normalized()
    model.compile(optimizer, loss="mse", jit_compile=jit_compile)
    history = model.fit(*DATA, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return [history.history["loss"], *to_numpy(model.trainable_variables)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.id)
def test_fit_is_the_same_however_it_is_compiled(case):
    results = [
        fitted(case.make(0.1, jit_compile=ours), jit_compile=outer)
        for ours, outer in [
            (False, False),
            (True, False),
            (True, True),
            ("auto", "auto"),
        ]
    ]
    for result in results[1:]:
        assert_near(result, results[0], 2e-5)
    assert results[0][0][1] < results[0][0][0]


# TensorFlow's debugger, which sees every operation or raises an error.


@pytest.fixture
def check_numerics():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


@pytest.fixture
def dump_debug_info(tmp_path):
    writer = tf.debugging.experimental.enable_dump_debug_info(
        str(tmp_path), tensor_debug_mode="FULL_HEALTH"
    )
    yield writer
    tf.debugging.experimental.disable_dump_debug_info()


@pytest.mark.slow
@pytest.mark.parametrize("debugger", ["check_numerics", "dump_debug_info"])
def test_fit_under_a_debugger(debugger, request, monkeypatch):
    monkeypatch.setattr(execution, "PLAIN_STEPS", 2)
    expected = fitted(kb.BAGM(0.01, jit_compile=False))
    request.getfixturevalue(debugger)
    optimizer = kb.BAGM(0.01)
    assert_near(fitted(optimizer), expected)
    for _ in range(4):
        optimizer.apply(
            [tf.zeros(v.shape) for v in optimizer._trainable_variables]
        )
    assert not compiled_functions(optimizer)


def test_check_numerics_finds_the_update(check_numerics):
    optimizer = kb.BAGM(0.01)
    variable = keras.Variable(np.ones(3))
    optimizer.build([variable])
    with pytest.raises(tf.errors.InvalidArgumentError, match="Inf|NaN"):
        optimizer.apply([tf.constant([1.0, np.nan, 1.0])])


# Strategies.

# Four schemes at once: a layer and the rest of the model share an accumulator,
# a variable is one block, and a kernel has one for each output unit.
MIXED_SHAPES = {
    "dense/kernel": (4, 3),
    "dense/bias": (3,),
    "dense_1/kernel": (2, 2),
    "dense_2/kernel": (3, 2),
    "embedding/embeddings": (5, 2),
    "dense_3/bias": (2,),
}
MIXED = kb.Blocking(
    "model",
    {
        "dense/.*": "layer",
        "dense_1/kernel": "variable",
        "dense_2/kernel": "output_unit",
    },
)


@pytest.fixture
def strategy():
    return two_replicas()


@few_classes
def test_replicas_equal_one_device_on_the_sum(case, strategy):
    def make():
        return case.make(
            0.1, blocking=MIXED, weight_decay=0.1, jit_compile=False
        )

    check_replicas(strategy, make, MIXED_SHAPES)


@few_classes
def test_compiled_replicas_equal_one_device(case, strategy):
    def make():
        return case.make(0.1, blocking=MIXED, jit_compile=True)

    check_replicas(strategy, make, MIXED_SHAPES)


@pytest.mark.parametrize(
    "scheme", ["variable", "output_unit", "layer", "model"]
)
def test_schemes_on_replicas(scheme, strategy):
    def make():
        return kb.BlockAdam(
            0.1, amsgrad=True, blocking=scheme, jit_compile=False
        )

    check_replicas(strategy, make)


@each_jit_compile
@pytest.mark.parametrize("function", [True, False], ids=["function", "eager"])
def test_modes_on_replicas(function, jit_compile, strategy):
    def make():
        return kb.BAGM(0.1, blocking="layer", jit_compile=jit_compile)

    check_replicas(strategy, make, function=function)


@each_jit_compile
@pytest.mark.parametrize("function", [True, False], ids=["function", "eager"])
def test_one_device_strategy(function, jit_compile):
    strategy = tf.distribute.OneDeviceStrategy("CPU:1")

    def make():
        return kb.BAGM(0.1, blocking="layer", jit_compile=jit_compile)

    check_replicas(strategy, make, function=function)


def test_state_is_on_the_devices_of_the_variables(strategy):
    with strategy.scope():
        variables = make_variables()
        optimizer = kb.BAGM()
        optimizer.build(variables)
    for variable in optimizer.variables:
        values = strategy.experimental_local_results(variable.value)
        assert [value.device[-5:] for value in values] == ["CPU:0", "CPU:1"]


def test_replicas_are_traced_once(strategy):
    with strategy.scope():
        variables = make_variables()
        optimizer = kb.BAGM(jit_compile=True)
        optimizer.build(variables)
    traces = count_traces(optimizer)
    for step, replicas in enumerate(replica_gradients(strategy, 4)[0]):
        falling(optimizer, step)
        strategy.run(
            lambda *given: optimizer.apply(list(given)),
            distribute(strategy, list(map(tensors, replicas))),
        )
    assert len(traces) == len(compiled_functions(optimizer)) == 2
    assert all(map(is_xla, compiled_functions(optimizer)))


@few_classes
def test_fit_on_replicas(case, strategy):
    expected = fitted(case.make(0.1, blocking="layer"))
    with strategy.scope():
        model = make_normalized()
        optimizer = case.make(0.1, blocking="layer")
    assert_near(fitted(optimizer, model), expected, 2e-5)
    for variable in [*model.trainable_variables, *optimizer.variables]:
        first, second = local_values(strategy, variable)
        np.testing.assert_array_equal(first, second)


OPTIONS = {
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.25},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "gradient_accumulation": {"gradient_accumulation_steps": 2},
    "use_ema": {"use_ema": True, "ema_overwrite_frequency": 2},
    "weight_decay": {"weight_decay": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_on_replicas_are_those_of_keras(name, strategy):
    """Keras clips the gradient of each replica before it adds them up."""
    replicas, _ = replica_gradients(strategy, 4)
    results = [
        train_replicas(strategy, make, replicas, False)
        for make in (
            lambda: kb.BlockAdam(
                0.1, blocking="coordinate", jit_compile=False, **OPTIONS[name]
            ),
            lambda: keras.optimizers.Adam(0.1, **OPTIONS[name]),
        )
    ]
    for actual, expected in zip(*results):
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(actual, expected, 1e-5, 1e-5 * scale)


# Sparse gradients.

EMBEDDINGS = {"embedding/embeddings": (5, 2), "dense/kernel": (2, 3)}
ROWS = [[3, 0, 3, 3], [1, 1, 4, 0], [2, 2, 2, 2]]


def slices(seed=0):
    """Rows, often more than once, their values and a gradient of a kernel."""
    rng = np.random.default_rng(seed)
    return [
        (
            np.array(ROWS[(step + seed) % 3]),
            rng.normal(size=(4, 2)).astype("float32"),
            rng.normal(size=(2, 3)).astype("float32"),
        )
        for step in range(4)
    ]


def sparse(given):
    rows, values, kernel = given
    return [tf.IndexedSlices(values, rows, (5, 2)), kernel]


def densified(given):
    """By a product: what each of the rows adds to each row of the table."""
    rows, values, kernel = given
    return [tf.one_hot(rows, 5, axis=0) @ values, kernel]


SPARSE_OPTIONS = [
    {},
    {"clipnorm": 0.5},
    {"clipvalue": 0.25},
    {"global_clipnorm": 0.5},
    {"gradient_accumulation_steps": 2},
    {"loss_scale_factor": 4.0},
    {"skip_nonfinite": True},
]


@pytest.mark.parametrize(
    "case, options",
    [pytest.param(case, {}, marks=marks_of(case)) for case in CASES]
    + [(Case(kb.BAGM), options) for options in SPARSE_OPTIONS[1:]],
    ids=lambda x: x.id if isinstance(x, Case) else "-".join(x),
)
def test_sparse_gradients_mean_their_dense_form(case, options):
    def run(gradients_of):
        optimizer = case.make(0.1, jit_compile=False, **options)
        variables = make_variables(EMBEDDINGS)
        optimizer.build(variables)

        @tf.function(autograph=False)
        def step(*given):
            optimizer.apply(gradients_of(given))

        for given in slices():
            step(*map(tf.constant, given))
        return to_numpy([*variables, *optimizer.variables])

    assert_near(run(sparse), run(densified))


def test_repeated_rows_are_added_before_they_are_squared():
    optimizer = kb.BAG(epsilon=0.0, initial_accumulator_value=0.0)
    (variable,) = make_variables({"embedding/embeddings": (2, 2)})
    optimizer.apply([tf.IndexedSlices(tf.ones((3, 2)), [1, 1, 1])], [variable])
    (velocity,) = [v for v in optimizer.variables if "velocity" in v.name]
    # (1 + 1 + 1)^2, not 1^2 + 1^2 + 1^2.
    np.testing.assert_array_equal(np.ravel(velocity), [0.0, 9.0])


@pytest.mark.slow
@pytest.mark.parametrize("options", SPARSE_OPTIONS, ids="-".join)
def test_sparse_gradients_on_replicas(options, strategy):
    # Keras itself accumulates gradients on replicas in eager steps only.
    function = "gradient_accumulation_steps" not in options
    assert_near(
        *(
            train_replicas(
                strategy,
                lambda: kb.BAGM(0.1, jit_compile=False, **options),
                list(zip(slices(0), slices(1))),
                function,
                EMBEDDINGS,
                gradients_of,
            )
            for gradients_of in (sparse, densified)
        )
    )


def test_sparse_gradients_on_replicas_equal_one_device(strategy):
    def make():
        return kb.BAGM(0.1)

    replicas = list(zip(slices(0), slices(1)))
    sums = [
        [np.add(*gs) for gs in zip(densified(first), densified(second))]
        for first, second in replicas
    ]
    actual = train_replicas(
        strategy, make, replicas, shapes=EMBEDDINGS, gradients_of=sparse
    )
    assert_near(actual, train_plain(make, sums, EMBEDDINGS))


# SavedModels.


def test_a_saved_model_with_an_optimizer_warns_of_nothing(tmp_path, caplog):
    model = make_normalized()
    fitted(kb.BAGM(0.1), model)
    module = tf.Module()
    module.model, module.optimizer = model, model.optimizer
    for number, saved in enumerate((model, module)):
        path = str(tmp_path / str(number))
        tf.saved_model.save(saved, path)
        tf.saved_model.load(path)
    model.export(str(tmp_path / "export"), verbose=False)
    assert not [r for r in caplog.records if r.name == "tensorflow"]
