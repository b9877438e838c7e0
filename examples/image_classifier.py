"""A classifier of images on a backbone: first frozen, then fine-tuned.

    python examples/image_classifier.py --images folder --weights imagenet
    python examples/image_classifier.py

A folder has one folder of images for each class, and the weights of ImageNet
are downloaded. Without them, the images are scikit-learn's digits and the
weights are random: that needs no network and shows the way, not what
fine-tuning can do.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

import keras_blockwise as kb


def load_images(folder: str | None, size: int, batch: int) -> Any:
    """Batches to train on and to validate with, and the number of classes."""
    if folder:
        parts = keras.utils.image_dataset_from_directory(
            folder,
            image_size=(size, size),
            batch_size=batch,
            validation_split=0.2,
            subset="both",
            seed=0,
        )
        return *parts, len(parts[0].class_names)
    digits = load_digits()
    x = digits.images[..., None].repeat(3, -1) * (255 / 16)
    x = tf.image.resize(x, (size, size))
    data = tf.data.Dataset.from_tensor_slices((x, digits.target))
    train, test = data.take(1297).shuffle(1297, seed=0), data.skip(1297)
    return train.batch(batch), test.batch(batch), 10


def make_model(weights: str | None, size: int, classes: int) -> keras.Model:
    backbone = keras.applications.MobileNet(
        (size, size, 3), 0.25, include_top=False, weights=weights, pooling="avg"
    )
    inputs = keras.Input((size, size, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    for layer in backbone.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.9  # The data are few.
    x = layers.Dropout(0.1)(backbone(x))
    return keras.Model(inputs, layers.Dense(classes, name="head")(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", help="a folder with a folder per class")
    parser.add_argument("--weights", choices=["imagenet"])
    parser.add_argument("--size", type=int, default=64, help="in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3, help="of each phase")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    train, test, classes = load_images(args.images, args.size, args.batch)
    model = make_model(args.weights, args.size, classes)
    if not args.weights:
        print("No weights were asked for: the backbone's are random.")
    backbone = next(x for x in model.layers if isinstance(x, keras.Model))

    def fit(rate: float, **arguments: Any) -> None:
        blocking = kb.Blocking.from_model(model)
        optimizer = kb.BlockAdam(rate, blocking=blocking, **arguments)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
        model.fit(
            train,
            epochs=args.epochs,
            shuffle=False,  # The batches are shuffled already.
            validation_data=test,
            verbose=2,
        )
        print(str(kb.summary(model)).splitlines()[-1])

    print("The head, on a frozen backbone")
    backbone.trainable = False
    fit(3e-3)

    print("All layers, each with 0.95 of the rate of the one after it")
    backbone.trainable = True
    multipliers = kb.layerwise_decay(model, 0.95)
    fit(1e-3, learning_rate_multipliers=multipliers)


if __name__ == "__main__":
    main()
