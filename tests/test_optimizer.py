"""Everything that Keras's base class promises holds for every optimizer.

Most options must equal the same optimizer without the option, which the test
feeds with gradients, weights or learning rates that it transforms itself.
"""

import pickle

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers import arrays
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import each_class
from helpers.cases import each_class_with
from helpers.cases import few_classes
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.models import mlp
from helpers.saving import dtype_policy
from helpers.tensorflow import tf
from helpers.training import eager
from helpers.training import train
from helpers.training import train_by_hand

LR = 0.0625
SHAPES = {"dense/kernel": (3, 2), "dense/bias": (2,)}


def make(case, learning_rate=LR, **kwargs):
    # test_tensorflow.py compares the compiled update with this one.
    return case.make(learning_rate, jit_compile=False, **kwargs)


def make_weights(dtype="float32"):
    return make_variables(SHAPES, dtype)


def gradients_at(step):
    rng = np.random.default_rng(100 + step)
    shapes = SHAPES.values()
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def values(variables):
    return [np.float64(value) for value in to_numpy(variables)]


def apply(optimizer, gradients, *weights):
    return optimizer.apply(tensors(gradients), *weights)


def moved(optimizer, weights, steps=4, transform=None, before=None):
    """The weights after some steps."""
    gradients = map(gradients_at, range(steps))
    if transform:
        gradients = map(transform, gradients)
    train(optimizer, weights, gradients, before=before)
    return values(weights)


def assert_close(actual, expected, rtol=2e-6, atol=1e-7):
    arrays.assert_close(actual, expected, rtol, atol)


def assert_differ(actual, expected):
    arrays.assert_differ(actual, expected, least=1e-3)


def norm(*arrays):
    return np.sqrt(sum(np.square(a).sum() for a in arrays))


# Each option, and what to do to the gradients for the same effect.
OPTIONS = {
    "clipnorm": lambda gs: [0.5 * g / norm(g) for g in gs],
    "clipvalue": lambda gs: [np.clip(g, -0.5, 0.5) for g in gs],
    "global_clipnorm": lambda gs: [0.5 * g / norm(*gs) for g in gs],
    "loss_scale_factor": lambda gs: [g / 0.5 for g in gs],
}


@each_class_with("option", OPTIONS)
def test_transformed_gradients(case, option):
    optimizer, by_hand = make(case, **{option: 0.5}), make(case)
    actual = moved(optimizer, make_weights())
    expected = moved(by_hand, make_weights(), transform=OPTIONS[option])
    assert_close(actual, expected)
    # The state too: some weights do not depend on the scale of a gradient.
    assert_close(values(optimizer.variables), values(by_hand.variables))
    moved(without := make(case), make_weights())
    assert_differ(values(optimizer.variables), values(without.variables))


EXCLUDE = {
    "none": lambda optimizer, weights: None,
    "var_list": lambda optimizer, weights: optimizer.exclude_from_weight_decay(
        var_list=weights[1:]
    ),
    "var_names": lambda optimizer, weights: optimizer.exclude_from_weight_decay(
        var_names=["bia"]
    ),
}


@each_class_with("exclude", EXCLUDE)
def test_weight_decay(case, exclude):
    weights, by_hand = make_weights(), make_weights()
    optimizer = make(case, weight_decay=0.5)
    EXCLUDE[exclude](optimizer, weights)
    # Adam-mini leaves out biases by itself, as its authors' code does.
    all_decay = exclude == "none" and case.cls is not kb.AdamMini

    def decay(optimizer, step):
        for weight in by_hand if all_decay else by_hand[:1]:
            weight.assign(weight.numpy() * (1 - LR * 0.5))

    actual = moved(optimizer, weights)
    assert_close(actual, moved(make(case), by_hand, before=decay))
    assert_differ(actual, moved(make(case), make_weights()))


@each_class_with("frequency", [2, None])
def test_ema(case, frequency):
    weights, expected = make_weights(), make_weights()
    optimizer, plain = (
        make(
            case,
            use_ema=True,
            ema_momentum=0.75,
            ema_overwrite_frequency=frequency,
        ),
        make(case),
    )
    averages = None
    for step in range(4):
        apply(optimizer, gradients_at(step), weights)
        apply(plain, gradients_at(step), expected)
        new = values(expected)
        old = averages or new  # The first step starts the average.
        averages = [0.75 * a + 0.25 * b for a, b in zip(old, new)]
        if frequency and step % frequency == frequency - 1:
            for weight, average in zip(expected, averages):
                weight.assign(average)
        assert_close(values(weights), values(expected))
    if frequency is None:
        assert_differ(values(weights), averages)
    optimizer.finalize_variable_values(weights)
    assert_close(values(weights), averages)


