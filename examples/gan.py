"""A GAN: two networks, each with an optimizer of its own.

    python examples/gan.py

The generator learns to draw scikit-learn's digits, 8 by 8. Prints both losses
and writes what it draws to an image file.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"  # For the step by hand.

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

import keras_blockwise as kb

NOISE = 32


class GAN(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.generator = keras.Sequential(
            [
                keras.Input((NOISE,)),
                layers.Dense(128, activation="relu"),
                layers.Dense(256, activation="relu"),
                layers.Dense(64, activation="sigmoid"),
            ],
            name="generator",
        )
        self.critic = keras.Sequential(
            [
                keras.Input((64,)),
                layers.Dense(256, activation="leaky_relu"),
                layers.Dropout(0.3),
                layers.Dense(128, activation="leaky_relu"),
                layers.Dense(1),
            ],
            name="critic",
        )

    def compile(self, generator_optimizer: Any, critic_optimizer: Any) -> None:
        super().compile(jit_compile=False)
        self.generator_optimizer = generator_optimizer
        self.critic_optimizer = critic_optimizer
        self.loss_of = keras.losses.BinaryCrossentropy(from_logits=True)

    def draw(self, count: int, training: bool = False) -> tf.Tensor:
        noise = tf.random.normal((count, NOISE))
        return self.generator(noise, training=training)

    def train_step(self, real: tf.Tensor) -> dict[str, tf.Tensor]:
        count = tf.shape(real)[0]
        with tf.GradientTape(persistent=True) as tape:
            drawn = self.draw(count, training=True)
            on_real = self.critic(real, training=True)
            on_drawn = self.critic(drawn, training=True)
            critic_loss = self.loss_of(tf.ones_like(on_real), on_real)
            critic_loss += self.loss_of(tf.zeros_like(on_drawn), on_drawn)
            loss = self.loss_of(tf.ones_like(on_drawn), on_drawn)
        for network, optimizer, own_loss in (
            (self.critic, self.critic_optimizer, critic_loss),
            (self.generator, self.generator_optimizer, loss),
        ):
            weights = network.trainable_variables
            optimizer.apply(tape.gradient(own_loss, weights), weights)
        return {"generator_loss": loss, "critic_loss": critic_loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--output", default="gan.png")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    x = np.float32(load_digits().data / 16)
    gan = GAN()
    gan.compile(*(kb.BlockAdam(args.rate, beta_1=0.5) for _ in range(2)))
    gan.fit(x, batch_size=64, epochs=args.epochs, verbose=2)
    images = keras.ops.convert_to_numpy(gan.draw(50)).reshape(5, 10, 8, 8)
    images = np.pad(images, [(0, 0), (0, 0), (1, 1), (1, 1)])
    picture = np.block([list(row) for row in images])
    plt.imsave(args.output, np.kron(picture, np.ones((8, 8))), cmap="gray")


if __name__ == "__main__":
    main()
