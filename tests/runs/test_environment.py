import hashlib
import subprocess
import sys

from research.runs import environment


def git(root, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def test_commit_and_the_dirty_flag_that_results_do_not_set(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    found = environment.commit(tmp_path)
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (tmp_path / "experiments/results").mkdir(parents=True)
    (tmp_path / "experiments/results/x.jsonl").write_text("{}")
    assert environment.commit(tmp_path)["dirty"] is False
    (tmp_path / "new.py").write_text("2")
    assert environment.commit(tmp_path)["dirty"] is True


def test_no_repository_is_said_as_none(tmp_path):
    assert environment.commit(tmp_path) == {"commit": None, "dirty": None}


def test_lock_hash_is_that_of_the_file(tmp_path):
    (tmp_path / "lock").write_bytes(b"jax==0.10.2\n")
    assert (
        environment.lock_sha256(tmp_path / "lock") == hashlib.sha256(b"jax==0.10.2\n").hexdigest()
    )
    assert len(environment.lock_sha256()) == 64


def test_device_and_versions_are_filled():
    device = environment.device()
    assert device["platform"] == "cpu"
    assert device["count"] == 8
    assert device["cores"] >= 1
    assert device["cpu"]
    assert set(environment.versions()) == {"python", "jax", "jaxlib", "flax", "optax"}


def test_processor_name_is_read_from_the_system_file(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3GHz\n")
    assert environment.cpu_model(tmp_path / "cpuinfo") == "Fast CPU @ 3GHz"
    assert environment.cpu_model(tmp_path / "missing")


GROW_AND_SHRINK = """
import numpy
from research.runs import environment
environment.reset_peak_memory()
before = environment.peak_memory()
block = numpy.ones(200_000_000 // 8)
del block
print(environment.peak_memory() - before)
"""


def test_peak_memory_sees_an_allocation_that_was_freed():
    # In a process of its own: where the kernel cannot begin a new peak, what other tests took
    # would hide the block.
    done = subprocess.run(
        [sys.executable, "-c", GROW_AND_SHRINK], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 150_000_000