@few_classes
def test_gradient_accumulation(case):
    weights, expected = make_weights(), make_weights()
    optimizer = make(case, gradient_accumulation_steps=3)
    plain = make(case)
    for step in range(2):
        parts = [gradients_at(3 * step + i) for i in range(3)]
        before = values(weights)
        for i, part in enumerate(parts):
            apply(optimizer, part, weights)
            if i < 2:
                assert_same(values(weights), before)
        apply(plain, [sum(gs) / 3 for gs in zip(*parts)], expected)
        assert_close(values(weights), values(expected))
    assert int(optimizer.iterations) == 2


@each_class
def test_loss_scale_optimizer(case):
    weights, inner = make_weights(), make(case)
    wrapper = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    actual = moved(wrapper, weights, transform=lambda gs: [8 * g for g in gs])
    assert_close(actual, moved(make(case), make_weights()))

    state = values(inner.variables)
    kernel, bias = gradients_at(4)
    kernel[2, 1] = np.inf
    eager(wrapper)(tensors([kernel, bias]))
    assert_same(values(weights), actual)
    assert_same(values(inner.variables), state)
    assert float(wrapper.dynamic_scale) == 4.0


def halved(step):
    return LR * 0.5**step


@each_class_with("kind", ["schedule", "callable", "set", "set schedule"])
def test_learning_rate(case, kind):
    schedule = keras.optimizers.schedules.ExponentialDecay(LR, 1, 0.5)
    first = {
        "schedule": schedule,
        "callable": lambda: halved(float(optimizer.iterations)),
    }
    optimizer = make(case, first.get(kind, 1.0))

    def before(optimizer, step):
        if kind == "set":
            optimizer.learning_rate = halved(step)
        elif kind == "set schedule" and step == 0:
            optimizer.learning_rate = schedule

    actual = moved(optimizer, make_weights(), before=before)
    by_hand = make(case, 1.0)
    by_hand.build(weights := make_weights())
    for step in range(4):
        by_hand.variables[1].assign(halved(step))
        apply(by_hand, gradients_at(step))
    assert_close(actual, values(weights))
    assert_differ(actual, moved(make(case), make_weights()))


@each_class
def test_variable_without_gradient(case):
    weights, optimizer = make_weights(), make(case)
    moved(optimizer, weights, steps=2)
    before, state = values(weights), values(optimizer.variables)
    with pytest.warns(UserWarning, match=r"do not exist.*\['dense/kernel'\]"):
        apply(optimizer, [None, gradients_at(2)[1]], weights)
    for variable, old in zip(optimizer.variables[2:], state[2:]):
        unchanged = np.array_equal(variable, old)
        assert unchanged == ("kernel" in variable.name), variable.name
    assert_same(values(weights[:1]), before[:1])
    # The other variable goes on as if nothing had happened.
    expected = moved(make(case), make_weights(), steps=3)
    assert_close(values(weights[1:]), expected[1:])
    with pytest.raises(ValueError, match="No gradients provided"):
        apply(optimizer, [None, None], weights)


@pytest.mark.tensorflow
@each_class_with("clipnorm", [None, 0.5])
def test_indexed_slices_mean_their_dense_form(case, clipnorm):
    shapes = {"embedding/embeddings": (4, 2)}
    sparse, dense = make_variables(shapes), make_variables(shapes)
    optimizer, twin = (make(case, clipnorm=clipnorm) for _ in range(2))
    rng = np.random.default_rng(0)
    # In the second step row 1 occurs twice: added up before it is squared.
    # Rows that do not occur have a gradient of zero: momentum moves them.
    for rows in [0, 1, 2, 3], [1, 3, 1], [3, 0], []:
        slices = rng.normal(size=(len(rows), 2)).astype("float32")
        total = np.zeros((4, 2), "float32")
        np.add.at(total, np.array(rows, int), slices)
        gradient = tf.IndexedSlices(
            tf.constant(slices), tf.constant(rows, "int64"), [4, 2]
        )
        optimizer.apply([gradient], sparse)
        apply(twin, [total], dense)
        assert_close(values(sparse), values(dense))
    assert_close(values(optimizer.variables), values(twin.variables))


@each_class
def test_constraint(case):
    weights, expected = make_weights(), make_weights()
    for weight in weights:
        weight.constraint = keras.constraints.MaxNorm(0.5)
    optimizer, plain = make(case), make(case)
    for step in range(3):
        apply(optimizer, gradients_at(step), weights)
        apply(plain, gradients_at(step), expected)
        for weight in expected:
            weight.assign(keras.constraints.MaxNorm(0.5)(weight))
        assert_close(values(weights), values(expected))
    assert_differ(values(weights), moved(make(case), make_weights(), steps=3))


