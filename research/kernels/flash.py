"""What FlashAttention-1 and -2 have in common: the contract, and a vjp that rebuilds probabilities.

Neither keeps the T×S probabilities for the backward pass, only the result and the log-sum-exp of each
row. With P rebuilt from them, dS = P * (dP - delta), where delta, the product of a row's result and
its gradient, is the same number that softmax's own vjp would sum over the row of P * dP.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research.kernels import operands
from research.kernels.attend import Attend, check_inputs
from research.kernels.flash_tiles import FlashTiles, flash_tiles
from research.kernels.mask import Mask
from research.kernels.online import scoring
from research.kernels.operands import Call
from research.kernels.triton import require
from research.types import Array


def attention(
    name: str, forward: Callable, backward: Callable, default: Callable = flash_tiles
) -> Attend:
    """A kernel of the contract from its two passes.

    forward(q, k, v, mask, seed, call, tiles) -> (out, lse [B, N, T] float32, base 2)
    backward(q, k, v, mask, seed, out_grad, lse, delta, call, tiles) -> gradients of q, k, v, slopes
    """

    def run(q, k, v, slopes, mask, seed, call, tiles):
        return forward(q, k, v, mask.replace(slopes=slopes), seed, call, tiles)

    def run_forward(q, k, v, slopes, mask, seed, call, tiles):
        out, lse = run(q, k, v, slopes, mask, seed, call, tiles)
        out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
        return out, (q, k, v, slopes, mask, seed, out, lse)

    def run_backward(call, tiles, kept, out_grad):
        q, k, v, slopes, mask, seed, out, lse = kept
        mask = mask.replace(slopes=slopes)
        delta = jnp.sum(out.astype(jnp.float32) * out_grad.astype(jnp.float32), -1).mT
        grads = backward(q, k, v, mask, seed, out_grad, lse, delta, call, tiles)
        *grads, slopes_grad = grads
        slopes_grad = None if slopes is None else slopes_grad.astype(slopes.dtype)
        return *grads, slopes_grad, None, None

    vjp = jax.custom_vjp(lambda *args: run(*args)[0], nondiff_argnums=(6, 7))
    vjp.defvjp(run_forward, run_backward)

    def attend(
        q: Array,
        k: Array,
        v: Array,
        mask: Mask,
        scale: float | None = None,
        dropout: tuple[float, Array] | None = None,
        softcap: float | None = None,
        tiles: FlashTiles | None = None,
        interpret: bool | None = None,
    ) -> Array:
        """The contract of `research.kernels.attend`; `tiles` is chosen by device and head size when
        None.

        Gradients flow to q, k, v and mask.slopes, in reverse mode. `interpret=True` runs it on any
        device, slowly; False compiles it wherever it is traced. ValueError on a device that is no
        GPU when None, and for heads or dtypes that the kernel does not take.
        """
        here = require(interpret, name)
        check_inputs(q, k, v, mask)
        operands.check_operands(q, k, v, name)
        score, seed = scoring(q.shape[-1], scale, softcap, dropout)
        tiles = default(q.shape[-1], q.dtype) if tiles is None else tiles
        call = Call(score, here, operands.static_offset(mask))
        return vjp(q, k, v, mask.slopes, mask.replace(slopes=None), seed, call, tiles)

    attend.__name__ = attend.__qualname__ = name
    return attend
