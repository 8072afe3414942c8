"""What training did to the matrices: the singular values and directions of ΔW = W_after − W_before.

    spectrum        ΔW = U diag(σ) Vᵀ, σ_1 ≥ σ_2 ≥ ...
    effective rank  exp(−Σ p_i ln p_i), p = σ / Σσ. Roy & Vetterli 2007 (EUSIPCO, pp. 606–610)
    stable rank     ‖ΔW‖_F² / σ_1²
    energy          Σ_{i≤r} σ_i² / Σ σ_i², and the error of the best approximation of rank r,
                    (Σ_{i>r} σ_i²)^½ in the Frobenius norm (Eckart & Young 1936)
    similarity      φ(A, B, i, j) = ‖U_iᵀ V_j‖_F² / min(i, j), in [0, 1]; U_i, V_j: the first i and j
                    directions of two updates. Hu et al. 2021 (arXiv:2106.09685), section 7.2
    amplification   ‖ΔW_r‖_F / ‖Uᵀ W V‖_F: by how much ΔW outdoes W in ΔW's own directions, Table 7

Matrices are [..., in, out], leading axes are layers: every statistic is one number a layer. Columns
of `left` are directions of what a layer reads, those of `right` of what it writes. The singular
vectors of LoRA's factor A in the paper are directions of what is read.

A LoRA's update is decomposed from its thin factors. Any other is a difference of two dense matrices
and carries their rounding: a spectrum that goes on, flat, at about eps(dtype) |W| is that, and it
adds to the effective rank.

Differs from the paper: amplification compares the part of ΔW of rank r with W in the same
directions; for a LoRA of rank r that is all of ΔW, and the paper's number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.paths import named_leaves, require_match
from research.types import Array, Params
from research.weights.base import dense, is_weight
from research.weights.lora import LoRA


@struct.dataclass
class Spectrum:
    """left [..., in, K], values [..., K] falling, right [..., out, K]; columns are orthonormal."""

    left: Array
    values: Array
    right: Array


def decompose(matrix: Array) -> Spectrum:
    """The thin SVD of matrix [..., in, out] in float32, K = min(in, out)."""
    u, values, vt = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
    return Spectrum(u, values, jnp.swapaxes(vt, -1, -2))


def decompose_product(a: Array, b: Array, scale: float = 1.0) -> Spectrum:
    """Of scale a b, a [..., in, R], b [..., R, out], without forming it. K = min(R, in, out).

    With a = Q S and bᵀ = P T, Q and P orthonormal, it is the SVD of the small S Tᵀ, turned by Q and P.
    """
    q, s = jnp.linalg.qr(a.astype(jnp.float32))
    p, t = jnp.linalg.qr(jnp.swapaxes(b, -1, -2).astype(jnp.float32))
    inner = decompose(scale * s @ jnp.swapaxes(t, -1, -2))
    return Spectrum(q @ inner.left, inner.values, p @ inner.right)


def matrices(params: Params) -> dict[str, Any]:
    """{path: array or Weight} of the matrices, .../kernel and .../table."""
    leaves = named_leaves(params, is_leaf=is_weight)
    return {path: w for path, w in leaves if path.endswith(("/kernel", "/table"))}


def spectra(before: Params, after: Params, rule: str = r".*") -> dict[str, Spectrum]:
    """{path: spectrum of the update} of the matrices that `rule` matches and that changed.

    Where `after` has a LoRA on the very leaf of `before`, it is from the factors; of an adapted
    model: spectra(lora.remove(params), params). RuleError when the rule matches no matrix,
    ValueError naming what only one of the two has, shapes that differ, and what is not finite.
    """
    old, new = matrices(before), matrices(after)
    paths = require_match(rule, [*old, *(path for path in new if path not in old)])
    require_same(old, new, paths)
    found = {path: update(old[path], new[path]) for path in paths}
    for path, one in found.items():
        if not jnp.isfinite(one.values).all():
            raise ValueError(f"{path}: the update is not finite")
    return {path: one for path, one in found.items() if one.values.any()}


def require_same(old: dict[str, Any], new: dict[str, Any], paths: list[str]) -> None:
    """ValueError unless both have every one of `paths`, in the same shapes."""
    for one, other, which in ((old, new, "before"), (new, old, "after")):
        alone = [path for path in paths if path in one and path not in other]
        if alone:
            raise ValueError(f"only the model {which} the update has {', '.join(alone[:4])}")
    shapes = [[jax.eval_shape(dense, tree[path]).shape for tree in (old, new)] for path in paths]
    for path, (was, now) in zip(paths, shapes, strict=True):
        if was != now:
            raise ValueError(f"{path} is {list(was)} before the update, {list(now)} after it")


def update(before: Any, after: Any) -> Spectrum:
    """Of after − before, arrays or Weights of the same shape; zeros where they are equal."""
    if isinstance(after, LoRA) and after.base is before:
        return decompose_product(after.a, after.b, after.scale)
    difference = dense(after).astype(jnp.float32) - dense(before).astype(jnp.float32)
    if not difference.any():
        # Models are often trained in part, and decomposing zeros takes as long as anything.
        *layers, rows, columns = difference.shape
        zeros = [jnp.zeros((*layers, *shape, 1)) for shape in ((rows,), (), (columns,))]
        return Spectrum(*zeros)
    return decompose(difference)


def effective_rank(values: Array) -> Array:
    """[..., K] -> [...], between 1 and the rank; 0 for a matrix of zeros."""
    total = values.sum(-1, keepdims=True)
    p = values / jnp.where(total > 0, total, 1)
    entropy = -(p * jnp.log(jnp.where(p > 0, p, 1))).sum(-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


def stable_rank(values: Array) -> Array:
    """[..., K] -> [...], between 1 and the rank; 0 for a matrix of zeros."""
    largest = values[..., :1]
    return ((values / jnp.where(largest > 0, largest, 1)) ** 2).sum(-1)


def approximation_error(values: Array) -> Array:
    """[..., K] -> [..., K + 1]: at r the Frobenius norm of what the best matrix of rank r lacks."""
    rest = jnp.cumsum(values[..., ::-1] ** 2, axis=-1)[..., ::-1]
    return jnp.sqrt(jnp.concatenate([rest, jnp.zeros_like(rest[..., :1])], axis=-1))


def energy(values: Array) -> Array:
    """[..., K] -> [..., K + 1]: at r the share of ‖ΔW‖_F² in the first r; nan for zeros."""
    rest = approximation_error(values) ** 2
    return 1 - rest / rest[..., :1]


def rank_for(values: Array, share: float) -> Array:
    """[..., K] -> [...]: the smallest rank that holds `share` of the energy; 0 for zeros."""
    return (energy(values) < share).sum(-1)


def directions(spectrum: Spectrum, side: str = "in", most: int | None = None) -> Array:
    """The first `most` columns of `left` (side "in") or `right` ("out"); ValueError for another side.

    nan where the singular value is zero to float32's precision: any direction would do there.
    """
    if side not in ("in", "out"):
        raise ValueError(f"side must be 'in' or 'out', not {side!r}")
    size = max(spectrum.left.shape[-2], spectrum.right.shape[-2])
    values = spectrum.values[..., :most]
    real = values > size * np.finfo(np.float32).eps * spectrum.values[..., :1]
    columns = spectrum.left if side == "in" else spectrum.right
    return jnp.where(real[..., None, :], columns[..., :most], jnp.nan)


def subspace_similarity(u: Array, v: Array) -> Array:
    """φ of all beginnings: u [..., D, I], v [..., D, J], orthonormal columns -> [..., I, J].

    At [i-1, j-1] the first i columns of u against the first j of v: 1 where one span holds the
    other, 0 where they are orthogonal, nan where `directions` were. ValueError when D differs.
    """
    if u.shape[-2] != v.shape[-2]:
        raise ValueError(f"directions in {u.shape[-2]} and in {v.shape[-2]} dimensions")
    squares = jnp.einsum("...di,...dj->...ij", u, v) ** 2
    i, j = (jnp.arange(1, n + 1) for n in squares.shape[-2:])
    return squares.cumsum(-1).cumsum(-2) / jnp.minimum(i[:, None], j[None])


def random_similarity(i: int, j: int, size: int) -> float:
    """The mean of φ between random subspaces of i and j dimensions among `size`."""
    return max(i, j) / size


class Amplification(NamedTuple):
    """Frobenius norms, one a layer: of ΔW_r and of W; of Uᵀ W V, where U and V are the first r
    directions of ΔW, of W itself, and random (the root of the mean square)."""

    update: Array
    weight: Array
    in_update: Array
    in_weight: Array
    in_random: Array

    @property
    def factor(self) -> Array:
        return self.update / self.in_update


def amplification(spectrum: Spectrum, weight: Any, rank: int) -> Amplification:
    """The row of LoRA's Table 7: an update [..., in, out] against the matrix that it changed.

    ValueError unless 1 <= rank <= the directions of the update, or where shapes differ.
    """
    w = dense(weight).astype(jnp.float32)
    (*_, rows, count), columns = spectrum.left.shape, spectrum.right.shape[-2]
    if not 1 <= rank <= count:
        raise ValueError(f"rank must be in 1..{count}, the update's directions, not {rank}")
    if w.shape[-2:] != (rows, columns):
        raise ValueError(f"the matrix is {list(w.shape[-2:])}, its update [{rows}, {columns}]")
    u, v = spectrum.left[..., :rank], spectrum.right[..., :rank]
    own = jnp.linalg.svd(w, compute_uv=False)
    return Amplification(
        update=_norm(spectrum.values[..., :rank]),
        weight=_norm(own),
        in_update=jnp.linalg.norm(jnp.swapaxes(u, -1, -2) @ w @ v, axis=(-2, -1)),
        in_weight=_norm(own[..., :rank]),
        in_random=_norm(own) * rank / (rows * columns) ** 0.5,
    )


def _norm(values: Array) -> Array:
    return jnp.sqrt((values**2).sum(-1))
