"""How a step is run: one plain path, and fast ones for TensorFlow and PyTorch.

The backend is chosen once, when the package is imported, as Keras does.
"""

from typing import Any

import keras

Execution: Any
if keras.backend.backend() == "tensorflow":
    from keras_blockwise.execution.tensorflow import TensorFlowOptimizer
    from keras_blockwise.execution.tensorflow import compiled
    from keras_blockwise.execution.tensorflow import number_of_replicas

    Execution = TensorFlowOptimizer
elif keras.backend.backend() == "torch":
    from keras_blockwise.execution.torch import TorchOptimizer
    from keras_blockwise.execution.torch import compiled
    from keras_blockwise.execution.torch import number_of_replicas

    Execution = TorchOptimizer
else:
    from keras_blockwise.execution.jax import compiled
    from keras_blockwise.execution.jax import number_of_replicas
    from keras_blockwise.execution.plain import PlainOptimizer

    Execution = PlainOptimizer

__all__ = ["Execution", "compiled", "number_of_replicas"]