@each_class
def test_apply_and_apply_gradients(case):
    weights, others = make_weights(), make_weights()
    optimizer, twin = make(case), make(case)
    assert apply(optimizer, gradients_at(0), weights) is None
    assert int(twin.apply_gradients(zip(tensors(gradients_at(0)), others))) == 1
    assert_same(values(weights), values(others))
    # Once built, the variables need not be given; their order is free.
    apply(optimizer, gradients_at(1))
    assert int(twin.apply_gradients(zip(tensors(gradients_at(1)), others))) == 2
    apply(optimizer, gradients_at(2))
    apply(twin, gradients_at(2)[::-1], others[::-1])
    assert_close(values(weights), values(others))
    apply(optimizer, [])  # As in Keras, not a step.
    assert int(optimizer.iterations) == int(twin.iterations) == 3


@each_class
def test_wrong_number_of_gradients_raises_as_in_keras(case):
    with pytest.raises(ValueError, match="must already be built"):
        apply(make(case), gradients_at(0))
    weights, optimizer = make_weights(), make(case)
    optimizer.build(weights)
    before = values(weights) + values(optimizer.variables)
    for wrong in gradients_at(0)[:1], 2 * gradients_at(0):
        with pytest.raises(ValueError, match=f"list of {len(wrong)} gradients"):
            apply(optimizer, wrong)
    with pytest.raises(ValueError, match="Unknown variable"):
        apply(optimizer, gradients_at(0), make_weights())
    assert_same(values(weights) + values(optimizer.variables), before)


RESOLUTION = {"bfloat16": 2e-2, "float16": 2e-3, "float64": 2e-6}


@each_class_with("dtype", RESOLUTION)
def test_dtype_of_the_variables(case, dtype):
    # In bfloat16 a beta_2 of 0.999 is 1: Keras's Adam does not move at all.
    weights, optimizer = make_weights(dtype), make(case)
    expected = moved(make(case), make_weights())
    tolerance = RESOLUTION[dtype]
    if case.cls is kb.AdaBlock:
        # Float32 finds an eigenvalue to 1e-7 of the largest. Measured: 7e-6.
        tolerance = max(tolerance, 1e-5)
    assert_close(moved(optimizer, weights), expected, tolerance, tolerance)
    assert {weight.dtype for weight in weights} == {dtype}
    wide = "float64" if dtype == "float64" else "float32"
    in_8_bits = case.kwargs.get("momentum_dtype") == "int8"
    for variable in optimizer.variables[2:]:
        if variable.name.endswith("momentum_scale"):
            assert in_8_bits and variable.dtype == "float32"
        elif variable.name.endswith("momentum"):
            assert variable.dtype in (dtype, "int8" if in_8_bits else dtype)
        else:
            assert variable.dtype == wide


@pytest.mark.tensorflow
@each_class
def test_raw_tf_variables(case):
    weights = make_weights()
    raw = [tf.Variable(w.numpy(), name=w.path) for w in weights]
    optimizer, twin = make(case, weight_decay=0.5), make(case, weight_decay=0.5)
    assert_close(moved(optimizer, raw), moved(twin, weights))
    assert optimizer.partitions == twin.partitions


@each_class
def test_empty_and_scalar_variables(case):
    shapes = {"a/kernel": (0, 3), "a/bias": (3,), "b/scale": ()}
    weights, alone = make_variables(shapes), make_variables(shapes)[1:]
    optimizer, twin = make(case), make(case)
    for step in range(3):
        kernel, bias = gradients_at(step)
        gradients = [kernel[0, :1].repeat(3), bias[0]]
        empty = np.zeros((0, 3), "float32")
        apply(optimizer, [empty, *gradients], weights)
        apply(twin, gradients, alone)
    assert_same(values(weights[1:]), values(alone))
    assert_differ(values(alone), values(make_variables(shapes)[1:]))


@pytest.mark.parametrize("scheme", ["layer", "model"])
def test_empty_variable_adds_nothing_to_its_group(scheme):
    shapes = {"a/kernel": (0, 3), "a/bias": (3,)}
    weights, alone = make_variables(shapes), make_variables(shapes)[1:]
    optimizer, twin = (
        kb.BlockAdam(LR, blocking=scheme, jit_compile=False) for _ in range(2)
    )
    gradient = np.array([1.0, 2.0, 3.0], "float32")
    apply(optimizer, [np.zeros((0, 3), "float32"), gradient], weights)
    apply(twin, [gradient], alone)
    assert_same(values(weights[1:]), values(alone))


