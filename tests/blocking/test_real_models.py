"""The models of `keras.applications`; see `real_models.py`."""

import keras
import pytest

from helpers.real_models import check_partitions
from helpers.real_models import check_saving
from helpers.real_models import check_steps
from helpers.real_models import check_tiles

APPLICATIONS = {
    "resnet": keras.applications.ResNet50,
    "mobilenet": keras.applications.MobileNetV3Small,
    "efficientnet": keras.applications.EfficientNetV2B0,
    "convnext": keras.applications.ConvNeXtTiny,
    "vgg": keras.applications.VGG16,
}
# Tiles by scheme, and by what the path of a variable ends with.
TILES = {
    "resnet": {
        "output_unit": {
            "conv1_conv/kernel": ((7, 7, 3, 64), (7, 7, 3, 1)),
            "conv5_block3_3_bn/gamma": ((2048,), (1,)),
            "classes/kernel": ((2048, 3), (2048, 1)),
        },
        "filter": {"conv1_conv/kernel": ((7, 7, 3, 64), (7, 7, 1, 1))},
        "input_unit": {"conv1_conv/kernel": ((7, 7, 3, 64), (7, 7, 1, 64))},
    },
    "mobilenet": {
        "output_unit": {
            "expanded_conv_depthwise/kernel": ((3, 3, 16, 1), (3, 3, 1, 1)),
            "expanded_conv_project/kernel": ((1, 1, 16, 16), (1, 1, 16, 1)),
        },
        "input_unit": {
            "expanded_conv_depthwise/kernel": ((3, 3, 16, 1), (3, 3, 1, 1)),
        },
    },
    "efficientnet": {
        "output_unit": {
            "block1a_project_conv/kernel": ((3, 3, 32, 16), (3, 3, 32, 1)),
            "block4a_dwconv2/kernel": ((3, 3, 192, 1), (3, 3, 1, 1)),
            "block4a_se_reduce/kernel": ((1, 1, 192, 12), (1, 1, 192, 1)),
        },
    },
    "convnext": {
        "output_unit": {
            "stage_0_block_0_depthwise_conv/kernel": (
                (7, 7, 1, 96),
                (7, 7, 1, 1),
            ),
            "stage_0_block_0_layer_scale/variable": ((96,), (1,)),
            "stage_0_block_0_pointwise_conv_1/kernel": ((96, 384), (96, 1)),
        },
        # A Conv2D of 96 groups: each input feeds one unit.
        "input_unit": {
            "stage_0_block_0_depthwise_conv/kernel": (
                (7, 7, 1, 96),
                (7, 7, 1, 1),
            ),
        },
        "adam_mini": {"block_0_layer_scale/variable": ((96,), (96,))},
    },
    "vgg": {
        "output_unit": {
            "block1_conv1/kernel": ((3, 3, 3, 64), (3, 3, 3, 1)),
            "block1_conv1/bias": ((64,), (1,)),
        },
        "variable": {"block1_conv1/kernel": ((3, 3, 3, 64), (3, 3, 3, 64))},
    },
}
SAVED = {"mobilenet": "filter", "convnext": "adam_mini"}
QUICK = ["mobilenet", "convnext"]


def application(name):
    keras.backend.clear_session(free_memory=False)  # Variables have numbers.
    base = APPLICATIONS[name](
        include_top=False, weights=None, input_shape=(32, 32, 3), pooling="avg"
    )
    for layer in base.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0  # So that the next loss is of the same network.
    outputs = keras.layers.Dense(3, name="classes")(base.output)
    return keras.Model(base.input, outputs)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in APPLICATIONS
    ],
)
def test_partitions(name):
    model = application(name)
    check_partitions(model)
    check_tiles(model, TILES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_steps(name):
    check_steps(application(name))


@pytest.mark.slow
def test_saving(tmp_path):
    models = {
        name: (lambda name=name: application(name), scheme)
        for name, scheme in SAVED.items()
    }
    check_saving(models, tmp_path)
