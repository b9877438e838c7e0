"""`Blocking.from_model`: the layers of any model are found, and never guessed.

By identity, in any kind of model; `square_models.py` has most of them.
"""

import gc
import re
import weakref

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_same
from helpers.models import optimizer_for
from helpers.processes import run_script
from helpers.saving import dtype_policy
from helpers.square_models import MODELS
from helpers.square_models import PLAIN
from helpers.square_models import REVERSED
from helpers.square_models import UP
from helpers.square_models import X
from helpers.square_models import functional
from helpers.square_models import plain
from helpers.square_models import reverse
from helpers.square_models import sequential
from helpers.square_models import subclassed
from helpers.square_models import up
from keras_blockwise.blocking.layer_axes import REGISTERED

L = keras.layers


@pytest.fixture(autouse=True)
def nothing_registered():
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def build_on(model, scheme="output_unit", rules=None):
    """The optimizer, built on the trainable variables of a model."""
    optimizer = optimizer_for(model, scheme, rules)
    optimizer.build(model.trainable_variables)
    return optimizer


def tiles(optimizer):
    return [partition.block_shape for partition in optimizer.partitions]


def kernels(optimizer):
    """The tiles of the variables with more than one axis."""
    return [tile for tile in tiles(optimizer) if len(tile) > 1]


def groups(optimizer):
    return [partition.group for partition in optimizer.partitions]


# Kinds of models.


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_blocks_are_exact(make):
    model = make()
    assert kernels(build_on(model)) == [UP, REVERSED, PLAIN]
    # Nothing but the layers could tell:
    with pytest.warns(UserWarning, match="from_model"):
        kb.BlockAdam().build(model.trainable_variables)


@pytest.mark.parametrize("make", [sequential, subclassed])
def test_compile_before_the_first_call(make):
    model = make(built=False)
    optimizer = optimizer_for(model)
    model.compile(optimizer, "mse")
    assert not model.weights
    model.fit(X, X, verbose=0)
    assert kernels(optimizer) == [UP, REVERSED, PLAIN]


def test_head_and_filter():
    inputs = keras.Input((8, 4))
    x = L.MultiHeadAttention(2, 3, use_bias=False)(inputs, inputs)
    x = L.SeparableConv1D(5, 3, depth_multiplier=2, use_bias=False)(x)
    x = L.Conv1D(2, 3, use_bias=False)(x)
    model = keras.Model(inputs, L.Dense(3, use_bias=False)(x))
    attention = [(4, 1, 3)] * 3 + [(2, 3, 1)]
    convolutions = [(3, 1, 1), (1, 8, 1), (3, 5, 1), (2, 1)]
    assert tiles(build_on(model, "head")) == attention + convolutions
    attention = [(4, 1, 1)] * 3 + [(2, 3, 1)]
    convolutions = [(3, 1, 1), (1, 1, 1), (3, 1, 1), (2, 1)]
    assert tiles(build_on(model, "filter")) == attention + convolutions


# Layers and variables that several hold, or that have one path.


def test_shared_layer_counts_once():
    inputs = keras.Input((4, 4))
    layer = reverse()
    inner = keras.Sequential([keras.Input((4, 4)), layer])
    model = keras.Model(inputs, plain()(inner(layer(inputs))))
    assert kernels(build_on(model)) == [REVERSED, PLAIN]
    assert len(set(groups(build_on(model, "layer")))) == 2


class Tied(L.Layer):
    """Multiplies with the kernel of another layer, and has a gain."""

    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.kernel = other.kernel
        self.gain = self.add_weight(shape=(4,), name="gain")

    def call(self, x):
        return keras.ops.matmul(x, self.kernel) * self.gain


