"""Decoding among given answers: a trie of token ids as arrays, so that it works under jit.

Node 0 is the root; a path from it to a leaf is one answer. In every step the tokens that lead to no
answer are removed, and the choice among the rest is made as ever. A sampled answer therefore has
the probability Π p(token) / p(allowed tokens), normalised step by step, which is *not* p(answer)
normalised over the answers; `research.evaluate.choice.answer_log_probs` scores whole answers.

Greedy it is the constrained decoding of De Cao et al. 2020 (arXiv:2010.00904) with one beam.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct

from research.types import Array


@struct.dataclass
class Trie:
    """tokens, children [nodes, most children] int32: which token leads where; -1 fills the rows.

    longest: tokens of the longest answer.
    """

    tokens: np.ndarray | Array
    children: np.ndarray | Array
    longest: int = struct.field(pytree_node=False)

    def keep(self, logits: Array, nodes: Array) -> Array:
        """Logits [B, V], -inf but for the tokens that go on from `nodes` [B].

        At a leaf nothing goes on, and everything stays: the row has ended.
        """
        rows, tokens = jnp.arange(logits.shape[0])[:, None], jnp.asarray(self.tokens)[nodes]
        # The index V, of no token, is dropped.
        at = jnp.where(tokens < 0, logits.shape[-1], tokens)
        allowed = jnp.zeros(logits.shape, bool).at[rows, at].set(True, mode="drop")
        return jnp.where(allowed | self.complete(nodes)[:, None], logits, -jnp.inf)

    def follow(self, nodes: Array, tokens: Array) -> Array:
        """The nodes [B] after one more token each; a leaf stays."""
        match = jnp.asarray(self.tokens)[nodes] == tokens[:, None]
        child = jnp.where(match, jnp.asarray(self.children)[nodes], -1).max(-1)
        return jnp.where(child < 0, nodes, child)

    def complete(self, nodes: Array) -> Array:
        """[B] bool: whether an answer ends here."""
        return jnp.asarray(self.tokens)[nodes, 0] < 0

    def check_rules(self, banned: Sequence[int], forced: Sequence[int]) -> None:
        """ValueError for rules that could leave no answer, or make another of it."""
        wanted = sorted(set(banned) & set(np.asarray(self.tokens).ravel().tolist()))
        if wanted:
            raise ValueError(f"banned_ids {wanted} are tokens of the answers")
        if len(forced):
            raise ValueError("forced_ids and answers to choose among exclude each other")

    def check(self, vocab_size: int, max_tokens: int) -> None:
        """ValueError when an id is outside the vocabulary or an answer longer than `max_tokens`."""
        if self.tokens.max() >= vocab_size:
            raise ValueError(
                f"the answers hold token id {self.tokens.max()}; ids are 0..{vocab_size - 1}"
            )
        if self.longest > max_tokens:
            raise ValueError(
                f"the longest answer has {self.longest} tokens, max_tokens is {max_tokens}"
            )


def trie_of(answers: Sequence[Sequence[int]]) -> Trie:
    """The trie of some answers, lists of token ids.

    ValueError for no answers, an empty or repeated one, a negative id, or one that another begins
    with: where an answer may end or go on, give both the stop id as their last token.
    """
    if not len(answers):
        raise ValueError("no answers: expected a list of lists of token ids")
    nodes: list[dict[int, int]] = [{}]
    for number, answer in enumerate(answers):
        if not len(answer):
            raise ValueError(f"answer {number} is empty: it needs at least one token")
        if min(answer) < 0:
            raise ValueError(f"answer {number} holds token id {min(answer)}; ids are 0 or more")
        node, created = 0, False
        for place, token in enumerate(answer):
            if place and not nodes[node] and not created:
                raise ValueError(
                    f"answer {number} begins with another answer; end both in a stop id"
                )
            if token not in nodes[node]:
                nodes[node][token] = len(nodes)
                nodes.append({})
                created = True
            node = nodes[node][token]
        if not created:
            raise ValueError(
                f"answer {number} is, or begins, another answer; end both in a stop id"
            )
    width = max(map(len, nodes))
    tokens, children = (np.full((len(nodes), width), -1, np.int32) for _ in range(2))
    for node, edges in enumerate(nodes):
        tokens[node, : len(edges)], children[node, : len(edges)] = list(edges), list(edges.values())
    return Trie(tokens, children, max(map(len, answers)))
