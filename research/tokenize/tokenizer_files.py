"""A tokenizer's files: what is read from a directory, and written to one.

`tokenizer.json`, or `tokenizer.model` (a SentencePiece model, see spm.py; `ice_text.model`:
chatglm.py), beside `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and
`generation_config.json`, as `transformers` has them. Use them through `Tokenizer`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from research.tokenize import chatglm, spm

SENTENCEPIECE = ("tokenizer.model", chatglm.VOCABULARY)
VOCABULARIES = ("tokenizer.json", *SENTENCEPIECE)
NAMED = ("bos", "eos", "pad", "unk")


class TokenizerError(ValueError):
    """A tokenizer's files are missing, malformed, or contradict each other."""


def read(directory: Path) -> dict[str, Any]:
    """The fields of the Tokenizer in a model directory; TokenizerError names the file that is wrong."""
    if not directory.is_dir():
        raise TokenizerError(f"{directory} is not a directory")
    config = _read_json(directory / "tokenizer_config.json", default={})
    named = _read_json(directory / "special_tokens_map.json", default={})
    named = {**named, **{key: value for key, value in config.items() if value is not None}}
    slow = _sentencepiece_file(directory)
    backend, implied = _read_backend(directory, slow, config)
    named = {**implied, **named}
    ids = {f"{name}_id": _special_id(backend, named, name, directory) for name in NAMED}
    template, name = _read_template(directory, config)
    stop_ids = _stop_ids(directory, ids["eos_id"])
    fields = {"chat_template": template, "template_name": name, "stop_ids": stop_ids}
    return {"backend": backend, **ids, **fields, **({} if slow is None else _original(slow))}


def read_sentencepiece(path: Path) -> dict[str, Any]:
    """The fields of the Tokenizer in a SentencePiece file, special tokens as its trainer named them."""
    if not path.is_file():
        raise TokenizerError(f"{path}: there is no such file")
    backend, implied = _sentencepiece_backend(path)
    if implied:
        ids = {f"{name}_id": _special_id(backend, implied, name, path) for name in NAMED}
        return {"backend": backend, **ids, **_original(path)}
    proto = path.read_bytes()
    spec = spm.parse(proto, str(path)).trainer_spec
    ids = {f"{name}_id": getattr(spec, f"{name}_id") for name in NAMED}
    ids = {name: index if index >= 0 else None for name, index in ids.items()}
    return {"backend": backend, **ids, "sentencepiece": proto}


def write(tokenizer: Any, directory: Path) -> None:
    """See `Tokenizer.save`."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-partial-", dir=directory) as folder:
        _write_files(tokenizer, Path(folder))
        _put_in_place(Path(folder), directory)


def _put_in_place(folder: Path, directory: Path) -> None:
    """Move complete files, tokenizer.json last but for the model it was made of.

    What an earlier tokenizer left goes first: a mixture of two would read as a complete one.
    """
    for name in (*VOCABULARIES, "chat_template.jinja"):
        (directory / name).unlink(missing_ok=True)
    last = {name: index for index, name in enumerate(VOCABULARIES, start=1)}
    for path in sorted(folder.iterdir(), key=lambda path: (last.get(path.name, 0), path.name)):
        os.replace(path, directory / path.name)


def _write_files(tokenizer: Any, directory: Path) -> None:
    ids = {name: getattr(tokenizer, f"{name}_id") for name in NAMED}
    named = {f"{name}_token": tokenizer.id_to_token(i) for name, i in ids.items() if i is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named,
        **(chatglm.FIELDS if tokenizer.sentencepiece_name == chatglm.VOCABULARY else {}),
    }
    # Through Python, so that a full disk is an OSError.
    text = tokenizer.backend.to_str(pretty=True)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", named)
    if tokenizer.sentencepiece is not None:
        (directory / tokenizer.sentencepiece_name).write_bytes(tokenizer.sentencepiece)
    if tokenizer.chat_template is not None:
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    if tokenizer.stop_ids not in ((), (tokenizer.eos_id,)):
        _write_json(
            directory / "generation_config.json", {"eos_token_id": list(tokenizer.stop_ids)}
        )


def _read_json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _sentencepiece_file(directory: Path) -> Path | None:
    """The directory's SentencePiece model; TokenizerError when there are two."""
    found = [directory / name for name in SENTENCEPIECE if (directory / name).exists()]
    if len(found) > 1:
        raise TokenizerError(f"{directory} has {' and '.join(SENTENCEPIECE)}; expected one of them")
    return found[0] if found else None