class Holder(keras.Model):
    """Holds layers under the given names of attributes; calls none."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def build(self, shape):
        for layer in self.layers:
            if not layer.built:
                layer.build(shape)

    def call(self, x):
        return x


def held(**layers):
    model = Holder(**layers)
    model.build((None, 4, 4))
    return model


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_tied_kernel_is_of_the_layer_that_made_it(names):
    kb.register_layer_axes(Tied, kernel="input output", gain="output")
    first = reverse("first")
    first.build((None, 4, 4))
    layers = dict(zip(names, (first, Tied(first, name="tied"))))
    model = held(**dict(sorted(layers.items())))
    paths = [variable.path for variable in model.trainable_variables]
    assert sorted(paths) == ["first/kernel", "tied/gain"]
    assert kernels(build_on(model)) == [REVERSED]
    by_path = dict(zip(paths, groups(build_on(model, "layer"))))
    assert by_path["first/kernel"] == "first"
    assert by_path["tied/gain"] != "first"


def test_two_sublayers_of_one_name():
    model = held(a=reverse("twin"), b=plain("twin"), c=up("twin"))
    paths = {variable.path for variable in model.trainable_variables}
    assert len(paths) == 1
    assert kernels(build_on(model)) == [REVERSED, PLAIN, UP]
    assert len(set(groups(build_on(model, "layer")))) == 3


def test_two_nested_models_with_layers_of_one_name():
    def encoder(layer):
        inputs = keras.Input((4, 4))
        return keras.Model(inputs, layer(inputs), name=None)

    inputs = keras.Input((4, 4))
    model = keras.Model(
        inputs, encoder(plain("h"))(encoder(reverse("h"))(inputs))
    )
    assert {variable.path for variable in model.trainable_variables} == {
        "h/kernel"
    }
    assert kernels(build_on(model)) == [REVERSED, PLAIN]
    assert len(set(groups(build_on(model, "layer")))) == 2


class EarlyWeight(L.Layer):
    """Makes its weight before it is called, outside of all other layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.w = self.add_weight(shape=(4, 4), name="w")

    def call(self, x):
        return keras.ops.matmul(x, self.w)


@pytest.mark.parametrize("called", [False, True])
def test_weights_made_in_the_constructor(called):
    kb.register_layer_axes(EarlyWeight, w="output input")
    model = Holder(a=EarlyWeight(name="inner"), b=EarlyWeight(name="inner"))
    model.own = model.add_weight(shape=(4, 4), name="own")
    if called:
        model.build((None, 4, 4))
        model.a(X)
        model.b(X)
    optimizer = kb.BlockAdam(
        blocking=kb.Blocking.from_model(model, rules={".*/own": (2, 2)})
    )
    optimizer.build(model.trainable_variables)
    assert tiles(optimizer) == [(2, 2), (1, 4), (1, 4)]
    names = groups(build_on(model, "layer"))
    assert None not in names
    assert len(set(names)) == 3


class TwoOfOneName(L.Layer):
    def build(self, shape):
        self.a = self.add_weight(shape=(4, 4), name="w")
        self.b = self.add_weight(shape=(4, 4), name="w")

    def call(self, x):
        return x


def test_two_weights_of_one_name():
    kb.register_layer_axes(TwoOfOneName, w="output input")
    model = held(a=TwoOfOneName(name="two"))
    assert tiles(build_on(model)) == [(1, 4), (1, 4)]
    first, second = groups(build_on(model, "layer"))
    assert first == second


def test_cells_of_one_name():
    cells = [L.LSTMCell(4, name="c", use_bias=False) for _ in range(2)]
    model = keras.Sequential([keras.Input((4, 4)), L.RNN(cells)])
    names = groups(build_on(model, "layer"))
    assert names[0] == names[1] != names[2] == names[3]


# Which variables there are can change.


def test_clone():
    model = functional()
    blocking = kb.Blocking.from_model(model)
    clone = keras.models.clone_model(model)
    assert kernels(build_on(clone)) == [UP, REVERSED, PLAIN]
    # The variables of the clone are strangers, and fit the table in order.
    optimizer = kb.BlockAdam(blocking=blocking)
    optimizer.build(clone.trainable_variables)
    assert kernels(optimizer) == [UP, REVERSED, PLAIN]


def test_freeze_and_unfreeze():
    model = functional()
    optimizer = optimizer_for(model)
    model.layers[1].trainable = False
    optimizer.build(model.trainable_variables)
    assert kernels(optimizer) == [REVERSED, PLAIN]
    blocking = kb.Blocking.from_model(model)
    model.layers[1].trainable = True
    optimizer = kb.BlockAdam(blocking=blocking)
    optimizer.build(model.trainable_variables)
    assert kernels(optimizer) == [UP, REVERSED, PLAIN]


