"""The arms of the layer benchmark: each is right or says why it is absent. Times are never asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import FLOOR, Case
from benchmarks.layers import arm as layers_arm
from benchmarks.layers.arm import imported
from benchmarks.layers.arms import HOST_ARMS, arms
from benchmarks.layers.case import run_case
from benchmarks.layers.operands import make_operands
from benchmarks.measure.failures import AbsentError
from benchmarks.records import styles
from fastlora.clock import Clock

pytestmark = pytest.mark.usefixtures("no_interpreter")

CPU = torch.device("cpu")
PEERS = ["lorafusion", "unsloth", "freesolo-chalk", "lycoris"]

# Each peer as its adapter sees it, names, signatures and limits, around plain torch.
FAKES = {
    "lorafusion": (
        "lorafusion/ops/lora_v1.py",
        """
from torch.nn.functional import dropout, linear

GAIN = 1.0

def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
    batch, sequence, _ = x.shape
    assert dropout_p > 0
    return linear(x, linear_w, linear_bias) + GAIN * alpha * (dropout(x, dropout_p) @ lora_a.T @ lora_b.T)
""",
    ),
    "unsloth": (
        "unsloth/kernels/fast_lora.py",
        """
from torch.nn.functional import dropout

GAIN = 1.0

class LoRA_W:
    @staticmethod
    def apply(X, W, W_quant, A, B, S, dropout_p=None, bias=None):
        batch, sequence, _ = X.shape
        assert W_quant is None
        return X @ W.T + GAIN * S * (dropout(X, dropout_p or 0.0) @ A.T @ B.T)
""",
    ),
    "freesolo-chalk": (
        "chalk/ops/lora.py",
        """
GAIN = 1.0
_FUSE_MIN_TOKENS = 16

def load_lora():
    return lambda x, A, B, scaling: GAIN * scaling * (x @ A.T @ B.T)
""",
    ),
    "lycoris": (
        "lycoris/__init__.py",
        """
from torch import nn

GAIN = 1.0

class LoConModule(nn.Module):
    def __init__(self, lora_name, org_module, multiplier=1.0, lora_dim=4, alpha=1, dropout=0.0, bypass_mode=None):
        super().__init__()
        assert bypass_mode
        self.base, self.scale = [org_module], alpha / lora_dim
        self.lora_down = nn.Linear(org_module.in_features, lora_dim, bias=False)
        self.lora_up = nn.Linear(lora_dim, org_module.out_features, bias=False)

    def forward(self, x):
        return self.base[0](x) + GAIN * self.scale * self.lora_up(self.lora_down(x))
""",
    ),
}
# What each of them takes.
TAKEN = {
    "lorafusion": {"dropout": 0.1},
    "unsloth": {"layer": "host", "dropout": 0.1},
    "freesolo-chalk": {},
    "lycoris": {},
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a module of the given source first on the path, as if its package were installed."""
    packages = {"surely_absent", *(path.partition("/")[0] for path, _ in FAKES.values())}

    def loaded():
        return [name for name in sys.modules if name.partition(".")[0] in packages]

    def install(path, source):
        file = tmp_path / path
        file.parent.mkdir(parents=True)
        # A namespace package would stand behind a real one that is installed.
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
        file.write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    yield install
    for name in loaded():
        del sys.modules[name]


@pytest.fixture
def any_device(monkeypatch):
    """Lets the kernels of a GPU run here, their fakes being torch."""
    monkeypatch.setattr(layers_arm, "require_gpu", lambda device: None)


def run(*names, layer="gpt2.proj", m=24, r=4, dtype="fp32", dropout=0.0, modes=("step",)):
    """The rows of one small case, the floor's left out."""
    chosen = [arms()[name] for name in (FLOOR, *names)]
    rows = run_case(Case(layer, m, r, dtype, dropout), chosen, modes, 1, 60.0, Clock(CPU), CPU)
    assert rows[0].status == "ok", rows[0].reason
    return [row for row in rows if row.arm != FLOOR]


def outcome(row):
    return (row.status, row.reason)


