"""W4 and W3 perplexity of SmolLM2-135M: RTN and GPTQ, with and without clip search and act-order.

    python experiments/gptq/perplexity.py --data DIR

DIR holds wikitext2/wiki.train.part.raw and wikitext2/wiki.test.raw. Every row runs the whole pipeline (inputs
of a block come from the quantized blocks before it) and evaluates the saved model. Rows are added to
results/perplexity.json one by one; those already there are kept, so an interrupted run goes on.
results/perplexity.md is made from the JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

from jaxquant.calibrate.text import eval_windows, read_text, windows
from jaxquant.evaluate import perplexity
from jaxquant.folder import versions
from jaxquant.io import load_checkpoint, load_params, open_model
from jaxquant.pipeline import quantize_model
from jaxquant.quant import Grid
from jaxquant.recipe import chain
from jaxquant.stages import GPTQ, RTN

RESULTS = Path(__file__).parent / "results"
# Clip rule and rounding.
METHODS = {
    "RTN": ("minmax", RTN()),
    "RTN + clip search": ("mse", RTN()),
    "GPTQ": ("minmax", GPTQ(act_order=False)),
    "GPTQ + act-order": ("minmax", GPTQ()),
    "GPTQ + clip search + act-order": ("mse", GPTQ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=31)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    arguments = parser.parse_args()

    train, test = (arguments.data / "wikitext2" / name for name in ("wiki.train.part.raw", "wiki.test.raw"))
    source = open_model("smollm2-135m")
    tokenizer, config = source.tokenizer(), source.config
    calibration = windows(
        read_text(str(train)), tokenizer, config, samples=arguments.samples, seqlen=arguments.seqlen, seed=0
    )
    held_out = eval_windows(read_text(str(test)), tokenizer, config, seqlen=2048, limit=arguments.windows)

    protocol = {
        "model": source.name,
        "fingerprint": source.fingerprint(),
        "calibration": f"{train.name} sha256 {_sha256(train)}",
        "samples": arguments.samples,
        "seqlen": arguments.seqlen,
        "seed": 0,
        "evaluation": f"{test.name} sha256 {_sha256(test)}",
        "windows": len(held_out),
        "evaluation_seqlen": 2048,
        "versions": versions(),
    }
    original = perplexity(load_params(source), config, held_out)
    protocol["original_perplexity"] = original.perplexity
    path = RESULTS / "perplexity.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for bits in arguments.bits:
        for name, (clip, rounding) in METHODS.items():
            if any(row["method"] == name and row["bits"] == bits for row in rows):
                continue
            started = time.monotonic()
            recipe = chain(rounding, grid=Grid(bits=bits, group_size=64, clip=clip))
            with tempfile.TemporaryDirectory() as folder:
                summary = quantize_model(source, recipe, calibration, Path(folder) / "q")
                params, quantized = load_checkpoint(Path(folder) / "q")
            result = perplexity(params, quantized, held_out)
            rows.append({
                "method": name,
                "bits": bits,
                "recipe": str(recipe),
                "effective_bits": summary["effective_bits"],
                "mean_layer_error": summary["mean_error"],
                "quantize_seconds": summary["seconds"],
                "seconds": time.monotonic() - started,
                "perplexity": result.perplexity,
                "window_nll": result.window_nll,
            })  # fmt: skip
            print(f"W{bits} {name}: {rows[-1]['perplexity']:.3f} in {rows[-1]['seconds']:.0f} s", flush=True)
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1) + "\n")
            (RESULTS / "perplexity.md").write_text(_table(protocol, rows))


def _table(protocol: dict, rows: list[dict]) -> str:
    lines = [
        f"# {protocol['model']}, WikiText-2 test, first {protocol['windows']} windows of 2048, float32",
        "",
        f"Original perplexity {protocol['original_perplexity']:.3f}. Its weights are dequantized Q4_1: they "
        "lie on a 4-bit grid already, which flatters every 4-bit row.",
        "Asymmetric grids, group size 64, "
        f"{rows[0]['effective_bits'] - rows[0]['bits']:.2f} bits of scale and zero per weight; calibration "
        f"{protocol['samples']} x {protocol['seqlen']} tokens of the WikiText-2 train part, seed "
        f"{protocol['seed']}.",
        "",
        "| method | bits | perplexity | mean layer error |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['bits']} | {row['perplexity']:.3f} | {row['mean_layer_error']:.3e} |"
        )
    return "\n".join(lines) + "\n"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
