"""Fine-tuning GPT-2 of KerasHub: LoRA, and a learning rate for each layer.

    python examples/lora.py --preset gpt2_base_en
    python examples/lora.py --steps 20

With a preset, its weights and its tokenizer are downloaded. Without one, the
model is small, its weights are random and its tokens are bytes: that needs no
network and shows the way, not what fine-tuning can do.
"""

import argparse
import os
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_hub
import numpy as np

import keras_blockwise as kb

LENGTH = 64


def make_model(preset: str | None) -> keras.Model:
    if preset:
        model = keras_hub.models.GPT2CausalLM.from_preset(preset)
        model.preprocessor.sequence_length = LENGTH
        return model
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=256,
        num_layers=3,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=256,
        max_sequence_length=LENGTH,
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def make_data(count: int, with_tokenizer: bool) -> list[Any]:
    """Pieces of Python's own documentation, as text or as tokens."""
    text = "\n".join(topics.values())
    rng = np.random.default_rng(0)
    starts = rng.integers(len(text) - 8 * LENGTH, size=count)
    if with_tokenizer:
        return [[text[i : i + 8 * LENGTH] for i in starts]]
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    windows = codes[starts[:, None] + np.arange(LENGTH + 1)].astype("int32")
    mask = np.ones((count, LENGTH), bool)
    inputs = {"token_ids": windows[:, :-1], "padding_mask": mask}
    return [inputs, windows[:, 1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", help="of a GPT-2, such as gpt2_base_en")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--decay", type=float, default=0.8)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    model = make_model(args.preset)
    if not args.preset:
        print("No preset: random weights, tokens that are bytes.")

    # Everything but the new matrices (and the biases beside them) is frozen.
    model.backbone.enable_lora(args.rank)
    optimizer = kb.BlockAdam(
        args.rate,
        blocking=kb.Blocking.from_model(model),
        learning_rate_multipliers=kb.layerwise_decay(model, args.decay),
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    data = make_data(args.steps * args.batch, bool(args.preset))
    model.fit(*data, batch_size=args.batch, verbose=2)

    print(kb.summary(model))


if __name__ == "__main__":
    main()
