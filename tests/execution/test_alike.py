"""Variables of one shape and kind, which PyTorch updates as one."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_near
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import few_classes
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors

# Some state is kept together and some is not; some variables have no like.
SHAPES = {
    f"{layer}/{name}": shape
    for i in range(7)
    for layer, name, shape in (
        (f"dense_{i}", "kernel", (4, 3)),
        (f"dense_{i}", "bias", (3,)),
        (f"scale_{i}", "scale", ()),
    )
} | {
    "dense_7/kernel": (3, 2),
    "dense_8/kernel": (72, 64),
    "dense_9/kernel": (72, 64),
}
PATHS = list(SHAPES)
of_pytorch = pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="other backends update each variable by itself",
)


def train(make, parts=(PATHS,), dtype="float32", reverse=False):
    """Weights after three steps; in the second some have no gradient.

    Args:
        make: Makes an optimizer.
        parts: The paths of the variables that each of several is for.
        dtype: That of the variables.
        reverse: Whether to give them the other way round.
    """
    variables = dict(zip(PATHS, make_variables(SHAPES, dtype)))
    optimizers = [make() for _ in parts]
    for optimizer, paths in zip(optimizers, parts):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        last = make_variables({"out/bias": (1,)}, dtype)  # Without a gradient.
        optimizer.build([*(variables[path] for path in paths), *last])
    for step, gradients in enumerate(make_gradients(3, SHAPES)):
        given = dict(zip(PATHS, tensors(gradients, dtype)))
        left_out = PATHS[1::4] if step == 1 else []
        for optimizer, paths in zip(optimizers, parts):
            own = [path for path in paths if path not in left_out]
            own = own[::-1] if reverse else own
            if own:
                optimizer.apply(
                    [given[path] for path in own], [variables[p] for p in own]
                )
            else:  # No gradient at all is not a step, which would be counted.
                optimizer.iterations.assign_add(1)
    return to_numpy(variables.values())


@few_classes
@pytest.mark.usefixtures("same_noise")
def test_each_has_the_step_that_it_would_have_alone(case):
    def make():
        return case.make(0.1, weight_decay=0.1, jit_compile=False)

    assert_near(train(make), train(make, [[path] for path in PATHS]))


@pytest.mark.parametrize("blocking", ["coordinate", "variable", "layer"])
def test_the_blocks_do_not_matter(blocking):
    def make():
        return kb.BAGM(0.1, blocking=blocking, jit_compile=False)

    layers = {}
    for path in PATHS:
        layers.setdefault(path.partition("/")[0], []).append(path)
    assert_near(train(make), train(make, layers.values()))


@pytest.mark.parametrize(
    "dtype, momentum_dtype",
    [("float64", None), ("bfloat16", None), ("float32", "bfloat16")],
)
def test_nor_does_the_order_of_the_variables(dtype, momentum_dtype):
    def make():
        return kb.BlockAdam(
            0.1,
            momentum_dtype=momentum_dtype,
            jit_compile=False,
            skip_nonfinite=True,
        )

    ends = [
        train(make, dtype=dtype, reverse=reverse) for reverse in (False, True)
    ]
    assert_near(*ends, 1e-2 if dtype == "bfloat16" else 1e-6)


def test_one_infinity_stops_them_all():
    optimizer = kb.BAGM(0.1, jit_compile=False, skip_nonfinite=True)
    variables = make_variables(SHAPES)
    optimizer.build(variables)
    before = to_numpy([*variables, *optimizer.block_state.slot_variables])
    (gradients,) = make_gradients(1, SHAPES)
    gradients[3] = np.full((4, 3), np.inf)
    optimizer.apply(tensors(gradients))
    after = to_numpy([*variables, *optimizer.block_state.slot_variables])
    assert_same(after, before)
    assert int(optimizer.skipped_steps) == 1


@of_pytorch
def test_a_stack_is_written_at_once(monkeypatch):
    written = []
    monkeypatch.setattr(
        kb.BAGM, "assign", lambda self, variable, value: written.append(value)
    )
    optimizer = kb.BAGM(0.1)
    optimizer.build(make_variables(SHAPES))
    optimizer.apply(tensors(*make_gradients(1, SHAPES)))
    # Five shapes, each with a momentum and a velocity.
    assert len(written) == 5 * 3


@of_pytorch
def test_a_stateless_step_leaves_the_variables_as_they_are():
    optimizer = kb.BAGM(0.1)
    variables = make_variables(SHAPES)
    optimizer.build(variables)
    (gradients,) = make_gradients(1, SHAPES)
    own = [*variables, *optimizer.variables]
    before = to_numpy(own)
    weights, state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables],
        tensors(gradients),
        [v.value for v in variables],
    )
    assert_same(own, before)
    optimizer.apply(tensors(gradients))
    assert_near([*weights, *state], to_numpy(own))
