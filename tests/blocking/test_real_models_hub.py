"""Backbones of KerasHub; see `real_models.py`."""

import keras
import keras_hub
import pytest

from helpers.models import all_subclasses
from helpers.real_models import check_partitions
from helpers.real_models import check_saving
from helpers.real_models import check_steps
from helpers.real_models import check_tiles
from keras_blockwise.blocking.layer_axes import LAYER_AXES

TEXT = {
    "dropout": 0.0,  # So that the next loss is that of the same network.
    "vocabulary_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
}
BACKBONES = {
    "gpt2": lambda: keras_hub.models.GPT2Backbone(
        **TEXT, max_sequence_length=8
    ),
    "bert": lambda: keras_hub.models.BertBackbone(
        **TEXT, max_sequence_length=8
    ),
    "gemma": lambda: keras_hub.models.GemmaBackbone(
        vocabulary_size=32,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        head_dim=6,
    ),
    "vit": lambda: keras_hub.models.ViTBackbone(
        image_shape=(16, 16, 3),
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    ),
    "whisper": lambda: keras_hub.models.WhisperBackbone(
        **TEXT, max_encoder_sequence_length=8, max_decoder_sequence_length=8
    ),
}
KEYS = {
    "output_unit": {"query/kernel": ((8, 2, 4), (8, 1, 1))},
    "head": {
        "query/kernel": ((8, 2, 4), (8, 1, 4)),
        "key/kernel": ((8, 2, 4), (8, 1, 4)),
        "value/kernel": ((8, 2, 4), (8, 1, 4)),
        "attention_output/kernel": ((2, 4, 8), (2, 4, 1)),
    },
    "adam_mini": {
        "query/kernel": ((8, 2, 4), (8, 1, 4)),
        "key/kernel": ((8, 2, 4), (8, 1, 4)),
        "value/kernel": ((8, 2, 4), (8, 1, 1)),
        "token_embedding/embeddings": ((32, 8), (1, 8)),
    },
}
TILES = {
    "gpt2": {
        **KEYS,
        "input_unit": {
            "position_embedding/embeddings": ((8, 8), (8, 1)),
            "token_embedding/embeddings": ((32, 8), (32, 1)),
        },
    },
    "bert": {
        **KEYS,
        "output_unit": {
            "position_embedding/embeddings": (
                (8, 8),
                (1, 8),
            ),
            "pooled_dense/kernel": ((8, 8), (8, 1)),
        },
    },
    # (heads, dim, head_dim), and a norm of its own.
    "gemma": {
        "output_unit": {
            "query/kernel": ((4, 8, 6), (1, 8, 1)),
            "attention_output/kernel": ((4, 6, 8), (4, 6, 1)),
            "pre_attention_norm/scale": ((8,), (1,)),
            "token_embedding/embeddings": ((32, 8), (1, 8)),
        },
        "head": {
            "query/kernel": ((4, 8, 6), (1, 8, 6)),
            "key/kernel": ((2, 8, 6), (1, 8, 6)),
            "value/kernel": ((2, 8, 6), (1, 8, 6)),
        },
        "adam_mini": {
            "value/kernel": ((2, 8, 6), (1, 8, 1)),
            "pre_attention_norm/scale": ((8,), (8,)),
        },
    },
    "vit": {
        "head": {"query/kernel": ((8, 2, 4), (8, 1, 4))},
        "output_unit": {
            "class_token": ((1, 1, 8), (1, 1, 8)),
            "patch_embedding/kernel": ((4, 4, 3, 8), (4, 4, 3, 1)),
        },
    },
    "whisper": KEYS
    | {
        "output_unit": {
            "encoder_token_embedding_conv_layer_1/kernel": (
                (3, 80, 8),
                (3, 80, 1),
            ),
        }
    },
}
SCHEMES = {
    "gpt2": "output_unit",
    "bert": "layer",
    "gemma": "head",
    "vit": "adam_mini",
    "whisper": "input_unit",
}
# KerasHub itself needs TensorFlow.
pytestmark = pytest.mark.tensorflow
each = pytest.mark.parametrize("name", BACKBONES)


def backbone_model(name):
    keras.backend.clear_session(free_memory=False)
    backbone = BACKBONES[name]()
    inputs = backbone.input
    x = backbone(inputs)
    if isinstance(x, dict):
        x = x.get("pooled_output", x.get("decoder_sequence_output"))
    if len(x.shape) == 3:
        x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="classes")(x))


def test_every_entry_is_of_a_class_of_keras_hub():
    names = {
        f"keras_hub.{cls.__name__}"
        for cls in all_subclasses(keras.Layer)
        if cls.__module__.partition(".")[0] == "keras_hub"
    }
    entries = {name for name in LAYER_AXES if not name.startswith("keras.")}
    assert entries <= names


@each
def test_partitions(name):
    model = backbone_model(name)
    check_partitions(model)
    check_tiles(model, TILES[name])


@pytest.mark.slow
@each
def test_steps(name):
    check_steps(backbone_model(name))


@pytest.mark.slow
def test_saving(tmp_path):
    models = {
        name: (lambda name=name: backbone_model(name), scheme)
        for name, scheme in SCHEMES.items()
    }
    check_saving(models, tmp_path, "import keras_hub")
