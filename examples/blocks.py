"""Which blocks a small transformer gets under four schemes.

python examples/blocks.py
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from keras import layers

import keras_blockwise as kb


def make_model() -> keras.Model:
    tokens = keras.Input((64,), dtype="int32")
    x = layers.Embedding(1000, 32, name="embedding")(tokens)
    y = layers.LayerNormalization(name="norm_1")(x)
    y = layers.MultiHeadAttention(4, 8, use_bias=False, name="attention")(y, y)
    x = layers.Add()([x, y])
    y = layers.LayerNormalization(name="norm_2")(x)
    y = layers.Dense(128, activation="gelu", name="up")(y)
    y = layers.Dense(32, name="down")(y)
    x = layers.Add()([x, y])
    return keras.Model(tokens, layers.Dense(1000, name="logits")(x))


def main() -> None:
    model = make_model()
    for optimizer, scheme in (
        (kb.BlockAdam, "output_unit"),
        (kb.BlockAdam, "head"),
        (kb.BlockAdam, "layer"),
        (kb.AdamMini, "adam_mini"),
    ):
        blocking = kb.Blocking.from_model(model, scheme)
        model.compile(optimizer(blocking=blocking), loss="mse")
        print(kb.summary(model), end="\n\n")


if __name__ == "__main__":
    main()
