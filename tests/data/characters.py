"""Conversations as token ids without a tokenizer, for the tests of data."""

import numpy as np


def encode(messages):
    """A token a character; a turn ends in 0. Assistant turns are learned."""
    ids, mask = [], []
    for message in messages:
        turn = [ord(c) for c in message["content"]] + [0]
        learned = message.get("loss_weight", 1.0) if message["role"] == "assistant" else 0.0
        ids, mask = ids + turn, mask + [learned] * len(turn)
    return np.array(ids), np.array(mask)
