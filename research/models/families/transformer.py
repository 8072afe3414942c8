"""The 2017 Transformer (Vaswani et al., arXiv:1706.03762): post-norm LayerNorm, ReLU, sinusoids.

Sizes of Table 3, for the 37,000 pieces that English and German share in section 5.1:

              L   D     heads  F     dropout   here          the paper
    base      6   512   8      2048  0.1       63,045,632    65M
    big       6   1024  16     4096  0.3       214,171,648   213M

Counted here: projections without bias (section 3.2.2), feed-forward with (3.3), one table for
source, target and output (3.4), LayerNorms with scale and shift. The paper says "about 37000", and
rounds; base would have 65M with 40,800 pieces, big 213M with 35,900.

Dropout is on what each sublayer adds, and on the sums of embeddings and positions (5.4). What the
paper leaves open is as in its authors' tensor2tensor: Glorot's initialisation of the matrices, and
N(0, 1/D) of the table, so that the embeddings times sqrt(D) have variance 1. Its optimizer is
Adam(b2=0.98, eps=1e-9) with `InverseSquareRoot.of_width(D, 4000)`; label smoothing is 0.1.
"""

from __future__ import annotations

from typing import Any

import jax

from research.models.attention import Attention, even_head_size
from research.models.block import Block, Residual, post_norm, pre_norm
from research.models.cross import CrossBlock
from research.models.init import Xavier
from research.models.layers import LayerNorm, Mlp
from research.models.seq2seq import Seq2SeqConfig
from research.models.stack import Stack


def transformer(
    vocab_size: int,
    layers: int,
    width: int,
    heads: int,
    ffn: int,
    *,
    dropout: float = 0.1,
    residual: Residual = post_norm,
    attention_bias: bool = False,
    eps: float = 1e-5,
    max_length: int = 1024,
    **parts: Any,
) -> Seq2SeqConfig:
    """One of any size, `layers` in the encoder and as many in the decoder.

    With residual=pre_norm (arXiv:2002.04745) a norm follows each trunk. `parts` are further
    Seq2SeqConfig fields (position, attend, remat, ...). ValueError when `heads` do not divide `width`.
    """
    norm, size = LayerNorm(eps), even_head_size(width, heads)

    def attention() -> Attention:  # one each: an instance used twice would share its parameters
        return Attention(heads, heads, size, bias=attention_bias, out_bias=attention_bias)

    more = {"ffn": Mlp(ffn, jax.nn.relu), "norm": norm, "residual": residual, "dropout": dropout}
    return Seq2SeqConfig(
        vocab_size=vocab_size,
        width=width,
        encoder=(Stack(layers, (Block(attention(), **more),)),),
        decoder=(Stack(layers, (CrossBlock(attention(), attention(), **more),)),),
        max_length=max_length,
        final_norm=norm if residual is pre_norm else None,
        init_std=width**-0.5,
        init_rules=((r".*/kernel", Xavier()),),
        dropout=dropout,
        **parts,
    )


PRESETS: dict[str, Seq2SeqConfig] = {
    "transformer-base": transformer(37_000, 6, 512, 8, 2048),
    "transformer-big": transformer(37_000, 6, 1024, 16, 4096, dropout=0.3),
}
