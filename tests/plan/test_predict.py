"""Plans against real arrays, hand counts and whole compiled steps."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from research.models.families.llama import llama
from research.plan.depth import in_depth
from research.plan.devices import A100, H100, Device, devices, named
from research.plan.memory import activations, compiled_update, memory, mesh_of, placed
from research.plan.predict import predict
from research.plan.program import lowered
from research.plan.seconds import Cost, model_flops
from research.plan.work import METHODS, Method, Work
from research.train.optim import SGD

V, L, D, N, K, H, F = 96, 4, 64, 4, 2, 16, 128
CONFIG = llama(V, L, D, N, K, F, max_length=64)
CPU = Device("cpu", 1e9, 1e9, 1e9, 0.0, 1.0, jnp.float32)
MATRICES = D * N * H * 2 + D * K * H * 2 + 3 * D * F  # of one layer
PARAMETERS = 2 * V * D + L * (MATRICES + 2 * D) + D


def work(method="full", rows=8, length=16, config=CONFIG):
    return Work(config, METHODS[method], rows, length)


def held(method, mesh=None):
    """Where things are, without a program compiled."""
    return placed(work(method), mesh_of(1, 1) if mesh is None else mesh)


def local(tree):
    shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_those_of_a_real_init(method):
    real = work(method).initial(jax.random.key(0))
    assert local(held(method).params) == sum(leaf.nbytes for leaf in jax.tree.leaves(real))


def test_full_training_by_hand():
    place = held("full")
    assert local(place.params) == local(place.trainable) == 4 * PARAMETERS
    assert local(place.optimizer) == 2 * 4 * PARAMETERS + 3 * 4  # two counts and the rate


def test_lora_by_hand():
    place = held("lora")
    sizes = [(D, N * H), (D, K * H), (D, K * H), (N * H, D), (D, F), (D, F), (F, D)]
    factors = 16 * L * sum(a + b for a, b in sizes)
    assert local(place.trainable) == 4 * factors
    assert local(place.params) == 4 * (PARAMETERS + factors)


def test_nf4_with_double_quantization_by_hand():
    qlora, lora = held("qlora"), held("lora")
    weights = L * MATRICES
    codes, scales = weights // 2, weights // 64
    blocks = sum(
        math.ceil(n / 64 / 256) for n in (D * N * H,) * 2 + (D * K * H,) * 2 + (D * F,) * 3
    )
    few = codes + scales + 4 * L * blocks + 4 * L * 7
    assert local(qlora.params) == local(lora.params) - 4 * weights + few
    assert local(qlora.optimizer) < local(lora.optimizer) / 3


def test_frozen_parameters_are_held_in_the_models_dtype_and_trained_ones_in_float32():
    half = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    lora = placed(work("lora", config=half), mesh_of(1, 1))
    assert local(lora.params) == 2 * PARAMETERS + local(lora.trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora.trainable)} == {jnp.dtype("float32")}
    full = placed(work("full", config=half), mesh_of(1, 1))
    assert local(full.params) == 4 * PARAMETERS


def test_eight_devices_divide_parameters_and_optimizer_state():
    one, eight = held("full"), held("full", mesh_of(1, 8))
    assert local(eight.params) * 8 == local(one.params)
    assert (local(eight.optimizer) - 12) * 8 == local(one.optimizer) - 12
    assert local(held("full", mesh_of(2, 4)).params) * 4 == local(one.params)
    assert local(held("full", mesh_of(8, 1)).params) == local(one.params)
    assert not eight.notes


def test_an_axis_that_the_devices_do_not_divide_is_copied_and_named():
    odd = llama(V, 2, 36, 4, 2, 64, head_size=8, max_length=64)
    place = placed(work(config=odd), mesh_of(1, 8))
    assert local(place.params) == local(placed(work(config=odd), mesh_of(1, 1)).params)
    assert any("embed" in note for note in place.notes)


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_memory_extrapolated_in_depth_is_that_of_the_whole_compiled_step(method):
    each = work(method, rows=4, length=32)
    plan = memory(each, placed(each, mesh_of(1, 1)), compiled_update(each))
    params = each.parameters()
    way = each.method
    step = lowered(each.objective, way.optimizer, params, way.rule, each.batch()).compile()
    found = step.memory_analysis()
    assert plan.gradients + plan.temporaries == pytest.approx(found.temp_size_in_bytes, rel=0.1)
    # The step's number and its key are not counted.
    assert plan.kept == pytest.approx(found.argument_size_in_bytes, abs=100)


def test_layers_computed_again_save_memory_and_cost_a_forward_pass():
    kept, again = work("full", length=64), work("full-remat", length=64)
    assert activations(again) < 0.6 * activations(kept)
    assert model_flops(again) / model_flops(kept) == pytest.approx(4 / 3, rel=0.1)


def test_flops_are_those_of_the_products_and_grow_evenly_with_depth():
    wide = work(rows=2, length=16, config=llama(512, 4, 256, 4, 2, 512, max_length=64))
    layer = 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512
    products = 6 * 32 * (4 * layer + 512 * 256)
    found = in_depth(lambda counts: model_flops(wide.deep(counts)), wide.counts)
    assert products < found < 1.1 * products
    assert found == pytest.approx(model_flops(wide), rel=1e-6)


def test_in_depth_asks_for_two_depths_of_one_stack_and_one_more_of_each_other():
    asked = []

    def value(counts):
        asked.append(counts)
        return 7 + 2 * counts[0] + 5 * counts[1]

    assert in_depth(value, (10, 1)) == 7 + 20 + 5
    assert asked == [(2, 1), (3, 1)]
    asked.clear()
    assert in_depth(value, (10, 20)) == 7 + 20 + 100
    assert asked == [(2, 2), (3, 2), (2, 3)]
    asked.clear()
    assert in_depth(value, (10, 20), whole=True) == 127
    assert in_depth(value, (3, 2)) == 23
    assert asked == [(10, 20), (3, 2)]


def test_a_plan_is_of_one_devices_rows_and_parts():
    one, eight = (predict(work(), count, CPU) for count in (1, 8))
    # FLOPs of the update are divided unevenly: scalars are not.
    assert eight.flops == pytest.approx(one.flops, rel=0.05)
    assert eight.memory.batch * 8 == one.memory.batch
    assert eight.memory.gradients * 8 == one.memory.gradients
    assert eight.cost.gathered_bytes > 0 == one.cost.gathered_bytes
    assert eight.memory.total < one.memory.total / 2
    assert one.fits
    tiny = dataclasses.replace(CPU, memory_bytes=1e5)
    assert not dataclasses.replace(one, device=tiny).fits


def test_seconds_by_hand():
    device = Device("d", 1.0, flop_s=100.0, bandwidth=10.0, link=2.0, utilisation=0.5)
    assert Cost(200.0, 20.0, 30.0, 0.0).seconds(device) == 200 / 50 + 30 / 10
    assert Cost(200.0, 80.0, 0.0, 0.0).seconds(device) == 80 / 10
    assert Cost(200.0, 20.0, 0.0, 20.0).seconds(device) == 20 / 2
    with pytest.raises(ValueError, match="speed of d is not known"):
        Cost(1.0, 1.0, 1.0, 0.0).seconds(dataclasses.replace(device, flop_s=0.0))


def test_devices_by_name():
    assert devices("8xh100") == (8, H100)
    assert devices("A100") == (1, A100)
    count, cpu = devices("cpu")
    assert (count, cpu.name, cpu.flop_s) == (1, "cpu", 0.0) and cpu.memory_bytes > 1e8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xh10", "no device 'h10'; there are h100"),
        ("0xh100", "written like 8xh100"),
        ("8 x", "written like 8xh100"),
        ("2xcpu", "one cpu is this machine"),
    ],
)
def test_devices_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        devices(text)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"no method 'qlor'; there are qlora"):
        named("qlor", METHODS, "method")
    with pytest.raises(ValueError, match="12 rows do not divide over 8 devices"):
        predict(work(rows=12), 8, CPU)
    with pytest.raises(ValueError, match="3 copies of the model do not divide 8 devices"):
        predict(work(), 8, CPU, copies=3)
    with pytest.raises(ValueError, match="one row of 1 to 64 tokens, not 8 of 65"):
        work(length=65)
    with pytest.raises(ValueError, match="need a rank above 0"):
        Method(quantized=True, optimizer=SGD())
    narrow = llama(V, 2, 32, 4, 2, 64, max_length=64)
    with pytest.raises(ValueError, match=r"k/kernel .* groups of 64 do not fill 32 columns"):
        work("qlora", config=narrow).parameters()
