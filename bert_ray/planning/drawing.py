"""The drawing of a plan: speed-up against workers, 1 to 1,024, as .html with all figures, .svg or .png."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_ray.errors import JobError, why
from bert_ray.planning.plan import COUNTS, NETWORK_LIMIT, Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 150


def write(plan: Plan, path: Path) -> None:
    """Draw a plan; the file's ending says how.

    Raises:
        JobError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            _figure(plan).savefig(path, format="png", dpi=_DOTS_PER_INCH)
        else:
            path.write_text(_svg(plan) if path.suffix == ".svg" else _page(plan), "utf-8")
    except OSError as error:
        raise JobError(f"output {path} cannot be written: {why(error)}; name another file") from error


def _figure(plan: Plan) -> Figure:
    # A Figure without pyplot: no display, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(COUNTS, COUNTS, color="grey", linestyle="--", linewidth=1, label="ideal")
    each = plan.work.step_tokens / plan.step.workers
    axes.plot(COUNTS, plan.grown, marker="o", label=f"step grows: {each:,.0f} tokens on each GPU")
    axes.plot(COUNTS, plan.as_it_is, marker="o", label=f"the job's step of {plan.work.step_tokens:,.0f} tokens")
    _mark(axes, plan.limit_grown, "C0")
    _mark(axes, plan.limit_as_it_is, "C1")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel=f"GPUs ({plan.gpu.name})", ylabel="speed-up over one GPU, predicted")
    title = f"{plan.model}, ZeRO {plan.work.zero_stage}; dotted: the network takes more than {NETWORK_LIMIT:.0%}"
    axes.set_title(title, parse_math=False)
    axes.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
    axes.set_yticks(COUNTS, [f"{count:,}" for count in COUNTS])
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _mark(axes: Any, workers: int, colour: str) -> None:
    if workers:
        axes.axvline(workers, color=colour, linestyle=":", linewidth=1.2)


def _svg(plan: Plan) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # The same drawing gives the same bytes. Text stays text, in the reader's font: a path may be of any script.
    with rc_context({"svg.hashsalt": "bert_ray", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        _figure(plan).savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _page(plan: Plan) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("bert_ray.planning", "templates"), autoescape=True, undefined=StrictUndefined
    )
    svg = _svg(plan)
    header, *rows = plan.memory_table()
    return environment.get_template("plan.html").render(
        model=plan.model,
        facts=plan.facts(),
        figures=plan.figures(),
        header=header,
        rows=rows,
        drawing=Markup(svg[svg.index("<svg") :]),
        counts=list(zip(COUNTS, plan.as_it_is, plan.grown, strict=True)),
        assumptions=plan.assumptions(),
    )