def _original(path: Path) -> dict:
    return {"sentencepiece": path.read_bytes(), "sentencepiece_name": path.name}


def _sentencepiece_backend(path: Path) -> tuple[tokenizers.Tokenizer, dict]:
    """The pipeline of a SentencePiece model, and the special tokens that the file's name implies."""
    model = spm.parse(path.read_bytes(), str(path))
    if path.name == chatglm.VOCABULARY:
        return chatglm.backend(model, str(path)), chatglm.SPECIAL
    return spm.backend(model), {}


def _read_backend(
    directory: Path, slow: Path | None, config: dict
) -> tuple[tokenizers.Tokenizer, dict]:
    fast = directory / "tokenizer.json"
    if fast.exists():
        _read_json(fast)  # tells a truncated file from one of an unknown form
        try:
            return tokenizers.Tokenizer.from_file(str(fast)), {}
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{fast} is not a tokenizer of `tokenizers`: {error}") from error
    if slow is None:
        raise TokenizerError(f"{directory} has neither {' nor '.join(VOCABULARIES)}")
    if slow.name == chatglm.VOCABULARY and (refused := chatglm.unsupported(config)) is not None:
        raise TokenizerError(f"{directory / 'tokenizer_config.json'}: {refused}")
    backend, implied = _sentencepiece_backend(slow)
    for index, token in sorted(config.get("added_tokens_decoder", {}).items(), key=_by_id):
        _add_token(backend, int(index), token, slow)
    _add_post_processor(backend, config)
    return backend, implied


def _by_id(entry: tuple[str, dict]) -> int:
    return int(entry[0])


def _add_token(backend: tokenizers.Tokenizer, index: int, token: dict, slow: Path) -> None:
    added = AddedToken(token["content"], normalized=False, special=token.get("special", False))
    (backend.add_special_tokens if added.special else backend.add_tokens)([added])
    if backend.token_to_id(token["content"]) != index:
        raise TokenizerError(
            f"{slow.with_name('tokenizer_config.json')}: added token {token['content']!r} has id "
            f"{index} there but {backend.token_to_id(token['content'])} in {slow.name}'s order"
        )


def _add_post_processor(backend: tokenizers.Tokenizer, config: dict) -> None:
    """The bos and eos that a LLaMA tokenizer adds, which a tokenizer.model does not record."""
    llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    before = ["<s>"] if config.get("add_bos_token", llama) else []
    after = ["</s>"] if config.get("add_eos_token", False) else []
    pairs = [(token, backend.token_to_id(token)) for token in before + after]
    if pairs and all(index is not None for _, index in pairs):
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=pairs
        )


def _special_id(
    backend: tokenizers.Tokenizer, named: dict, name: str, directory: Path
) -> int | None:
    token = named.get(f"{name}_token")
    token = token["content"] if isinstance(token, dict) else token
    if token is None:
        return None
    index = backend.token_to_id(token)
    if index is None:
        raise TokenizerError(f"{directory}: {name}_token {token!r} is not in the vocabulary")
    return index


def _read_template(directory: Path, config: dict) -> tuple[str | None, str]:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8"), str(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template, f"{directory / 'tokenizer_config.json'} (chat_template)"


def _stop_ids(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    stop = _read_json(directory / "generation_config.json", default={}).get("eos_token_id")
    stop = [stop] if isinstance(stop, int) else stop or []
    return tuple(dict.fromkeys(([] if eos_id is None else [eos_id]) + stop))
