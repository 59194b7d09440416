"""The Python face of csrc/: it mirrors the header, says why it refuses, and passes on what it was given.

What the kernels compute is tested where they run: in the host model, and on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from csrc import build as csrc
from fastlora.backends import cuda, cuda_abi, dispatch
from fastlora.backends.dropout import Dropout
from fastlora.backends.request import Product, Request
from fastlora.ops.autograd import lora_matmul_op
from tests.cases import kernel_named, make

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "fastlora.h"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

# Remembers the last call of each verb, answers with ANSWER, and writes 1 where the gradient begins.
SPY = """
#include <fastlora.h>
#include <string.h>

extern "C" {
FASTLORA_API fastlora_lora_matmul spy_lora_matmul;
FASTLORA_API fastlora_rank_grad spy_rank_grad;
FASTLORA_API void* spy_workspace;

int32_t fastlora_abi(void) { return ABI; }
const char* fastlora_device_type(void) { return DEVICE_TYPE; }
const char* fastlora_obstacle(void) { return OBSTACLE; }
size_t fastlora_lora_matmul_workspace(const fastlora_lora_matmul* call) { return 1000; }
const char* fastlora_lora_matmul_sm90(const fastlora_lora_matmul* call, void* workspace, int32_t device,
                                      void* stream) {
  spy_lora_matmul = *call;
  spy_workspace = workspace;
  memset(workspace, 0, 1000);
  return ANSWER;
}
const char* fastlora_lora_matmul_tile(const fastlora_lora_matmul* call, int32_t device) {
  spy_lora_matmul = *call;
  return "a tile";
}
size_t fastlora_rank_grad_workspace(const fastlora_rank_grad* call) { return 0; }
const char* fastlora_rank_grad_sm90(const fastlora_rank_grad* call, void* workspace, int32_t device,
                                    void* stream) {
  spy_rank_grad = *call;
  return ANSWER;
}
}
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library is loaded and nothing chosen, before and after."""

    def forget() -> None:
        dispatch.forget()
        cuda_abi.find_library.cache_clear()

    for name in ("FASTLORA_CUDA_LIBRARY",):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a library of the spy's source."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    made: dict[tuple[str, ...], Path] = {}

    def compile_spy(
        abi: int = cuda_abi.ABI, answer: str = "NULL", obstacle: str = "NULL", device: str = "cpu", source: str = SPY
    ) -> Path:
        values = {"ABI": abi, "ANSWER": answer, "OBSTACLE": obstacle, "DEVICE_TYPE": f'"{device}"'}
        defines = tuple(f"-D{name}={value}" for name, value in values.items())
        if (source, *defines) not in made:
            folder = tmp_path_factory.mktemp("spy")
            (folder / "spy.cpp").write_text(source)
            library = folder / "spy.so"
            flags = ("-shared", "-fPIC", "-fvisibility=hidden", f"-I{HEADER.parent}")
            subprocess.run([compiler, *flags, *defines, folder / "spy.cpp", "-o", library], check=True)
            made[(source, *defines)] = library
        return made[(source, *defines)]

    return compile_spy


@pytest.fixture
def spy(compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The spy as a library for the CPU, its last calls to be read."""
    path = compiled()
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(path))
    return ctypes.CDLL(str(path))


def request(device: torch.device = CPU, **changes: Any) -> Request:
    """A request that nothing stands against, with changes."""
    good = Request("lora_matmul", device, torch.bfloat16, torch.bfloat16, 64, 128, 256, 16, dropout=False)
    return good._replace(**changes)


# ---- The header


def header_structs() -> dict[str, list[tuple[str, str]]]:
    """Of each struct of the header its fields in order, (name, type)."""
    text = re.sub(r"//.*", "", HEADER.read_text())
    structs = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, re.DOTALL):
        fields = []
        for declaration in filter(None, (line.strip() for line in body.split(";"))):
            kind, names = re.fullmatch(r"((?:const )?\w+\s*\*?)\s*(.*)", declaration, re.DOTALL).groups()
            pointers = "*" in declaration
            for field in names.split(","):
                fields.append((field.strip(" *"), "pointer" if pointers else kind.strip()))
        structs[name] = fields
    return structs


