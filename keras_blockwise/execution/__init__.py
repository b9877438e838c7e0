"""How a step is run: one plain path, and fast ones for TensorFlow and PyTorch.

The backend is chosen once, when the package is imported, as Keras does.
"""

from typing import Any

import keras

Execution: Any
if keras.backend.backend() == "tensorflow":
    from keras_blockwise.execution.tensorflow import TensorFlowOptimizer

    Execution = TensorFlowOptimizer
elif keras.backend.backend() == "torch":
    from keras_blockwise.execution.torch import TorchOptimizer

    Execution = TorchOptimizer
else:
    from keras_blockwise.execution.plain import PlainOptimizer

    Execution = PlainOptimizer
