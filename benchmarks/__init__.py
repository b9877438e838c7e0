"""Speed and memory of the optimizers, each beside its peers in one run."""

import contextlib
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

with contextlib.suppress(ImportError):
    # PyTorch imports it where it is installed, which crashes after TensorFlow.
    import triton  # noqa: F401
