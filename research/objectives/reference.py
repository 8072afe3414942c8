"""Who the reference policy is, where its log-probabilities are not taken once beforehand.

A Reference is `(model, params, context) -> (model, params)` from the policy's to its own. It is read
without a gradient and without dropout. Cached log-probabilities (a batch's `reference`) cost no forward
pass and no memory for a second model, but stand for one model and one table of data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from research.types import Params
from research.weights import lora
from research.weights.base import is_weight, row_count

Reference = Callable[[Any, Params, Any], tuple[Any, Params]]


def without_adapter(model: Any, params: Params, context: Any) -> tuple[Any, Params]:
    """The policy's own weights without their LoRAs: no second copy of the model.

    ValueError for parameters without a LoRA, whose reference would be the policy itself.
    """
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    if not any(isinstance(leaf, lora.LoRA) for leaf in leaves):
        raise ValueError("there is no LoRA to take off: the reference would be the policy itself")
    return model, lora.remove(params)


def in_context(other: Any = None) -> Reference:
    """The parameters that `context["reference"]` holds, of the model `other` or of the policy's.

    ValueError for a vocabulary that is not the policy's.
    """

    def reference(model: Any, params: Params, context: Any) -> tuple[Any, Params]:
        if not isinstance(context, dict) or "reference" not in context:
            raise ValueError("the reference's parameters are wanted as context['reference']")
        theirs = context["reference"]
        found, wanted = row_count(theirs["embed"]["table"]), row_count(params["embed"]["table"])
        if found != wanted:
            raise ValueError(
                f"the reference has a vocabulary of {found} tokens and the policy one of {wanted}: "
                "the same ids would not be the same text"
            )
        return (model if other is None else other), theirs

    return reference
