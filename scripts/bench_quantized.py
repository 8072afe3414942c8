"""Products with matrices of few bits, by shape and rows, and decoding of a real model in few bits.

    bash scripts/cpu.sh .venv/bin/python -m scripts.bench_quantized              both, 15 minutes
    python -m scripts.bench_quantized --parts products --repeats 5               1 minute
    python -m scripts.bench_quantized --parts model --layers 10                  its first 10 layers

A product is one matrix of SmolLM2-135M times 1, 8 or 256 rows, in as many copies as no cache holds;
`dense` is what decoding reads (`weights.transposed`; the table as it is). All representations of a
shape are compiled first and then take turns. The model is SmolLM2-135M-Instruct: its file's own
blocks of 4 bits as they are, made dense once, and its dense weights quantized again. A decoding time
is a call for `--tokens` + 1 new tokens less a call for one; prefill is a prompt's call for one token.

Cells are medians, in brackets the median of the ratios to `dense` of one turn: of times, so that
less than 1 is faster. Other programs falsify times; how many cores they kept busy is printed below.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.cells import markdown
from experiments.shared.few_bits import ALL
from experiments.shared.first_layers import first_layers
from research import hub
from research.decode import Sampling, generate
from research.decode.generate import for_decoding
from research.hub.download import smollm2
from research.models.decoder import Decoder
from research.types import Array, Params
from research.weights import int8
from research.weights.base import matmul, matmul_transposed
from research.weights.formats import Codebook, Integer
from research.weights.quantized import Quantized, quantize, quantized
from research.weights.transposed import Transposed
from scripts.bench import busy_elsewhere_s

Run = Callable[[], Any]

NF4 = Codebook(double=True)
SHAPES = {  # [in, out] of a kernel; the tied table multiplies from the other side
    "attention q, o": (576, 576),
    "attention k, v": (576, 192),
    "ffn gate, up": (576, 1536),
    "ffn down": (1536, 576),
    "table": (49152, 576),
}


def gguf_blocks(name: str, w: Array) -> Quantized:
    """As a Q4_1 file has it: 32 numbers share a scale and a least number of 16 bits."""
    node = quantized(name, w, Integer(4, 32, "minimum"))
    return node.replace(scale=node.scale.astype(jnp.float16), zero=node.zero.astype(jnp.float16))


def of_format(format: Any) -> Callable[[str, Array], Quantized]:
    return lambda name, w: quantized(name, w, format)


# (path, matrix) -> what stands in its place
REPRESENTATIONS: dict[str, Callable[[str, Array], Any]] = {
    "dense": lambda name, w: w if name.endswith("table") else Transposed(w.mT.copy()),
    "dense [in, out]": lambda name, w: w,
    "Int8 row": of_format(Integer(8, "row")),
    "Int4 64": of_format(Integer(4, 64)),
    "NF4+DQ 64": of_format(NF4),
    "Q4_1 blocks": gguf_blocks,
    "W8A8": lambda name, w: int8.QuantizedInputs(quantized(name, w, Integer(8, "row")), None),
}


def turns(runs: Mapping[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, taking turns after a first call of each that does not count."""
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return times


def products(name: str, shape: tuple[int, int], rows: int, megabytes: int) -> dict[str, Run]:
    """For each representation a pass over copies of one random matrix; each gives its products."""
    path = "embed/table" if name == "table" else "a/kernel"
    multiply = jax.jit(matmul_transposed if name == "table" else matmul)
    w = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (rows, shape[1 if name == "table" else 0]))
    count = copies(shape, megabytes)

    def run(make: Callable[[str, Array], Any]) -> Run:
        made = make(path, w)
        all_of_them = [jax.tree.map(jnp.copy, made) for _ in range(count)]
        return lambda: [multiply(x, one) for one in all_of_them]

    return {kind: run(make) for kind, make in REPRESENTATIONS.items()}


def copies(shape: tuple[int, int], megabytes: int) -> int:
    """How many dense float32 matrices fill so many megabytes; one at least."""
    return max(1, round(megabytes * 1e6 / (4 * np.prod(shape))))


def cells(times: Mapping[str, list[float]], of: Callable[[float], str]) -> list[str]:
    """`of(median)` and the median ratio to the dense form's time of the same turn."""
    full = times["dense"]
    ratio = {k: median(a / b for a, b in zip(t, full, strict=True)) for k, t in times.items()}
    return [f"{of(median(t))} ({ratio[name]:.2f})" for name, t in times.items()]