def test_every_arm_has_a_mark_of_its_own_in_pictures():
    marks = [styles.STYLES[name] for name in arms() if name not in (FLOOR, *HOST_ARMS)]
    assert len({(mark.colour, mark.marker) for mark in marks}) == len(marks)


def test_the_floor_is_first_and_fastlora_last():
    names = list(arms())
    assert names[0] == FLOOR
    start = names.index("full") + 1
    assert names[start : start + len(PEERS)] == PEERS
    start += len(PEERS)
    assert tuple(names[start : start + len(HOST_ARMS)]) == HOST_ARMS
    ours = names[start + len(HOST_ARMS) :]
    assert ours[0] == "compiled-fastlora"
    assert all(name.startswith("fastlora") for name in ours[1:])
    assert {"plain", "addmm", "compiled", "peft-fp32", "peft-same", "loralib"} < set(names[:start])


@pytest.mark.parametrize("layer", ["gpt2.proj", "768x512+256"])
@pytest.mark.parametrize(("dtype", "dropout"), [("fp32", 0.0), ("bf16", 0.1)])
def test_every_arm_is_right_or_says_why_it_is_absent(dtype, dropout, layer):
    names = [name for name, arm in arms().items() if name != FLOOR and not arm.by_name_only]
    rows = {row.arm: row for row in run(*names, dtype=dtype, dropout=dropout, layer=layer)}
    assert set(rows) == set(names)
    for row in rows.values():
        assert row.status in ("ok", "absent"), f"{row.arm}: {row.reason}"
        assert (row.status == "absent") == bool(row.reason)
    for name, excuse in {"compiled": "no C++ compiler", "loralib": "not installed"}.items():
        if rows[name].status == "absent":
            assert excuse in rows[name].reason
        else:
            assert {error.rstrip("01") for error in rows[name].errors} == {"y", "dx", "da", "db"}


def test_arms_import_nothing_optional():
    optional = {"peft", "transformers", "loralib", "lorafusion", "unsloth", "chalk", "lycoris"}
    code = "import sys; from benchmarks.layers.arms import arms; arms(); "
    code += f"print({optional} & sys.modules.keys())"
    root = Path(__file__).resolve().parents[2]
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_loralib_shares_the_base():
    pytest.importorskip("loralib")
    case = Case("gpt2.proj", 24, 4, "bf16", 0.1)
    operands = make_operands(case, CPU)
    built = arms()["loralib"].build(case, operands, 0.1)
    assert built.layer.weight.data_ptr() == operands.w.data_ptr()
    assert built.layer.bias.data_ptr() == operands.bias.data_ptr()
    assert {name for name, q in built.layer.named_parameters() if q.requires_grad} == {"lora_A", "lora_B"}
    assert not built.layer.merge_weights
    assert built.layer.scaling == operands.scale
    assert built.trained["da"].dtype == torch.bfloat16


def build_compiled(case):
    operands, arm = make_operands(case, CPU), arms()["compiled"]
    if reason := arm.absence(CPU):
        pytest.skip(reason)
    return arm.build(case, operands, 0.0), operands


def test_a_case_never_meets_the_recompilations_of_the_last():
    with torch._dynamo.config.patch(recompile_limit=1):
        for m in (24, 25):
            built, operands = build_compiled(Case("gpt2.proj", m, 4, "fp32", 0.0))
            built.layer(operands.xs[0])


def test_copies_of_the_input_share_one_graph():
    built, operands = build_compiled(Case("gpt2.proj", 24, 4, "fp32", 0.0))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for x, dy in zip(operands.xs, operands.dys, strict=True):
        torch.autograd.grad(built.layer(x), x, dy)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_compiled_is_absent_without_a_compiler():
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        (row,) = run("compiled")
    assert outcome(row) == ("absent", "inductor finds no C++ compiler: install g++ or set CXX")