@each_class_with("use_ema", [True, False])
def test_variable_overwritten_by_its_gradient(case, use_ema):
    # A float8 layer has such variables: their "gradients" are new values.
    factor = keras.Variable(1.0, name="factor")
    factor.overwrite_with_gradient = True
    kernel, bias = make_weights()
    optimizer = make(case, use_ema=use_ema)
    for step in range(4):
        g, h = gradients_at(step)
        apply(optimizer, [g, np.float32(step + 5), h], [kernel, factor, bias])
        assert float(factor) == step + 5
    assert_close(values([kernel, bias]), moved(make(case), make_weights()))
    assert not [v for v in optimizer.variables if "factor" in v.name]
    assert [p is None for p in optimizer.partitions] == [False, True, False]


def make_mlp():
    return mlp(16, 16, 1, names=(None, None))


def make_embedding_model():
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(6, 4),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )


def make_data():
    rng = np.random.default_rng(7)
    # So small that a loss scaled by 2**15 does not overflow in float16.
    return rng.normal(size=(8, 16)), 0.1 * rng.normal(size=(8, 1))


def assert_fit_like_by_hand(case, model, twin, x, y, tolerance):
    twin.set_weights(start := model.get_weights())
    model.compile(case.make(0.01), "mse")
    model.fit(x, y, batch_size=len(x), epochs=3, verbose=0)
    train_by_hand(twin, make(case, 0.01), x, y, 3)
    for first, a, b in zip(start, model.get_weights(), twin.get_weights()):
        moved = norm(a - first)
        assert moved > 1e-3
        assert norm(a - b) < tolerance * moved
    assert int(model.optimizer.iterations) == 3


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@few_classes
def test_mixed_precision_in_fit(case, policy):
    with dtype_policy(policy):
        model, twin = make_mlp(), make_mlp()
    # In a graph the layers round at other places than eagerly.
    tolerance = {"mixed_float16": 5e-3, "mixed_bfloat16": 5e-2}[policy]
    if case.cls is kb.BlockMuon:
        # It makes small singular values large, and what was rounded in them:
        # Keras's own Muon differs by 0.8 % here.
        tolerance *= 2
    assert_fit_like_by_hand(case, model, twin, *make_data(), tolerance)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")


@few_classes
def test_embedding_in_fit(case):
    # Row 1 repeats; rows 0, 2 and 3 do not occur.
    x = np.array([[1, 1, 4], [5, 1, 4]])
    y = np.array([[1.0], [0.5]])
    model, twin = make_embedding_model(), make_embedding_model()
    assert_fit_like_by_hand(case, model, twin, x, y, 1e-4)


@few_classes
def test_frozen_layers_in_fit(case):
    model, twin = make_mlp(), make_mlp()
    twin.set_weights(model.get_weights())
    model.layers[0].trainable = twin.layers[0].trainable = False
    frozen = model.layers[0].get_weights()
    model.compile(case.make(0.01), "mse")
    x, y = make_data()
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    train_by_hand(twin, make(case, 0.01), x, y, 2)
    assert_same(model.layers[0].get_weights(), frozen)
    assert_close(model.get_weights(), twin.get_weights(), 1e-4, 1e-6)
    assert [p.shape for p in model.optimizer.partitions] == [(16, 1), (1,)]


def test_float8_layer_in_fit():
    model = make_mlp()
    model.layers[0].quantize("float8")
    model.compile(kb.BlockAdam(0.01), "mse")
    before = values(model.trainable_variables)
    model.fit(*make_data(), epochs=2, verbose=0)
    changed = {
        v.name
        for v, old in zip(model.trainable_variables, before)
        if not np.array_equal(v, old)
    }
    assert {"kernel", "bias", "inputs_amax_history"} <= changed
    overwritten = [p is None for p in model.optimizer.partitions]
    assert sum(overwritten) == 6
    assert len(model.optimizer.variables) == 2 + 2 * 4


@each_class
def test_pickle_of_an_optimizer(case):
    optimizer = make(case, weight_decay=0.5, name="mine")
    optimizer.learning_rate = 0.25  # Not that of the constructor.
    restored = pickle.loads(pickle.dumps(optimizer))
    assert type(restored) is case.cls
    assert restored.get_config() == optimizer.get_config()
    assert float(restored.learning_rate) == 0.25


def test_pickle_of_a_trained_model():
    model = make_mlp()
    model.compile(kb.BlockAdam(0.01), "mse")
    model.fit(*make_data(), verbose=0)
    restored = pickle.loads(pickle.dumps(model))
    assert restored.optimizer.partitions == model.optimizer.partitions
    assert_same(
        values(restored.optimizer.variables), values(model.optimizer.variables)
    )
    fits = [
        m.fit(*make_data(), shuffle=False, verbose=0) for m in (model, restored)
    ]
    assert fits[0].history == fits[1].history