MIRRORS = {
    "fastlora_matrix": cuda_abi.Matrix,
    "fastlora_mask": cuda_abi.Mask,
    "fastlora_lora_matmul": cuda_abi.LoraMatmul,
    "fastlora_rank_grad": cuda_abi.RankGrad,
}
TYPES = {
    ctypes.c_void_p: "pointer",
    ctypes.c_int64: "int64_t",
    ctypes.c_int32: "int32_t",
    ctypes.c_float: "float",
    cuda_abi.Matrix: "fastlora_matrix",
    cuda_abi.Mask: "fastlora_mask",
}


def test_every_struct_of_the_header_has_its_mirror() -> None:
    assert header_structs().keys() == MIRRORS.keys()


@pytest.mark.parametrize("name", MIRRORS)
def test_a_mirror_has_the_fields_of_the_header_in_order(name: str) -> None:
    assert [(field, TYPES[kind]) for field, kind in MIRRORS[name]._fields_] == header_structs()[name]


def filled(structure: type[ctypes.Structure], numbers: Iterator[int]) -> tuple[ctypes.Structure, list[int]]:
    """A structure with a number of its own in every field, and those numbers in order."""
    values, flat = [], []
    for _, kind in structure._fields_:
        if issubclass(kind, ctypes.Structure):
            value, inner = filled(kind, numbers)
            flat += inner
        else:
            value = next(numbers)
            flat.append(value)
        values.append(value)
    return structure(*values), flat


@pytest.mark.parametrize(
    ("structure", "pack"),
    [(cuda_abi.LoraMatmul, cuda_abi.pack_lora_matmul), (cuda_abi.RankGrad, cuda_abi.pack_rank_grad)],
    ids=["lora_matmul", "rank_grad"],
)
def test_packing_makes_the_bytes_of_the_structure(
    structure: type[ctypes.Structure], pack: Callable[..., bytes]
) -> None:
    expected, numbers = filled(structure, itertools.count(1))
    assert pack(*numbers) == bytes(expected)


def test_the_codes_are_those_of_the_header() -> None:
    text = HEADER.read_text()
    codes = {name: int(value) for name, value in re.findall(r"(FASTLORA_\w+) = (\d+)", text)}
    assert int(re.search(r"#define FASTLORA_ABI (\d+)", text)[1]) == cuda_abi.ABI
    assert {
        "FASTLORA_BF16": cuda_abi.DTYPES[torch.bfloat16],
        "FASTLORA_FP16": cuda_abi.DTYPES[torch.float16],
        "FASTLORA_FP32": cuda_abi.DTYPES[torch.float32],
        "FASTLORA_MASK_NONE": cuda_abi.MASK_NONE,
        "FASTLORA_MASK_INPUT": cuda_abi.MASK_INPUT,
        "FASTLORA_MASK_PRODUCT": cuda_abi.MASK_PRODUCT,
        "FASTLORA_Z_JOBS": cuda.DESIGNS.index("z_jobs"),
        "FASTLORA_SERIAL": cuda.DESIGNS.index("serial"),
    } == codes


# ---- What is refused, in which words

HOPPER = "the kernels need a CUDA GPU of sm_90, such as an H100 or H200"
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({"dtype": torch.float32}, "float32: the kernels are for bfloat16 and float16"),
    "float64": ({"dtype": torch.float64}, "float64: the kernels are for bfloat16 and float16"),
    "no_tokens": ({"m": 0}, "nothing to compute: M=0 K=128 N=256"),
    "no_inputs": ({"k": 0}, "nothing to compute: M=64 K=0 N=256"),
    "too_many_tokens": ({"m": 2**31}, "M=2147483648 K=128 N=256: the kernels count to 2^31 - 1"),
    "rank": ({"r": 257}, "rank 257: the kernels hold at most 256"),
    "masked_rank": (
        {"verb": "rank_grad", "k": 300, "n": 128, "r": 128, "dropout": True},
        "rank 300: the kernels hold at most 256",
    ),
    "unaligned": ({"unaligned": "x has strides (7, 1): no"}, "x has strides (7, 1): no"),
}


@pytest.mark.usefixtures("spy")
def test_a_library_for_the_cpu_takes_what_is_there() -> None:
    assert cuda.refuses(request()) is None
    assert cuda.refuses(request(r=256)) is None
    assert cuda.refuses(request(verb="rank_grad", k=256, n=128, r=128, dropout=True)) is None
    assert cuda.refuses(request(GPU)) == "x is on cuda: FASTLORA_CUDA_LIBRARY takes CPU tensors"


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.usefixtures("spy")
def test_what_the_kernels_cannot_do_is_said(case: str) -> None:
    changes, reason = REFUSALS[case]
    assert cuda.refuses(request(**changes)) == reason