def product_rows(
    shapes: Mapping[str, tuple[int, int]], rows: Sequence[int], repeats: int, megabytes: int
) -> Iterator[list[str]]:
    """Lines of the first table: milliseconds a matrix."""
    for name, shape in shapes.items():
        count = copies(shape, megabytes)
        for each in rows:
            times = turns(products(name, shape, each, megabytes), repeats)
            shown = cells(times, lambda seconds, n=count: f"{1e3 * seconds / n:.3f}")
            yield [f"{name} {shape[0]}×{shape[1]}", str(each), *shown]


def forms(layers: int | None) -> tuple[Decoder, dict[str, Params]]:
    """The model, and its parameters in every form as decoding takes them."""
    dense, blocks = hub.load(smollm2()), hub.load(smollm2(), blocks=True)
    if layers is not None:
        dense, blocks = first_layers(dense, layers), first_layers(blocks, layers)
    as_it_is = lambda params: for_decoding(params, dense=False)  # noqa: E731
    start = time.perf_counter()
    once = jax.block_until_ready(for_decoding(blocks.params))
    print(f"blocks made dense and transposed in {time.perf_counter() - start:.1f} s", flush=True)
    bytes_ = quantize(dense.params, ALL, Integer(8, "row"))
    return dense.model, {
        "dense": for_decoding(dense.params),
        "Q4_1 blocks": as_it_is(blocks.params),
        "Q4_1 made dense once": once,
        "Int8 row": as_it_is(bytes_),
        "W8A8": as_it_is(int8.add(bytes_, ALL)),
        "NF4+DQ 64": as_it_is(quantize(dense.params, ALL, NF4)),
    }


def decoding(
    model: Decoder, params: Mapping[str, Params], batch: int, tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each form for `tokens` steps of so many rows, without what the first token takes."""
    prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, (batch, 16)).tolist()

    def run(form: Params, count: int) -> Run:
        sampling = Sampling(temperature=0.0, max_tokens=count)
        return lambda: generate(model, form, prompts, jax.random.key(0), sampling)

    calls = {(name, n): run(form, n) for name, form in params.items() for n in (1, tokens + 1)}
    times = turns(calls, repeats)
    return {
        name: [
            long - short
            for short, long in zip(times[name, 1], times[name, tokens + 1], strict=True)
        ]
        for name in params
    }


def prefill(
    model: Decoder, params: Mapping[str, Params], length: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each form to read a prompt of `length` tokens and say one."""
    prompt = np.random.default_rng(1).integers(3, model.config.vocab_size, length).tolist()
    sampling = Sampling(temperature=0.0, max_tokens=1)

    def run(form: Params) -> Run:
        return lambda: generate(model, form, [prompt], jax.random.key(0), sampling)

    return turns({name: run(form) for name, form in params.items()}, repeats)


def model_rows(model: Decoder, params: Mapping[str, Params], options: Any) -> Iterator[list[str]]:
    """Lines of the second table: tokens a second, and the ratio of times."""
    for batch in options.batches:
        times = decoding(model, params, batch, options.tokens, options.repeats)
        work = batch * options.tokens
        yield [f"decode, batch {batch}", *cells(times, lambda s, n=work: f"{n / s:.1f}")]
    times = prefill(model, params, options.prompt, options.repeats)
    yield [f"prefill, {options.prompt}", *cells(times, lambda s: f"{options.prompt / s:.0f}")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_quantized",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=["products", "model"], default=["products", "model"])
    add("--repeats", type=int, default=7)
    add("--rows", type=int, nargs="+", default=[1, 8, 256])
    add("--megabytes", type=int, default=60, help="of dense copies of a matrix")
    add("--layers", type=int, help="of the model; all by default")
    add("--batches", type=int, nargs="+", default=[1, 8])
    add("--tokens", type=int, default=32, help="new tokens that are timed")
    add("--prompt", type=int, default=512, help="tokens of the prompt that prefill reads")
    options = parser.parse_args(arguments)
    numbers = [options.repeats, options.megabytes, options.tokens, options.prompt]
    if min(*numbers, *options.rows, *options.batches) < 1:
        parser.error("every number must be at least 1")
    return options


def main(options: argparse.Namespace) -> None:
    start, before = time.perf_counter(), busy_elsewhere_s()
    if "products" in options.parts:
        lines = list(product_rows(SHAPES, options.rows, options.repeats, options.megabytes))
        print("ms a matrix\n\n" + markdown(["matrix", "rows", *REPRESENTATIONS], lines), flush=True)
    if "model" in options.parts:
        model, params = forms(options.layers)
        lines = list(model_rows(model, params, options))
        print("\ntokens a second\n\n" + markdown(["work", *params], lines))
    elsewhere = (busy_elsewhere_s() - before) / (time.perf_counter() - start)
    print(f"\ncores that other programs kept busy meanwhile: {elsewhere:.2f}")


if __name__ == "__main__":
    main(parse(None))
