"""TensorFlow, or `None` where another backend runs the tests."""

import keras

tf = None
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf  # noqa: F401
