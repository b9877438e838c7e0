"""What each axis of each weight of a layer means: the only file that knows
Dense, Conv, attention and all other layers.

`LAYER_AXES` has an entry per layer class, and a subclass inherits the entry of
its parent. An entry maps the name of a weight to its kind and to the meaning of
each of its axes:

    output   indexes the units of the output of the map that the weight is
    input    indexes the units of its input
    spatial  indexes a position in a convolution window
    head     indexes attention heads, in a projection from which heads are made

An axis may have two meanings, joined by "+"; "..." repeats the one before it
for as many axes as there are; "output/2" at the end are the outputs of a
convolution in 2 groups, each with inputs of its own, and "output*4" those of
the 4 gates of an LSTM, one gate after the other. A key "child/weight"
names the weight of a sublayer by the sublayer's name, and takes precedence
over the entry of the sublayer's own class; "*" stands for all other weights.
Where the axes depend on the arguments of the layer, a function of the layer
takes the place of an entry.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import keras

from keras_blockwise.blocking.axes import Axes
from keras_blockwise.blocking.axes import Meaning
from keras_blockwise.blocking.axes import Weight

Layer = Any
Variable = Any
Entry = Mapping[str, tuple[str, str]]

BIAS = ("bias", "output ...")
NORM = ("norm", "output ...")
SHIFT = ("shift", "output ...")
VECTOR = ("vector", "output ...")
CONV = ("conv", "spatial ... input output")
DEPTHWISE = ("conv", "spatial ... input+output output")
LINEAR = ("dense", "input output")
NORMALIZATION = {"gamma": NORM, "beta": SHIFT, "scale": NORM}


def projections(axes: str, *names: str) -> dict[str, tuple[str, str]]:
    """Sublayers of an attention layer that project to heads."""
    kinds = {"query": "query", "key": "key", "value": "value"}
    return {
        f"{name}/{weight}": (kinds.get(name.partition("_")[0], "dense"), axes)
        for name in names
        for weight in ("kernel", "lora_kernel_a")
    }


ATTENTION = projections(
    "input head+output output", "query", "key", "value", "gate"
)

# In KerasHub, without gates.
HEADS = projections("input head+output output", "query", "key", "value")
HEADS_DENSE = projections(
    "input head+output output", "query_dense", "key_dense", "value_dense"
)
HEADS_FIRST = projections("head+output input output", "query", "key", "value")
EXPERTS = ("dense", "output input output")
EXPERTS_OF_QWEN = {
    "expert_feedforward_gate_dense": EXPERTS,
    "expert_feedforward_output_dense": EXPERTS,
}
TABLE = ("embedding", "output input")
TOKEN = ("embedding", "output output input")


def einsum_dense(layer: Layer) -> Entry:
    """The axes of an EinsumDense, from its equation alone."""
    inputs, _, rest = layer.equation.partition(",")
    kernel, _, outputs = rest.partition("->")
    meanings = [
        "+".join(["input"] * (i in inputs) + ["output"] * (i in outputs))
        for i in kernel
    ]
    # LoRA: kernel = a @ b, where the rank takes the place of the last axis.
    last = "input output" if kernel[-1] in outputs else "output input"
    return {
        "kernel": ("dense", " ".join(meanings)),
        "bias": BIAS,
        "lora_kernel_a": ("dense", " ".join(meanings)),
        "lora_kernel_b": ("dense", last),
    }


def convolution(layer: Layer) -> Entry:
    return {
        "kernel": ("conv", f"spatial ... input output/{layer.groups}"),
        "bias": BIAS,
        "lora_kernel_a": CONV,
        "lora_kernel_b": LINEAR,
    }


def recurrent(axes: str) -> Entry:
    return {
        "kernel": ("recurrent", axes),
        "recurrent_kernel": ("recurrent", axes),
        "bias": BIAS,
    }


# By the root package and the name of the class: not all classes are public.
LAYER_AXES: dict[str, Entry | Callable[[Layer], Entry]] = {
    "keras.AdditiveAttention": {"scale": ("vector", "input")},
    "keras.Attention": {
        "scale": ("vector", ""),
        "concat_score_weight": ("vector", ""),
    },
    "keras.BaseConv": convolution,
    "keras.BaseConvTranspose": {
        "kernel": ("conv", "spatial ... output input"),
        "bias": BIAS,
    },
    "keras.BaseDepthwiseConv": {"kernel": DEPTHWISE, "bias": BIAS},
    "keras.BaseSeparableConv": {
        "depthwise_kernel": DEPTHWISE,
        "pointwise_kernel": CONV,
        "bias": BIAS,
    },
    "keras.BatchNormalization": NORMALIZATION,
    "keras.ConvLSTMCell": recurrent("spatial ... input output*4"),
    "keras.Dense": {
        "kernel": LINEAR,
        "bias": BIAS,
        "lora_kernel_a": LINEAR,
        "lora_kernel_b": LINEAR,
    },
    "keras.EinsumDense": einsum_dense,
    "keras.Embedding": {
        "embeddings": ("embedding", "output input"),
        "lora_embeddings_a": ("embedding", "output input"),
        "lora_embeddings_b": LINEAR,
        "reverse_embeddings": LINEAR,
    },
    "keras.GRUCell": recurrent("input output*3"),
    "keras.GroupNormalization": NORMALIZATION,
    "keras.GroupedQueryAttention": ATTENTION,
    "keras.LSTMCell": recurrent("input output*4"),
    "keras.LayerNormalization": NORMALIZATION,
    "keras.LayerScale": {"*": VECTOR},
    "keras.MultiHeadAttention": ATTENTION,
    "keras.PReLU": {"alpha": VECTOR},
    "keras.RMSNormalization": NORMALIZATION,
    "keras.STFTSpectrogram": {
        "real_kernel": ("conv", "spatial input output"),
        "imag_kernel": ("conv", "spatial input output"),
    },
    "keras.SimpleRNNCell": recurrent("input output"),
    "keras_hub.BloomAttention": HEADS_DENSE,
    "keras_hub.CachedGemma3Attention": HEADS_FIRST,
    "keras_hub.CachedGemmaAttention": HEADS_FIRST,
    "keras_hub.CachedMistralAttention": HEADS,
    "keras_hub.CachedMixtralAttention": HEADS,
    "keras_hub.DINOV2Embedding": {
        "cls_token": TOKEN,
        "mask_token": TABLE,
        "interpolated_position_embeddings": TOKEN,
    },
    "keras_hub.DINOV2LayerScale": {"*": VECTOR},
    "keras_hub.DeiTEmbeddings": {
        "class_token": TOKEN,
        "distillation_token": TOKEN,
        "position_embedding": TOKEN,
    },
    "keras_hub.DisentangledSelfAttention": HEADS,
    "keras_hub.FalconAttention": HEADS_DENSE,
    "keras_hub.GptOssAttention": {**HEADS, "sinks": VECTOR},
    "keras_hub.GptOssExperts": {
        "gate_up_proj": EXPERTS,
        "gate_up_proj_bias": BIAS,
        "down_proj": EXPERTS,
        "down_proj_bias": BIAS,
    },
    "keras_hub.GptOssLayerNormalization": NORMALIZATION,
    "keras_hub.LlamaAttention": HEADS,
    "keras_hub.LlamaLayerNorm": NORMALIZATION,
    "keras_hub.MistralLayerNormalization": NORMALIZATION,
    "keras_hub.MixtralLayerNormalization": NORMALIZATION,
    "keras_hub.MixtralMoeExperts": {
        **EXPERTS_OF_QWEN,
        "expert_feedforward_intermediate_dense": EXPERTS,
    },
    "keras_hub.Phi3Attention": HEADS,
    "keras_hub.Phi3LayerNorm": NORMALIZATION,
    "keras_hub.PositionEmbedding": {"embeddings": TABLE},
    "keras_hub.Qwen3Attention": HEADS,
    "keras_hub.Qwen3LayerNorm": NORMALIZATION,
    "keras_hub.Qwen3MoeAttention": HEADS,
    "keras_hub.Qwen3MoeExperts": EXPERTS_OF_QWEN,
    "keras_hub.Qwen3MoeLayerNorm": NORMALIZATION,
    "keras_hub.QwenAttention": HEADS,
    "keras_hub.QwenLayerNorm": NORMALIZATION,
    "keras_hub.QwenMoeAttention": HEADS,
    "keras_hub.QwenMoeExperts": EXPERTS_OF_QWEN,
    "keras_hub.QwenMoeLayerNorm": NORMALIZATION,
    "keras_hub.RMSNormalization": NORMALIZATION,
    "keras_hub.RWKV7ChannelMix": {"time_mix_k": VECTOR},
    "keras_hub.RWKV7TimeMix": {
        **{
            f"{name}{i}": LINEAR
            for name in ("w", "a", "v", "g")
            for i in (1, 2)
        },
        "*": VECTOR,
    },
    "keras_hub.RelativeEmbedding": {"rel_embedding": TABLE},
    "keras_hub.T5LayerNorm": {"weight": NORM},
    "keras_hub.T5MultiHeadAttention": {"embeddings": VECTOR},
    "keras_hub.ViTPatchingAndEmbedding": {"class_token": TOKEN},
    "keras_hub.XLNetAttentionMaskLayer": {"mask_emb": TOKEN},
    "keras_hub.XLNetEncoder": {
        "content_attention_bias": BIAS,
        "positional_attention_bias": BIAS,
        "segment_attention_bias": BIAS,
        "segment_encoding": ("embedding", "output input input"),
    },
}

# Entries of layers that are not Keras's, by class.
REGISTERED: dict[type, Entry] = {}


def register_layer_axes(
    layer_class: type | None = None, /, **weights: str
) -> Any:
    """Says what the axes of the weights of a layer of your own mean.

    `Blocking.from_model` then cuts them as exactly as those of Keras's layers.
    A subclass inherits what is said of its parent. Weights of a layer that
    nobody registered are one block each.

    Args:
        layer_class: A subclass of `keras.Layer`; left out in a decorator.
        **weights: For the name of each weight, the meaning of its axes in
            order, separated by spaces: `"output"` (indexes the units of the
            output of the map that the weight is), `"input"` (of its input),
            `"spatial"` (a position in a convolution window), `"head"` (an
            attention head); `"input+output"` for an axis that is both, and
            `"..."` to repeat the one before it for as many axes as there are.

    Returns:
        `layer_class`, or a decorator.

    Raises:
        TypeError, ValueError: If `layer_class` is not a layer class, or a
            meaning is unknown.

    Example:

    ```python
    @kb.register_layer_axes(kernel="input output", gain="output")
    class ScaledDense(keras.layers.Layer):
        ...
    ```
    """
    for name, meanings in weights.items():
        words = str(meanings).replace("+", " ").split()
        if words[:1] == ["..."] or set(words) - MEANINGS:
            raise ValueError(
                f"The axes of weight {name!r} must be words of "
                f"{sorted(MEANINGS)}, separated by spaces, of which '...' is "
                f"not the first. Received: {name}={meanings!r}."
            )

    def register(layer_class: type) -> type:
        if not (
            isinstance(layer_class, type)
            and issubclass(layer_class, keras.Layer)
        ):
            raise TypeError(
                "`layer_class` must be a subclass of `keras.Layer`. Received: "
                f"{layer_class!r}."
            )
        REGISTERED[layer_class] = {
            name: (kind_of(meanings), meanings)
            for name, meanings in weights.items()
        }
        return layer_class

    return register if layer_class is None else register(layer_class)


MEANINGS = {"input", "output", "spatial", "head", "..."}


def kind_of(meanings: str) -> str:
    if "spatial" in meanings:
        return "conv"
    return "dense" if "input" in meanings else "bias"


def parse(weight: Weight, kind: str, meanings: str) -> Axes:
    """The axes of a weight from their description."""
    words = meanings.split()
    rank = len(weight.shape)
    if "..." in words:
        i = words.index("...")
        words[i - 1 : i + 1] = words[i - 1 : i] * (rank - len(words) + 2)
    if len(words) != rank:
        raise ValueError(
            f"The axes {meanings!r} that are registered for variable "
            f"{weight.path!r} must have one word for each axis of its shape. "
            f"Received: a variable of shape {weight.shape}."
        )
    roles = {
        meaning: tuple(i for i, word in enumerate(words) if meaning in word)
        for meaning in ("output", "input", "spatial", "head")
    }
    return Axes(
        **roles,
        kind=kind,
        groups=int(meanings.partition("/")[2] or 1),
        gates=int(meanings.partition("*")[2] or 1),
    )


def axes_of(weight: Weight, layer: Layer, parents: list[Layer]) -> Axes | None:
    """The entry for a weight of a layer in the tables, `None` without one."""
    looked_up = [(parent, f"{layer.name}/{weight.name}") for parent in parents]
    looked_up += [(layer, weight.name), (layer, "*")]
    for owner, name in looked_up:
        for cls in type(owner).__mro__:
            root = cls.__module__.partition(".")[0]
            entry = REGISTERED.get(cls) or LAYER_AXES.get(
                f"{root}.{cls.__name__}", {}
            )
            entry = entry(owner) if callable(entry) else entry
            if name in entry:
                return parse(weight, *entry[name])
    return None


def meanings_in(model: Layer) -> dict[int, Meaning]:
    """The role of each variable of a model, by `id` of the variable."""
    layers: list[Layer] = []
    parents: dict[int, list[Layer]] = {}
    holders: dict[int, list[Layer]] = {}
    variables: dict[int, Variable] = {}

    def visit(layer: Layer) -> None:
        layers.append(layer)
        parents.setdefault(id(layer), [])
        for leaf in {id(leaf): leaf for leaf in leaves(vars(layer))}.values():
            if isinstance(leaf, keras.Variable):
                # A quantized kernel has another shape, and is not trained.
                if keras.backend.is_float_dtype(leaf.dtype):
                    variables[id(leaf)] = leaf
                    holders.setdefault(id(leaf), []).append(layer)
            else:
                if id(leaf) not in parents:
                    visit(leaf)
                parents[id(leaf)].append(layer)

    visit(model)
    names = unique_names(layers)
    meanings = {}
    for key, variable in variables.items():
        weight = Weight.of(variable)
        owner = owner_of(weight, holders[key])
        axes = owner and axes_of(weight, owner, parents[id(owner)])
        meanings[key] = Meaning(
            names[id(owner or holders[key][0])],
            (axes,) if axes else unknown(len(weight.shape)),
        )
    return meanings


def unknown(rank: int) -> tuple[Axes, ...]:
    """One block, in doubt wherever a scheme could make several."""
    axes = tuple(range(rank))
    return Axes(), Axes(axes, axes, kind="dense")


def leaves(value: Any) -> Iterator[Any]:
    """The layers and variables in an attribute of a layer."""
    if isinstance(value, keras.Layer | keras.Variable):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from leaves(item)


def owner_of(weight: Weight, holders: list[Layer]) -> Layer | None:
    """The layer that made a weight, which others may hold as well."""
    if len(holders) == 1:
        return holders[0]
    makers = [layer for layer in holders if layer.path == weight.layer_path]
    return makers[0] if makers else None


def unique_names(layers: list[Layer]) -> dict[int, str]:
    """Paths, with a number where several layers have one path."""
    counts: dict[str, int] = {}
    names = {}
    for layer in layers:
        path = layer.path or layer.name  # No path before it is built.
        count = counts[path] = counts.get(path, -1) + 1
        names[id(layer)] = f"{path}#{count}" if count else path
    return names
