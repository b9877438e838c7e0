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
from keras_blockwise.blocking.layer_axes import meanings_in

TEXT = {
    "dropout": 0.0,  # So that the next loss is that of the same network.
    "vocabulary_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
}
DECODER = {
    "vocabulary_size": 32,
    "num_layers": 1,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
}
MIXTURE = {**DECODER, "num_experts": 2, "top_k": 1}
HIDDEN = {
    "vocabulary_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
}
models = keras_hub.models
# Backbones of which only the knowledge of their layers is tested.
KNOWN = {
    "llama": lambda: models.LlamaBackbone(**DECODER),
    "llama3": lambda: models.Llama3Backbone(**DECODER),
    "mistral": lambda: models.MistralBackbone(**DECODER),
    "qwen": lambda: models.QwenBackbone(**DECODER),
    "qwen3": lambda: models.Qwen3Backbone(head_dim=4, **DECODER),
    "phi3": lambda: models.Phi3Backbone(**DECODER),
    "gemma3": lambda: models.Gemma3Backbone(
        head_dim=4, image_size=16, **DECODER
    ),
    "mixtral": lambda: models.MixtralBackbone(**MIXTURE),
    "qwen_moe": lambda: models.QwenMoeBackbone(
        moe_intermediate_dim=8, shared_expert_intermediate_dim=8, **MIXTURE
    ),
    "qwen3_moe": lambda: models.Qwen3MoeBackbone(
        head_dim=4, moe_intermediate_dim=8, **MIXTURE
    ),
    "gpt_oss": lambda: models.GptOssBackbone(head_dim=4, **MIXTURE),
    "falcon": lambda: models.FalconBackbone(
        vocabulary_size=32,
        num_layers=1,
        num_attention_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
    ),
    "gpt_neo_x": lambda: models.GPTNeoXBackbone(**HIDDEN),
    "bloom": lambda: models.BloomBackbone(**HIDDEN),
    "t5": lambda: models.T5Backbone(**HIDDEN),
    "xlnet": lambda: models.XLNetBackbone(**HIDDEN, dropout=0.0),
    "esm": lambda: models.ESMBackbone(**HIDDEN),
    "deberta": lambda: models.DebertaV3Backbone(
        **HIDDEN, max_sequence_length=8, bucket_size=4
    ),
    "rwkv7": lambda: models.RWKV7Backbone(
        vocabulary_size=32,
        num_layers=2,
        hidden_size=8,
        intermediate_dim=16,
        head_size=4,
    ),
    "deit": lambda: models.DeiTBackbone(
        image_shape=(16, 16, 3),
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
    ),
    "dinov2": lambda: models.DINOV2Backbone(
        image_shape=(16, 16, 3),
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
    ),
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
SAVED = {"gpt2": "output_unit", "gemma": "head", "whisper": "input_unit"}
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


@pytest.mark.filterwarnings("ignore")  # Those of KerasHub.
@pytest.mark.parametrize("name", KNOWN)
def test_every_axis_is_known(name):
    keras.backend.clear_session(free_memory=False)
    model = KNOWN[name]()
    meanings = meanings_in(model)
    for variable in model.trainable_variables:
        (axes,) = meanings[id(variable)].axes  # And no other.
        assert axes.kind != "unknown", variable.path
        name = variable.path.rpartition("/")[0].rpartition("/")[2]
        if axes.kind in ("query", "key", "value"):
            assert axes.head and len(variable.shape) == 3, variable.path
        kind = name.removesuffix("_dense")
        if kind in ("query", "key", "value") and len(variable.shape) == 3:
            assert axes.kind == kind, variable.path
        if "experts" in variable.path and len(variable.shape) == 3:
            assert (axes.output, axes.input) == ((0, 2), (1,))


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
        for name, scheme in SAVED.items()
    }
    check_saving(models, tmp_path, "import keras_hub")
