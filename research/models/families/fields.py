"""Which fields of a config.json a family reads, and which may stand there unread.

A field that nobody has read may change what the model computes: it is refused by name, unless its
value says that it is off, or it is one of those below, which say nothing about the function.
"""

from __future__ import annotations

from typing import Any

from research.models.families.checkpoint import ConfigError

# Where the file comes from, and how the library that wrote it runs or labels things.
_BOOKKEEPING = """
_attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
_from_model_config _name_or_path _num_labels architectures attn_implementation auto_map
chunk_size_feed_forward dtype finetuning_task gradient_checkpointing id2label is_decoder
is_encoder_decoder is_llama_config label2id low_cpu_mem_usage model_type num_labels
output_attentions output_hidden_states output_past prefix problem_type return_dict
task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript transformers.js_config
transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
"""
# What a tokenizer or a way of decoding takes from older files.
_DECODING = """
bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
model_max_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
pad_token_id remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id
suppress_tokens temperature top_k top_p typical_p unk_token_id
"""
# What matters in training only, and heads that a language model does not have.
_TRAINING = """
attention_dropout attn_pdrop classifier_dropout embd_pdrop hidden_dropout hidden_dropout_prob
initializer_range predict_special_tokens resid_pdrop summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj z_loss_weight
"""
# In which precision and order the same function is computed.
_ARITHMETIC = """
apply_query_key_layer_scaling attention_softmax_in_fp32 bias_dropout_fusion
fp32_residual_connection
"""
# Lengths of buffers under the names of older code, beside those that are read.
_LENGTHS = "max_sequence_length n_ctx"
NEUTRAL = frozenset(f"{_BOOKKEEPING} {_DECODING} {_TRAINING} {_ARITHMETIC} {_LENGTHS}".split())


class Fields(dict):
    """A config that remembers which of its fields were asked for."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.read: set[str] = config.read if isinstance(config, Fields) else set()

    def but(self, *without: str, **changes: Any) -> Fields:
        """Without some fields and with others; what is asked of it is asked of this one too."""
        kept = {name: value for name, value in self.items() if name not in without}
        changed = Fields(self)
        changed.clear()
        changed.update(kept | changes)
        return changed

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.read.add(name)
        return super().__contains__(name)

    def refuse_unread(self) -> None:
        """ConfigError naming the fields that nobody knows here and that are not off."""
        unknown = sorted(set(self) - self.read - NEUTRAL)
        found = [f"{name} = {dict.get(self, name)!r}" for name in unknown if dict.get(self, name)]
        if found:
            raise ConfigError(
                f"config.json: {', '.join(found)} may change what the model computes and is not "
                "known here; a file whose fields change nothing can be read without them"
            )
