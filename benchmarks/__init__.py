"""Speed, memory and quality of the optimizers, each beside its peers."""

import contextlib
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# PyTorch's optimizers import Triton where it is installed. A process that has
# loaded TensorFlow before that ends with a segmentation fault (Triton 3.8).
with contextlib.suppress(ImportError):
    import triton  # noqa: F401
