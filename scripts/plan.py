"""What a training step will need on some devices, before it is run: memory, FLOPs, time.

    python -m scripts.plan --model llama-7b --method qlora --devices 8xh100 --batch 64 --length 2048
    python -m scripts.plan --model smollm2-135m --method full --devices cpu --batch 4 --length 256
    python -m scripts.plan --check                   plans against small steps that are really taken

No array of the model is made. Parameters, gradients and optimizer state are counted from shapes and
divided as `train.sharding` does; temporaries and FLOPs are read off programs of 2 and 3 layers, compiled
here for the rows of one device and extrapolated in depth (--compile: the whole depth). The speed of a
CPU is measured, with a small real step; that of other devices is their data sheet's at an assumed
utilisation. research/plan says what is counted, and docs/PERFORMANCE.md how well it fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from research.compiled import keep_compiled
from research.models.families import PRESETS
from research.plan.devices import Device, devices, named
from research.plan.predict import Plan, predict
from research.plan.work import METHODS, Work
from research.runs.environment import cpu_model
from scripts.planning.check import check, table
from scripts.planning.running import measured_cpu


def text(plan: Plan, title: str) -> str:
    """The plan as lines: bytes of one device in GB (10^9), FLOPs and time of a step."""
    memory, device = plan.memory, plan.device
    lines = [
        ("parameters", memory.parameters),
        ("  of which trained", memory.trained),
        ("gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        ("batch", memory.batch),
        ("activations, temporaries", memory.temporaries),
        ("total", memory.total),
    ]
    whole = device.memory_bytes
    verdict = "fits" if plan.fits else "does not fit"
    shown = [title, "", "GB on each device"]
    shown += [f"  {name:26}{value / 1e9:10.3f}" for name, value in lines]
    shown += [f"  {'memory of a ' + device.name:26}{whole / 1e9:10.3f}"]
    shown += [f"  {verdict}: {memory.total / whole:.0%} of it", "", *time(plan), *plan.notes]
    return "\n".join(shown)


def time(plan: Plan) -> list[str]:
    tokens, device = plan.work.rows * plan.work.length, plan.device
    how = "measured here" if device.measured else "estimate: data sheet, assumed"
    return [
        f"FLOPs of a step    {plan.flops:.3e}, {plan.flops / tokens:.3e} a token",
        f"expected time      {plan.seconds:.3g} s, {tokens / plan.seconds:,.0f} tokens/s",
        f"                   ({how} {device.utilisation:.0%} of {device.flop_s / 1e12:,.3g} TFLOP/s,"
        f" {device.bandwidth / 1e9:,.0f} GB/s)",
    ]


def planned(options: argparse.Namespace) -> str:
    """The text of the plan that was asked for; ValueError for what there is not or does not fit together."""
    count, device = devices(options.devices)
    method = named(options.method, METHODS, "method")
    config = named(options.model, PRESETS, "model")
    work = Work(config, method, options.batch, options.length)
    plan = predict(work, count, known(device, work), options.copies, options.compile)
    parts = f"{options.copies} × fsdp {count // options.copies}"
    shape = f"{options.batch} rows of {options.length} tokens"
    return text(
        plan, f"{options.model}, {options.method}, {count} × {device.name} ({parts}), {shape}"
    )


def known(device: Device, work: Work) -> Device:
    """A device with its speed, which is measured if need be."""
    return device if device.flop_s else measured_cpu(work.method)


def checked() -> str:
    found = check()
    machine = found.machine
    limits = f"{machine.flop_s / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s"
    others = f"other programs kept {found.cores_elsewhere:.2f} cores busy meanwhile"
    head = f"planned / measured (ratio), {cpu_model()}, {limits}; {others}"
    return f"{head}\n\n{table(found.rows)}"


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="a preset of research/models/families")
    add("--method", default="full", help=", ".join(METHODS))
    add("--devices", default="cpu", help="8xh100, 1xa100, h200, cpu")
    add("--batch", type=int, default=8, help="rows of a step, all devices together")
    add("--length", type=int, default=512, help="tokens of a row")
    add("--copies", type=int, default=1, help="of the model, each divided over the other devices")
    add("--compile", action="store_true", help="the whole depth instead of 2 and 3 layers")
    add("--check", action="store_true", help="plan small steps, take them, and compare")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parser, options = parse(arguments)
    keep_compiled()
    try:
        print(checked() if options.check else planned(options))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
