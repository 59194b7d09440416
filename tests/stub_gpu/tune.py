"""``python -m fastlora.tune`` as on a GPU: the stand-in for ``torch.cuda``, and kernels with planted faults and times.

A kernel is the reference under its name, and takes as long as the script says by a clock that stands still otherwise:
what wins does not hang on how busy this machine is. Processes are forked from one that has imported everything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
import torch._inductor.config

import fastlora.tune.__main__ as command_line
from fastlora.backends import dispatch, reference
from fastlora.backends.request import Kernel, Product
from fastlora.clock import Clock
from fastlora.tune import plan, work, worker
from tests.stub_gpu import stand_in

ROOT = Path(__file__).resolve().parents[2]

# A worker as users' are: started, not forked.
PYTHON = (sys.executable, "-m", "tests.stub_gpu.tune")

# Of a call whose time is not planted.
_MS = 1.0


class Planted(NamedTuple):
    """What a kernel does in the calls that ``where`` describes: by fields of a Request, ``adapters`` and ``call``.

    Attributes:
        does: the name of a fault, or the milliseconds that it takes, in turns.
    """

    verb: str
    kernel: str
    does: str | list[float]
    where: Mapping[str, Any] = MappingProxyType({})


class Script(NamedTuple):
    """What the processes of one command are to do.

    Attributes:
        planted: of several for a call the last holds; a time and a fault both do.
        dtypes: those that are proven.
        forked: False where workers are to be started as users' are.
        case_seconds: how long a kernel may take for one case.
        starts: False where no worker is to start.
        repeats: of a case; fewer than users' unless it is about them.
    """

    planted: tuple[Planted, ...] = ()
    dtypes: tuple[str, ...] = ("fp16",)
    forked: bool = True
    case_seconds: float = 60.0
    starts: bool = True
    repeats: int = 2

    def text(self) -> str:
        """As :meth:`parse` reads it."""
        planted = [(*planted[:3], dict(planted.where)) for planted in self.planted]
        return json.dumps(self._asdict() | {"planted": planted})

    @staticmethod
    def parse(text: str) -> Script:
        """The script of a text."""
        fields = json.loads(text)
        return Script(**fields | {"planted": tuple(Planted(*planted) for planted in fields["planted"])})


class _Now:
    """The device's clock."""

    ms = 0.0


class Event(stand_in.Event):
    """A moment of the clock that kernels move."""

    def record(self, stream: object = None) -> None:
        self._at = 1e-3 * _Now.ms


# The names of the kernels in the order they ran in.
ran: list[str] = []


def _exits() -> None:
    sys.exit(7)


def _hangs() -> None:
    Path(os.environ["STUB_TUNE_WORKERS"]).with_suffix(".hangs").touch()
    while True:
        time.sleep(3600)


def _crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _raises() -> None:
    raise ValueError("a planted exception")


def _has_no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


