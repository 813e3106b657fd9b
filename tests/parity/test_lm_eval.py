"""Parity with lm-evaluation-harness: prompts of its tasks, numbers of its own backend on torch."""

from __future__ import annotations

import json
import warnings
from importlib import resources

import jax
import numpy as np
import pytest

from jaxquant.calibrate.text import read_text
from jaxquant.evaluate.task_data import load_items, with_shots
from jaxquant.io import load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lm_eval():
    """The package; its import and its data sets warn of things that are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lm_eval", reason="lm_eval is not installed")


@pytest.fixture(scope="module")
def both(lm_eval):
    """The tiny model in our adapter, and its weights in the harness's backend."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from huggingface_reference import huggingface_model
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from jaxquant.evaluate.lm_eval import JaxquantLM

    folder = resources.files("jaxquant.io") / "tiny"
    raw = json.loads((folder / "config.json").read_text())
    model = load_model("tiny")
    theirs = huggingface_model(raw, model.config, jax.tree.map(np.array, model.params))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    return JaxquantLM(model), HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=4, device="cpu")


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, own, i) for i, own in enumerate(arguments)]


def test_loglikelihood(both):
    contexts = [
        "The old lighthouse keeper",
        "Question: What is rain? \nAnswer:",
        "",
        "word " * 600,
        "Tail spaces  ",
    ]
    pairs = [
        (context, ending) for context in contexts for ending in (" walked", " water from the sky.", " ä")
    ]
    ours, theirs = (lm.loglikelihood(instances("loglikelihood", pairs)) for lm in both)
    for (own, own_greedy), (reference, greedy) in zip(ours, theirs, strict=True):
        assert own == pytest.approx(reference, abs=1e-4)
        assert own_greedy == greedy


def test_loglikelihood_rolling(both):
    # No periodic text: two windows of the same tokens, cut elsewhere, get one sum from the harness's cache.
    texts = [(read_text("corpus:evaluation")[:4000],), ("Short.",)]
    ours, theirs = (lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for lm in both)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_generate_until(both):
    options = {"until": [".", "\n\n"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    prompts = [("The old lighthouse keeper", options), ("2 + 3 =", options), ("far " * 700, options)]
    ours, theirs = (lm.generate_until(instances("generate_until", prompts)) for lm in both)
    assert ours == theirs


AI2 = {"choices": {"text": ["wet rain", "dry sun"], "label": ["A", "B"]}, "answerKey": "B"}
ROWS = {
    "arc_easy": {"question": "Sand {n} is what?", **AI2},
    "openbookqa": {"question_stem": "Sand {n} is", **AI2},
    "piqa": {"goal": "Dry {n} it", "sol1": "in the sun", "sol2": "in the rain, twice", "label": 0},
    "boolq": {"passage": "Salt {n} -- is white.", "question": "is salt white", "label": 1},
    "copa": {
        "premise": "It {n} rained. ", "choice1": "Clouds came.", "choice2": "I slept.", "question": "effect",
        "label": 1,
    },
    "hellaswag": {
        "activity_label": "Baking {n}", "ctx_a": "[header] How [title] Mix [step] it.", "ctx_b": "the COOK",
        "endings": ["[substeps] stirs  it.", "sings [title] loud", "runs.", "eats."], "label": "2",
    },
    "winogrande": {"sentence": "Ann {n} beat so _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    "mmlu_high_school_physics": {
        "subject": "high_school_physics", "question": " Light {n}? ", "choices": ["a", "b", "c", "d"],
        "answer": 3,
    },
    "lambada_openai": {"text": "He {n} walked to the\nboat and saw the sea"},
    "gsm8k": {"question": "{n} + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
}  # fmt: skip
OURS = {"mmlu_high_school_physics": "mmlu", "lambada_openai": "lambada"}


class Rows(list):
    """As much of a data set as tasks use, without a cache on disk."""

    @property
    def features(self):
        return self[0]

    def map(self, function):
        return Rows({**row, **function(row)} for row in self)


@pytest.fixture(scope="module")
def manager(lm_eval):
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shots", [0, 2])
def test_prompts(manager, name, shots, tmp_path, monkeypatch):
    """The very requests of the harness's task on rows of its schema, its examples being ours."""
    if (name, shots) == ("lambada_openai", 2):
        pytest.skip("the harness puts two spaces before the words of its examples, and one before the target")
    from lm_eval.api.task import ConfigurableTask

    numbered = [
        {
            key: value.replace("{n}", str(n)) if isinstance(value, str) else value
            for key, value in ROWS[name].items()
        }
        for n in range(3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in numbered))
    monkeypatch.setattr(
        ConfigurableTask, "download",
        lambda self, *args, **kwargs: setattr(
            self, "dataset", {split: Rows(numbered) for split in ("train", "validation", "test", "dev")}
        ),
    )  # fmt: skip
    task = manager.load(name)["tasks"][name]
    docs = list(task.eval_docs)
    monkeypatch.setattr(task.sampler, "sample", lambda n, eval_doc=None, **kwargs: docs[1 : 1 + n])

    items = load_items(OURS.get(name, name), str(path))
    (item,) = with_shots(items[:1], items[1 : 1 + shots], shots)
    if shots:
        # Drawn in an order of ours.
        parts = {with_shots(items[:1], items[1:], 2, seed=seed)[0].contexts[0]: seed for seed in range(8)}
    else:
        parts = {item.contexts[0]: 0}
    context = task.fewshot_context(docs[0], shots)
    theirs = task.construct_requests(docs[0], context)
    theirs = [request.args for request in (theirs if isinstance(theirs, list) else [theirs])]
    assert theirs[0][0] in parts
    item = with_shots(items[:1], items[1 : 1 + shots], shots, seed=parts[theirs[0][0]])[0]
    if name == "gsm8k":  # generated there, with nothing to follow
        assert theirs[0][0] == item.contexts[0]
    else:
        assert theirs == list(zip(item.contexts, item.continuations, strict=True))
