"""Blockwise adaptive optimizers for Keras."""

from keras_blockwise.blocking import Blocking
from keras_blockwise.optimizers import BAG
from keras_blockwise.optimizers import BAGM
from keras_blockwise.optimizers import BlockAdam
from keras_blockwise.optimizers import BlockRMSprop
from keras_blockwise.partition import Partition

__version__ = "0.1.0"

__all__ = [
    "BAG",
    "BAGM",
    "BlockAdam",
    "BlockRMSprop",
    "Blocking",
    "Partition",
]
