"""The doctor's findings, and its report as text for people."""

import dataclasses
from typing import NamedTuple

from rqv2_jax.tools.doctor_streams import SAMPLED, Lengths


class Finding(NamedTuple):
    """A fact about the data: `kind` is error, warning or note, `where` the stream it is in."""

    kind: str
    where: str
    what: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The doctor's result; `streams` are (name, items read, remark), `sampled` counts (passages, queries)."""

    name: str
    streams: list[tuple[str, int, str]]
    sampled: tuple[int, int]
    lengths: list[Lengths]
    findings: list[Finding]

    def verdict(self) -> str:
        """Returns `ok`, `usable, with N warnings` or `not usable: N errors`."""
        errors, warnings = (
            sum(finding.kind == kind for finding in self.findings) for kind in ("error", "warning")
        )
        if errors:
            return f"not usable: {errors} error{'s' * (errors > 1)}"
        return f"usable, with {warnings} warning{'s' * (warnings > 1)}" if warnings else "ok"

    def usable(self) -> bool:
        """Says whether there is no error."""
        return all(finding.kind != "error" for finding in self.findings)


def share(part: int, whole: int, what: str) -> str:
    """Returns `part of whole what (percent)` as text."""
    return f"{part:,} of {whole:,} {what} ({part / max(whole, 1):.1%})"


def render(report: Report) -> str:
    """Returns the report as tables for people: findings, errors first, and the verdict last."""
    lines = [report.name, ""]
    if report.streams:
        lines.append(f"{'stream':<16}{'read':>12}")
    lines += [f"{name:<16}{count:>12,}   {remark}" for name, count, remark in report.streams]
    if report.lengths:
        passages, queries = report.sampled
        head = "".join(f"{name:>8}" for name in ("min", "median", "mean", "90%", "99%", "max"))
        lines += ["", f"tokens{head}{'limit':>10}{'inputs cut':>12}{'tokens lost':>13}"]
        for row in report.lengths:
            low, median, *high = (f"{value:>8,.0f}" for value in row.quantiles)
            line = f"{row.name:<8}{low[2:]}{median}{row.mean:>8.1f}{''.join(high)}"
            cut = f"{row.limit:>10}{row.cut:>12.1%}{row.lost:>13.1%}" if row.limit else f"{'-':>10}"
            lines.append(line + cut)
        lines.append(
            f"(of {queries:,} queries, {passages:,} passages and {SAMPLED:,} pairs of them, drawn at "
            "random; special tokens included)"
        )
    if lines[-1]:
        lines.append("")
    for kind in ("error", "warning", "note"):
        lines += [f"{kind:<8} {f.where}: {f.what}" for f in report.findings if f.kind == kind]
    lines += ["", report.verdict()] if report.findings else [report.verdict()]
    return "\n".join(lines)