def test_enable_lora_after_compile():
    model = functional()
    optimizer = optimizer_for(model)
    model.compile(optimizer, "mse")
    for layer in model.layers[2:]:
        layer.enable_lora(2)
    model.fit(X, X, verbose=0)
    # The reversed layer contracts the last axis of its kernel.
    assert kernels(optimizer) == [UP, (1, 2), (1, 4), (4, 1), (2, 1)]


def test_float8_variables_have_no_blocks():
    layer = plain()
    model = keras.Sequential([keras.Input((4, 4)), layer, reverse()])
    layer.quantize("float8")
    optimizer = optimizer_for(model)
    fit(model, optimizer)
    paths = [variable.path for variable in model.trainable_variables]
    for path, partition in zip(paths, optimizer.partitions):
        is_scale = "scale" in path or "amax_history" in path
        assert (partition is None) == is_scale
    assert sum(partition is None for partition in optimizer.partitions) == 6


# Optimizers around the optimizer.


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"),
    reason="this Keras has no `MultiOptimizer`",
)
def test_subsets_of_multi_optimizer(tmp_path):
    model = functional()
    rules = {"reverse/kernel": "variable", "plain/kernel": "coordinate"}
    rest, last = (
        optimizer_for(model, scheme, rules)
        for scheme in ("output_unit", "input_unit")
    )
    optimizers = keras.optimizers.OptimizerMap(rest, {"plain/.*": last})
    fit(model, keras.optimizers.MultiOptimizer(optimizers))
    # Each rule matches a variable of the model, though not of both subsets.
    assert tiles(rest) == [UP, (4, 4)]
    assert tiles(last) == [(1, 1)]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.fit(X, X, verbose=0)
    parts = loaded.optimizer.optimizers
    assert sorted(map(tiles, parts)) == [[(1, 1)], [UP, (4, 4)]]


def test_blocks_inside_a_loss_scale_optimizer():
    with dtype_policy("mixed_float16"):
        model = functional()
    optimizer = optimizer_for(model)
    fit(model, optimizer)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert model.optimizer.inner_optimizer is optimizer
    assert kernels(optimizer) == [UP, REVERSED, PLAIN]


def fit(model, optimizer):
    model.compile(optimizer, "mse")
    model.fit(X, X, verbose=0)


# The model is not kept alive.


def test_the_model_can_go():
    model = functional()
    blocking = kb.Blocking.from_model(model)
    variables = model.trainable_variables
    reference = weakref.ref(model)
    keras.backend.clear_session()
    del model
    gc.collect()
    assert reference() is None
    optimizer = kb.BlockAdam(blocking=blocking)
    optimizer.build(variables)
    assert kernels(optimizer) == [UP, REVERSED, PLAIN]


def test_weights_can_be_saved_and_loaded(tmp_path):
    # A model that holds itself through its optimizer cannot load weights.
    model = functional()
    fit(model, optimizer_for(model))
    weights = model.get_weights()
    model.save_weights(tmp_path / "w.weights.h5")
    model.fit(X, X, verbose=0)
    model.load_weights(tmp_path / "w.weights.h5")
    assert_same(model.get_weights(), weights)


# How a variable is found.


def twins():
    return held(a=reverse("twin"), b=plain("twin"))


def orphans():
    """The variables of a model that is gone, and its blocking."""
    model = twins()
    blocking = kb.Blocking.from_model(model)
    variables = model.trainable_variables
    keras.backend.clear_session()
    return variables, blocking


def built_on(blocking, variables):
    optimizer = kb.BlockAdam(blocking=blocking)
    optimizer.build(variables)
    return tiles(optimizer)


def test_first_by_identity():
    model = twins()
    blocking = kb.Blocking.from_model(model)
    a, b = model.trainable_variables
    assert built_on(blocking, [b, a]) == [PLAIN, REVERSED]
    assert built_on(blocking, [b]) == [PLAIN]


def test_then_in_order():
    variables, blocking = orphans()
    gc.collect()
    assert blocking.model() is None
    assert built_on(blocking, variables) == [REVERSED, PLAIN]


