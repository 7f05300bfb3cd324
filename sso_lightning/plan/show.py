"""A plan as tables of at most 80 columns."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sso_lightning.plan.dry_run import DryRun
from sso_lightning.plan.make import Plan
from sso_lightning.plan.memory import PARTS

_WIDTH = 80
_SHOWN = 420  # characters of a prompt before and after its principle, together


def size(count: float) -> str:
    """Bytes as a text of two or three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            digits = 0 if unit == "B" or count >= 100 else 1
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    raise AssertionError


def number(count: float) -> str:
    """A count as a text of three digits."""
    for unit in ("", " k", " M", " G", " T", " P", " E"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} Z"


def show(plan: Plan) -> None:
    """Print it."""
    console = Console(file=sys.stdout, width=_WIDTH, highlight=False, soft_wrap=False)
    if plan.dry_run:
        _show_record(console, plan.dry_run)
    if plan.parameters is not None:
        assert plan.trained is not None
        console.print(
            f"[bold]{escape(plan.policy)}[/]: {plan.parameters:,} parameters, {plan.trained:,} "
            f"trained; {plan.devices} x {size(plan.memory)}, {plan.strategy}"
        )
    _show_memory(console, plan)
    _show_costs(console, plan)
    if plan.remedies:
        table = _table("What would take less", "settings", "peak", "in", "")
        for remedy in plan.remedies:
            fits = "fits" if remedy.fits else ""
            table.add_row("\n".join(remedy.settings), size(remedy.bytes), remedy.phase, fits)
        console.print(table)
    for note in plan.notes:
        console.print(f"note: {escape(note)}")
    if plan.problems:
        console.print(f"[bold]{len(plan.problems)} to mend:[/]")
        for problem in plan.problems:
            console.print(f"- {escape(problem)}")


def _table(title: str | None, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _show_memory(console: Console, plan: Plan) -> None:
    if not plan.peak:
        return
    phase, most = plan.peak
    names = list(plan.phases)
    table = _table("Memory of a device", "", *names)
    for part in PARTS:
        if any(part in parts for parts in plan.phases.values()):
            sizes = (plan.phases[name].get(part, 0) for name in names)
            table.add_row(part, *(size(count) if count else "" for count in sizes))
    table.add_row("together", *(size(sum(plan.phases[name].values())) for name in names))
    console.print(table)
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
    share = f"{most / plan.memory:.0%}"
    console.print(f"Peak {size(most)} in {phase}, {share} of {size(plan.memory)}: {verdict}.")
    records = ", ".join(f"{count} in {name}" for name, count in plan.records.items())
    slots = f"; {plan.slots[0]} answers of {plan.slots[1]} tokens at once" if plan.slots else ""
    assert plan.lengths
    longest = max(plan.lengths.longest.values())
    answer = max(plan.lengths.answers.values())
    console.print(
        f"For prompts of {longest} and answers of {answer} tokens; records a batch: {records}"
        f"{slots}."
    )


def _show_costs(console: Console, plan: Plan) -> None:
    if not plan.costs:
        return
    assert plan.lengths
    table = _table("One iteration, by arithmetic", "", "tokens", "FLOPs", "hours")
    total = 0.0
    for name, cost in plan.costs.items():
        hours = "" if cost.hours is None else f"{cost.hours:.2f}"
        total += cost.hours or 0.0
        table.add_row(name, number(cost.tokens), number(cost.flops), hours)
    if plan.assumed.tflops:
        table.add_row("together", "", "", f"{total:.2f}")
    console.print(table)
    means = plan.lengths.mean
    prompts = ", ".join(f"{name} {value:.0f}" for name, value in means.items())
    answer = sum(plan.lengths.mean_answers.values()) / len(plan.lengths.mean_answers)
    rates = "no rates for this device: give --tflops (and --bandwidth) for hours"
    if plan.assumed.tflops:
        rates = (
            f"{plan.assumed.mfu:.0%} of {plan.assumed.tflops:g} TFLOP/s; decoding reads "
            f"{plan.assumed.bandwidth / 1e12:.2f} TB/s at 60 %; loading, saving, traffic left out"
        )
    console.print(
        f"{plan.queries} queries; prompts of {prompts} tokens, answers of {answer:.0f}; {rates}."
    )


def _show_record(console: Console, dry: DryRun) -> None:
    console.print(f"[bold]One record[/]: {escape(dry.record)}")
    for context, text in dry.prompts.items():
        console.print(f"[bold]{context}[/]")
        console.print(escape(_shortened(text)), style="dim")
    table = _table(None, "sequence", "prompt", "principle at", "scored")
    for one in dry.sequences:
        place = "{}-{}".format(*one.principle) if one.principle else ""
        scored = f"up to {one.answer_tokens}" if one.sampled else f"{one.answer_tokens}"
        table.add_row(one.name, f"{one.prompt_tokens}", place, scored)
    console.print(table)
    console.print(f"Tokens; scored is the answer alone, {escape(dry.ends)} included.")


def _shortened(text: str) -> str:
    """A prompt without the middle of what is long."""
    if len(text) <= 2 * _SHOWN:
        return text
    return f"{text[:_SHOWN]} [...] {text[-_SHOWN:]}"
