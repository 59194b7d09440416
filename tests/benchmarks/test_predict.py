"""The predictions: targets and published tables, hand arithmetic, the kernels' own constants, and the command line."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.cases import GROUPS, LAYERS, MODES, Case
from benchmarks.predict import command as predict
from benchmarks.predict import cost
from benchmarks.predict.command import DEVICES, Prediction
from benchmarks.predict.cost import DESIGNS, Kernel, Problem
from fastlora.backends import dispatch

H200 = DEVICES["h200"]


def case(k: int, n: int, r: int, m: int = 8192, dtype: str = "bf16") -> Case:
    return Case(f"{k}x{n}", m, r, dtype, dropout=0.0)


def problem(k: int, n: int, r: int, m: int = 8192, sms: int = 132) -> Problem:
    return Problem(m, k, n, r, itemsize=2, sms=sms)


def ratios(k: int, n: int, r: int, m: int = 8192) -> dict[tuple[str, str], float]:
    return {(row.design, row.mode): row.ratio for row in predict.predict(case(k, n, r, m), H200)}


def gemm_seconds(p: Problem) -> float:
    return 2 * p.m * p.k * p.n / 790e12


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    return predict.run(parser.parse_args(argv))


# The targets' table: M = 8192, R = 16, bf16, H200, a step over the frozen layer's.
@pytest.mark.parametrize(
    ("k", "n", "least", "serial", "plain"),
    [(4096, 4096, "1.012", "1.072", "1.36"), (8192, 28672, "1.004", "1.019", "1.13")],
)
def test_the_targets_rows(k: int, n: int, least: str, serial: str, plain: str) -> None:
    step = ratios(k, n, 16)
    assert f"{case(k, n, 16).theory('step'):.3f}" == least
    assert f"{step['serial-ideal', 'step']:.3f}" == serial
    assert f"{step['plain', 'step']:.2f}" == plain
    assert step["full", "step"] == pytest.approx(1.5, abs=1e-12)
    assert {step["frozen", mode] for mode in MODES} == {1.0}


# Forward over the plain GEMM, in whole waves, 2 µs for the serial design's second launch.
@pytest.mark.parametrize(
    ("k", "n", "z_jobs", "serial"),
    [(4096, 4096, "1.004", "1.053"), (4096, 1024, "1.199", "1.20"), (8192, 28672, "1.002", "1.009")],
)
def test_forward_in_whole_waves(k: int, n: int, z_jobs: str, serial: str) -> None:
    waves = cost.in_whole_waves(problem(k, n, 16), H200, "bf16")
    assert f"{waves['cuda-z_jobs']:.3f}" == z_jobs
    assert f"{waves['triton-serial']:.{len(serial) - 2}f}" == serial
    arithmetic = case(k, n, 16).theory("forward")
    assert ratios(k, n, 16)["cuda-z_jobs", "forward"] == pytest.approx(max(arithmetic, waves["cuda-z_jobs"]))


# K, N, R, then forward: FLOP minimum, serial, library, plain; backward: FLOP minimum, one read of dy, two, plain.
ROOFLINE = [
    (4096, 4096, 16, 1.008, 1.049, 1.135, 1.314, 1.016, 1.094, 1.140, 1.404),
    (4096, 4096, 64, 1.031, 1.062, 1.136, 1.316, 1.063, 1.109, 1.155, 1.404),
    (8192, 8192, 16, 1.004, 1.025, 1.067, 1.157, 1.008, 1.047, 1.070, 1.202),
    (8192, 8192, 64, 1.016, 1.031, 1.068, 1.158, 1.031, 1.054, 1.077, 1.202),
    (4096, 14336, 16, 1.005, 1.017, 1.103, 1.282, 1.010, 1.059, 1.104, 1.244),
    (14336, 4096, 16, 1.005, 1.046, 1.071, 1.122, 1.010, 1.062, 1.075, 1.276),
    (8192, 28672, 16, 1.0025, 1.008, 1.051, 1.141, 1.005, 1.030, 1.052, 1.122),
    (8192, 28672, 64, 1.010, 1.014, 1.051, 1.141, 1.020, 1.032, 1.055, 1.122),
    (28672, 8192, 16, 1.0025, 1.023, 1.035, 1.061, 1.005, 1.031, 1.037, 1.138),
    (28672, 8192, 64, 1.010, 1.025, 1.036, 1.061, 1.020, 1.037, 1.044, 1.138),
]


@pytest.mark.parametrize("row", ROOFLINE, ids=lambda row: "{}x{}-R{}".format(*row))
def test_the_roofline_table(row: tuple[float, ...]) -> None:
    """Within its rounding, and within three times z, a and b: it leaves most of their bytes out, here all count."""
    k, n, r = (int(size) for size in row[:3])
    p, of = problem(k, n, r), ratios(k, n, r)
    per_byte = 1 / H200.bytes_per_s / gemm_seconds(p)
    serial = of["serial-ideal", "backward"]
    second_read = serial + p.moved(y=1) * per_byte
    ours = [case(k, n, r).theory("forward"), *(of[name, "forward"] for name in ("serial-ideal", "library", "plain"))]
    ours += [case(k, n, r).theory("backward"), serial, second_read, of["plain", "backward"]]
    small = 3 * p.moved(z=1, a=1, b=1) * per_byte
    for column, (mine, table) in enumerate(zip(ours, row[3:], strict=True)):
        assert abs(mine - table) <= 0.00051 + (0 if column in (0, 4) else small), column


# K, N, R, then a step over the frozen layer's: FLOP minimum, serial, plain.
@pytest.mark.parametrize(
    ("k", "n", "r", "least", "serial", "plain"),
    [
        (4096, 4096, 64, 1.047, 1.085, 1.360),
        (8192, 8192, 16, 1.006, 1.036, 1.179),
        (8192, 8192, 64, 1.023, 1.042, 1.179),
        (8192, 28672, 64, 1.015, 1.023, 1.131),
        (28672, 8192, 16, 1.004, 1.027, 1.100),
        (28672, 8192, 64, 1.015, 1.031, 1.100),
        (2048, 2048, 16, 1.023, 1.144, 1.718),
    ],
)
def test_the_step_table(k: int, n: int, r: int, least: float, serial: float, plain: float) -> None:
    step = ratios(k, n, r)
    assert round(case(k, n, r).theory("step"), 3) == least
    assert round(step["serial-ideal", "step"], 3) == serial
    assert step["plain", "step"] == pytest.approx(plain, abs=0.0025)


def test_theory_by_hand() -> None:
    theory = case(512, 2048, 8).theory
    assert theory("forward") == 1 + 8 / 512 + 8 / 2048
    assert theory("backward") == 1 + 16 / 512 + 16 / 2048
    assert theory("step") == (theory("forward") + theory("backward")) / 2


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_theory_is_the_minimum_over_the_frozen_gemm(mode: str) -> None:
    p = problem(4096, 1024, 24)
    assert cost.minimum(p)[mode].flops / cost.gemm(p).flops == pytest.approx(case(4096, 1024, 24).theory(mode))


def test_bytes_by_hand() -> None:
    m, k, n, r = 8, 3, 5, 2
    p = problem(k, n, r, m)
    x, w, y, z, a, b = 2 * m * k, 2 * k * n, 2 * m * n, 2 * m * r, 2 * r * k, 2 * r * n
    forward = {
        "frozen": [x + w + y],
        "plain": [x + w + y, x + a + z, z + b + y, 2 * y, 3 * y],
        "library": [x + a + z, x + w + y, z + b + 2 * y],
        "serial-ideal": [x + a + z, x + w + y + z + b],
        "triton-serial": [x + a + z, x + w + y + z + b],
        "triton-portable": [x + a + z, x + w + y + z + b],
        "triton-skinny": [x + a + z, z + b + y, x + w + 2 * y],
        "cuda-serial": [x + a + z, x + w + y + z + b],
        "cuda-z_jobs": [2 * x + w + y + 2 * z + a + b],
        "full": [x + w + y],
    }
    partial = {width: 2 * 4 * 8 * width for width in (k, n)}
    backward = {
        "frozen": [y + w + x],
        "plain": [y + w + x, 2 * y, y + b + z, y + z + b, z + a + x, x + z + a, 3 * x],
        "library": [y + b + z, y + w + x, z + a + 2 * x, x + z + a, y + z + b],
        "serial-ideal": [y + b + z + z + b, y + w + x + z + a, x + z + a],
        "triton-serial": [y + b + z, y + w + x + z + a, x + z + a, y + z + b],
        "triton-portable": [y + b + z, y + w + x + z + a, x + z + a, y + z + b],
        "triton-skinny": [y + b + z + z + b, z + a + x, y + w + 2 * x, x + z + a],
        "cuda-serial": [y + b + z, y + w + x + z + a, x + z + a + partial[k], y + z + b + partial[n]],
        "cuda-z_jobs": [2 * y + w + x + 2 * z + a + b, x + z + a + partial[k], y + z + b + partial[n]],
        "full": [y + w + x, x + w + y],
    }
    for design in DESIGNS:
        work = cost.kernels(design, p)
        assert [kernel.bytes for kernel in work["forward"]] == forward[design], design
        assert [kernel.bytes for kernel in work["backward"]] == backward[design], design
        assert work["step"] == work["forward"] + work["backward"]
    least = cost.minimum(p)
    assert least["forward"].bytes == x + w + a + b + y + z
    assert least["backward"].bytes == (y + w + a + b + x + z) + (x + a + b)


def test_kernels_are_predicted_under_their_own_names() -> None:
    kernels = {kernel.name for kernel in dispatch.KERNELS["lora_matmul"]} - {"reference"}
    assert {name for name in DESIGNS if name.partition("-")[0] in ("triton", "cuda", "library")} == kernels


def test_nothing_goes_below_the_minimum() -> None:
    for k, n, r, m in product((768, 4096, 28672), (512, 4096), (1, 8, 16, 64, 128), (128, 8192)):
        p = problem(k, n, r, m)
        for design in set(DESIGNS) - {"frozen", "full"}:
            for mode, least in cost.minimum(p).items():
                work = cost.kernels(design, p)[mode]
                assert sum(kernel.flops for kernel in work) >= least.flops, (design, mode, p)
                assert sum(kernel.bytes for kernel in work) >= least.bytes, (design, mode, p)


def test_bytes_of_a_group_by_hand() -> None:
    """Two layers of one x [8, 3]: what is of its size moves once where they run together."""
    m, k, r = 8, 3, 2
    first, second = problem(k, 5, r, m), problem(k, 7, r, m)
    x, z, a = 2 * m * k, 2 * m * r, 2 * r * k
    (w0, y0, b0), (w1, y1, b1) = ((2 * k * n, 2 * m * n, 2 * r * n) for n in (5, 7))
    together = {design: cost.kernels(design, first, second) for design in cost.TOGETHER}
    assert {design: [kernel.bytes for kernel in work["forward"]] for design, work in together.items()} == {
        "library-together": [
            *(4 * a, x + 2 * a + 2 * z, 4 * z),
            *(x + w0 + y0, z + b0 + 2 * y0, x + w1 + y1, z + b1 + 2 * y1),
        ],
        "triton-skinny-together": [
            x + 2 * a + 2 * z,
            *(z + b0 + y0, x + w0 + 2 * y0, z + b1 + y1, x + w1 + 2 * y1),
        ],
    }
    assert {design: [kernel.bytes for kernel in work["backward"]] for design, work in together.items()} == {
        "library-together": [
            *(y0 + b0 + z, y1 + b1 + z, 8 * z + 4 * a),
            *(2 * z + 2 * a + x, y0 + w0 + 2 * x, y1 + w1 + 2 * x),
            *(x + 2 * z + 2 * a, y0 + z + b0, y1 + z + b1),
        ],
        "triton-skinny-together": [
            *(y0 + 2 * b0 + 2 * z, y1 + 2 * b1 + 2 * z),
            *(2 * z + 2 * a + x, y0 + w0 + 2 * x, y1 + w1 + 2 * x),
            x + 2 * z + 2 * a,
        ],
    }
    for design in DESIGNS:
        alone, each = cost.kernels(design, first, second), [cost.kernels(design, p) for p in (first, second)]
        assert alone["forward"] == each[0]["forward"] + each[1]["forward"]
        # Autograd reads both dx and writes their sum.
        assert alone["backward"] == [*each[0]["backward"], *each[1]["backward"], Kernel(0.0, 3 * x)]
    least, of_each = cost.minimum(first, second), [cost.minimum(p) for p in (first, second)]
    for mode, times in {"forward": 1, "backward": 2}.items():
        assert least[mode].bytes == sum(one[mode].bytes for one in of_each) - times * x
        assert least[mode].flops == sum(one[mode].flops for one in of_each)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("r", [16, 64])
def test_a_group_together_is_no_slower_than_its_layers_alone(group: str, r: int) -> None:
    rows = list(predict.predict(Case(group, 8192, r, "bf16", 0.0), H200))
    of = {(row.design, row.mode): row.ratio for row in rows}
    assert {row.design for row in rows} == {*DESIGNS, *cost.TOGETHER}
    assert {of["frozen", mode] for mode in MODES} == {1.0}
    for mode in MODES:
        assert of["library-together", mode] < of["library", mode] < of["plain", mode]
        assert of["triton-skinny-together", mode] < of["triton-skinny", mode]
    for row in rows:
        if row.design in cost.TOGETHER:
            assert row.bytes >= row.compulsory_bytes
            assert row.ratio >= row.theory or row.mode != "forward"


def test_what_takes_several_layers_says_so_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--layer", "64x64", "64x32+32", "--rank", "8", "--design", "frozen", "library-together") == 0
    single, several = capsys.readouterr().out.split("\n\n")[1:3]
    assert "library-together" not in single
    assert "library-together" in several
    assert run("--layer", "64x64", "--rank", "8", "--design", "library-together") == 0
    assert "library-together take layers of one input" in capsys.readouterr().out


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic() -> None:
    assert Kernel(790e12, 1.0).seconds(H200, "bf16") == 1
    assert Kernel(1.0, 4.3e12).seconds(H200, "bf16") == 1
    assert Kernel(790e12, 1.0, 1.25).seconds(H200, "bf16") == 1.25
    assert Kernel(1.0, 4.3e12, 1.25).seconds(H200, "bf16") == 1


def test_serial_as_built_adds_a_read_of_dy_and_the_partial_sums() -> None:
    p = problem(4096, 4096, 16)
    splits = cost.grad_splits(p)
    assert splits == 4
    extra = p.moved(y=1) + 2 * (2 * 4 * splits * p.r * p.k)
    of = ratios(4096, 4096, 16)
    difference = of["triton-serial", "backward"] - of["serial-ideal", "backward"]
    assert difference == pytest.approx(extra / H200.bytes_per_s / gemm_seconds(p))


def test_small_ranks_pay_for_sixteen_and_large_ones_read_x_once() -> None:
    one, sixteen, large = (problem(4096, 4096, r) for r in (1, 16, 128))
    assert cost.extended(one).flops == cost.extended(sixteen).flops
    assert cost.z_jobs_makespan(one) == cost.z_jobs_makespan(sixteen)
    built, paper = (cost.kernels(design, large)["forward"][0] for design in ("triton-serial", "serial-ideal"))
    assert built.bytes == paper.bytes


def test_rank_grad_is_built_as_the_model_says() -> None:
    pytest.importorskip("triton")
    from fastlora.kernels import rank_grad

    for m, k, r in product((100, 2048, 8192), (512, 4096, 28672), (16, 64, 128)):
        wide, narrow = (torch.empty(m, size, dtype=torch.bfloat16, device="meta") for size in (k, r))
        _, launches = rank_grad.launches(narrow, wide, dtype=torch.bfloat16, capability=90, precision="ieee")
        p = problem(k, k, r, m)
        assert launches[0].grid[::2] == (cost.rank_blocks(p), cost.grad_splits(p))
        assert len(launches) == len(cost.rank_grad_triton(p))


def test_the_constants_of_csrc_are_read_from_its_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (cost.TILE_M, cost.GROUP) == (128, 8)
    monkeypatch.setattr(cost, "SCHEDULE", tmp_path / "schedule.cuh")
    cost.SCHEDULE.write_text("constexpr int TILE_K = 64;\n")
    with pytest.raises(ValueError, match=r"^schedule.cuh: expected a line `constexpr … TILE_M = <integer>;`$"):
        cost._constant("TILE_M")


# csrc/README.md quotes these.
@pytest.mark.parametrize(
    ("m", "k", "n", "makespan"),
    [
        (8192, 4096, 4096, "1.004"),
        (8192, 4096, 1024, "1.199"),
        (8192, 4096, 14336, "1.004"),
        (8192, 14336, 4096, "1.001"),
        (8192, 8192, 28672, "1.002"),
        (8192, 28672, 8192, "1.001"),
        (2048, 4096, 4096, "1.004"),
        (16384, 4096, 4096, "1.004"),
    ],
)
def test_z_jobs_go_where_clusters_would_idle(m: int, k: int, n: int, makespan: str) -> None:
    assert f"{cost.z_jobs_makespan(problem(k, n, 16, m)):.3f}" == makespan


def test_z_jobs_by_hand() -> None:
    """Four units of rows on three clusters, a tile each: two clusters would idle in the second wave, and make z."""
    p = problem(1600, 256, 16, m=1024, sms=6)
    # 0.78 of z twice, three tiles from 0, 0.78 and 0.78, the fourth when the first has ended.
    assert cost.z_jobs_makespan(p) == pytest.approx((2 + 2 * 0.01) / 2)


def test_the_default_shapes_print(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a prediction needs no GPU"))
    assert run() == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("Predictions for h200: 790 TFLOP/s bf16, 4.3 TB/s, 132 SMs")
    for name, rank in product(("llama3-8b.q", "llama3-70b.gate", "llama3-8b.kv"), (16, 64)):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}  M=8192") and f"R={rank} " in line)
        block = {line.split("  ")[1]: line.split() for line in lines[start + 1 : start + 7 + len(DESIGNS)]}
        assert set(DESIGNS) <= set(block)
        rows = ratios(LAYERS[name].k, LAYERS[name].n, rank)
        for design in DESIGNS:
            assert block[design][1:4] == [f"{rows[design, mode]:.3f}" for mode in MODES]
    assert "triton-serial 1.053, cuda-z_jobs 1.004" in printed


def test_json_has_a_row_for_each_shape_design_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.jsonl"
    sizes = ["--layer", "4096x4096", "gpt2.attn", "--tokens", "1024", "2048", "--rank", "8", "--dtype", "fp16"]
    assert run(*sizes, "--json", str(path)) == 0
    rows = [Prediction(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row.layer, row.m, row.design, row.mode) for row in rows] == list(
        product(("4096x4096", "gpt2.attn"), (1024, 2048), DESIGNS, MODES)
    )
    assert {(row.k, row.n) for row in rows if row.layer == "gpt2.attn"} == {(768, 2304)}
    for row in rows:
        assert all(getattr(row, field.name) is not None for field in fields(row))
        assert (row.r, row.dtype, row.device, row.flops_per_s, row.bytes_per_s) == (8, "fp16", "h200", 790e12, 4.3e12)
        assert row.theory == Case(row.layer, row.m, row.r, row.dtype, 0.0).theory(row.mode)
        assert row.arithmetic_ms == pytest.approx(1e3 * row.flops / row.flops_per_s)
        assert row.bandwidth_ms == pytest.approx(1e3 * row.bytes / row.bytes_per_s)
        assert row.ms >= (1 - 1e-9) * max(row.arithmetic_ms, row.bandwidth_ms)
        least = cost.minimum(problem(row.k, row.n, row.r, row.m))
        assert row.compulsory_bytes == sum(least[mode].bytes for mode in least if row.mode in (mode, "step"))


def test_a_device_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    own = ["--flops", "100", "--bandwidth", "2", "--sms", "10", "--json", str(path)]
    assert run("--layer", "host", "--rank", "8", "--device", "A100", *own) == 0
    row = Prediction(**json.loads(path.read_text(encoding="utf-8").splitlines()[0]))
    assert (row.device, row.flops_per_s, row.bytes_per_s, row.sms) == ("a100", 100e12, 2e12, 10)
    assert "--flops, --bandwidth, --sms as given" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_device_predicts(name: str, dtype: str) -> None:
    rows = list(predict.predict(case(4096, 4096, 16, dtype=dtype), DEVICES[name]))
    assert all(row.ratio >= 1 and row.ms > 0 for row in rows)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layer", "llama9.q"], "expected KxN, such as 4096x14336, or one of host"),
        (["--layer", "0x64"], "unknown layer '0x64'"),
        (["--layer", "64x"], "unknown layer '64x'"),
        (["--layer", "64x64x64"], "unknown layer '64x64x64'"),
        (["--layer", "llama3-8b.mlp"], "no design here is of a whole MLP"),
        (["--layer", "64x64+"], "unknown layer '64x64+'"),
        (["--layer", "64x64+0"], "unknown layer '64x64+0'"),
        (["--layer", "64X-64"], "unknown layer '64X-64'"),
        (["--tokens", "0"], "at least 1, got '0'"),
        (["--rank", "2.5"], "at least 1, got '2.5'"),
        (["--flops", "0"], "above 0, got '0'"),
        (["--bandwidth", "nan"], "above 0, got 'nan'"),
        (["--sms", "-1"], "at least 1, got '-1'"),
        (["--dtype", "int8"], "bf16"),
    ],
)
def test_bad_input_says_what_is_expected(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_device_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--device", "h300")
    error = capsys.readouterr().err
    assert all(name in error for name in DEVICES)


def test_an_unwritable_path_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--layer", "host", "--json", str(tmp_path)) == 2
    assert f"--json {tmp_path}: " in capsys.readouterr().err
