"""The 1,797 handwritten digits of scikit-learn as a TensorFlow data set."""

import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

# TFDS warns that a data set is not prepared yet, and then prepares it.
logging.getLogger("absl").setLevel(logging.ERROR)


class Digits(tfds.core.GeneratorBasedBuilder):
    """Grey images of 8 x 8 pixels: the first 1,297 train, the last 500 test.

    The definition of this class is all that `tfds.load("digits")` needs.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            "train": self._generate_examples(range(1297)),
            "test": self._generate_examples(range(1297, 1797)),
        }

    def _generate_examples(self, indices: range) -> Iterator[Any]:
        digits = load_digits()
        # From 0..16 to the 0..255 of other images.
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        for i in indices:
            yield i, {"image": images[i, :, :, None], "label": digits.target[i]}


def load(name: str) -> Any:
    """The train and test split of a set of labelled images, and what it is.

    Args:
        name: `"digits"`, `"mnist"`, `"cifar10"` or another name of TFDS.

    Returns:
        `((train, test), info)`. Exits with a sentence where it cannot.
    """
    try:
        builder = tfds.builder(name)
        if not builder.is_prepared() and builder.url_infos:
            # Ask once: without a network, TFDS retries for minutes.
            requests.head(next(iter(builder.url_infos)), timeout=20)
        return tfds.load(
            name, split=["train", "test"], as_supervised=True, with_info=True
        )
    except (OSError, tfds.core.DatasetNotFoundError) as error:
        sys.exit(
            f"Could not load the data set {name!r} ({type(error).__name__}): "
            "check the network and the name, or leave out --dataset for the "
            "digits that come with scikit-learn."
        )
