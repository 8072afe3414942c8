"""Self times by hand, and a tiny model's profile from the profiler's own file."""

import gzip
import json

import pytest

from scripts import profile
from scripts.profile import Operation


def span(name, start, duration, thread=1, process=1):
    return {"ph": "X", "pid": process, "tid": thread, "name": name, "ts": start, "dur": duration}


def meta(kind, name, thread=None, process=1):
    event = {"ph": "M", "pid": process, "name": kind, "args": {"name": name}}
    return event if thread is None else event | {"tid": thread}


CPU = [
    meta("process_name", "/host:CPU"),
    meta("thread_name", "tf_XLAEigen/1", 1),
    meta("thread_name", "tf_XLAPjRtCpuClient/2", 2),
    meta("thread_name", "python", 3),
]


def test_self_time_leaves_out_what_an_event_calls():
    lane = [span("while", 0, 100), span("dot", 10, 30), span("copy", 15, 5), span("dot", 60, 20)]
    found = [(event["name"], own) for event, own in profile.self_times(lane)]
    assert found == [("while", 50), ("dot", 25), ("copy", 5), ("dot", 20)]


def test_events_that_touch_are_neighbours():
    found = profile.self_times([span("a", 0, 10), span("b", 10, 10)])
    assert [own for _, own in found] == [10, 10]


def test_operations_of_all_computing_threads_are_added_and_those_of_python_and_the_runtime_left_out():
    events = [
        *CPU,
        span("dot.1", 0, 10),
        span("ThunkExecutor::Execute", 0, 50, thread=2),
        span("dot.1", 5, 20, thread=2),
        span("add", 30, 1, thread=2),
        span("step", 0, 1000, thread=3),
    ]
    assert profile.operations(events) == [Operation("dot.1", 2, 30), Operation("add", 1, 1)]


def test_a_devices_streams_come_before_the_hosts_threads():
    device = [meta("process_name", "/device:GPU:0", process=7)]
    device += [meta("thread_name", "Stream #14(Compute)", 1, 7)]
    device += [meta("thread_name", "XLA Modules", 2, 7)]
    events = [*CPU, *device, span("gemm", 0, 5, process=7), span("dot", 0, 9)]
    events.append(span("jit_step", 0, 99, thread=2, process=7))
    assert [each.name for each in profile.operations(events)] == ["gemm"]


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (
            "jit(step)/jit(run)/while/body/closed_call/Block/ffn/dot_general",
            "Block/ffn/dot_general",
        ),
        ("jit(step)/transpose(jvp())/while/body/Block/ffn/up/mul", "backward Block/ffn/up/mul"),
        ("jit(run)/transpose(jvp(Decoder.project))/head/dot", "backward Decoder.project/head/dot"),
        ("jit(run)/jvp(Decoder.hidden)/add", "Decoder.hidden/add"),
        ("jit(run)/mul", "mul"),
    ],
)
def test_places_are_read_off_a_programs_text(path, place):
    line = f'  %dot.4 = f32[2]{{0}} dot(%a, %b), metadata={{op_type="d" op_name="{path}"}}'
    assert profile.places(f"{line}\n  ROOT %add.1 = f32[] add(%x, %y)") == {"dot.4": place}


def test_the_summary_gives_shares_and_kinds():
    found = [Operation("dot.4", 2, 600.0), Operation("add", 1, 300.0), Operation("dot", 1, 100.0)]
    text = profile.summary(found, {"dot.4": "ffn/gate"}, top=4)
    assert "| dot.4 | 2 | 0.60 | 60.0% | ffn/gate |" in text
    assert "| dot | 3 | 0.70 | 70.0% |" in text
    with pytest.raises(ValueError, match="no compiled operation"):
        profile.summary([], {}, top=4)


def test_the_newest_trace_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trace\.json\.gz"):
        profile.newest(tmp_path)
    path = tmp_path / "plugins/profile/2026/vm.trace.json.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": CPU}, file)
    assert profile.newest(tmp_path) == path
    assert profile.read(path) == CPU


@pytest.mark.parametrize("work", ["train", "decode", "prefill"])
def test_a_tiny_model_is_profiled(work, tmp_path, capsys):
    sizes = ["--rows", "1", "--length", "16", "--steps", "2", "--top", "500"]
    profile.main(["--work", work, "--model", "tiny", *sizes, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.startswith("tiny: ") and "median of 2" in out
    assert "| operation | calls | self ms | share | place |" in out and "| kind |" in out
    assert list(tmp_path.rglob("*.xplane.pb"))
    if work == "train":
        assert "Block/" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiney"], "no model 'tiney'; there are tiny"),
        (["--method", "lor"], "no method 'lor'"),
        (["--steps", "0"], "at least 1"),
        (["--length", "2048"], "1 to 1024 tokens"),
    ],
)
def test_bad_input_ends_with_a_message(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        profile.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
