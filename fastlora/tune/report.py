"""What a table says, for people: kernels with their proofs and wins on a screen, and what a contributor sends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from ..backends import dispatch
from ..backends.measured import Bucket, Proof, Table

_WIDTH = 120


def table(found: Table, refusals: Mapping[tuple[str, str], str]) -> str:
    """A line for each kernel: how its checks ended, and where it is taken and how far ahead.

    Args:
        found: what a machine has proven and measured.
        refusals: verb and kernel → why it cannot run here.
    """
    lines = [f"{'kernel':<16}{'verb':<13}{'proof':<34}fastest"]
    for verb, kernels in dispatch.KERNELS.items():
        for kernel in kernels:
            if kernel.name != "reference":
                wins = _wins(found, verb, kernel.name)
                proof = _proof(found, verb, kernel.name, refusals.get((verb, kernel.name)))
                lines.append(f"{kernel.name:<16}{verb:<13}{proof:<34}{wins}".rstrip())
    failed = [p for p in found.proofs if not p.passed]
    lines += [f"{p.kernel} failed in {p.dtype}: {p.why}"[: 2 * _WIDTH] for p in failed]
    return "\n".join(lines)


def _proof(found: Table, verb: str, kernel: str, refusal: str | None) -> str:
    if kernel == "library":
        return "needs none"
    proofs = [proof for proof in found.proofs if (proof.verb, proof.kernel) == (verb, kernel)]
    if not proofs:
        return "cannot run here" if refusal else "not tried"
    passed = [proof for proof in proofs if proof.passed]
    words = [f"{sum(p.checks for p in passed)} checks passed ({_short(passed)})"] if passed else []
    words += [f"failed ({_short(failed)})"] if (failed := [p for p in proofs if not p.passed]) else []
    return ", ".join(words)


def _short(proofs: list[Proof]) -> str:
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return ", ".join(short.get(proof.dtype, proof.dtype) for proof in proofs)


def _wins(found: Table, verb: str, kernel: str) -> str:
    """In how many sizes a kernel or a form of it is taken, and by how much it is ahead of the rule's there."""
    buckets = [bucket for bucket in found.buckets if bucket.verb == verb]
    mine = [bucket for bucket in buckets if bucket.best is not None and bucket.best.partition(":")[0] == kernel]
    # What failed afterwards is not taken.
    proofs = (found.proof(verb, kernel, bucket.dtype) for bucket in mine)
    mine = [bucket for bucket, proof in zip(mine, proofs, strict=True) if proof is None or proof.passed]
    usual = sum(bucket.best is None and bucket.rule == kernel for bucket in buckets)
    words = [f"{len(mine)} of {len(buckets)} sizes, {_range(mine)} x the rule's"] if mine else []
    words += (
        [f"the rule's in {usual} more" if mine else f"{usual} of {len(buckets)} sizes, by the rule"] if usual else []
    )
    return ", ".join(words)


def _range(buckets: list[Bucket]) -> str:
    factors = [bucket.times[bucket.rule][1] / bucket.times[bucket.best or bucket.rule][1] for bucket in buckets]
    low, high = f"{min(factors):.2f}", f"{max(factors):.2f}"
    return low if low == high else f"{low} to {high}"


def winners(found: Table) -> str:
    """A line for each size at which something beats the rule."""
    return "\n".join(
        f"  {bucket.direction:<9}{bucket!s:<36}{bucket.dtype:<9}{'dropout ' if bucket.dropout else '':<8}"
        f"{bucket.best:<20}{1e3 * bucket.times[bucket.best][1]:>9.1f} us, {bucket.rule} "
        f"{1e3 * bucket.times[bucket.rule][1]:.1f}"
        for bucket in found.buckets
        if bucket.best is not None
    )


def export(found: Table) -> str:
    """What a contributor sends: the table for the package, and the lines of benchmarks/HARDWARE.md that it proves."""
    content = json.loads(found.text()) | {"ledger": list(ledger(found))}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def ledger(found: Table) -> Iterator[str]:
    """The lines of the ledger that a table is proof of; what was done without a GPU is left empty."""
    machine = found.machine
    for proof in found.proofs:
        ended = f"{proof.checks} checks of fastlora.tune passed" if proof.passed else f"failed: {proof.why}"
        ran = f"{machine.device}, kernels {machine.kernels}: {ended}"
        yield f"| {proof.kernel} | {proof.verb} | {machine.capability} | {proof.dtype} | | {ran} |"
