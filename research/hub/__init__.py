"""Models in and out: `load` and `save` of Hugging Face directories, GGUF files, PEFT adapters."""

from research.hub.checkpoint import CheckpointError
from research.hub.peft import load_adapter, save_adapter, without_adapter
from research.hub.pretrained import Pretrained, load, save
from research.hub.quantized_save import save_quantized

__all__ = [
    "CheckpointError",
    "Pretrained",
    "load",
    "load_adapter",
    "save",
    "save_adapter",
    "save_quantized",
    "without_adapter",
]
