"""``PatchReport``: which layers of a model run on fastlora, which do not and why, and what would run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .. import gated
from ..backends import dispatch
from ..backends.request import Request
from ..text import listed

# At which a report says what would run: no layer knows how many it will get.
TOKENS = 2048


@dataclass(frozen=True)
class PatchReport:
    """The layers that :func:`patch_peft` patched and skipped; ``print`` it.

    Attributes:
        patched: names of the layers that run on fastlora from now on.
        already_patched: names of those that did before.
        skipped: name of each other adapter layer → the reason why it keeps PEFT's forward.
        trainable_base: names of the patched layers whose base weight asks for a gradient.
        groups: names of the layers that compute together where they are called with one input.
        ungrouped: name of each layer that could have been in a group → the reason why it is in none.
        mlps: names of the gated MLPs that run as one product.
        requests: what the layers that run on fastlora ask of a kernel, at TOKENS tokens and without dropout; how many
            layers ask it.
        bases: what their quantised bases are, and what is done with them; how many layers have such a one.
    """

    patched: tuple[str, ...]
    already_patched: tuple[str, ...]
    skipped: dict[str, str]
    trainable_base: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    ungrouped: dict[str, str] = field(default_factory=dict)
    mlps: tuple[str, ...] = ()
    requests: Counter[Request] = field(default_factory=Counter, repr=False)
    bases: Counter[str] = field(default_factory=Counter)

    @property
    def reasons(self) -> Counter[str]:
        """The number of layers skipped for each reason."""
        return Counter(self.skipped.values())

    def __str__(self) -> str:
        total = len(self.patched) + len(self.already_patched) + len(self.skipped)
        lines = [f"{len(self.patched)} of {total} adapter layers patched"]
        if self.already_patched:
            lines[0] += f", {len(self.already_patched)} patched already"
        for reason, count in self.reasons.most_common():
            lines.append(f"  {count} skipped: {reason} ({listed(n for n, r in self.skipped.items() if r == reason)})")
        if self.trainable_base:
            lines.append(f"  {len(self.trainable_base)} with a trainable base weight ({listed(self.trainable_base)})")
        lines += gated.report(self.groups, self.mlps, self.ungrouped)
        for (kernel, why), count in self._kernels().most_common():
            lines.append(f"  {count} run {kernel} at {TOKENS} tokens, {why}")
        lines += [f"  {count} with {base}" for base, count in self.bases.most_common()]
        return "\n".join(lines)

    def _kernels(self) -> Counter[tuple[str, str]]:
        """The kernel that would run, and why → the number of layers."""
        kernels: Counter[tuple[str, str]] = Counter()
        for request, count in self.requests.items():
            try:
                explanation = dispatch.explain_request(request)
            except RuntimeError as error:  # a setting that each call will refuse: a report is printed all the same
                kernels["nothing", str(error)] += count
            else:
                kernels[explanation.chosen or "nothing", explanation.why] += count
        return kernels
