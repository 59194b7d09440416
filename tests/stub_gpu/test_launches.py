"""Every kernel launched without a GPU: Triton's launcher on a stub driver, csrc's host code on a stub runtime.

What the stubs refuse a driver would refuse; the last part of this file plants faults that they must see.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections import defaultdict
from typing import Any

import pytest

from fastlora.backends import cuda, cuda_abi, dispatch
from tests.stub_gpu import build, launch
from tests.stub_gpu.launch import Outcome
from tests.test_repository import LEDGER

MARK = "stub"

needs_driver = pytest.mark.skipif(build.driver_obstacle() is not None, reason=str(build.driver_obstacle()))
needs_runtime = pytest.mark.skipif(build.runtime_obstacle() is not None, reason=str(build.runtime_obstacle()))
every_kernel = pytest.mark.parametrize(
    ("verb", "name"),
    [
        pytest.param(verb, kernel.name, marks=needs_driver if kernel.name.startswith("triton") else needs_runtime)
        for verb, kernels in dispatch.KERNELS.items()
        for kernel in kernels
        if kernel.name.startswith(launch.FAMILIES)
    ],
)


@every_kernel
def test_what_a_kernel_does_not_refuse_it_launches(verb: str, name: str, found: list[Outcome]) -> None:
    ours = [outcome for outcome in found if (outcome.verb, outcome.kernel) == (verb, name)]
    assert [(outcome.call, outcome.error) for outcome in ours if outcome.error is not None] == []
    assert all(outcome.launches for outcome in ours if outcome.refusal is None)
    assert any(outcome.launches for outcome in ours)


@every_kernel
def test_the_ledger_marks_what_is_launched_here(verb: str, name: str, found: list[Outcome]) -> None:
    marked: dict[tuple[str, str], bool] = {}
    for line in LEDGER.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == [name, verb] and cells[2].startswith("sm_"):
            marked[cells[2], cells[3]] = MARK in cells[4].split(", ")
    launches: dict[tuple[str, str], int] = defaultdict(int)
    for outcome in found:
        if (outcome.verb, outcome.kernel) == (verb, name):
            launches[f"sm_{outcome.capability}", outcome.dtype] += len(outcome.launches)
    assert marked == {key: launches[key] > 0 for key in marked}
    assert {key for key, count in launches.items() if count} <= set(marked)


@needs_driver
def test_a_rank_and_a_tile_of_every_kind_go_through_triton(found: list[Outcome]) -> None:
    serial = [outcome for outcome in found if outcome.kernel == "triton-serial" and outcome.maps]
    assert {"_middle_kernel", "_serial_kernel"} <= {name for outcome in serial for name in outcome.launches}
    summed = [outcome for outcome in found if "_sum_splits_kernel" in outcome.launches]
    assert any(outcome.verb == "rank_grad" for outcome in summed)


@needs_driver
def test_the_gated_activation_is_launched_each_way(found: list[Outcome]) -> None:
    ours = [outcome for outcome in found if outcome.verb == "swiglu"]
    assert {outcome.capability for outcome in ours} == set(launch.ARCHITECTURES)
    assert [(outcome.call, outcome.error) for outcome in ours if outcome.error is not None] == []
    assert {outcome.launches for outcome in ours} == {("_swiglu_kernel",) * 2 + ("_swiglu_backward_kernel",) * 2}


@needs_driver
def test_a_group_goes_together(found: list[Outcome]) -> None:
    """Its launches of three branches, and no middle or update of a branch alone but t's."""
    outcomes = [outcome for outcome in found if outcome.call.startswith("Group(") and outcome.launches]
    assert {outcome.kernel for outcome in outcomes} == {"triton-skinny"}
    three = next(outcome for outcome in outcomes if outcome.call == "Group(masked=True)" and outcome.capability == 90)
    middles = [name for name in three.launches if name == "_group_middle_kernel"]
    assert (
        len(middles) == three.launches.count("_group_update_kernel") == three.launches.count("_group_grad_kernel") == 1
    )
    assert three.launches.count("_rank_update_kernel") == 3


@needs_runtime
def test_clusters_and_dependent_launches_go_through_csrc(found: list[Outcome]) -> None:
    for design in cuda.DESIGNS:
        ours = [outcome for outcome in found if outcome.kernel == f"cuda-{design}" and outcome.launches]
        assert any(outcome.clusters for outcome in ours)
        assert all(outcome.maps for outcome in ours)
    # Its launch of tiles may start before that of z has ended.
    serial = [outcome for outcome in found if outcome.kernel == "cuda-serial" and outcome.launches]
    assert any(outcome.dependent for outcome in serial)


