"""A transformer that a person can read, for the tests."""

import keras

L = keras.layers


def transformer(
    vocabulary=11,
    dim=8,
    num_heads=2,
    num_key_value_heads=None,
    num_layers=1,
    **kwargs,
):
    """Token ids to logits, in layers whose names are those of their roles."""
    ids = keras.Input((5,), dtype="int32")
    x = L.Embedding(vocabulary, dim, name="embed", **kwargs)(ids)
    for i in range(num_layers):
        norm = L.LayerNormalization(name=f"norm_{i}_attention", **kwargs)
        if num_key_value_heads is None:
            attention = L.MultiHeadAttention(
                num_heads, dim // num_heads, name=f"attention_{i}", **kwargs
            )
        else:
            attention = L.GroupQueryAttention(
                dim // num_heads,
                num_heads,
                num_key_value_heads,
                name=f"attention_{i}",
                **kwargs,
            )
        y = norm(x)
        x = L.Add()([x, attention(y, y, use_causal_mask=True)])
        norm = L.LayerNormalization(name=f"norm_{i}_mlp", **kwargs)
        up = L.Dense(12, activation="gelu", name=f"up_{i}", **kwargs)
        down = L.Dense(dim, name=f"down_{i}", **kwargs)
        x = L.Add()([x, down(up(norm(x)))])
    x = L.LayerNormalization(name="norm", **kwargs)(x)
    return keras.Model(ids, L.Dense(vocabulary, name="logits", **kwargs)(x))
