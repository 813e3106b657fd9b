"""The command line on the tiny model: forms that scripts rely on, exit codes, kill and resume."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxquant import cli, jobs
from jaxquant.io import checkpoint

SMALL = ["--bits", "4", "--group-size", "64", "--samples", "2", "--seqlen", "64", "--seed", "0"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the entry point; returns exit code, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jaxquant", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("The miller's daughter walked to the river and counted the boats on the water. " * 60)
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("cli") / "q4"
    arguments = ["quantize", "tiny", "--recipe", "gptq", *SMALL, "--json"]
    arguments += ["--calibration", str(text), "--out", str(folder)]
    # In this process, whose later commands run the same programs.
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(sys, "argv", ["jaxquant", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    assert not exit_.value.code
    return folder, [json.loads(line) for line in stdout.getvalue().splitlines()]


def test_quantize_prints_json_lines_and_fills_the_folder(quantized):
    folder, events = quantized
    assert [e["event"] for e in events if e["event"] != "row"] == ["plan", "block", "block", "block", "done"]
    rows = [event for event in events if event["event"] == "row"]
    assert len(rows) == 21
    assert all(row["error"] <= row["error_rtn"] for row in rows)
    saved = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [{"event": "row", **row} for row in saved] == rows
    assert "blocks.2.mlp.down" in (folder / "report.html").read_text()
    assert (folder / "tokenizer.json").is_file()


def test_evaluate_tasks(run, tmp_path):
    rows = [{"goal": f"Dry {n}", "sol1": "in the sun", "sol2": "in rain", "label": 0} for n in range(5)]
    files = [tmp_path / name for name in ("piqa.jsonl", "lambada.jsonl", "answers.json")]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files[1].write_text(json.dumps({"text": "The keeper of the old lighthouse looked at the sea"}) + "\n")
    arguments = ["evaluate", "tiny", "--task", f"piqa={files[0]}", "--limit", "2", "--shots", "1"]
    code, out, _ = run(*arguments, "--answers", files[2], "--json")
    assert code == 0
    (result,) = json.loads(out)["tasks"]
    assert (result["task"], result["n"], result["shots"]) == ("piqa", 2, 1)
    assert 0 <= result["acc_norm"] <= 1
    assert len(json.loads(files[2].read_text())["answers"]["piqa"]) == 2
    code, out, _ = run("evaluate", "tiny", "--task", f"lambada={files[1]}")
    assert code == 0
    assert "lambada: 1 items" in out
    assert "+-" not in out  # one item has no spread


def test_inspect_reports_bits_bytes_and_modules(run, quantized):
    code, out, _ = run("inspect", quantized[0], "--json")
    result = json.loads(out)
    assert code == 0
    assert result["effective_bits"] == pytest.approx(4 + 32 / 64)
    weights = sum(np.prod(row["shape"]) for row in result["modules"])
    assert result["bytes"] == pytest.approx(weights * 4.5 / 8)
    assert result["state"] == "complete"
    code, out, _ = run("inspect", quantized[0])
    assert code == 0
    assert "GPTQ (act-order, static groups, damping 0.01), W4 g64 asymmetric, mse clip search" in out
    assert "blocks.1.attn.o" in out
    assert "per token: 0.4424 M multiply-adds in these linears\n" in out
    assert "0.768 kB of cache (0.768 kB in 16 bits)" in out


def test_evaluate_against_the_original(run, quantized, text):
    options = ["--text", text, "--seqlen", 64, "--windows", 3, "--json"]
    code, out, _ = run("evaluate", quantized[0], *options, "--against", "tiny")
    result = json.loads(out)
    assert code == 0
    assert result["tokens"] == 3 * 63
    assert result["perplexity"] == pytest.approx(np.exp(result["nll"]))
    assert 0 < result["kl"] < 0.5
    assert result["kl_stderr"] > 0
    assert 0.5 < result["top1"] <= 1
    code, out, _ = run("evaluate", "tiny", *options)
    assert json.loads(out)["perplexity"] == pytest.approx(result["reference_perplexity"], rel=1e-5)


@pytest.mark.slow
def test_smoothness_against_the_original(run, quantized, text):
    folder = quantized[0]
    command = ["smoothness", folder, "--against", "tiny", "--text", text, "--windows", 2, "--seqlen", 32]
    code, out, _ = run(*command, "--json")
    result = json.loads(out)
    assert code == 0
    for key in ("gradient_ratio", "gradient_cosine", "candidate_retention", "tree_retention"):
        assert 0.5 < result[key] < 1.5
        assert 0 < result[f"{key}_stderr"] < 0.5
        assert len(result["by_window"][key]) == 2
    assert result["candidates_reference"] > 1
    assert result["tree_nodes_reference"] > result["tree_shared"] > 0
    assert (result["windows"], result["seqlen"], result["prompt_tokens"]) == (2, 32, 32)
    assert json.loads((folder / "smoothness.json").read_text()) == result
    pair = jobs.evaluate(str(folder), text=str(text), seqlen=32, limit=1, against="tiny")
    jobs.report(folder, evaluation=pair)
    code, out, _ = run(*command)
    assert code == 0
    assert "gradients at the input: ratio " in out
    assert "nodes of a decoding tree" in out
    page = (folder / "report.html").read_text()
    assert "Smoothness" in page
    assert "nats" in page  # the evaluation is kept

    code, _, err = run(*command[:4], "--seqlen", 4096)
    assert code == 2
    assert "this model takes 2 to 512 tokens" in err


def test_bench_prints_speeds_and_bytes(run):
    arguments = ("bench", "tiny", "--prompt", "8", "--tokens", "2", "--repeats", "1")
    code, out, _ = run(*arguments, "--json")
    result = json.loads(out)
    assert code == 0
    assert {"prefill_tokens_per_second", "decode_tokens_per_second", "bytes_per_token"} < set(result)
    code, out, _ = run(*arguments, "--backend", "portable")
    assert code == 0
    assert "tokens/s" in out
    code, _, err = run(*arguments, "--backend", "cuda")
    assert code == 2
    assert "use portable or kernel" in err


def test_generate_is_deterministic(run, quantized):
    command = ["generate", quantized[0], "--prompt", "The river", "--max-tokens", 8, "--json"]
    greedy = [json.loads(run(*command)[1]) for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert 0 < greedy[0]["tokens"] <= 8
    sampled = [json.loads(run(*command, "--seed", 3, "--temperature", 1.5)[1])["text"] for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert sampled[0] != greedy[0]["text"]
    code, out, _ = run("generate", quantized[0], "--prompt", "The river", "--max-tokens", 4)
    assert code == 0
    assert out.startswith("The river")


def test_export_writes_what_is_in_the_folder(run, quantized, tmp_path):
    code, out, _ = run("export", quantized[0], "--out", tmp_path / "hf", "--json")
    assert code == 0
    result = json.loads(out)
    written = (tmp_path / "hf" / "model-00001.safetensors").stat().st_size
    assert 0 < written - result["bytes"] < 0.1 * written  # the header
    assert list(result["schemes"].values()) == [21]
    code, _, err = run("export", quantized[0], "--out", tmp_path / "hf")
    assert (code, "exists; give another --out" in err) == (2, True)
    code, out, _ = run("export", quantized[0], "--out", tmp_path / "again")
    assert code == 0
    assert "21 linears W" in out


def test_dry_run_prints_the_plan_and_writes_nothing(run, tmp_path):
    code, out, _ = run("quantize", "tiny", *SMALL, "--out", tmp_path / "q", "--dry-run")
    assert code == 0
    assert "21 linears at 4.500 effective bits" in out
    assert not (tmp_path / "q").exists()
    code, out, _ = run("quantize", "tiny", *SMALL, "--out", tmp_path / "q", "--dry-run", "--json")
    plan = json.loads(out)
    assert plan["event"] == "plan"
    assert plan["peak_bytes"] > 0
    assert not (tmp_path / "q").exists()


def stopped_at_block_1(sent: signal.Signals, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs the command in a child that sends itself the signal when block 1 is solved and not yet saved."""
    # Where the tests run in the background of a shell, SIGINT is ignored and children inherit that.
    code = f"""
import os, signal
from jaxquant import cli
from jaxquant.io import checkpoint

signal.signal(signal.SIGINT, signal.default_int_handler)
save = checkpoint.save_block

def save_unless_stopped(folder, index, params, record):
    if index == 1:
        os.kill(os.getpid(), {int(sent)})
    save(folder, index, params, record)

checkpoint.save_block = save_unless_stopped
cli.main()
"""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(quantized, text, tmp_path, run):
    folder = tmp_path / "killed"
    arguments = ["quantize", "tiny", "--recipe", "gptq", *SMALL]
    arguments += ["--calibration", str(text), "--out", str(folder)]
    assert stopped_at_block_1(signal.SIGKILL, arguments).returncode == -signal.SIGKILL
    assert checkpoint.finished_blocks(folder) == 1

    code, _, err = run(*arguments)
    assert code == 2
    assert "give --resume to go on with it" in err
    code, _, err = run("generate", folder, "--prompt", "a")
    assert code == 1
    assert "finish the run with --resume" in err
    code, out, _ = run(*arguments, "--resume")
    assert code == 0
    assert "blocks.0." not in out
    for index in range(3):
        ours, theirs = (checkpoint.load_block(f, index)[0] for f in (folder, quantized[0]))
        for linear in ("q", "o"):
            a, b = ours["attn"][linear]["kernel"], theirs["attn"][linear]["kernel"]
            np.testing.assert_array_equal(a.words, b.words)
            np.testing.assert_array_equal(a.scale, b.scale)
            np.testing.assert_array_equal(a.zero, b.zero)


