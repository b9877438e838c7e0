"""SPAM equals that of pytorch-optimizer, step by step, in float64.

    python -m pip install . pytest torch==2.13.0 pytorch-optimizer==4.1.0
    python -m pytest tests/pytorch/test_spam_reference.py

Through spikes and resets, but without a warm-up after these: there the
reference is one step ahead of the authors' code.
"""

import numpy as np
import pytest
import torch
from pytorch_optimizer import SPAM

import keras_blockwise as kb
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors

SHAPES = {"dense/kernel": (4, 3), "dense/bias": (3,)}


@pytest.mark.parametrize("scale", [1.0, 64.0], ids=["smooth", "spikes"])
def test_equal_steps(scale):
    variables = make_variables(SHAPES, "float64")
    parameters = [
        torch.nn.Parameter(torch.tensor(variable.numpy()))
        for variable in variables
    ]
    optimizer = kb.SPAM(
        0.125,
        reset_every=30,
        reset_warmup=0,
        reset_bias_correction=False,
        spike_threshold=4.0,
        blocking="coordinate",
    )
    reference = SPAM(
        parameters,
        lr=0.125,
        update_proj_gap=30,
        warmup_epoch=0,
        threshold=4,
        foreach=False,
    )
    for step, gradients in enumerate(make_gradients(100, SHAPES)):
        if step % 7 == 0:
            gradients = [scale * g for g in gradients]
        optimizer.apply(tensors(gradients, "float64"), variables)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = torch.tensor(gradient)
        reference.step()
        for variable, parameter in zip(variables, parameters):
            np.testing.assert_allclose(
                variable.numpy(), parameter.detach(), 1e-9, err_msg=str(step)
            )
