"""The model families, found by the architecture that a config.json names."""

from types import ModuleType

from research.models.decoder import DecoderConfig
from research.models.families import baichuan, chatglm, glm, gpt, llama, qwen
from research.models.families.checkpoint import ConfigError, refuse
from research.models.families.fields import Fields

FAMILIES = (gpt, llama, qwen, chatglm, glm, baichuan)

# Every family's published decoders by name: 'llama-7b', 'qwen2.5-0.5b', ...
PRESETS: dict[str, DecoderConfig] = {
    name: config for family in FAMILIES for name, config in family.PRESETS.items()
}


def find(config: dict) -> ModuleType:
    """The family module that implements `config["architectures"]`; ConfigError when none does."""
    named = config.get("architectures") or []
    for family in FAMILIES:
        if any(architecture in family.ARCHITECTURES for architecture in named):
            return family
    known = [architecture for family in FAMILIES for architecture in family.ARCHITECTURES]
    raise ConfigError(f"config.json: architectures {named} are not implemented, only {known}")


def read(config: dict) -> tuple[ModuleType, DecoderConfig]:
    """The family and the model that a config.json describes.

    ConfigError, naming the field, for what is not implemented and for what nobody knows here.
    """
    family, fields = find(config), Fields(config)
    refuse(fields, "is_causal", True, None)  # transformers turns any decoder into an encoder by it
    described = family.from_huggingface(fields)
    fields.refuse_unread()
    return family, described
