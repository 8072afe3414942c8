"""From logits to text: filters, sampling, beams, contrast, drafts, and choice among given answers."""

from research.decode.answers import Trie, trie_of
from research.decode.beam import BeamResult, Beams, beam_search
from research.decode.contrastive import Contrastive, contrastive_search
from research.decode.drafts import DraftModel, Lookup
from research.decode.generate import Generation, generate
from research.decode.prompts import PromptError
from research.decode.sampling import Sampling
from research.decode.speculative import Speculation, speculate
from research.decode.streaming import stream

__all__ = [
    "BeamResult",
    "Beams",
    "Contrastive",
    "DraftModel",
    "Generation",
    "Lookup",
    "PromptError",
    "Sampling",
    "Speculation",
    "Trie",
    "beam_search",
    "contrastive_search",
    "generate",
    "speculate",
    "stream",
    "trie_of",
]
