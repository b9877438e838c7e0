"""The contestants: one optimizer step each, on the same gradients."""

import importlib.util
import os
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_blockwise as kb
from benchmarks import contestants
from benchmarks.contestants import ADAM
from benchmarks.contestants import ADAM_8BIT
from benchmarks.contestants import ADAM_MINI
from benchmarks.contestants import ADAMW
from benchmarks.contestants import COPY
from benchmarks.contestants import FLOAT32
from benchmarks.contestants import FLOOR
from benchmarks.contestants import MUON
from benchmarks.contestants import MUON_OF_OURS
from benchmarks.contestants import OPTAX
from benchmarks.contestants import Contestant
from benchmarks.models import Specs

# It takes a loop that makes functions for one that traces them again.
tf.get_logger().setLevel("ERROR")

Step = Callable[[], object]

# The module that a peer needs, beside Keras itself.
PEERS = {
    "optax": "optax",
    "torch": "torch",
    "adam_mini": "adam_mini",
    "bitsandbytes": "bitsandbytes",
}
MODES = ("compiled", "graph", "eager")
SCHEMES = ("variable", "output_unit", "layer")


def bytes_per_parameter(name: str) -> int:
    """The least a step can read and write: w, m and g, or w, m, v and g."""
    if name == COPY:
        return 8
    if name == ADAM_8BIT:
        return 16
    if name.startswith(contestants.OURS):
        return 12 + 2 * tf.as_dtype(contestants.momentum(name)).size
    return 28 if name in (ADAM, ADAMW, OPTAX) else 20


def without_missing(peers: Iterable[str]) -> tuple[list[str], list[str]]:
    """The peers that are installed, and a sentence for each of the others."""
    installed = []
    sentences = []
    for peer in peers:
        module = PEERS.get(peer)
        if module is None or importlib.util.find_spec(module):
            installed.append(peer)
        else:
            sentences.append(f"{peer} is not installed and is left out.")
    return installed, sentences


def make_ours(name: str, **arguments: Any) -> Any:
    """One of `contestants.our_names`."""
    cls, scheme, *_ = name.split()
    return getattr(kb, cls)(
        1e-3,
        blocking=scheme,
        momentum_dtype=contestants.momentum(name),
        **arguments,
    )


def our_optimizers(
    schemes: Iterable[str], momenta: Iterable[str] = (FLOAT32,)
) -> dict[str, Any]:
    """Compiled from the first step on, as after many of them by default."""
    return {
        name: make_ours(name, jit_compile=True)
        for name in contestants.our_names(schemes, momenta)
    }


def keras_step(
    optimizer: Any, variables: Any, gradients: Any, mode: str
) -> Step:
    """One step of a Keras optimizer; it has ended when the call returns."""
    optimizer.build(variables)

    def step() -> None:
        optimizer.apply(gradients)

    if mode == "eager":
        return step
    # The gradients are captured, so that no arguments are passed per call.
    return tf.function(step, autograph=False, jit_compile=mode == "compiled")


def keras_steps(
    variables: Sequence[Any],
    gradients: Sequence[Any],
    schemes: Iterable[str],
    modes: Iterable[str],
    momenta: Iterable[str] = (FLOAT32,),
) -> dict[Contestant, Step]:
    """Our optimizers and Keras's Adam, all on the same variables."""
    tensors = [tf.constant(gradient) for gradient in gradients]
    optimizers = {ADAM: keras.optimizers.Adam(1e-3)}
    optimizers.update(our_optimizers(schemes, momenta))
    return {
        Contestant(name, mode): keras_step(optimizer, variables, tensors, mode)
        for name, optimizer in optimizers.items()
        for mode in modes
    }


def muon_steps(
    variables: Sequence[Any], gradients: Sequence[Any], schemes: Iterable[str]
) -> dict[Contestant, Step]:
    """`BlockMuon` and Keras's Muon, compiled, on the same variables."""
    tensors = [tf.constant(gradient) for gradient in gradients]
    optimizers = {MUON: keras.optimizers.Muon(1e-3, weight_decay=None)}
    for scheme in schemes:
        optimizers[f"{MUON_OF_OURS} {scheme}"] = kb.BlockMuon(
            1e-3,
            blocking=scheme,
            output_layer=variables[0].path,
            jit_compile=True,
        )
    return {
        Contestant(name, "compiled"): keras_step(
            optimizer, variables, tensors, "compiled"
        )
        for name, optimizer in optimizers.items()
    }


def optax_steps(
    arrays: Sequence[Any], gradients: Sequence[Any]
) -> dict[Contestant, Step]:
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.adam(1e-3)
    gradients = [jnp.asarray(gradient) for gradient in gradients]
    weights = [jnp.array(array) for array in arrays]
    state = optimizer.init(weights)

    @partial(jax.jit, donate_argnums=(1, 2))
    def update(gradients: Any, state: Any, weights: Any) -> Any:
        updates, state = optimizer.update(gradients, state, weights)
        return state, optax.apply_updates(weights, updates)

    def step() -> None:
        nonlocal state, weights
        state, weights = update(gradients, state, weights)
        jax.block_until_ready((state, weights))

    return {Contestant(OPTAX, "compiled"): step}


def torch_optimizers(
    specs: Specs,
    arrays: Sequence[Any],
    gradients: Sequence[Any],
    peers: Iterable[str],
) -> dict[str, Any]:
    """PyTorch's optimizers, on variables that they share."""
    import torch

    named = []
    for (path, shape), array, gradient in zip(specs, arrays, gradients):
        layer, _, name = path.rpartition("/")
        if len(shape) == 2 and name != "embeddings":
            # The layout of PyTorch, and a name that adam_mini cuts by rows.
            shape = shape[::-1]
            layer = f"mlp.{layer}"
        weight = torch.nn.Parameter(torch.tensor(array.reshape(shape)))
        weight.grad = torch.from_numpy(gradient.reshape(shape))
        named.append((f"{layer}/{name}", weight))
    weights = [weight for _, weight in named]
    optimizers: dict[str, Any] = {}
    if "torch" in peers:
        optimizers[ADAMW] = torch.optim.AdamW(weights, lr=1e-3, fused=True)
        optimizers[FLOOR] = torch.optim.SGD(
            weights, lr=1e-3, momentum=0.9, nesterov=True, fused=True
        )
    if "adam_mini" in peers:
        from adam_mini import Adam_mini

        optimizers[ADAM_MINI] = Adam_mini(
            named, lr=1e-3, dim=768, n_heads=12, verbose=False
        )
    if "bitsandbytes" in peers:
        from bitsandbytes.optim import Adam8bit

        optimizers[ADAM_8BIT] = Adam8bit(weights, lr=1e-3)
    return optimizers


def copy_step(size: int) -> dict[Contestant, Step]:
    """Copies as many numbers as there are parameters, on every core."""
    source = np.ones(size, np.float32)
    target = np.zeros(size, np.float32)
    cores = os.cpu_count() or 1
    parts = list(
        zip(np.array_split(target, cores), np.array_split(source, cores))
    )
    pool = ThreadPoolExecutor(cores)

    def step() -> None:
        list(pool.map(lambda part: np.copyto(*part), parts))

    return {Contestant(COPY, ""): step}
