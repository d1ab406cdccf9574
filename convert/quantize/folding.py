"""Scales of a projection's inputs, taken back by what comes before it: the layer computes the same.

AWQ (arXiv:2306.00978, section 3.2) multiplies the weights of an input by s and divides the input by s: in the weight of
the norm before q, k, v and before gate and up, in the outputs of v before o, and in those of up before down.

What is stored unquantised is rounded to its dtype here, as the file will have it.
"""

import numpy as np

from convert.quantize.layer import Layer, Matrix

# The norm before a stage, and all that has its output as input.
_AFTER_NORM = {
    "qkv": ("input_norm.weight", ("attention.q.weight", "attention.k.weight", "attention.v.weight")),
    "gate_up": (
        "post_attention_norm.weight",
        (
            "mlp.gate.weight",
            "mlp.up.weight",
            "moe.router.weight",
            "moe.shared_gate.weight",
            "moe.experts.gate_up",
            "moe.shared.gate.weight",
            "moe.shared.up.weight",
        ),
    ),
}
_PLAIN = ("moe.router.weight", "moe.shared_gate.weight")


def fold_into_norm(layer: Layer, stage: str, scales_D: np.ndarray) -> np.ndarray:
    """Divides a norm by scales, and multiplies all weights after it.

    Args:
      layer: changed in place.
      stage: "qkv" or "gate_up".
      scales_D: float32, positive.

    Returns:
      The scales that the weights were multiplied by, float32 [D]: those that the rounded norm stands for.
    """
    norm_path, paths = _AFTER_NORM[stage]
    norm = layer.params[norm_path]
    folded = _as_stored(layer, norm_path, norm / scales_D)
    # A norm that is 0, or rounds to 0, stays.
    usable = (folded != 0) & np.isfinite(folded)
    used = np.where(usable, norm / np.where(usable, folded, 1), 1).astype(np.float32)
    layer.params[norm_path] = np.where(usable, folded, norm)
    for path in paths:
        if path in layer.params:
            layer.params[path] *= used
            if path in _PLAIN:
                layer.params[path] = _as_stored(layer, path, layer.params[path])
    return used


def shared_by_heads(values_I: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Means over the query heads that share a value head, float32 [heads * head_dim]: v has one scale for all of them.

    Args:
      values_I: of the inputs of o.
      heads, kv_heads: of the model.
    """
    grouped = values_I.reshape(kv_heads, heads // kv_heads, -1)
    return np.broadcast_to(grouped.mean(1, keepdims=True), grouped.shape).reshape(-1).astype(np.float32)


def fold_into_v(layer: Layer, scales_I: np.ndarray) -> None:
    """Divides the outputs of v by scales, and multiplies the inputs of o.

    Args:
      layer: changed in place.
      scales_I: float32, positive, equal for the query heads that share a value head.
    """
    v, o = layer.params["attention.v.weight"], layer.params["attention.o.weight"]
    kv_heads, head_dim, _ = v.shape
    scales_Kd = scales_I.reshape(kv_heads, -1, head_dim)[:, 0]
    layer.params["attention.v.weight"] = v / scales_Kd[..., None]
    bias = layer.params["attention.v.bias"] / scales_Kd
    layer.params["attention.v.bias"] = _as_stored(layer, "attention.v.bias", bias)
    layer.params["attention.o.weight"] = o * scales_I.reshape(o.shape[1:])


def fold_into_up(layer: Layer, down: Matrix, scales_F: np.ndarray) -> None:
    """Divides the outputs of up by scales, and multiplies the inputs of its down.

    Args:
      layer: changed in place.
      down: of the dense layer, the shared expert or an expert.
      scales_F: float32, positive.
    """
    layer.params[down.path][down.index] *= scales_F
    if down.expert is not None:
        layer.params["moe.experts.gate_up"][down.expert, 1] /= scales_F[:, None]
    else:
        layer.params[down.path.replace("down", "up")] /= scales_F[:, None]


def _as_stored(layer: Layer, path: str, values: np.ndarray) -> np.ndarray:
    """Values rounded to the dtype of a parameter, float32."""
    return values.astype(layer.dtypes[path]).astype(np.float32)