@needs_runtime
def test_the_tile_in_words_is_that_of_the_kernel_which_csrc_launches(found: list[Outcome]) -> None:
    tiles = {(outcome.tile, outcome.launches[-1]) for outcome in found if "cuda" in outcome.kernel and outcome.tile}
    for words, kernel in tiles:
        rows, columns, cluster = re.fullmatch(r"(\d+)x(\d+)x64, clusters of (\d)", words).groups()
        assert rows == "128"
        assert f", {columns}, {cluster}, " in kernel
    assert {words.partition(",")[0] for words, _ in tiles} == {"128x128x64", "128x256x64"}


@needs_runtime
@pytest.mark.parametrize(
    ("change", "device", "shift", "words"),
    [
        ({}, 0, 0, None),
        ({"adapter_dtype": 2}, 0, 0, None),
        ({"adapter_dtype": 2}, 0, 8, "refused a tensor map"),
        ({}, 1, 0, "device 1 of 1"),
        ({"r": 257}, 0, 0, "r must be at most 256"),
        ({"x": (20, 1)}, 0, 0, "rows of x must be contiguous and start on 16 bytes"),
    ],
    ids=["right", "packed", "workspace_off_16_bytes", "no_such_device", "rank", "rows"],
)
def test_csrc_answers_in_words(change: dict[str, Any], device: int, shift: int, words: str | None) -> None:
    library = cuda_abi.load(str(build.library()))
    assert isinstance(library, cuda_abi.Library)
    assert (library.device_type, library.obstacle) == ("cuda", None)
    stub = ctypes.CDLL(str(build.LIBRARY))
    stub.stub_take.restype = ctypes.c_char_p
    stub.stub_take()
    memory = ctypes.create_string_buffer(1 << 20)
    start = (ctypes.addressof(memory) + 255) // 256 * 256
    strides = dict(x=(96, 1), w=(96, 1), a=(96, 1), b=(16, 1), y=(256, 1), z=(16, 1))
    numbers = dict(m=128, k=96, n=256, r=16, dtype=0, adapter_dtype=0)
    numbers |= {name: value for name, value in change.items() if name not in strides}
    matrices = {name: (start, *change.get(name, pair)) for name, pair in strides.items()}
    call = bytes(cuda_abi.LoraMatmul(**matrices, **numbers))
    answer = library.lora_matmul.run(call, start + shift, device, None)
    launches = json.loads(stub.stub_take())["operations"]
    if words is None:
        assert answer is None
        assert launches
    else:
        assert words in answer.decode()


# By name, what the message says of it.
DRIVER_FAULTS = {
    "map_stride": "stride 0 is 136 bytes, expected a multiple of 16",
    "map_stride_of_a_product": "stride 0 is 200 bytes, expected a multiple of 16",
    "map_base": "the matrix does not start on 16 bytes",
    "null_pointer": "argument 1 of 5 is a NULL pointer",
    "argument_missing": "argument 3 of 5 is missing",
    "argument_missing_in_python": "missing 1 required positional argument: 'size'",
    "cluster_of_the_grid": "a grid of 3 is no multiple of the cluster of 2",
    "cluster_too_large": "a cluster of 16 CTAs",
    "shared_without_opt_in": "65536 bytes of dynamic shared memory, asked for 49152",
    "shared_over_the_limit": "asks for 232449 bytes of dynamic shared memory, limit 232448",
    "grid": "grid 1 x 65536 x 1",
    "block": "block 1056 x 1 x 1",
}
RUNTIME_FAULTS = {
    "map_stride": "refused a tensor map",
    "map_base": "refused a tensor map",
    "map_box": "refused a tensor map",
    "argument_missing": "argument 1 of 1 is missing",
    "cluster_of_the_grid": "a grid of 3 is no multiple of the cluster of 2",
    "cluster_too_large": "a cluster of 16 CTAs",
    "shared_without_opt_in": "65536 bytes of dynamic shared memory, asked for 49152",
    "shared_over_the_limit": "asks for 232449 bytes of dynamic shared memory, limit 232448",
    "grid": "grid 4 x 65536 x 1",
    "block": "block 1056 x 1 x 1",
}


@needs_driver
def test_a_planted_fault_shows_to_triton() -> None:
    build.driver()
    lines = build.finish(build.start("tests.stub_gpu.faults")).splitlines()
    errors: dict[str, str | None] = dict(map(json.loads, lines))
    assert {name for name, error in errors.items() if error is None} == {"none", "none_by_hand"}
    for name, words in DRIVER_FAULTS.items():
        assert words in str(errors.pop(name))
    assert set(errors) == {"none", "none_by_hand"}


@needs_runtime
def test_a_planted_fault_shows_to_csrc() -> None:
    fault = ctypes.CDLL(str(build.faults())).fault
    fault.restype = ctypes.c_char_p
    assert fault(b"none") is None
    for name, words in RUNTIME_FAULTS.items():
        assert words in str(fault(name.encode()))
