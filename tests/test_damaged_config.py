"""A config that is damaged or edited is refused in a sentence, or works."""

import copy
import math
import random

import keras
import pytest

import keras_blockwise as kb
from helpers.cases import make_variables

# The square kernels have no default names.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Names and shapes",
    "ignore:The saved blocks do not fit",
    "ignore:The output layer is not known",
)

SHAPES = {"dense/kernel": (4, 3), "dense/bias": (3,), "dense_1/kernel": (3, 5)}
OPTIMIZERS = [
    lambda: kb.BlockAdam(
        blocking=kb.Blocking("output_unit", {"dense/kernel": (None, 1)}),
        weight_decay=0.01,
        use_ema=True,
    ),
    lambda: kb.BAGM(
        keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5),
        blocking="layer",
        gradient_accumulation_steps=2,
    ),
    lambda: kb.BlockRMSprop(blocking="model", clipnorm=1.0),
    lambda: kb.AdamMini(),
    lambda: kb.BlockMuon(output_layer="dense"),
    lambda: kb.AdaBlock(bounds=(8.0, 0.125), layers_per_step=1, seed=1),
    lambda: kb.Adalayer(sgd_learning_rate=0.1, output_layer="dense"),
    lambda: kb.BAG(skip_nonfinite=True),
]
VALUES = [
    *(None, "x", "", -1, 0, 7, 10**30, 2.5, math.nan, math.inf, True),
    *([], [1], {}, {"a": 1}, [None], ["kernel"], (1, 2)),
]


def built(optimizer):
    optimizer.build(make_variables(SHAPES))
    return optimizer


def places(config, path=()):
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        yield *path, key
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def damaged(config, rng):
    """A copy with one field deleted, cut short, or of another type."""
    config = copy.deepcopy(config)
    *path, key = rng.choice(list(places(config)))
    owner = config
    for step in path:
        owner = owner[step]
    how = rng.randrange(4)
    if how == 0:
        del owner[key]
    elif how == 1 and isinstance(owner[key], list):
        owner[key] = owner[key][:-1]
    elif how == 2 and isinstance(owner[key], int | float):
        owner[key] = str(owner[key])
    else:
        owner[key] = rng.choice(VALUES)
    return config


def test_random_damage():
    configs = [
        (type(optimizer), optimizer.get_config())
        for optimizer in (built(make()) for make in OPTIMIZERS)
    ]
    variables = make_variables(SHAPES)
    outcomes = []
    for seed in range(1000):
        cls, config = configs[seed % len(configs)]
        optimizer = None
        try:
            optimizer = cls.from_config(damaged(config, random.Random(seed)))
            before = len(optimizer.variables)
            optimizer.build(variables)
        except (ValueError, TypeError) as error:
            assert "Received: " in str(error), (seed, error)
            if optimizer is not None:
                assert not optimizer.built, seed
                assert len(optimizer.variables) == before, seed
        outcomes.append(optimizer is not None and optimizer.built)
    assert 200 < sum(outcomes) < 800


FIELDS = {
    **{
        f"no {name}": (
            lambda blocking, name=name: blocking.pop(name),
            f"config of a blocking must have the field `{name}`",
        )
        for name in ("scheme", "rules", "table", "exact")
    },
    **{
        f"no {name} in a row": (
            lambda blocking, name=name: blocking["table"][1].pop(name),
            f"config of a row of a blocking must have the field `{name}`",
        )
        for name in (
            *("name", "layer", "kind", "source"),
            *("shape", "block_shape", "group"),
        )
    },
    "scheme": (
        lambda blocking: blocking.update(scheme=7),
        "`scheme` in the config of a blocking must be a string or a list. "
        "Received: 7",
    ),
    "rules": (
        lambda blocking: blocking.update(rules=[1]),
        r"`rules` in the config of a blocking must be a mapping. Received: \[",
    ),
    "table": (
        lambda blocking: blocking.update(table="x"),
        "`table` in the config of a blocking must be a list or `None`",
    ),
    "row": (
        lambda blocking: blocking["table"].insert(0, None),
        "config of a row of a blocking must be a mapping. Received: None",
    ),
    "kind": (
        lambda blocking: blocking["table"][0].update(kind=["dense"]),
        "`kind` in the config of a row of a blocking must be a string",
    ),
    "shape": (
        lambda blocking: blocking["table"][0].update(shape=[4, "3"]),
        "`shape` in the config of a row of a blocking must be a list of int",
    ),
    "block_shape": (
        lambda blocking: blocking["table"][0].update(block_shape=4),
        "`block_shape` in the config of a row of a blocking must be a list",
    ),
    "group": (
        lambda blocking: blocking["table"][0].update(group={}),
        "`group` in the config of a row of a blocking must be a string or",
    ),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_a_field_of_the_blocking_is_named(kind):
    damage, message = FIELDS[kind]
    config = built(kb.BlockAdam()).get_config()
    damage(config["blocking"])
    with pytest.raises(ValueError, match=message):
        kb.BlockAdam.from_config(config)


@pytest.mark.parametrize("value", ["0.1", [1], {"a": 1}])
@pytest.mark.parametrize(
    "name",
    [
        *("clipnorm", "clipvalue", "global_clipnorm", "weight_decay"),
        *("ema_momentum", "loss_scale_factor", "gradient_accumulation_steps"),
    ],
)
def test_arguments_of_keras(name, value):
    message = f"`{name}` must be a number.* Received: {name}="
    with pytest.raises(ValueError, match=message):
        kb.BAG(**{name: value})


def test_a_schedule_that_cannot_be_made():
    optimizer = OPTIMIZERS[1]()
    config = optimizer.get_config()
    config["learning_rate"]["module"] = None
    config["learning_rate"]["class_name"] = 3
    with pytest.raises(ValueError, match="`learning_rate` must be a number or"):
        type(optimizer).from_config(config)


def test_an_error_in_build_leaves_nothing_behind():
    class Broken(kb.BlockAdam):
        works = False

        def add_slot(self, *args):
            if not self.works and len(self.variables) > 6:
                raise ValueError("no memory")
            return super().add_slot(*args)

    optimizer = Broken(use_ema=True, gradient_accumulation_steps=2)
    variables = make_variables(SHAPES)
    before = optimizer.variables
    with pytest.raises(ValueError, match="no memory"):
        optimizer.build(variables)
    assert not optimizer.built
    assert list(map(id, optimizer.variables)) == list(map(id, before))
    optimizer.works = True
    optimizer.build(variables)
    whole = built(kb.BlockAdam(use_ema=True, gradient_accumulation_steps=2))
    names = [[v.name for v in o.variables] for o in (optimizer, whole)]
    assert names[0] == names[1]
