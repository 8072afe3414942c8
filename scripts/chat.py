"""Talk to a model in the terminal, the answer streaming.

python -m scripts.chat smollm2 [--adapter DIR] [--system TEXT] [--temperature 0.7] ...
python -m scripts.chat PATH        a Hugging Face directory or a .gguf file

/reset           forget the conversation        /adapter on|off   the fine-tuned adapter
/system TEXT     a new system prompt, and reset  /quit             or Ctrl-D; Ctrl-C stops an answer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax

from research import hub
from research.compiled import keep_compiled
from research.decode import PromptError, Sampling, generate
from research.decode.generate import for_decoding
from research.decode.text import TextStream
from research.hub.download import DownloadError, smollm2
from research.tokenize.chat import ChatTemplateError, render
from research.weights.prompt import before, is_prompt

Write = Callable[[str], Any]


@dataclass
class Chat:
    """A conversation with a model; `params` holds the adapter where there is one."""

    model: Any
    params: Any
    tokenizer: Any
    sampling: Sampling
    write: Write
    has_adapter: bool = False
    system: str | None = None
    adapter: bool = True
    seed: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self):
        self.plain = self.model, self.params
        if self.has_adapter:
            self.plain = hub.without_adapter(*self.plain)
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> str:
        """The model's answer to `text`, written as it comes and kept in the conversation."""
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.encode(render(self.tokenizer, asked, add_generation_prompt=True))
        stream = TextStream(self.tokenizer.decode)
        model, params = (self.model, self.params) if self.adapter else self.plain
        if any(map(is_prompt, jax.tree.leaves(params, is_leaf=is_prompt))):
            (prompt,) = before(params, [prompt])
        rng = jax.random.fold_in(jax.random.key(self.seed), len(asked))
        try:
            generate(
                model,
                params,
                [prompt],
                rng,
                self.sampling,
                callback=lambda new: self.write(stream.add(new[0])),
            )
        except KeyboardInterrupt:
            self.write(" [stopped]")
        self.write(stream.end() + "\n")
        answer = self.tokenizer.decode(stream.ids)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def command(self, line: str) -> bool:
        """Obey a line that begins with '/'; False ends the conversation."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self.reset()
            self.write("[forgotten]\n")
        elif name == "/system":
            self.system = rest.strip() or None
            self.reset()
            self.write("[new system prompt, forgotten]\n")
        elif name == "/adapter" and rest in ("on", "off") and self.has_adapter:
            self.adapter = rest == "on"
            self.write(f"[adapter {rest}]\n")
        elif name == "/adapter" and not self.has_adapter:
            self.write("[no adapter: start with --adapter DIR]\n")
        else:
            self.write("[commands: /reset, /system TEXT, /adapter on|off, /quit]\n")
        return True

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line until /quit or their end."""
        for line in map(str.strip, lines):
            try:
                if line.startswith("/") and not self.command(line):
                    return
                if line and not line.startswith("/"):
                    self.say(line)
            except PromptError as error:
                self.write(f"[{error}; /reset begins anew]\n")
            except ChatTemplateError as error:
                hint = "; /system alone takes the system prompt away" if self.system else ""
                self.write(f"[{error}{hint}]\n")


def typed() -> Iterable[str]:
    """Lines from the terminal until Ctrl-D."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n[/quit or Ctrl-D to leave]")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="smollm2",
        help="'smollm2' (the default), a model directory or a .gguf file",
    )
    parser.add_argument("--adapter", help="a PEFT adapter directory")
    parser.add_argument("--system", help="system prompt; the template's own when absent")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--repetition-penalty", type=float, default=1.1)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    keep_compiled()
    try:
        pretrained = hub.load(smollm2() if options.model == "smollm2" else options.model)
        if options.adapter:
            pretrained = hub.load_adapter(pretrained, options.adapter)
    except (ValueError, OSError, DownloadError) as error:
        print(f"chat: {error}", file=sys.stderr)
        return 1
    if pretrained.tokenizer is None or pretrained.tokenizer.chat_template is None:
        print(f"chat: {options.model} has no tokenizer with a chat template", file=sys.stderr)
        return 1
    chat = Chat(
        model=pretrained.model,
        params=for_decoding(pretrained.params, donate=True),
        tokenizer=pretrained.tokenizer,
        sampling=Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            max_tokens=options.max_tokens,
            stop_ids=pretrained.tokenizer.stop_ids,
        ),
        write=lambda text: print(text, end="", flush=True),
        has_adapter=options.adapter is not None,
        system=options.system,
        seed=options.seed,
    )
    print("Compiling at the first answer takes some seconds. /quit leaves.", flush=True)
    chat.run(typed())
    return 0


if __name__ == "__main__":
    sys.exit(main())
