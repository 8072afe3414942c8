"""The reference side of the benchmark: transformers and peft as their users call them.

    .references/venv/bin/python -m scripts.benchmark.theirs WORKLOAD MODE THREADS

Defaults throughout: sdpa attention, dynamic cache, torch.optim.AdamW, batches padded to their
longest row.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from scripts.benchmark.modes import RANK
from scripts.benchmark.worker import Repeat, seconds, serve

Work = dict[str, Any]
LIBRARIES = ("torch", "transformers", "peft")
BATCH = 8
NO_LOSS = -100
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(work: Work):
    return AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)


def decode(work: Work, rows: int) -> tuple[dict[str, Any], Repeat]:
    """The time of `new_tokens` tokens after the first: that of all, less that of one alone."""
    model, count = load(work).eval(), work["sizes"]["new_tokens"]
    model.generation_config.eos_token_id = None  # stop at nothing
    model.generation_config.pad_token_id = 0
    prompts = torch.tensor(work["prompts"][:rows])

    def continued(tokens: int) -> torch.Tensor:
        mask = torch.ones_like(prompts)
        options = {"attention_mask": mask, "do_sample": False, "use_cache": True}
        return model.generate(prompts, max_new_tokens=tokens, **options)[:, prompts.shape[1] :]

    def repeat() -> dict[str, Any]:
        first, whole = seconds(partial(continued, 1)), seconds(partial(continued, count + 1))
        spent = {"seconds": whole - first, "whole_s": whole}
        return {**spent, "work": rows * count, "steps": count}

    continued(1)
    return {"tokens": continued(count + 1).tolist()}, repeat


def prefill(work: Work) -> tuple[dict[str, Any], Repeat]:
    """The prompt into a new cache, and the logits of its last position."""
    model, tokens = load(work).eval(), torch.tensor([work["prefill"]])

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(tokens, use_cache=True, logits_to_keep=1).logits[0, -1].log_softmax(-1)

    log_probs = run()
    token = int(log_probs.argmax())
    check = {"tokens": [token], "log_prob": float(log_probs[token])}
    counts = {"work": tokens.numel(), "steps": 1, "tokens": tokens.numel()}
    return check, lambda: {"seconds": seconds(run), **counts}


def full(work: Work) -> tuple[dict[str, Any], Repeat]:
    return training(load(work), [whole_batch(work)])


def adapter(work: Work) -> tuple[dict[str, Any], Repeat]:
    return training(adapted(work), [whole_batch(work)])


def rows(work: Work) -> tuple[dict[str, Any], Repeat]:
    """One repetition is all chosen rows once, in padded batches of 8 in the data set's order."""
    chosen = work["examples"]
    batches = [padded(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
    first = padded([chosen[i] for row in work["packed"][0] for i in row])
    check, repeat = training(adapted(work), batches, first)

    def counted() -> dict[str, Any]:
        reply = repeat()
        return {**reply, "work": reply["supervised"]}

    return check, counted


def adapted(work: Work):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    return get_peft_model(load(work), config)


def training(model, batches: list[dict], first: dict | None = None) -> tuple[dict, Repeat]:
    """A repetition is one optimizer step for each batch. Check: the loss before the first step,
    which is taken on `first` where that is given."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01)
    counts = {
        "steps": len(batches),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "supervised": sum(int((batch["labels"][:, 1:] != NO_LOSS).sum()) for batch in batches),
    }

    def run(batch: dict) -> float:
        loss = model(**batch).loss
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    def repeat() -> dict[str, Any]:
        losses = []
        spent = seconds(lambda: losses.extend(run(batch) for batch in batches))
        return {"seconds": spent, "work": counts["tokens"], **counts, "loss": losses[-1]}

    return {"loss": run(batches[0] if first is None else first)}, repeat


def whole_batch(work: Work) -> dict:
    """Every token with a next one has a loss: the model shifts the labels itself."""
    tokens = torch.tensor(work["batch"])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def padded(examples: list[dict]) -> dict:
    """A batch padded on the right to its longest row. A weight belongs to predicting the next
    token, a label is that token."""
    shape = (len(examples), max(len(e["tokens"]) for e in examples))
    tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, NO_LOSS)
    for row, example in enumerate(examples):
        ids, has_loss = torch.tensor(example["tokens"]), torch.tensor(example["weights"]) != 0
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        labels[row, 1 : len(ids)][has_loss[:-1]] = ids[1:][has_loss[:-1]]
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


MODES = {
    "decode1": partial(decode, rows=1),
    "decode8": partial(decode, rows=8),
    "prefill1024": prefill,
    "full4x256": full,
    "lora4x256": adapter,
    "rows": rows,
}

if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    work = json.loads(Path(sys.argv[1]).read_text())
    serve(partial(MODES[sys.argv[2]], work), LIBRARIES)