def test_then_by_names_and_shape():
    model = functional()
    blocking = kb.Blocking.from_model(model)
    a, b, c = model.trainable_variables
    del model
    keras.backend.clear_session()
    gc.collect()
    assert blocking.model() is None
    assert built_on(blocking, [c, a]) == [PLAIN, UP]
    assert built_on(blocking, [b]) == [REVERSED]


def test_else_it_raises():
    variables, blocking = orphans()
    gc.collect()
    for variable in variables:  # It may be either.
        with pytest.raises(ValueError, match="twin/kernel"):
            built_on(blocking, [variable])
    strangers = functional().trainable_variables
    with pytest.raises(ValueError, match="up/kernel"):
        built_on(blocking, strangers)
    unbuilt = subclassed(built=False)
    with pytest.raises(ValueError, match="must belong to the model"):
        built_on(kb.Blocking.from_model(unbuilt), strangers)


def test_a_row_is_of_one_variable():
    # Else a model and its clone would share accumulators, layer by layer.
    model = functional()
    clone = keras.models.clone_model(model)
    blocking = kb.Blocking.from_model(model, "layer")
    variables = model.trainable_variables + clone.trainable_variables
    with pytest.raises(ValueError, match="must belong to the model"):
        built_on(blocking, variables)


# Layers of one's own.


class Own(L.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(4, shape[-1]), name="w")
        self.gain = self.add_weight(shape=(4,), name="gain")

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.w)) * self.gain


def own(cls=Own):
    return keras.Sequential([keras.Input((4, 4)), cls(name="own"), plain()])


def test_register_by_a_call():
    assert kb.register_layer_axes(Own, w="output input", gain="output") is Own
    optimizer = build_on(own())
    assert tiles(optimizer) == [(1, 4), (1,), PLAIN]
    assert tiles(build_on(own(), "input_unit")) == [(4, 1), (4,), (1, 4)]


def test_register_as_a_decorator():
    @kb.register_layer_axes(w="output input", gain="output")
    class Decorated(Own):
        pass

    assert issubclass(Decorated, Own)
    assert tiles(build_on(own(Decorated))) == [(1, 4), (1,), PLAIN]


def test_subclass_inherits():
    kb.register_layer_axes(Own, w="output input", gain="output")

    class Child(Own):
        pass

    @kb.register_layer_axes(w="input output")
    class Other(Own):
        """Has what it says, and the rest of its parent."""

    assert tiles(build_on(own(Child))) == [(1, 4), (1,), PLAIN]
    assert tiles(build_on(own(Other))) == [(4, 1), (1,), PLAIN]


def test_subclass_of_a_layer_of_keras():
    class Scaled(L.EinsumDense):
        def build(self, shape):
            super().build(shape)
            self._tracker.unlock()
            self.gain = self.add_weight(shape=(4,), name="gain")

    kb.register_layer_axes(Scaled, gain="output")
    layer = Scaled("abc,dc->abd", (None, 4), name="scaled")
    model = keras.Sequential([keras.Input((4, 4)), layer])
    assert tiles(build_on(model)) == [REVERSED, (1,)]


def test_register_all_words():
    class Many(L.Layer):
        def build(self, shape):
            self.a = self.add_weight(shape=(2, 3, 4, 5), name="a")
            self.b = self.add_weight(shape=(2, 3, 4, 5), name="b")
            self.c = self.add_weight(shape=(), name="c")

        def call(self, x):
            return x

    kb.register_layer_axes(
        Many,
        a="spatial ... input+output output",
        b="input head+output ...",
        c="",
    )
    model = held(many=Many())
    assert tiles(build_on(model)) == [(2, 3, 1, 1), (2, 1, 1, 1), ()]
    assert tiles(build_on(model, "input_unit")) == [
        (2, 3, 1, 5),
        (1, 3, 4, 5),
        (),
    ]
    assert tiles(build_on(model, "filter")) == [
        (2, 3, 1, 1),
        (2, 1, 1, 1),
        (),
    ]
    assert tiles(build_on(model, "head")) == [(2, 3, 1, 1), (2, 1, 1, 1), ()]