def _loses() -> None:
    def lost(*args: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.synchronize = lost
    lost()


_ENDS: dict[str, Callable[[], None]] = {
    "exits": _exits,
    "hangs": _hangs,
    "crashes": _crashes,
    "raises": _raises,
    "loses the GPU": _loses,
    "has no memory": _has_no_memory,
}
# Of the runs of a case, in both directions, one that is neither the first nor the last.
_OTHER_BITS = 13

_MOST_KNOWN = 12


def _spoiled(fault: str, right: torch.Tensor, call: int) -> torch.Tensor:
    """A result with a fault in its last element."""
    if fault == "is wrong":
        right[-1, -1] += 1
    elif fault == "has other bits" and call % plan.REPEATS == _OTHER_BITS:
        right.view(torch.int16 if right.itemsize == 2 else torch.int32)[-1, -1] += 1
    elif fault == "leaves memory unwritten":
        made = torch.empty(right.shape, dtype=right.dtype)
        made.view(-1)[:-1] = right.view(-1)[:-1]
        return made
    return right


def _right(verb: str) -> Callable[..., Any]:
    """The reference, which computes once what it is asked again and again."""
    known: dict[Any, Any] = {}

    def right(*args: Any, **options: Any) -> Any:
        # A CPU's own care for memory that nobody has written, which is not taken where tensors say they are on a GPU.
        with torch._C.DisableTorchFunction():
            operands = args[0] if verb == "lora_matmul" else (*args, *options.values())
            key = tuple((t.data_ptr(), t.shape, t.stride()) if isinstance(t, torch.Tensor) else t for t in operands)
            if key not in known:
                if len(known) >= _MOST_KNOWN:
                    known.clear()
                # The operands are kept with it: their memory is not another's meanwhile.
                known[key] = operands, getattr(reference, verb)(*args, **options)
            made = known[key][1]
            return made.clone() if verb == "rank_grad" else tuple(tensor.clone() for tensor in made)

    return right


def _planted(script: Script, verb: str, kernel: Kernel, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with what the script plants into a kernel."""
    mine = [planted for planted in script.planted if (planted.verb, planted.kernel) == (verb, kernel.name)]
    calls: Counter[str] = Counter()

    def planted(*args: Any, **options: Any) -> Any:
        facts = _facts(verb, *args, **options)
        called = json.dumps(facts)
        facts["call"] = calls[called]
        ran.append(kernel.name)
        ms, fault = _MS, ""
        for does, where in ((planted.does, planted.where) for planted in mine):
            if where.items() <= facts.items():
                if isinstance(does, str):
                    fault = does
                else:
                    ms = does[calls[called] % len(does)]
        _Now.ms += ms
        calls[called] += 1
        if fault in _ENDS:
            _ENDS[fault]()
        made = run(*args, **options)
        if verb == "rank_grad":
            return _spoiled(fault, made, calls[called])
        return _spoiled(fault, made[0], calls[called]), made[1]

    return planted


def _facts(verb: str, *args: Any, **options: Any) -> dict[str, Any]:
    if verb == "rank_grad":
        p, q = args
        dtype, adapters = q.dtype, options["dtype"]
        facts = {"m": q.shape[0], "k": p.shape[1], "n": q.shape[1], "dropout": options.get("dropout") is not None}
    else:
        (p,) = args
        dtype, adapters = p.x.dtype, p.a.dtype
        facts = {"m": p.x.shape[0], "k": p.x.shape[1], "n": p.b.shape[0], "r": p.a.shape[0]}
        facts |= {"dropout": p.seed is not None}
    return facts | {"dtype": str(dtype).removeprefix("torch."), "adapters": str(adapters).removeprefix("torch.")}


def _kernel(script: Script, verb: str, kernel: Kernel) -> Kernel:
    if kernel.name == "reference":
        return kernel
    if kernel.name == "library":
        # Its forms are those of a CPU.
        return kernel._replace(run=_planted(script, verb, kernel, kernel.run), forms=())
    run = _planted(script, verb, kernel, _right(verb))

    def gradients(p: Product, dy: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dx, t = run(p.turned(dy))
        da = reference.rank_grad(t, p.x, dtype=p.a.dtype, dropout=p.mask_x)
        return dx, da, reference.rank_grad(dy, z, dtype=p.b.dtype)

    return Kernel(kernel.name, lambda request: None, run, gradients=kernel.gradients and gradients)


def prepare(script: Script) -> None:
    """Makes this process one on a GPU, with the kernels of a script."""
    torch.set_num_threads(1)
    stand_in.enter()
    torch.cuda.Event = Event
    # Not a quarter of a gigabyte before every sample.
    Clock._flush = torch.empty(1)
    for verb, kernels in dispatch.KERNELS.items():
        dispatch.KERNELS[verb] = tuple(_kernel(script, verb, kernel) for kernel in kernels)
    # Cases of more tiles than a GPU has multiprocessors take a CPU seconds.
    plan._LARGE_CASES = ((520, 136, 264, 16, False, False, False),)
    plan.REPEATS = script.repeats
    work._MOST_ROUNDS = 20
    plan.DTYPES = {name: plan.DTYPES[name] for name in script.dtypes}
    worker._START_SECONDS = 60.0
    if script.forked:
        worker.subprocess.Popen = _Forked


class _Forked:
    """A worker as ``Popen`` starts it, but forked from this process: that takes no imports."""

    def __init__(self, command: Sequence[str], *, stderr: Any, **options: Any) -> None:
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for i, mine in enumerate((theirs_in, theirs_out, stderr.fileno())):
                os.dup2(mine, i)
            os.closerange(3, 1024)
            _be_a_worker(command)
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin = os.fdopen(ours_in, "w", encoding="utf-8")
        self.stdout = os.fdopen(ours_out, encoding="utf-8")
        self._status: int | None = None

    def wait(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


def _be_a_worker(command: Sequence[str]) -> None:
    status: Any = 1
    try:
        sys.stdin, sys.stderr = os.fdopen(0), os.fdopen(2, "w", buffering=1)
        _work(command)
    except SystemExit as end:
        if isinstance(end.code, int):
            status = end.code
        else:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _work(command: Sequence[str]) -> NoReturn:
    *_, option, module, device = command
    assert (option, module) == ("-m", "fastlora.tune.worker"), command
    with Path(os.environ["STUB_TUNE_WORKERS"]).open("a") as file:
        print(os.getpid(), file=file)
    sys.argv = [module, device]
    if not Script.parse(os.environ["STUB_TUNE"]).starts:
        sys.exit("no GPU is free")
    worker.main()


def _begin(script: str, cache: Path, out: Path) -> None:
    """What each forked process starts with: variables, the stand-in, and files that its words go to."""
    os.chdir(ROOT)
    for name in ("FASTLORA_TABLE", "FASTLORA_BACKEND", "TRITON_INTERPRET"):
        os.environ.pop(name, None)
    # Real launches: what the check at first use does is looked at elsewhere.
    os.environ |= {"FASTLORA_CACHE": str(cache), "FASTLORA_CHECK": "0"}
    os.environ |= {"STUB_TUNE": script, "STUB_TUNE_WORKERS": str(out.with_suffix(".workers"))}
    for i, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), i)
    dispatch.forget()
    prepare(Script.parse(script))


def command(script: str, cache: Path, out: Path, arguments: Sequence[str]) -> None:
    """The command, for a process of its own."""
    # A suite that a shell started in the background inherits an ignored Ctrl-C; the command at a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _begin(script, cache, out)
    sys.exit(command_line.main(arguments, python=PYTHON, case_seconds=Script.parse(script).case_seconds))


def ask(script: str, cache: Path, out: Path, calls: Sequence[Mapping[str, Any]]) -> None:
    """Prints, for each call, which kernel ``auto`` runs and how it explains that, for a process of its own."""
    _begin(script, cache, out)
    for call in calls:
        print(json.dumps(_answer(**call)))


def _answer(
    m: int,
    k: int = 64,
    n: int = 48,
    r: int = 8,
    dtype: str = "float16",
    direction: str = "forward",
    dropout: bool = False,
) -> list[str]:
    kind = getattr(torch, dtype)
    x, dy, w, a, b = (torch.randn(shape).to(kind) for shape in ((m, k), (m, n), (n, k), (r, k), (n, r)))
    p = Product(x, w, a, b, 1.7, None, *((0.3, torch.tensor((1, 2))) if dropout else ()))
    ran.clear()
    why = ""
    if direction in ("da", "db"):
        operands = {"da": (torch.randn(m, r).to(kind), x), "db": (dy, torch.randn(m, r).to(kind))}[direction]
        dispatch.rank_grad(*operands, kind, p.mask_x if direction == "da" else None)
    else:
        p = p if direction == "forward" else p.turned(dy)
        dispatch.lora_matmul(p)
        why = str(dispatch.explain(p))
    (name,) = ran
    return [name, why]


def main() -> None:
    """A worker that was started, not forked."""
    prepare(Script.parse(os.environ["STUB_TUNE"]))
    _work(sys.argv)


if __name__ == "__main__":
    main()
