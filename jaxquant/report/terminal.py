"""What the commands print for people: the plan, progress, results."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxquant.report.figures import human_bytes

if TYPE_CHECKING:
    from jaxquant.plan import Plan
    from jaxquant.recipe import Recipe

# Operations that surgeries leave to run time, see `plan.token_cost`.
_ONLINE = {
    "key_rotation": "to rotate queries and keys",
    "hidden_hadamard": "to transform the inputs of down",
    "post_rotation": "to rotate behind inner norms",
}


@contextlib.contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr while it is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_plan(name: str, recipe: Recipe, plan: Plan) -> None:
    """What will run and what it will take."""
    minutes, seconds = divmod(round(plan.seconds), 60)
    duration = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    print(f"{name}: {recipe}")
    print(
        f"plan: {plan.linears} linears at {plan.effective_bits:.3f} effective bits; "
        f"{human_bytes(plan.output_bytes)} on disk ({human_bytes(plan.source_bytes)} in 16 bits), "
        f"peak memory about {human_bytes(plan.peak_bytes)}, time about {duration}"
    )


def print_speed(result: dict[str, Any]) -> None:
    """The result of `jobs.bench`."""
    read, written = (result[f"{part}_tokens_per_second"] for part in ("prefill", "decode"))
    size = {key: human_bytes(result[key]) for key in ("bytes_per_token", "weight_bytes", "cache_bytes")}
    seconds = result["compile_seconds"]
    print(
        f"{result['model']} on {result['device']}: reads {read:.1f} tokens/s ({result['prompt']} at once), "
        f"writes {written:.1f} tokens/s"
    )
    print(
        f"a token moves {size['bytes_per_token']} (weights {size['weight_bytes']}, cache "
        f"{size['cache_bytes']}): {result['roofline']:.0%} of what memory allows at "
        f"{human_bytes(result['bandwidth'])}/s"
    )
    print(f"compiled in {seconds['prefill']:.1f} s (prefill) and {seconds['decode']:.1f} s (decode)")


def print_evaluation(result: dict[str, Any]) -> None:
    """The result of `jobs.evaluate`."""
    where = f"{result['text']}, {result['windows']} windows of {result['seqlen']}, {result['tokens']} tokens"
    print(f"{result['model']}: perplexity {result['perplexity']:.4f} (nll {result['nll']:.5f}) on {where}")
    if "kl" in result:
        print(
            f"against {result['against']}: its perplexity {result['reference_perplexity']:.4f}; "
            f"KL {result['kl']:.5f} +- {result['kl_stderr']:.5f} nats per token, "
            f"same top-1 token {100 * result['top1']:.2f} %"
        )


def print_tasks(result: dict[str, Any]) -> None:
    """The result of `jobs.evaluate_tasks`."""
    print(f"{result['model']}:")
    for task in result["tasks"]:
        shots = f", {task['shots']} shots" if task["shots"] else ""
        cut = f", {task['truncated']} prompts cut to the model's context" if task["truncated"] else ""
        print(f"{task['task']}: {task['n']} items{shots}{cut}")
        for name in ("acc", "acc_norm", "exact_match", "nll", "perplexity"):
            if task.get(name) is not None:
                spread = task.get(f"{name}_stderr")
                print(f"  {name:12}{task[name]:>9.4f}" + ("" if spread is None else f" +- {spread:.4f}"))


def print_allocation(result: dict[str, Any]) -> None:
    """The result of `allocation.write_recipe`."""
    print(
        f"{result['model']}: {result['effective_bits']:.4f} effective bits of {result['budget']:g}, "
        f"by {result['metric']} with beta {result['beta']:g}"
    )
    by_bits: dict[int, list[str]] = {}
    for unit, bits in result["units"].items():
        by_bits.setdefault(bits, []).append(unit.removeprefix("blocks."))
    for bits, units in sorted(by_bits.items()):
        print(f"  {bits} bits: {' '.join(units)}")
    for name, loss in result["predicted"].items():
        print(f"  {result['metric']} on {name}, if losses add up: {loss:.4f} nats per token")
    if "tau" in result:
        tau = result["tau"]
        print(
            f"  Kendall's tau between tasks and general text at {tau['bits']} bits: {tau['tau']:.2f} "
            f"({tau['low']:.2f} to {tau['high']:.2f})"
        )
    used = {name: share for name, share in result["shares"].items() if share}
    specs = (
        f"{name}={result['texts'][name]}" if name in result["tasks"] else result["texts"][name]
        for name in used
    )
    words = [f"--calibration {shlex.quote(spec)}" for spec in specs]
    words += [f"--mix {','.join(f'{share:g}' for share in used.values())}"] if len(used) > 1 else []
    words.append(
        f"--samples {result['samples'] * len(used)} --seqlen {result['seqlen']} --seed {result['seed']}"
    )
    print(f"{result['recipe']} is written, and pictured in {result['page']}. Next:")
    model, recipe = shlex.quote(result["model"]), shlex.quote(result["recipe"])
    print(f"  jaxquant quantize {model} --recipe {recipe} {' '.join(words)} --out q")


def print_smoothness(result: dict[str, Any]) -> None:
    """The result of `jobs.smoothness`."""

    def shown(name: str) -> str:
        spread = result[f"{name}_stderr"]
        return f"{result[name]:.4g}" + ("" if spread is None else f" +- {spread:.2g}")

    print(
        f"{result['model']} against {result['against']} on {result['text']}, {result['windows']} windows of "
        f"{result['seqlen']} tokens"
    )
    print(f"gradients at the input: ratio {shown('gradient_ratio')}, cosine {shown('gradient_cosine')}")
    print(f"{'':28}{'model':>18}{'original':>18}{'kept':>18}")
    for label, name, kept in (
        ("candidates of a position", "candidates", "candidate_retention"),
        ("  exp(entropy)", "candidates_entropy", None),
        ("  1 / sum p^2", "candidates_participation", None),
        ("  of a neighbourhood", "neighborhood_candidates", "neighborhood_retention"),
        ("nodes of a decoding tree", "tree_nodes", "tree_retention"),
        ("  branching", "tree_branching", None),
    ):
        cells = (shown(name), shown(f"{name}_reference"), "" if kept is None else shown(kept))
        print(f"{label:28}" + "".join(f"{cell:>18}" for cell in cells).rstrip())


class StepTable:
    """Prints a line for every twentieth of a training run: means since the last one, and the time left."""

    def __init__(self) -> None:
        self._recent: list[dict[str, Any]] = []

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes an event of `train_model`."""
        if event["event"] == "gradient" and event["done"] == event["total"]:
            print("moments of the loss gradients taken", flush=True)
        elif event["event"] == "resume":
            print(f"going on after step {event['step']} of {event['steps']}", flush=True)
        elif event["event"] == "step":
            self._recent.append(event)
            if event["step"] == event["steps"] or len(self._recent) == max(1, event["steps"] // 20):
                self._print(event)

    def _print(self, last: dict[str, Any]) -> None:
        names = [name for name in ("kl", "hidden", "smooth", "seconds") if any(e[name] for e in self._recent)]
        means = {name: sum(e[name] for e in self._recent) / len(self._recent) for name in names}
        left = round(means.pop("seconds") * (last["steps"] - last["step"]))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        remaining = f"  {left // 60}:{left % 60:02d} left" if left else ""
        print(f"step {last['step']:>5} of {last['steps']}  {shown}{remaining}", flush=True)
        self._recent = []


def print_summary(folder: Path, summary: dict[str, Any]) -> None:
    """What a run left in `folder`, from the summary of `quantize_model` or `train_model`."""
    errors = ""
    if "mean_error" in summary:
        errors = f"mean layer error {summary['mean_error']:.2e}, RTN {summary['mean_error_rtn']:.2e}; "
    print(
        f"{folder}: {summary['effective_bits']:.3f} effective bits, {summary['disk_bytes'] / 1e6:.1f} MB "
        f"(original in 16 bits: {summary['source_bytes'] / 1e6:.1f} MB); {errors}"
        f"{summary['seconds']:.0f} s; pictures in {folder / 'report.html'}"
    )


def print_inspection(result: dict[str, Any]) -> None:
    """The result of `jobs.inspect`."""
    bits = "no" if result["effective_bits"] is None else f"{result['effective_bits']:.3f}"
    print(f"{result['model']}: {result['recipe']}")
    print(
        f"{sum(row['bits'] < 16 for row in result['modules'])} quantized linears of "
        f"{len(result['modules'])}, {bits} effective bits, "
        f"{result['bytes'] / 1e6:.2f} MB packed, {result['disk_bytes'] / 1e6:.2f} MB with embeddings, norms"
    )
    if result["training"]:
        print(result["training"])
    print(f"{result['state']}: {result['blocks']} of {result['blocks_total']} blocks")
    token = result["token"]
    online = [f"{token[key] / 1e6:.3g} M {what}" for key, what in _ONLINE.items() if token[key]]
    rest = f"; besides, {', '.join(online)}" if online else ""
    print(f"per token: {token['linears'] / 1e6:.4g} M multiply-adds in these linears{rest}")
    cache, cache_16 = token["cache_bytes"] / 1e3, token["cache_bytes_16"] / 1e3
    print(f"per token of context: {cache:.3g} kB of cache ({cache_16:.3g} kB in 16 bits)")
    for row in result["modules"]:
        shape = "x".join(map(str, row["shape"]))
        errors = f"error {row['error']:.3e}  (RTN {row['error_rtn']:.3e})" if "error" in row else ""
        print(f"{row['module']:24} {shape:>11}  {errors}".rstrip())
