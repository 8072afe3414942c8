"""What transformers' beam search says: tests/decode/fixtures/beam_{tiny,smollm2}.json.

    .references/venv/bin/python scripts/references/beam_search.py tiny
    .references/venv/bin/python scripts/references/beam_search.py smollm2 MODEL.gguf

Writes {stop, new, settings, prompts: [{text, ids}], found: per setting, per prompt {rows,
scores}}; the rows are new tokens up to and with the stop id, best first. Each prompt is read alone,
without padding. The tiny model is that of tests/hub/fixtures/tiny_llama/gqa.
"""

import json
import sys
from pathlib import Path

import torch
from hub_logits import open_model
from transformers import AutoTokenizer

TESTS = Path(__file__).parents[2] / "tests"
NEW = 16
SETTINGS = [
    {"length_penalty": 1.0, "early_stopping": False},
    {"length_penalty": 0.0, "early_stopping": True},
]
TINY_SETTINGS = [
    {"length_penalty": penalty, "early_stopping": early}
    for penalty in (0.0, 1.0, 2.0)
    for early in (False, True, "never")
] + [{"length_penalty": 1.0, "early_stopping": False, "no_repeat_ngram_size": 2}]
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = [
    "What is the capital of France?",
    "Name a colour.",
    "Is ice colder than steam? Answer with one word.",
    "Who wrote Hamlet?",
    "Translate to French: Good morning.",
    "What does a baker make?",
]
TEXTS = [
    "In the beginning God created the heaven and the earth. And the earth was",
    "Shall I compare thee to a summer's day? Thou art more lovely",
    "The Lord is my shepherd; I shall not",
    "To be, or not to be,",
]


def continued(model, ids: list[int], stop: list[int], setting: dict) -> dict:
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=stop,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **setting,
    )
    rows = [row[len(ids) :].tolist() for row in out.sequences]
    ends = [[i + 1 for i, token in enumerate(row) if token in stop] for row in rows]
    rows = [row[: end[0]] if end else row for row, end in zip(rows, ends, strict=True)]
    return {"rows": rows, "scores": [round(x, 5) for x in out.sequences_scores.tolist()]}


def write(name: str, model, prompts: list[dict], stop: list[int], settings: list[dict]) -> None:
    found = [[continued(model, p["ids"], stop, setting) for p in prompts] for setting in settings]
    record = {"stop": stop, "new": NEW, "settings": settings, "prompts": prompts, "found": found}
    (TESTS / f"decode/fixtures/beam_{name}.json").write_text(json.dumps(record) + "\n")


def tiny() -> None:
    model = open_model(TESTS / "hub/fixtures/tiny_llama/gqa")
    torch.manual_seed(0)
    prompts = [{"ids": torch.randint(64, (n,)).tolist()} for n in (1, 2, 3, 5, 8, 13)]
    write("tiny", model, prompts, [2, 11, 40], TINY_SETTINGS)


def smollm2(path: Path) -> None:
    model = open_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [CHAT.format(q) for q in QUESTIONS] + TEXTS
    prompts = [{"text": t, "ids": tokenizer(t, add_special_tokens=False).input_ids} for t in texts]
    write("smollm2", model, prompts, [2], SETTINGS)


if __name__ == "__main__":
    tiny() if sys.argv[1] == "tiny" else smollm2(Path(sys.argv[2]))
