"""AdamMini equals the authors' package, step by step, in float64.

Runs in an environment of its own, with PyTorch, which this package never needs:

    python -m pip install . pytest torch==2.13.0
    python -m pip install --no-deps adam-mini==1.1.1
    python -m pytest tests/pytorch

The reference finds out by the names of the weights what they are for; the
transformer here has other names, and its layers tell. Weights and gradients of
the one are those of the other, in PyTorch's order of axes.
"""

import numpy as np
import pytest
import torch
from adam_mini import Adam_mini

import keras_blockwise as kb
from helpers.transformer import transformer

DIM, NUM_HEADS, STEPS = 8, 2, 25

# Names that the reference knows, for the layers of the transformer.
NAMES = {
    "embed": "embed",
    "norm": "norm",
    "query": "attn.query",
    "key": "attn.key",
    "value": "attn.value",
    "attention_output": "attn.o_proj",
    "up": "mlp.up",
    "down": "mlp.down",
    "logits": "lm_head",
}


def reference_name(number, path):
    layer, _, weight = path.rpartition("/")
    layer = layer.rpartition("/")[2]
    name = NAMES[layer if layer in NAMES else layer.partition("_")[0]]
    kind = "bias" if weight in ("bias", "beta") else "weight"
    return f"{number}.{name}.{kind}"


def to_torch(path, x):
    """A weight or gradient as PyTorch has it: (out, in), heads beside dims."""
    if path.endswith("attention_output/kernel"):
        x = x.reshape(-1, x.shape[-1])
    elif "attention" in path and path.endswith("kernel"):
        x = x.reshape(x.shape[0], -1)
    elif x.ndim == 2 and path.endswith("bias"):
        x = x.reshape(-1)
    x = x.T if path.endswith("kernel") else x
    return torch.tensor(np.ascontiguousarray(x))


def warm_up(step):
    """Warm-up, then decay; numbers that float32 can hold."""
    return 2.0**-6 * min(step + 1, 8) if step < 16 else 2.0**-5


@pytest.mark.parametrize("value", ["output_unit", "variable"])
@pytest.mark.parametrize("num_key_value_heads", [None, 1])
def test_equal_steps(num_key_value_heads, value):
    model = transformer(
        dim=DIM,
        num_heads=NUM_HEADS,
        num_key_value_heads=num_key_value_heads,
        num_layers=2,
        dtype="float64",
    )
    variables = model.trainable_variables
    paths = [variable.path for variable in variables]
    rng = np.random.default_rng(0)
    for variable in variables:  # Ones and zeros would not show the decay.
        variable.assign(rng.normal(size=variable.shape))
    arguments = {"weight_decay": 0.125}
    optimizer = kb.AdamMini(
        value=value,
        blocking=kb.Blocking.from_model(model, "adam_mini"),
        **arguments,
    )
    named = [
        (
            reference_name(number, path),
            torch.nn.Parameter(to_torch(path, variable.numpy())),
        )
        for number, (path, variable) in enumerate(zip(paths, variables))
    ]
    reference = Adam_mini(
        iter(named), dim=DIM, n_heads=NUM_HEADS, verbose=False, **arguments
    )
    if value == "variable":
        reference.wv_names = {}  # What its authors advise for short runs.

    scales = [np.exp(rng.normal(size=v.shape)) for v in variables]
    for step in range(STEPS):
        gradients = [scale * rng.normal(size=scale.shape) for scale in scales]
        optimizer.learning_rate = warm_up(step)
        optimizer.apply(gradients, variables)
        for group in reference.param_groups:
            group["lr"] = warm_up(step)
        for path, (_, parameter), gradient in zip(paths, named, gradients):
            parameter.grad = to_torch(path, gradient)
        reference.step()
        for path, variable, (_, parameter) in zip(paths, variables, named):
            np.testing.assert_allclose(
                to_torch(path, variable.numpy()),
                parameter.detach(),
                rtol=1e-9,
                atol=1e-12,
                err_msg=f"{path} at step {step}",
            )
    # As many second moments as the reference has.
    counts = [
        state["vmean"].numel() if "vmean" in state else state["v"].numel()
        for state in reference.state.values()
    ]
    assert [p.num_blocks for p in optimizer.partitions] == counts
