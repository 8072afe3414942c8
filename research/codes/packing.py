"""Small codes in bytes: two of 4 bits, four of 2 bits, or eight of 3 bits in three bytes.

The first code has the highest bits, as in bitsandbytes' 4-bit matrices.
"""

from __future__ import annotations

import jax.numpy as jnp

from research.types import Array

# bits -> (bytes of a word, codes in it)
WORDS = {2: (1, 4), 3: (3, 8), 4: (1, 2), 8: (1, 1)}


def word_of(bits: int) -> tuple[int, int]:
    """(bytes, codes) of the shortest run of whole bytes that holds whole codes."""
    if bits not in WORDS:
        raise ValueError(f"codes have {', '.join(map(str, WORDS))} bits, not {bits}")
    return WORDS[bits]


def pack(codes: Array, bits: int) -> Array:
    """Codes [..., n] in 0..2**bits - 1 as bytes [..., n * bits / 8], uint8.

    ValueError when n codes do not fill whole words.
    """
    size, count = word_of(bits)
    if codes.shape[-1] % count:
        raise ValueError(
            f"codes of {bits} bits are packed {count} at a time, which does not divide "
            f"{codes.shape[-1]}"
        )
    parts = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], -1, count)
    word = (parts << _places(bits, count)).sum(axis=-1, dtype=jnp.uint32)
    packed = word[..., None] >> _places(8, size)
    return (packed & 0xFF).astype(jnp.uint8).reshape(*codes.shape[:-1], -1)


def unpack(packed: Array, bits: int) -> Array:
    """Bytes [..., n * bits / 8] -> codes [..., n], uint8."""
    return join(fields(packed, bits))


def fields(packed: Array, bits: int) -> list[Array]:
    """The codes at each place of a word, the first place first: uint8 [..., words] each."""
    size, count = word_of(bits)
    if bits == 8:
        return [packed]
    words = packed
    if size > 1:
        parts = packed.reshape(*packed.shape[:-1], -1, size).astype(jnp.uint32)
        words = (parts << _places(8, size)).sum(axis=-1, dtype=jnp.uint32)
    places = range(bits * (count - 1), -1, -bits)
    return [(words >> place & (2**bits - 1)).astype(jnp.uint8) for place in places]


def join(parts: list[Array]) -> Array:
    """What belongs to the places of a word, [..., words] each, in order: [..., n]."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)


def _places(bits: int, count: int) -> Array:
    """How far each of `count` fields of `bits` bits is moved up, the first the farthest."""
    return bits * jnp.arange(count - 1, -1, -1, dtype=jnp.uint32)
