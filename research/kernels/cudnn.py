"""cuDNN's fused attention, through `jax.nn.dot_product_attention`, for what its interface expresses.

Causal or not, a causal sliding window, grouped heads; bfloat16 and float16. What it cannot say (segments, a
prefix, ALiBi, queries that do not begin where the keys do) is a ValueError here, never a dense bias.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.kernels.attend import check_inputs
from research.kernels.mask import Mask
from research.kernels.operands import static_offset
from research.types import Array


def cudnn(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    scale: float | None = None,
    implementation: str = "cudnn",
) -> Array:
    """The contract of `research.kernels.attend`; `implementation="xla"` is JAX's own form of the same
    call, for a device without cuDNN."""
    check_inputs(q, k, v, mask)
    reason = unable(q, k, mask, implementation)
    if reason:
        raise ValueError(f"the kernel 'cudnn' {reason}: choose 'flash2' or 'reference'")
    window = None
    if mask.window is not None:
        window = (mask.window - 1, 0 if mask.causal else mask.window - 1)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation=implementation,
    )


def unable(q: Array, k: Array, mask: Mask, implementation: str = "cudnn") -> str | None:
    """Why the call cannot be made, or None."""
    for name in ("prefix", "query_segments", "slopes"):
        if getattr(mask, name) is not None:
            return f"has no {name} in its mask"
    if mask.window is not None and q.shape[1] >= k.shape[1] + mask.window:
        return "gives no zeros to queries whose window ends before the first key they could see"
    if static_offset(mask) != 0:
        return "has its queries begin with the keys, so the mask's offset must be the int 0"
    if implementation != "cudnn":
        return None
    if not mask.causal and mask.window is not None and mask.window > 1:
        return "has no window to the right"
    if jax.default_backend() != "gpu":
        return f"runs on a GPU, and this is a {jax.default_backend()}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"takes heads of a multiple of 8 up to 128 numbers, not {q.shape[-1]}"
    return None
