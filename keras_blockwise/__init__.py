"""Blockwise adaptive optimizers for Keras."""

from keras_blockwise.blocking.blocking import Blocking
from keras_blockwise.blocking.layer_axes import register_layer_axes
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.callbacks.monitor import BlockMonitor
from keras_blockwise.callbacks.rates import HessianInformedRates
from keras_blockwise.multipliers import layerwise_decay
from keras_blockwise.optimizers import BAG
from keras_blockwise.optimizers import BAGM
from keras_blockwise.optimizers import BCOS
from keras_blockwise.optimizers import SPAM
from keras_blockwise.optimizers import AdaBlock
from keras_blockwise.optimizers import Adalayer
from keras_blockwise.optimizers import AdamMini
from keras_blockwise.optimizers import BlockAdam
from keras_blockwise.optimizers import BlockMuon
from keras_blockwise.optimizers import BlockNadam
from keras_blockwise.optimizers import BlockRMSprop
from keras_blockwise.plan import plan
from keras_blockwise.plots import plot_blocks
from keras_blockwise.state.convert import convert_state
from keras_blockwise.state.saving import all_or_nothing
from keras_blockwise.summary import summary

__version__ = "0.1.0"

__all__ = [
    "AdaBlock",
    "Adalayer",
    "AdamMini",
    "BAG",
    "BAGM",
    "BCOS",
    "BlockAdam",
    "BlockMonitor",
    "BlockMuon",
    "BlockNadam",
    "BlockRMSprop",
    "Blocking",
    "HessianInformedRates",
    "Partition",
    "SPAM",
    "all_or_nothing",
    "convert_state",
    "layerwise_decay",
    "plan",
    "plot_blocks",
    "register_layer_axes",
    "summary",
]