def test_register_weights_of_a_sublayer():
    # As Keras's own attention layers have it: the parent knows more.
    class Attention(L.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.query = L.EinsumDense(
                "btd,dnh->btnh", (None, 2, 3), name="query"
            )

        def build(self, shape):
            self.query.build(shape)

        def call(self, x):
            return self.query(x)

    model = keras.Sequential([keras.Input((4, 4)), Attention(), L.Flatten()])
    assert tiles(build_on(model, "head")) == [(4, 1, 1)]
    kb.register_layer_axes(
        Attention, **{"query/kernel": "input head+output output"}
    )
    assert tiles(build_on(model, "head")) == [(4, 1, 3)]
    assert tiles(build_on(model)) == [(4, 1, 1)]


@pytest.mark.parametrize(
    "meanings", ["rows", "... output", "input, output", ("input", "output"), 3]
)
def test_register_checks_its_words(meanings):
    with pytest.raises(ValueError, match=r"weight 'w'.*Received: w=") as error:
        kb.register_layer_axes(Own, w=meanings)
    assert repr(meanings) in str(error.value)
    assert Own not in REGISTERED


@pytest.mark.parametrize("cls", [3, int, L.Dense(2)])
def test_register_checks_its_class(cls):
    with pytest.raises(TypeError, match="subclass of `keras.Layer`. Received"):
        kb.register_layer_axes(cls, w="output")
    with pytest.raises(TypeError, match="subclass of `keras.Layer`. Received"):
        kb.register_layer_axes(w="output")(cls)


@pytest.mark.parametrize("meanings", ["output", "output input input"])
def test_registered_axes_must_fit_the_shape(meanings):
    kb.register_layer_axes(Own, w=meanings)
    message = rf"'{meanings}'.*'[\w/]*own/w'.*\(4, 4\)"
    with pytest.raises(ValueError, match=message):
        kb.Blocking.from_model(own())


# Layers that nobody knows.


@pytest.mark.parametrize(
    "scheme",
    ["output_unit", "input_unit", "filter", "head", "adam_mini"],
)
def test_unknown_layer_is_reported_once(scheme):
    model = own()
    blocking = kb.Blocking.from_model(
        model, scheme
    )  # Silent: no layer is used.
    with pytest.warns(UserWarning) as record:
        optimizer = kb.BlockAdam(blocking=blocking)
        optimizer.build(model.trainable_variables)
    (warning,) = record
    text = str(warning.message)
    assert re.search(r"own/w' of shape \(4, 4\)", text)
    assert re.search(r"own/gain' of shape \(4,\)", text)
    assert "plain" not in text
    assert "register_layer_axes" in text
    assert "`rules`" in text
    assert tiles(optimizer)[:2] == [(4, 4), (4,)]


@pytest.mark.parametrize("scheme", ["coordinate", "variable", "layer", "model"])
def test_unknown_layer_does_not_matter(scheme):
    build_on(own(), scheme)  # A warning would be an error.


def test_rules_silence_the_report():
    rules = {".*/own/w": (2, 2), ".*/own/gain": "coordinate"}
    assert tiles(build_on(own(), rules=rules)) == [(2, 2), (1,), PLAIN]


def test_unknown_weight_with_an_axis_of_one():
    class Token(L.Layer):
        def build(self, shape):
            self.token = self.add_weight(shape=(1, 1, 4), name="token")

        def call(self, x):
            return x + self.token

    # The first axes can be cut in one way only; the last could be.
    with pytest.warns(UserWarning, match="token"):
        build_on(keras.Sequential([keras.Input((4, 4)), Token(), plain()]))


# Rules.


def test_heads_hidden_by_a_reshape():
    inputs = keras.Input((5, 4))
    x = L.Dense(18, name="qkv", use_bias=False)(inputs)  # 3 * 2 heads of 3.
    model = keras.Model(inputs, L.Reshape((5, 3, 2, 3))(x))
    assert tiles(build_on(model, rules={"qkv/kernel": (None, 3)})) == [(4, 3)]
    message = r"'qkv/kernel'.*axis 1 has size 18, which 4 does not divide"
    with pytest.raises(ValueError, match=message):
        kb.Blocking.from_model(model, "head", {"qkv/kernel": (None, 4)})


def test_two_rules_on_one_variable():
    rules = {"plain/.*": "variable", ".*/kernel": "coordinate"}
    with pytest.raises(
        ValueError, match="'plain/kernel' must match one"
    ) as error:
        kb.Blocking.from_model(functional(), rules=rules)
    assert "plain/.*" in str(error.value)
    rules["plain/kernel"] = (2, 2)  # The path itself goes first.
    assert kernels(build_on(functional(), rules=rules))[-1] == (2, 2)


def test_rule_by_a_path_of_before_loading(tmp_path):
    model = keras.Sequential([keras.Input((4, 4)), plain()], name="before")
    rules = {"before/plain/kernel": (2, 2)}
    fit(model, optimizer_for(model, rules=rules))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    (variable,) = loaded.trainable_variables
    assert variable.path == "plain/kernel"
    # The optimizer has its blocks in its config, whatever the path.
    loaded.fit(X, X, verbose=0)
    assert tiles(loaded.optimizer) == [(2, 2)]
    # Another one would not find the variable.
    with pytest.raises(ValueError) as error:
        kb.Blocking.from_model(loaded, rules=rules)
    assert "before/plain/kernel" in str(error.value)
    assert "\n  plain/kernel" in str(error.value)


def test_rules_are_checked_once_there_are_variables():
    model = subclassed(built=False)
    blocking = kb.Blocking.from_model(model, rules={"nothing": "layer"})
    model.build((None, 4, 4))
    with pytest.raises(ValueError, match="'nothing'"):
        kb.BlockAdam(blocking=blocking).build(model.trainable_variables)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("rows",), ValueError, "`scheme` must be one of.*'rows'"),
        ((3,), TypeError, "`scheme` must be a string, or a tuple.*3"),
        (((None, 0),), TypeError, r"`scheme`.*\(None, 0\)"),
        (("layer", {".*": "rows"}), ValueError, r"`rules\['\.\*'\]`.*'rows'"),
        (("layer", {"(": "layer"}), ValueError, r"regular expression.*'\('"),
        (("layer", [1]), TypeError, r"`rules` must map.*\[1\]"),
        (((None, 3),), ValueError, "'up/kernel'.*3 axis|'up/kernel'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        kb.Blocking.from_model(functional(), *arguments)


@pytest.mark.parametrize("model", [None, 3, "model", [], L.Dense(3)])
def test_not_a_model(model):
    with pytest.raises(TypeError, match="`model` must be a `keras.Model`"):
        kb.Blocking.from_model(model)


# Saving.

SCRIPT = """
import json
import sys

import keras
import numpy as np

import helpers.square_models
import keras_blockwise

keras.utils.set_random_seed(1)
keras.layers.Dense(3)  # Names are given out in another order.
for name in sys.argv[2:]:
    model = keras.models.load_model(f"{sys.argv[1]}/{name}.keras")
    before = [p.block_shape for p in model.optimizer.partitions]
    x = np.load(f"{sys.argv[1]}/x.npy")
    loss = model.fit(x, x, verbose=0).history["loss"]
    groups = [p.group for p in model.optimizer.partitions]
    print(json.dumps([before, len(set(groups)), loss]))
"""


@pytest.mark.slow
def test_save_and_continue_in_a_new_process(tmp_path):
    cases = {
        f"{name}-unit": (make, "output_unit") for name, make in MODELS.items()
    }
    cases |= {f"{name}-layer": (make, "layer") for name, make in MODELS.items()}
    np.save(tmp_path / "x.npy", X)
    expected = []
    for name, (make, scheme) in cases.items():
        model = make()
        optimizer = optimizer_for(model, scheme)
        fit(model, optimizer)
        model.save(tmp_path / f"{name}.keras")
        loss = model.fit(X, X, verbose=0).history["loss"]
        count = len(set(groups(optimizer)))
        expected.append([list(map(list, tiles(optimizer))), count, loss])
    received = run_script(SCRIPT, tmp_path, *cases)
    for ours, theirs in zip(expected, received):
        assert ours[:2] == theirs[:2]
        np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-6)
    assert len(received) == len(cases)