@pytest.mark.parametrize(
    ("name", "distribution"), [*zip(PEERS[:3], PEERS[:3], strict=True), ("lycoris", "lycoris-lora")]
)
def test_a_peer_that_is_not_installed_is_absent(name, distribution, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (row,) = run(name)
    assert outcome(row) == ("absent", f"{distribution} is not installed")


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.usefixtures("any_device")
def test_a_peer_is_found_by_import_and_gated(name, install):
    path, source = FAKES[name]
    install(path, source)
    (row,) = run(name, r=16, dtype="bf16", **TAKEN[name])
    assert outcome(row) == ("ok", None)
    assert set(row.errors) == {"y", "dx", "da", "db"}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.usefixtures("any_device")
def test_a_peer_that_is_wrong_gets_no_speed(name, install):
    path, source = FAKES[name]
    install(path, source.replace("GAIN = 1.0", "GAIN = 1.05"))
    (row,) = run(name, r=16, dtype="bf16", **TAKEN[name])
    assert row.status == "wrong"
    assert row.wall_ms is None


def test_a_peer_whose_import_raises_is_absent_in_its_words(install):
    install("lycoris/__init__.py", "raise NotImplementedError('needs a GPU\\nand more')")
    (row,) = run("lycoris")
    assert outcome(row) == ("absent", "import lycoris raises NotImplementedError: needs a GPU")


def test_another_package_of_the_name_is_absent_in_pythons_words(install):
    install("chalk/__init__.py", "")
    (row,) = run("freesolo-chalk")
    assert outcome(row) == ("absent", "import chalk.ops.lora raises ModuleNotFoundError: No module named 'chalk.ops'")


@pytest.mark.usefixtures("any_device")
def test_a_peer_that_fails_in_its_call_is_an_error(install):
    path, source = FAKES["freesolo-chalk"]
    install(path, source.replace("GAIN * scaling", "1 / 0"))
    (row,) = run("freesolo-chalk")
    assert outcome(row) == ("error", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("lorafusion", {"r": 8}, "takes ranks that are powers of two from 16 on, got 8"),
        ("lorafusion", {"r": 24}, "takes ranks that are powers of two from 16 on, got 24"),
        ("lorafusion", {"layer": "host"}, "its dx kernel reads past in_features that are no multiple of 256, got 64"),
        ("lorafusion", {"dtype": "fp32"}, "multiplies float32 in TF32"),
        ("lorafusion", {}, "its backward fails without dropout"),
        ("unsloth", {}, "its autograd Function takes no bias of the base"),
        ("freesolo-chalk", {"m": 15}, "leaves fewer than 16 tokens to PEFT, got 15"),
        ("freesolo-chalk", {"dropout": 0.1}, "leaves layers with dropout to PEFT"),
        ("lycoris", {"dropout": 0.1}, "drops the adapter's output, not its input"),
    ],
)
@pytest.mark.usefixtures("any_device")
def test_limits_of_peers_are_said(name, case, reason, install):
    install(*FAKES[name])
    (row,) = run(name, **{"r": 16, "dtype": "bf16", **case})
    assert outcome(row) == ("absent", reason)


@pytest.mark.usefixtures("any_device")
def test_chalk_is_absent_where_its_self_test_fails(install):
    path, source = FAKES["freesolo-chalk"]
    install(path, source.replace("return lambda", "return None\n    lambda"))
    (row,) = run("freesolo-chalk")
    assert outcome(row) == ("absent", "its self-test fails on this GPU, where it leaves everything to PEFT")


@pytest.mark.parametrize("name", ["lorafusion", "freesolo-chalk"])
def test_a_cpu_is_not_for_kernels_of_a_gpu(name, install):
    install(*FAKES[name])
    (row,) = run(name, r=16, dtype="bf16", **TAKEN[name])
    assert outcome(row) == ("absent", "needs a CUDA GPU")


def test_a_peer_that_changes_others_runs_by_name_only():
    assert [name for name, arm in arms().items() if arm.by_name_only] == ["unsloth"]


def test_an_import_is_told_by_the_name_pip_knows():
    with pytest.raises(AbsentError, match=r"^surely-absent is not installed$"):
        imported("surely_absent.module", "surely-absent")
