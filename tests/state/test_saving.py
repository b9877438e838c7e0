"""What is saved can be loaded, and what does not fit is refused whole."""

import json

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_same
from helpers.arrays import refused
from helpers.cases import LAST_OF_CLASS
from helpers.cases import each_class
from helpers.cases import make_variables
from helpers.models import mlp
from helpers.models import normal
from helpers.processes import run_script
from helpers.saving import own_variables
from helpers.training import train_on_batch

# Loads models that another process has saved, and goes on training them.
CONTINUE = """
import json, sys
import keras, numpy as np
import keras_blockwise
from helpers.training import train_on_batch
for path in sys.argv[1:]:
    model = keras.models.load_model(path)
    x, y = np.load(path + ".npz").values()
    losses = [train_on_batch(model, x, y) for _ in range(3)]
    print(json.dumps([losses, repr(model.optimizer.partitions)]))
"""


DATA = normal((8, 4), (8, 2))


def two_layers():
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(4, activation="tanh")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2)(hidden))


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """Losses and blocks of every class, here and in a new process."""
    folder = tmp_path_factory.mktemp("models")
    paths, here = [], []
    for i, case in enumerate(LAST_OF_CLASS):
        optimizer = case.make(jit_compile=False, weight_decay=0.01)
        model = compiled_eagerly(optimizer)
        for _ in range(3):
            model.train_on_batch(*DATA)
        paths.append(str(folder / f"{i}.keras"))
        model.save(paths[-1])
        np.savez(paths[-1], *DATA)
        losses = [train_on_batch(model, *DATA) for _ in range(3)]
        here.append([losses, repr(optimizer.partitions)])
    return list(zip(here, run_script(CONTINUE, *paths)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "i", range(len(LAST_OF_CLASS)), ids=[c.id for c in LAST_OF_CLASS]
)
def test_new_process_goes_on_with_the_same_losses(continued, i):
    here, there = continued[i]
    assert there == here
    losses, _ = here
    assert losses[0] > losses[1] > losses[2]


@keras.saving.register_keras_serializable("test_saving")
class Unnamed(keras.Model):
    """Its layers have no names of their own: other numbers after loading."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = [keras.layers.Dense(4), keras.layers.Dense(2)]

    def build(self, input_shape):
        for layer, size in zip(self.inner, (4, 4)):
            layer.build((None, size))

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


def make_sequential():
    return mlp(4, 4, 2, names=(None, None))


def make_nested():
    inner = keras.Sequential([keras.layers.Dense(4, name="inner")], name="seq")
    outer = keras.Sequential([inner, keras.layers.Dense(2)], name="out")
    inputs = keras.Input((4,))
    return keras.Model(inputs, outer(inputs))


def make_wrapped():
    inputs = keras.Input((4,))
    x = keras.layers.Reshape((2, 2))(inputs)
    x = keras.layers.Bidirectional(keras.layers.SimpleRNN(2))(x)
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def make_subclassed():
    model = Unnamed()
    model.build((None, 4))
    return model


MODELS = {
    "sequential": make_sequential,
    "nested": make_nested,
    "wrapped": make_wrapped,
    "subclassed": make_subclassed,
}


def paths_of(model):
    return [variable.path for variable in model.trainable_variables]


# The kernel "inner" is square and has no default name.
@pytest.mark.filterwarnings("ignore:Names and shapes")
@pytest.mark.parametrize("scheme", ["output_unit", "layer"])
@pytest.mark.parametrize("kind", MODELS)
def test_paths_change_and_blocks_do_not(tmp_path, kind, scheme):
    model = MODELS[kind]()
    first = model.trainable_variables[0].path
    blocking = kb.Blocking(scheme, {first: "variable"})
    optimizer = kb.BlockAdam(0.01, blocking=blocking, jit_compile=False)
    model.compile(optimizer, "mse", run_eagerly=True)
    model.train_on_batch(*DATA)
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")

    assert paths_of(restored) != paths_of(model), "nothing is tested"
    assert first not in paths_of(restored)
    assert restored.optimizer.partitions == model.optimizer.partitions
    tiles = [p.block_shape for p in model.optimizer.partitions]
    assert tiles[0] == tuple(model.trainable_variables[0].shape)
    assert_same(restored.optimizer.variables, model.optimizer.variables)
    assert restored.optimizer.blocking.scheme == scheme
    assert restored.optimizer.blocking.rules == {first: "variable"}
    losses = [train_on_batch(m, *DATA) for m in (model, restored) * 2]
    assert losses[0] == losses[1] > losses[2] == losses[3]


def test_no_warning_when_the_saved_blocks_fit(tmp_path):
    model = make_nested()
    with pytest.warns(UserWarning, match="seq/inner/kernel"):
        model.compile(kb.BlockAdam(), "mse")
        model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras")


SHAPES = {"dense/kernel": (3, 2), "dense/bias": (2,), "dense_1/kernel": (2, 3)}
# Another architecture, and what the warning must say of it.
OTHERS = {
    "shape": (
        {**SHAPES, "dense_1/kernel": (2, 4)},
        r"variable 2 was 'kernel' of shape \(2, 3\) and is 'dense_1/kernel' of "
        r"shape \(2, 4\)",
    ),
    "name": (
        {"dense/kernel": (3, 2), "dense/gamma": (2,), "dense_1/kernel": (2, 3)},
        r"variable 1 was 'bias' of shape \(2,\) and is 'dense/gamma' of shape",
    ),
    "fewer": (
        {"dense_2/kernel": (3, 2), "dense_2/bias": (2,)},
        "there were 3 variables and are 2",
    ),
    "more": (
        {**SHAPES, "dense_1/bias": (3,)},
        "there were 3 variables and are 4",
    ),
}
RULED = kb.Blocking("variable", {".*kernel": (None, 1)})


def reused(shapes):
    """What another architecture gets from the config of a built optimizer."""
    optimizer = kb.BlockAdam(blocking=RULED)
    optimizer.build(make_variables(SHAPES))
    copy = kb.BlockAdam.from_config(optimizer.get_config())
    copy.build(make_variables(shapes))
    return copy.partitions


@pytest.mark.parametrize("kind", OTHERS)
def test_config_of_another_architecture_is_resolved_anew(kind):
    shapes, message = OTHERS[kind]
    with pytest.warns(UserWarning, match=message) as caught:
        partitions = reused(shapes)
    assert [w.category for w in caught].count(UserWarning) == 1
    fresh = kb.BlockAdam(blocking=RULED)
    fresh.build(make_variables(shapes))
    assert partitions == fresh.partitions


def test_config_is_reused_for_a_part_of_the_variables():
    # As after freezing a layer: no warning, and no rule that matches nothing.
    shapes = {"dense_1/kernel": (2, 3)}
    assert reused(shapes) == (kb.Partition((2, 3), (2, 1)),)


def compiled_eagerly(optimizer):
    model = two_layers()
    model.compile(optimizer, "mse", run_eagerly=True)
    return model


def test_weights_file_into_a_built_optimizer(tmp_path):
    model = compiled_eagerly(kb.BAGM(0.01, jit_compile=False))
    model.train_on_batch(*DATA)
    model.save_weights(tmp_path / "x.weights.h5")
    other = compiled_eagerly(kb.BAGM(0.5, jit_compile=False))
    other.train_on_batch(*DATA)
    other.train_on_batch(*DATA)
    other.load_weights(tmp_path / "x.weights.h5")
    assert_same(other.optimizer.variables, model.optimizer.variables)
    assert float(other.optimizer.learning_rate) == np.float32(0.01)
    assert train_on_batch(model, *DATA) == train_on_batch(other, *DATA)


def test_weights_file_with_another_blocking_is_refused(tmp_path):
    model = compiled_eagerly(kb.BAGM(jit_compile=False))
    model.train_on_batch(*DATA)
    model.save_weights(tmp_path / "x.weights.h5")
    other = compiled_eagerly(kb.BAGM(jit_compile=False, blocking="input_unit"))
    other.train_on_batch(*DATA)
    with refused(other.optimizer.variables, r"kernel/velocity \(1, 4\)"):
        other.load_weights(tmp_path / "x.weights.h5")


def stepped(optimizer, shapes=SHAPES):
    """With a state that has no zero in it."""
    variables = make_variables(shapes)
    optimizer.build(variables)
    for variable in optimizer.variables:
        variable.assign(variable + 7)
    return optimizer


# All fit but for the last variable: what is assigned too early shows.
LAST = kb.Blocking(rules={"dense_1/kernel": "variable"})
STATES = {
    "blocking": (
        kb.BlockAdam(blocking=LAST),
        kb.BlockAdam(),
        r"must have the blocks of this optimizer. 'dense_1_kernel_velocity' is "
        r"kernel/velocity \(1, 3\)\. Received: kernel/velocity \(1, 1\)\. "
        r"None of it was loaded",
    ),
    "groups": (
        kb.BlockAdam(blocking="layer"),
        kb.BlockAdam(),
        r"'dense_kernel_velocity' is kernel/velocity \(1, 2\)\. Received: "
        r"kernel/velocity \(\)\.",
    ),
    "statistics": (
        kb.BlockRMSprop(centered=True),
        kb.BlockRMSprop(),
        r"'dense_bias_velocity' is bias/velocity \(2,\)\. Received: "
        r"kernel/average_gradient \(1, 2\)",
    ),
    "momentum": (
        kb.BAGM(),
        kb.BAGM(momentum=0.0),
        r"kernel/velocity \(1, 2\)\. Received: kernel/momentum in .* \(3, 2\)",
    ),
    "ema": (
        kb.BAG(use_ema=True),
        kb.BAG(),
        r"kernel/velocity \(1, 2\)\. Received: average \(3, 2\)",
    ),
    "more variables": (
        kb.BAG(blocking="variable"),
        kb.BAG(blocking="model"),
        r"\(\)\. Received: kernel/velocity \(1, 1\)",
    ),
    "optimizer": (
        kb.BAGM(),
        kb.BlockAdam(),
        "must be one of BlockAdam. Received: the state of BAGM",
    ),
    "subclass": (
        kb.AdamMini(blocking="variable"),
        kb.BlockAdam(blocking="variable"),
        "must be one of BlockAdam. Received: the state of AdamMini",
    ),
    "Keras": (
        keras.optimizers.Adam(),
        kb.BlockAdam(blocking="coordinate"),
        "must be one of BlockAdam. Received: the state of another optimizer",
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_state_that_does_not_fit_is_refused_whole(kind):
    saved, loading, message = STATES[kind]
    saved = type(saved).from_config(saved.get_config())
    loading = type(loading).from_config(loading.get_config())
    loading.build(make_variables(SHAPES))
    with refused(loading.variables, message):
        loading.load_own_variables(own_variables(stepped(saved)))


@pytest.mark.parametrize("count", [2, 4])
def test_state_of_other_variables_is_refused_whole(count):
    shapes = dict(list({**SHAPES, "dense_1/bias": (3,)}.items())[:count])
    loading = stepped(kb.BAG(), SHAPES)
    message = rf"must have 5 variables\. Received: {count + 2}\. None"
    with refused(loading.variables, message):
        loading.load_own_variables(own_variables(stepped(kb.BAG(), shapes)))


@each_class
def test_state_that_fits_is_loaded_whole(case):
    kwargs = {"use_ema": True, "gradient_accumulation_steps": 2}
    saved, loading = stepped(case.make(**kwargs)), case.make(**kwargs)
    loading.build(make_variables(SHAPES))
    loading.load_own_variables(own_variables(saved))
    assert_same(loading.variables, saved.variables)


def test_momentum_dtype_is_saved(tmp_path):
    optimizer = kb.BlockAdam(momentum_dtype="bfloat16", jit_compile=False)
    model = compiled_eagerly(optimizer)
    model.train_on_batch(*DATA)
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert_same(restored.optimizer.variables, model.optimizer.variables)
    dtypes = {v.dtype for v in restored.optimizer.variables}
    assert "bfloat16" in dtypes


OPTIONS = {
    "plain": {},
    "ema": {"use_ema": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(
            0.5, 10, 0.5
        )
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saved_before_the_first_step(tmp_path, options):
    model = compiled_eagerly(
        kb.BAGM(**{"learning_rate": 0.5, "jit_compile": False, **options})
    )
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert restored.optimizer.built  # Keras builds it with the model.
    assert float(restored.optimizer.learning_rate) == 0.5
    losses = [train_on_batch(m, *DATA) for m in (model, restored) * 3]
    assert losses[::2] == losses[1::2]
    assert losses[0] != losses[-1]


def test_rules_saved_before_the_first_step(tmp_path):
    # Sequential changes the paths: better no blocks than other ones.
    model = make_sequential()
    first = model.trainable_variables[0].path
    blocking = kb.Blocking(rules={first: "variable"})
    model.compile(kb.BlockAdam(blocking=blocking), "mse")
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=f"`rules` must match.*{first}"):
        keras.models.load_model(tmp_path / "model.keras")


def test_unbuilt_optimizer_skips_a_state_as_in_keras():
    store = own_variables(stepped(kb.BlockAdam()))
    with pytest.warns(UserWarning, match="has 2 variables whereas the saved"):
        kb.BlockAdam().load_own_variables(store)


def test_schedule_set_after_build_can_be_saved():
    def scheduled():
        optimizer = kb.BlockAdam(0.5)
        optimizer.build(make_variables(SHAPES))
        schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)
        optimizer.learning_rate = schedule
        return optimizer

    saved, loading = scheduled(), scheduled()
    saved.iterations.assign(3)
    loading.load_own_variables(own_variables(saved))
    assert_same(loading.variables, saved.variables)


# The state is saved by position: this order must never change.
PATHS = ["a_kernel", "a_bias", "b_kernel", "b_bias"]
KERAS = ["iteration", "learning_rate"]


def of_each(*slots, paths=PATHS):
    return [f"{path}_{slot}" for path in paths for slot in slots]


ORDER = {
    "BlockAdam": (
        kb.BlockAdam(amsgrad=True),
        KERAS + of_each("momentum", "velocity", "velocity_hat"),
    ),
    "AdamMini": (kb.AdamMini(), KERAS + of_each("momentum", "velocity")),
    "Adalayer": (
        kb.Adalayer(output_layer="b"),
        KERAS + of_each("momentum", "velocity"),
    ),
    "SGD+Adalayer": (
        kb.Adalayer(sgd_learning_rate=0.5, output_layer="b"),
        [
            *KERAS,
            *of_each("momentum", paths=PATHS[:2]),
            *of_each("momentum", "velocity", paths=PATHS[2:]),
        ],
    ),
    "BlockNadam": (kb.BlockNadam(), KERAS + of_each("momentum", "velocity")),
    "BAGM": (kb.BAGM(), KERAS + of_each("momentum", "velocity")),
    "no blocks": (kb.BAGM(blocking="none"), KERAS + of_each("momentum")),
    "multipliers": (
        kb.BAG(learning_rate_multipliers={}),
        [*KERAS, "learning_rate_multipliers", *of_each("velocity")],
    ),
    "BAGM-none": (kb.BAGM(momentum=0.0), KERAS + of_each("velocity")),
    "BlockMuon": (
        kb.BlockMuon(output_layer="b"),
        KERAS + of_each("momentum", "velocity"),
    ),
    "BAG": (kb.BAG(), KERAS + of_each("velocity")),
    "BlockRMSprop": (
        kb.BlockRMSprop(centered=True, momentum=0.5),
        KERAS + of_each("momentum", "velocity", "average_gradient"),
    ),
    "BCOS": (kb.BCOS(), KERAS + of_each("momentum")),
    "BCOS-none": (kb.BCOS(momentum=0.0), KERAS),
    "AdaBlock": (kb.AdaBlock(), KERAS + of_each("momentum", "velocity")),
    "SPAM": (kb.SPAM(), KERAS + of_each("momentum", "velocity")),
    "layer": (
        kb.BlockAdam(blocking="layer"),
        [
            *KERAS,
            "a_kernel_momentum",
            "a_kernel_velocity",
            "a_bias_momentum",
            "b_kernel_momentum",
            "b_kernel_velocity",
            "b_bias_momentum",
        ],
    ),
    "model": (
        kb.BlockAdam(blocking="model"),
        [
            *KERAS,
            "a_kernel_momentum",
            "a_kernel_velocity",
            "a_bias_momentum",
            "b_kernel_momentum",
            "b_bias_momentum",
        ],
    ),
    "options": (
        kb.BlockAdam(use_ema=True, gradient_accumulation_steps=2),
        KERAS
        + of_each("average")
        + of_each("gradient_accumulator")
        + of_each("momentum", "velocity"),
    ),
}


@pytest.mark.parametrize("kind", ORDER)
def test_names_and_order_of_the_state(kind):
    optimizer, expected = ORDER[kind]
    optimizer = type(optimizer).from_config(optimizer.get_config())
    inputs = keras.Input((3,))
    x = keras.layers.Dense(2, name="a")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, name="b")(x))
    optimizer.build(model.trainable_variables)
    assert [variable.name for variable in optimizer.variables] == expected
    store = own_variables(optimizer)
    assert list(store) == [*map(str, range(len(expected))), "names"]


def test_names_in_a_saved_state():
    store = own_variables(stepped(kb.BlockAdam(blocking="layer")))
    assert json.loads(bytes(store["names"])) == [
        "BlockAdam",
        "iteration",
        "learning_rate",
        "kernel/momentum in the dtype of the weight",
        "kernel/velocity",
        "bias/momentum in the dtype of the weight",
        "kernel/momentum in the dtype of the weight",
        "kernel/velocity",
    ]
