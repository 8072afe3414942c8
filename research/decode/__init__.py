"""From logits to text: sampling filters and generation."""

from research.decode.generate import Generation, generate
from research.decode.prompts import PromptError
from research.decode.sampling import Sampling

__all__ = ["Generation", "PromptError", "Sampling", "generate"]