@pytest.mark.slow
def test_ctrl_c_exits_130_and_says_how_to_go_on(text, tmp_path):
    folder = tmp_path / "interrupted"
    arguments = ["quantize", "tiny", *SMALL, "--calibration", str(text), "--out", str(folder), "--json"]
    result = stopped_at_block_1(signal.SIGINT, arguments)
    assert result.returncode == 130
    assert f"--out {folder} --json --resume" in result.stderr
    assert checkpoint.finished_blocks(folder) == 1


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["quantize", "tiny"], 2, "Missing option '--out'"),
    (["quantize", "tiny", "--out", "OUT", "--bits", "9"], 2, "bits=9 is out of range; use 1 to 8"),
    (["quantize", "tiny", "--out", "OUT", "--recipe", "gtpq"], 2, "unknown recipe 'gtpq'; use one of"),
    (["quantize", "tiny", "--out", "OUT", "--group-size", "60"], 2, "attn.q: 128 inputs are not divisible"),
    (["quantize", "tiny", "--out", "OUT", "--seqlen", "4096"], 2, "this model takes 2 to 512 tokens"),
    (["quantize", "tiny", "--out", "OUT", "--calibration", "EMPTY"], 1, "the text is empty"),
    (["quantize", "tiny", "--out", "OUT", "--calibration", "SHORT"], 1, "tokens found, 513 needed"),
    (["quantize", "tiny", "--out", "OUT", "--calibration", "MISSING"], 1, "MISSING"),
    (["quantize", "tiny", "--out", "OUT", "--convention", "full"], 2, "no effect with an asymmetric grid"),
    (["quantize", "tiny", "--out", "OUT", "--recipe", "rtn", "--no-act-order"], 2, "no effect with"),
    (["quantize", "tiny", "--out", "OUT", "--recipe", "osaq-rtn", "--percdamp", "0.1"], 2, "no effect with"),
    (["quantize", "tiny", "--out", "OUT", "--recipe", "r.toml", "--bits", "3"], 2, "--bits has no effect"),
    (["quantize", "tiny", "--out", "OUT", "--recipe", "r.toml"], 1, "r.toml: No such file"),
    (["quantize", "small-model", "--out", "OUT"], 2, "give a known name (tiny, smollm2-135m)"),
    (["quantize", "./nowhere", "--out", "OUT"], 1, "no such file or directory"),
    (["quantize", "tiny", "--out", "OUT", "--samples", "0", "--dry-run"], 2, "samples=0: must be at least 1"),
    (["quantize", "tiny", "--out", "OUT", "--seed", "-1"], 2, "--seed"),
    (["quantize", "tiny", "--out", "OUT", "--group-size", "-1"], 2, "use None (0 on the command line)"),
    (["quantize", "tiny", "--out", "SHORT"], 2, "SHORT is a file; give another --out"),
    (["quantize", "tiny", "--out", "SHORT/OUT", "--seqlen", "8", "--samples", "1"], 1, "cannot be written"),
    (["evaluate", "tiny", "--seqlen", "1"], 2, "--seqlen 1"),
    (["evaluate", "tiny", "--seqlen", "0"], 2, "--seqlen 0"),
    (["evaluate", "tiny", "--windows", "0"], 2, "--windows"),
    (["evaluate", "tiny", "--task", "arc_easy"], 2, "write NAME=FILE"),
    (["evaluate", "tiny", "--task", "race=EMPTY"], 2, "race: no such task"),
    (["evaluate", "tiny", "--task", "piqa=EMPTY"], 1, "EMPTY: no rows; a row of piqa has"),
    (["evaluate", "tiny", "--task", "piqa=SHORT"], 1, "SHORT:1: not JSON"),
    (["evaluate", "tiny", "--task", "piqa=a", "--task", "piqa=b"], 2, "piqa: given twice"),
    (["evaluate", "tiny", "--task", "piqa=a", "--task", "copa=b", "--shots-from", "c"], 2, "of one task"),
    (["evaluate", "tiny", "--task", "piqa=a", "--windows", "3"], 2, "--windows has no effect with --task"),
    (["evaluate", "tiny", "--shots", "3"], 2, "--shots has no effect with a text"),
    (["generate", "tiny", "--prompt", "a\udcff"], 1, "the prompt is not UTF-8"),
    (["generate", "tiny", "--prompt", "a", "--max-tokens", "-2"], 2, "--max-tokens"),
    (["generate", "tiny", "--prompt", "a", "--temperature", "nan"], 2, "temperature must be 0"),
    (["inspect", "SHORT"], 1, "this is not a quantized model"),
    (["generate", "tiny", "--prompt", ""], 1, "the prompt is empty"),
    (["generate", "tiny", "--prompt", "a", "--max-tokens", "9999"], 1, "max_position"),
    (["inspect", "."], 1, "this is not a quantized model"),
    (["frobnicate"], 2, "No such command"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_bad_input_names_the_place_and_the_remedy(arguments, code, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "SHORT").write_text("Too short.")
    got, out, err = run(*arguments)
    assert got == code
    assert message in " ".join((out + err).split())
    assert "Traceback" not in err
    assert not (tmp_path / "OUT").exists()


def test_help_teaches_by_example_and_starts_fast(run):
    for command in ("quantize", "evaluate", "generate", "inspect", "demo"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"jaxquant {command}" in out
    # Heavy packages must not be imported for --help; their absence is what keeps it under a second.
    heavy = ("jax", "numpy", "orbax", "flax")
    probe = f"import sys; from jaxquant import cli; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_demo_runs_the_whole_tour(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("demo", "--model", "tiny")
    assert code == 0
    assert "perplexity" in out
    assert "The old lighthouse keeper" in out
    folder = tmp_path / "jaxquant-demo-tiny-w4"
    assert (folder / "report.html").is_file()
    code, again, _ = run("demo", "--model", "tiny")
    assert code == 0
    assert "blocks.0" not in again  # everything quantized is kept


TRAIN = ["--bits", 2, "--group-size", 32, "--steps", 4, "--batch", 2, "--seqlen", 32, "--save-every", 2]


@pytest.mark.slow
def test_train_writes_an_ordinary_model_with_a_report(run, text, tmp_path):
    folder = tmp_path / "t2"
    code, out, _ = run("train", "tiny", *TRAIN, "--text", text, "--text", "corpus", "--mix", "3,1",
                       "--smoothness", "neighborhood", "--out", folder, "--json")  # fmt: skip
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["step"] * 4 + ["done"]
    metrics = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [{"event": "step", "steps": 4, **row} for row in metrics] == events[:4]
    assert "<h2>Training</h2>" in (folder / "report.html").read_text()
    code, out, _ = run("inspect", folder)
    assert code == 0
    assert "trained from rounding to nearest: steps 4" in out
    assert "21 quantized linears of 21, 3.000 effective bits" in out
    code, out, _ = run("smoothness", folder, "--against", "tiny", "--windows", 2, "--seqlen", 32, "--json")
    assert code == 0
    assert 0 < json.loads(out)["gradient_cosine"] <= 1
    assert "<h2>Smoothness</h2>" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_interrupted_training_tells_how_to_go_on(run, tmp_path, monkeypatch, quantized):
    from jaxquant.train import loop

    command = ["train", quantized[0], "--teacher", "tiny", *TRAIN[4:], "--out", tmp_path / "t"]
    step, done = loop.train_step, []

    def stop(*arguments, **options):
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", stop)
    code, out, err = run(*command)
    assert code == cli.INTERRUPTED
    assert "step     3 of 4  kl" in out
    assert f"go on with: jaxquant train {quantized[0]} --teacher tiny --steps 4" in err
    assert err.strip().endswith("--resume")
    code, out, _ = run(*command, "--resume")
    assert code == 0
    assert "going on after step 2 of 4" in out
    assert "4.500 effective bits" in out


def test_training_refuses_what_does_not_fit(run, tmp_path, quantized):
    out = ["--out", tmp_path / "t"]
    for arguments, code, message in (
        (["tiny", "--mix", "1,2"], 2, "--mix 1,2: give one positive number for each of the 1 texts"),
        (["tiny", "--text", "corpus", "--text", "corpus"], 2, "names a text twice"),
        (["tiny", "--teacher", "tiny"], 2, "--teacher has no effect with tiny"),
        ([quantized[0]], 2, "name the model it was made from with --teacher"),
        ([quantized[0], "--teacher", "tiny", "--bits", "3"], 2, "--bits has no effect"),
        (["tiny", "--group-size", "48"], 2, "128 inputs are not divisible by group_size=48"),
        (["tiny", "--batch", "4", "--accumulate", "3"], 2, "cannot be computed in accumulate=3 parts"),
        (["tiny", "--smoothness", "silk"], 2, "unknown smoothness 'silk'"),
        (["tiny", "--seqlen", "100000"], 2, "this model takes 2 to 512 tokens"),
    ):
        found, _, err = run("train", *arguments, *out)
        assert (found, message in err) == (code, True), err
    assert not (tmp_path / "t").exists()


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ALLOCATE = ["allocate", "tiny", "--items", 4, "--samples", 2, "--seqlen", 64, "--group-size", 32]


@pytest.mark.slow
def test_bits_are_allocated_and_the_model_quantized_with_them(run, sums, tmp_path):
    recipe, table = tmp_path / "m.toml", tmp_path / "m.table.json"
    domains = ["--task", f"gsm8k={sums}", "--general", "corpus=corpus"]
    code, out, _ = run(
        *ALLOCATE, "--recipe", "rtn", "--unit", "linear", *domains, "--bits", 4.2, "-o", recipe, "--json"
    )
    assert code == 0
    result = json.loads(out)
    assert 4 < result["effective_bits"] <= 4.2
    assert len(result["units"]) == 21
    assert set(result["units"].values()) >= {2, 4}
    assert Path(result["page"]).is_file()
    # The table alone serves another budget; the original is not measured again.
    code, out, _ = run("allocate", "tiny", "--bits", 4.5, "--table", table, "-o", tmp_path / "n.toml")
    assert code == 0
    assert "effective bits of 4.5, by kl with beta 0.7" in out
    command = shlex.split(out[out.index("jaxquant quantize") :].strip())
    command[command.index("--out") + 1] = str(tmp_path / "q")
    code, out, _ = run(*command[1:], "--samples", 4, "--seqlen", 64, "--json")
    assert code == 0
    done = json.loads(out.splitlines()[-1])
    assert 4.2 < done["effective_bits"] <= 4.5
    assert done["disk_bytes"] > done["quantized_bytes"]
    code, out, _ = run("evaluate", tmp_path / "q", "--seqlen", 32, "--windows", 2, "--json")
    assert code == 0
    assert json.loads(out)["perplexity"] > 1
    code, out, _ = run("inspect", tmp_path / "q", "--json")
    assert {row["bits"] for row in json.loads(out)["modules"]} >= {3, 4}


def test_allocations_that_cannot_be_are_refused(run, sums, tmp_path):
    recipe = tmp_path / "m.toml"
    code, _, err = run(*ALLOCATE[:2], "--bits", 4, "-o", recipe)
    assert code == 1
    assert "m.table.json: no such table; measure one first" in err
    code, _, err = run(*ALLOCATE[:2], "--bits", 4, "-o", recipe, "--unit", "linear")
    assert code == 2
    assert "--unit has no effect with --table" in err
    code, _, err = run(*ALLOCATE, "--bits", 4, "-o", recipe, "--task", f"gsm8k={sums}")
    assert code == 2
    assert "give a task and a general text, of different names" in err
    domains = ["--task", f"arc_easy={sums}", "--general", "c=corpus"]
    code, _, err = run(*ALLOCATE, "--bits", 4, "-o", recipe, *domains)
    assert code == 1
    assert "sums.jsonl:1: no field" in err
    code, _, err = run(*ALLOCATE, "--bits", 4, "-o", tmp_path / "m.json", "--task", f"gsm8k={sums}")
    assert code == 2
    assert "a recipe is a .toml file" in err
    for flag, told in (("--widths", "write numbers of bits, such as 2,3,4"), ("--task", "write NAME=FILE")):
        code, _, err = run(*ALLOCATE, "--bits", 4, "-o", recipe, "--general", "c=corpus", flag, "x")
        assert code == 2
        assert told in err
    assert not recipe.exists()


def test_calibration_texts_are_mixed(run, text, tmp_path):
    base = ["quantize", "tiny", "--recipe", "gptq", *SMALL, "--samples", 4,
            "--calibration", text, "--calibration", "corpus"]  # fmt: skip
    code, _, _ = run(*base, "--mix", "1,3", "--out", tmp_path / "q")
    assert code == 0
    code, out, _ = run("inspect", tmp_path / "q", "--json")
    assert json.loads(out)["calibration"]["text"] == f"0.25 {text}, 0.75 corpus"
    code, _, err = run(*base, "--mix", "1,3,2", "--out", tmp_path / "r")
    assert code == 2
    assert "--mix 1,3,2: give one positive number for each of the 2 texts" in err