def test_a_cpu_without_a_library_for_it(monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Path]) -> None:
    assert cuda.refuses(request()) == f"x is on cpu: {HOPPER}"
    assert cuda_abi.find_library.cache_info().currsize == 0, "a CPU has no use for the library"
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(compiled(device="cuda")))
    assert cuda.refuses(request()) == f"x is on cpu: {HOPPER}"


def test_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda.refuses(request(GPU)) == "AMD GPUs: the kernels are written for NVIDIA's Hopper"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)], ids=str)
def test_another_architecture(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Path]
) -> None:
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(compiled(device="cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    major, minor = capability
    assert cuda.refuses(request(GPU)) == (
        f"sm_{major}{minor}: the kernels use wgmma and TMA of sm_90a, which H100 and H200 have"
    )


def test_hopper_is_taken(monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Path]) -> None:
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(compiled(device="cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.refuses(request(GPU)) is None


def test_a_driver_older_than_the_toolkit(monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Path]) -> None:
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(compiled(device="cuda", obstacle='"the driver is old"')))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.refuses(request(GPU)) == "the driver is old"


def test_a_library_that_was_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_abi, "_PACKAGE_LIBRARY", tmp_path / "absent.so")
    assert cuda.refuses(request(GPU)) == (
        "the CUDA kernels are not built: install the CUDA toolkit, 12.5 or newer, and install fastlora again with "
        "FASTLORA_BUILD_CUDA=1, or run `python csrc/build.py` in a clone"
    )


def test_the_toolkit_asked_for_is_the_one_that_builds() -> None:
    assert csrc.OLDEST_NVCC == (12, 5)


def test_a_named_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(tmp_path / "absent.so"))
    assert cuda.refuses(request()) == (
        f"FASTLORA_CUDA_LIBRARY={tmp_path}/absent.so is no file: unset it, or name a library that csrc/build.py made"
    )


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty.so").touch()
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(tmp_path / "empty.so"))
    assert re.fullmatch(r"the CUDA kernels do not load: .*empty\.so: file too short", cuda.refuses(request()))


def test_a_library_of_something_else(monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Path]) -> None:
    path = compiled(source="int other;")
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(path))
    reason = cuda.refuses(request())
    assert reason.startswith(f"{path} is no library of fastlora's kernels: ")
    assert "undefined symbol: fastlora_abi" in reason


def test_a_library_of_another_abi(monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Path]) -> None:
    path = compiled(abi=cuda_abi.ABI + 1)
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(path))
    assert cuda.refuses(request()) == (
        f"{path} has ABI {cuda_abi.ABI + 1}, this fastlora needs {cuda_abi.ABI}: "
        "build it again with `python csrc/build.py`"
    )


def test_a_verb_without_a_library_raises_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(tmp_path / "absent.so"))
    with pytest.raises(RuntimeError, match=r"absent\.so is no file: unset it"):
        cuda.rank_grad(torch.empty(8, 8), torch.empty(8, 8), dtype=torch.float32)


# ---- Dispatch


def call() -> Tensor:
    return make(32, 64, 48, 8, dtype=torch.bfloat16)()


def test_forced_on_a_cpu_it_raises_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="FASTLORA_BACKEND=cuda cannot run this call") as caught:
        call()
    for name in cuda.DESIGNS:
        assert re.search(rf"cuda-{name} +x is on cpu: {re.escape(HOPPER)}", str(caught.value))
    assert re.search("library +can run", str(caught.value))


@pytest.mark.usefixtures("spy")
def test_auto_leaves_it_even_where_it_can_run() -> None:
    explanation = fastlora.explain(*make(32, 64, 48, 8, dtype=torch.bfloat16)[:4])
    assert explanation.chosen == "library"
    assert dict(explanation.verdicts)["cuda-serial"] == (
        "can run without a GPU, but auto keeps it for GPUs; FASTLORA_BACKEND=cuda-serial forces it"
    )


