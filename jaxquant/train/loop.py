"""Training with rounded weights: the step as a pure function, and the loop that survives being killed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxquant.errors import InputError, NonFiniteError, UsageError
from jaxquant.folder import token_facts
from jaxquant.io import checkpoint
from jaxquant.models.config import ModelConfig
from jaxquant.models.decoder import Model
from jaxquant.records import Event
from jaxquant.smoothness.neighborhood import substituted
from jaxquant.train.latent import is_latent, merge, split
from jaxquant.train.losses import (
    Smoothness,
    gradient_loss,
    layer_loss,
    neighborhood_loss,
    prediction_loss,
    respond,
    stream_loss,
)

if TYPE_CHECKING:
    import optax

METRICS, RUN = "metrics.jsonl", "run.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained; hashable, so that a step is compiled once for it.

        loss = KL + hidden_weight hidden + smooth_share w(k) [KL / smooth] smooth

    with the terms of `train.losses`. The bracket is a constant for the gradient: the smoothness term always
    weighs `smooth_share` of the KL, whatever its size; w rises from 0 to 1 over `smooth_warmup` of the steps.

    `"substitution"` adds no term: both models read neighbours of the text in its place, every time others,
    so that KL and the hidden stream are those of the neighbourhood, for the time of the text alone.

    Attributes:
      steps: updates.
      batch: windows of an update.
      accumulate: parts that a batch is computed in, one after another; `"gradient"` is then a mean of ratios,
        one for each part.
      learning_rate: Adam's, in shares of a level and of a scale (see `Latent`); peak of a cosine to 0.
      warmup: share of the steps in which it rises from 0.
      clip_norm: the gradient is shortened to this norm.
      hidden_weight: of the hidden stream.
      smoothness: which loss, or `"none"`.
      smooth_share, smooth_warmup: see above.
      radius: of `"neighborhood"`, in units of the embeddings' root mean square.
      substituted: share of the tokens that `"substitution"` replaces, each by one of its 10 nearest in the
        teacher's embedding; it rises from 0 over `smooth_warmup`.
      remat: compute what lies inside a block again on the way back instead of keeping it.
      save_every: steps between states on disk.
      seed: of the neighbours of `"neighborhood"` and `"substitution"`.
    """

    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 5e-3
    warmup: float = 0.05
    clip_norm: float = 1.0
    hidden_weight: float = 1.0
    smoothness: Smoothness = "none"
    smooth_share: float = 0.2
    smooth_warmup: float = 0.1
    radius: float = 0.05
    substituted: float = 0.2
    remat: bool = True
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.batch % self.accumulate:
            raise UsageError(f"batch={self.batch} cannot be computed in accumulate={self.accumulate} parts")
        if self.smoothness not in get_args(Smoothness):
            raise UsageError(
                f"unknown smoothness {self.smoothness!r}; use one of {', '.join(get_args(Smoothness))}"
            )
        for name in ("learning_rate", "clip_norm", "radius"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: must be positive")
        for name, of in (("warmup", "steps"), ("smooth_warmup", "steps"), ("substituted", "tokens")):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)}: must be a share of the {of}, 0 to 1")
        for name in ("hidden_weight", "smooth_share"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: must be a number of at least 0")

    def optimizer(self) -> optax.GradientTransformation:
        """Adam behind a clipped norm, its rate as the attributes say."""
        import optax

        rising = round(self.warmup * self.steps)
        # From one step up the schedule to one before its end: at its start and end nothing moves.
        last = max(self.steps, rising) + 1 if rising else self.steps
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, rising, last)
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(b2=0.98),
            optax.scale_by_schedule(lambda count: -1.0 * rate(count + (rising > 0))),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes: trained parameters (see `latent.split`), the optimizer, the steps done."""

    trained: dict[str, Any]
    optimizer: Any
    step: Int[Array, ""]

    @classmethod
    def start(cls, trained: dict[str, Any], options: Training) -> State:
        """Before the first step."""
        return cls(trained, options.optimizer().init(trained), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "teacher_config", "options"), donate_argnames="state")
def train_step(
    state: State,
    rest: dict[str, Any],
    teacher: dict[str, Any],
    tokens: Int[Array, "batch T"],
    outputs: Mapping[str, Array] | None = None,
    *,
    config: ModelConfig,
    teacher_config: ModelConfig,
    options: Training,
) -> tuple[State, dict[str, Array]]:
    """One update; the state is donated.

    Args:
      state: before it.
      rest: the student's parameters that are not trained.
      teacher: parameters with float kernels.
      tokens: int32, `options.batch` windows.
      outputs: of `layer_loss`, for `smoothness="layer"`.
      config, teacher_config: of the two models.
      options: see `Training`.

    Returns:
      The state, and scalars: `loss`, `kl`, `hidden`, `smooth` (0 without such a term), `gradient_norm`.
    """
    import optax

    noise = jax.random.fold_in(jax.random.key(options.seed), state.step)
    risen = (state.step + 1).astype(jnp.float32) / max(1.0, options.smooth_warmup * options.steps)
    known = (teacher, teacher_config)

    def neighbors(tokens: Array, key: Array) -> Array:
        drawn, chosen = jax.random.split(key)
        near = substituted(teacher["embed"], tokens, drawn, share=options.substituted)
        return jnp.where(jax.random.uniform(chosen, tokens.shape) < risen, near, tokens)

    def loss(trained: dict[str, Any], tokens: Array, key: Array) -> tuple[Array, dict[str, Array]]:
        student = (merge(trained, rest), config)
        if options.smoothness == "substitution":
            tokens = neighbors(tokens, key)
        double = options.smoothness == "gradient"
        ours = respond(student, tokens, gradient=double, remat=options.remat)
        theirs = lax.stop_gradient(respond(known, tokens, gradient=double, remat=options.remat))
        kl = prediction_loss(student, known, ours.hidden, theirs.hidden)
        hidden = stream_loss(ours.stream, theirs.stream)
        total, smooth = kl + options.hidden_weight * hidden, jnp.zeros(())
        if ours.gradient is not None and theirs.gradient is not None:
            smooth = gradient_loss(ours.gradient, theirs.gradient)
        elif options.smoothness == "neighborhood":
            smooth = neighborhood_loss(
                student, known, tokens, key, radius=options.radius, remat=options.remat
            )
        elif options.smoothness == "layer":
            assert outputs is not None
            smooth = layer_loss(student, known, outputs)
        if options.smoothness not in ("none", "substitution"):
            weight = options.smooth_share * jnp.minimum(risen, 1)
            # Below this both are noise of rounding.
            ratio = jnp.where(smooth > 1e-9, kl / jnp.where(smooth > 1e-9, smooth, 1), 0)
            total += weight * lax.stop_gradient(ratio) * smooth
        return total, {"loss": total, "kl": kl, "hidden": hidden, "smooth": smooth}

    parts = tokens.reshape(options.accumulate, -1, tokens.shape[-1])

    def add(total: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
        gradient, metrics = jax.grad(loss, has_aux=True)(state.trained, *part)
        return jax.tree.map(lambda a, b: a + b / options.accumulate, total, (gradient, metrics)), None

    zeros = {name: jnp.zeros(()) for name in ("loss", "kl", "hidden", "smooth")}
    start = (jax.tree.map(jnp.zeros_like, state.trained), zeros)
    (gradient, metrics), _ = lax.scan(add, start, (parts, jax.random.split(noise, options.accumulate)))
    # optax's Adam raises a float to an integer power, which callers who forbid promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer = options.optimizer().update(gradient, state.optimizer, state.trained)
    moved: Any = optax.apply_updates(state.trained, updates)
    moved = jax.tree.map(
        lambda leaf: leaf.project() if is_latent(leaf) else leaf, merge(moved, rest), is_leaf=is_latent
    )
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    return State(split(moved)[0], optimizer, state.step + 1), metrics


def train(
    student: Model,
    teacher: Model,
    tokens: np.ndarray,
    options: Training,
    *,
    outputs: Mapping[str, Array] | None = None,
    folder: Path | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Trains a student to follow a teacher.

    Step k reads windows `k batch .. (k + 1) batch - 1`, from the start again where they end. With a folder
    the state is kept there every `save_every` steps, one `METRICS` line a step, and the same run that finds
    its state goes on from it to the same bits.

    Args:
      student: from `latent_params`.
      teacher: with float kernels.
      tokens: int32 `[windows, T]`.
      options: see `Training`.
      outputs: of `layer_loss`, for `smoothness="layer"`.
      folder: of states and metrics; `None` keeps nothing.
      on_event: called with `{"event": "step", "step", "steps", "loss", ..., "seconds"}`, and once with
        `{"event": "resume", "step"}`.

    Returns:
      The student's parameters after the last step, still with `Latent` kernels.

    Raises:
      UsageError: fewer windows than a batch, no moments for the layer loss, or a state of other options,
        tokens or grids in the folder.
      NonFiniteError: NaN or infinity in the loss or the gradient; names the step.
      InputError: a state cannot be read, or the disk is full.
    """
    if len(tokens) < options.batch:
        raise UsageError(
            f"{len(tokens)} windows for batch={options.batch}; give more text or a smaller batch"
        )
    if options.smoothness == "layer" and not outputs:
        raise UsageError("the layer loss needs moments of the teacher's gradients; give outputs")
    trained, rest = split(student[0])
    # On the device once, not at every step.
    rest, known, outputs = jax.tree.map(jnp.asarray, (rest, teacher[0], outputs))
    # A copy: steps donate the state, the caller keeps the model.
    state = jax.tree.map(jnp.copy, State.start(trained, options))
    if folder is not None:
        resumed = _resume(folder, state, _identity(state, tokens, options))
        if resumed is not None:
            state = resumed
            on_event({"event": "resume", "step": int(state.step), "steps": options.steps})
    for step in range(int(state.step), options.steps):
        begun = time.perf_counter()
        rows = np.arange(step * options.batch, (step + 1) * options.batch) % len(tokens)
        state, metrics = train_step(
            state, rest, known, jnp.asarray(tokens[rows]), outputs,
            config=student[1], teacher_config=teacher[1], options=options,
        )  # fmt: skip
        row = {"step": step + 1, **{name: float(value) for name, value in metrics.items()}}
        if not (np.isfinite(row["loss"]) and np.isfinite(row["gradient_norm"])):
            raise NonFiniteError(
                f"step {step + 1}: the loss is {row['loss']:g} and it or its gradient is not finite; use a "
                "smaller learning_rate, or check the model file"
            )
        row["seconds"] = time.perf_counter() - begun
        if folder is not None:
            with (folder / METRICS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            if row["step"] % options.save_every == 0 or row["step"] == options.steps:
                _save(folder, state)
        on_event({"event": "step", "steps": options.steps, **row})
    return merge(state.trained, rest)


def _save(folder: Path, state: State) -> None:
    """Writes the state beside older ones, then deletes those."""
    path = folder / f"state-{int(state.step):08d}"
    # numpy leaves: orbax would keep the sharding of this machine, and ask for it.
    leaves = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    checkpoint.save_tree(path, params=leaves)
    for other in folder.glob("state-*"):
        if other != path:
            shutil.rmtree(other)


def _identity(start: State, tokens: np.ndarray, options: Training) -> dict[str, Any]:
    """What tells one run from another: its options, its text, and layers, grids and shapes of the student."""
    student = f"{jax.tree.structure(start)} {[leaf.shape for leaf in jax.tree.leaves(start)]}"
    digest = hashlib.sha256(student.encode()).hexdigest()
    return {"options": dataclasses.asdict(options), "student": digest, **token_facts(tokens, {})}


def _resume(folder: Path, start: State, identity: dict[str, Any]) -> State | None:
    """The last whole state in `folder`; metrics of steps behind it are dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob("state-*.orbax-checkpoint-tmp*"):
        shutil.rmtree(partial)
    found = sorted(folder.glob("state-*"))
    run = folder / RUN
    if found and (not run.is_file() or json.loads(run.read_text(encoding="utf-8")) != identity):
        raise UsageError(f"{found[-1]} is the state of another run; repeat that one, or take another folder")
    checkpoint.write_text(run, json.dumps(identity) + "\n")
    state = _load(found[-1], start) if found else start
    metrics = folder / METRICS
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    # The last line of a killed run may be cut short.
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= int(state.step)]
    checkpoint.write_text(metrics, "".join(kept))
    return state if found else None


def _load(path: Path, start: State) -> State:
    stored = checkpoint.load_tree(path)["params"]
    leaves, tree = jax.tree.flatten(start)
    found = [stored[name] for name in sorted(stored)]
    if [leaf.shape for leaf in found] != [leaf.shape for leaf in leaves]:
        raise InputError(f"{path} is not whole; delete it, and the run in {path.parent} begins anew")
    return jax.tree.unflatten(tree, [jnp.asarray(leaf) for leaf in found])