def test_auto_leaves_it_on_hopper_until_it_is_proven(
    monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Path]
) -> None:
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(compiled(device="cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    explanation = dispatch._explain(request(GPU), "auto")
    assert explanation.chosen == "library"
    assert dict(explanation.verdicts)["cuda-z_jobs"] == (
        "can run, but auto passes it over: is not proven on sm_90 in bfloat16 (`python -m fastlora.tune`, "
        "docs/tuning.md); FASTLORA_BACKEND=cuda-z_jobs forces it"
    )


@pytest.mark.usefixtures("spy")
def test_words_of_the_library_are_raised(monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Path]) -> None:
    monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(compiled(answer='"no room for y"')))
    monkeypatch.setenv("FASTLORA_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"^the CUDA kernels refuse a call: no room for y$"):
        call()


@pytest.mark.parametrize("rank", [1, 8, 12])
@pytest.mark.parametrize("tokens", [0, 1, 32])
@pytest.mark.parametrize("forced", ["reference", "library", "cuda"])
@pytest.mark.usefixtures("spy")
def test_z_lies_alike_whoever_makes_it(forced: str, tokens: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile and its caches are told how before a kernel is chosen."""
    monkeypatch.setenv("FASTLORA_BACKEND", forced)
    x, w, a, b, bias = make(tokens, 64, 48, rank, dtype=torch.bfloat16)
    for operands in ((x, w, a, b, 1.5, bias, 0.0, None, False), (x, None, a, b, 1.5, None, 0.0, None, False)):
        z = lora_matmul_op(*operands)[1]
        assert z.stride() == (8 * -(-rank // 8), 1)
        assert Request.of_rank_grad(z, x, torch.bfloat16, False).unaligned is None
        torch.library.opcheck(lora_matmul_op, operands, test_utils="test_faketensor")


# ---- What the library is given


def given(spy: ctypes.CDLL, structure: type[ctypes.Structure]) -> dict[str, Any]:
    """The fields of the last call, matrices and a mask among them as tuples."""
    name = next(name for name, mirror in MIRRORS.items() if mirror is structure)
    return as_values(structure.in_dll(spy, name.replace("fastlora", "spy")))


def as_values(structure: ctypes.Structure) -> dict[str, Any]:
    fields = {field: getattr(structure, field) for field, _ in structure._fields_}
    return {
        field: tuple(as_values(value).values()) if isinstance(value, ctypes.Structure) else value
        for field, value in fields.items()
    }


DROPOUT = Dropout(0.25, torch.tensor([11, 22]))
MASK = (DROPOUT.threshold, pytest.approx(DROPOUT.rescale), DROPOUT.seed.data_ptr())
NO_MASK = (0, 0, 1.0, None)


@pytest.mark.parametrize(("name", "design"), [("cuda-z_jobs", 0), ("cuda-serial", 1)])
def test_the_forward_arrives_field_by_field(spy: ctypes.CDLL, name: str, design: int) -> None:
    x, w, a, b, bias = make(32, 64, 48, 12, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = torch.empty(32, 80, dtype=x.dtype)[:, :64].copy_(x)
    y, z = kernel_named(name).run(Product(x, w, a, b, 1.5, bias))
    assert (y.shape, y.stride(), y.dtype) == ((32, 48), (48, 1), torch.bfloat16)
    assert (z.shape, z.stride(), z.dtype) == ((32, 12), (16, 1), torch.bfloat16)
    assert given(spy, cuda_abi.LoraMatmul) == {
        "x": (x.data_ptr(), 80, 1), "w": (w.data_ptr(), 64, 1), "a": (a.data_ptr(), 64, 1), "b": (b.data_ptr(), 12, 1),
        "y": (y.data_ptr(), 48, 1), "z": (z.data_ptr(), 16, 1), "bias": bias.data_ptr(),
        "m": 32, "k": 64, "n": 48, "r": 12,
        "dtype": 0, "adapter_dtype": 2, "scale": 1.5, "mask": NO_MASK,
        "design": design, "tile_columns": 0,
    }  # fmt: skip
    assert ctypes.c_void_p.in_dll(spy, "spy_workspace").value % 16 == 0


def test_the_backward_arrives_with_its_operands_turned(spy: ctypes.CDLL) -> None:
    dy = torch.empty(32, 48, dtype=torch.float16)
    w, a, b = (torch.empty(*shape, dtype=torch.float16) for shape in ((48, 64), (8, 64), (48, 8)))
    dx, t = cuda.lora_matmul(Product(dy, w.T, b.T, a.T, 0.5, None, DROPOUT.p, DROPOUT.seed, True))
    assert given(spy, cuda_abi.LoraMatmul) == {
        "x": (dy.data_ptr(), 48, 1), "w": (w.data_ptr(), 1, 64), "a": (b.data_ptr(), 1, 8), "b": (a.data_ptr(), 1, 64),
        "y": (dx.data_ptr(), 64, 1), "z": (t.data_ptr(), 8, 1), "bias": None,
        "m": 32, "k": 48, "n": 64, "r": 8,
        "dtype": 1, "adapter_dtype": 1, "scale": 0.5, "mask": (2, *MASK),
        "design": 0, "tile_columns": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("on_product", "mask"), [(False, (1, *MASK)), (True, NO_MASK)])
def test_z_alone_has_neither_w_nor_y_nor_a_product_to_mask(
    spy: ctypes.CDLL, on_product: bool, mask: tuple[Any, ...]
) -> None:
    x, _, a, b, _ = make(32, 64, 48, 8, dtype=torch.bfloat16)
    y, z = cuda.lora_matmul(Product(x, None, a, b, 1.5, None, DROPOUT.p, DROPOUT.seed, on_product))
    assert y is None
    assert z.shape == (32, 8)
    arrived = given(spy, cuda_abi.LoraMatmul)
    assert {name: arrived[name] for name in ("w", "y")} == dict.fromkeys(("w", "y"), (None, 0, 0))
    assert arrived["bias"] is None
    assert (arrived["a"], arrived["z"]) == ((a.data_ptr(), 64, 1), (z.data_ptr(), 8, 1))
    assert arrived["mask"] == mask


def test_a_bias_with_gaps_is_copied(spy: ctypes.CDLL) -> None:
    x, w, a, b, bias = make(32, 64, 48, 8, dtype=torch.bfloat16)
    cuda.lora_matmul(Product(x, w, a, b, 1.5, bias.repeat_interleave(2)[::2]))
    assert given(spy, cuda_abi.LoraMatmul)["bias"] not in (None, bias.data_ptr())


# p [M, P], q [M, Q], whether q is masked; and which is wide, with the strides of the gradient.
SIDES = {
    "da": (8, 64, False, "q", (64, 1)),
    "db": (64, 8, False, "p", (1, 8)),
    "square": (16, 16, False, "q", (16, 1)),
    "masked": (8, 64, True, "q", (64, 1)),
    "masked_narrow_q": (64, 8, True, "q", (8, 1)),
}


@pytest.mark.parametrize("case", SIDES)
def test_rank_grad_arrives_field_by_field(spy: ctypes.CDLL, case: str) -> None:
    rows, columns, masked, wide, strides = SIDES[case]
    p, q = (torch.empty(32, width + 8, dtype=torch.bfloat16)[:, :width] for width in (rows, columns))
    grad = cuda.rank_grad(p, q, dtype=torch.float32, dropout=DROPOUT if masked else None)
    assert (grad.shape, grad.dtype) == ((rows, columns), torch.float32)
    left, right = (q, p) if wide == "q" else (p, q)
    assert given(spy, cuda_abi.RankGrad) == {
        "wide": (left.data_ptr(), left.stride(0), 1), "narrow": (right.data_ptr(), right.stride(0), 1),
        "grad": (grad.data_ptr(), *strides),
        "m": 32, "c": left.shape[1], "r": right.shape[1],
        "dtype": 0, "grad_dtype": 2, "mask": (1, *MASK) if masked else NO_MASK,
    }  # fmt: skip


# ---- The library itself


@pytest.fixture(scope="session")
def library() -> Path:
    """The kernels, built into the package; nothing happens where that has been done."""
    if reason := csrc.obstacle():
        pytest.skip(f"the CUDA kernels are not built here: {reason}")
    csrc.build()
    return csrc.LIBRARY


def test_it_loads_without_a_gpu(library: Path) -> None:
    assert ctypes.CDLL(str(library)).fastlora_abi() == cuda_abi.ABI
    assert cuda_abi.require_library().device_type == "cuda"


def test_it_shows_the_functions_of_the_header_alone(library: Path) -> None:
    declared = set(re.findall(r"^FASTLORA_API .*?(\w+)\(", HEADER.read_text(), re.MULTILINE))
    printed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in printed.splitlines()} == declared
