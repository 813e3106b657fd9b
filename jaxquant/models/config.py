"""The static description of a decoder-only language model, and its linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxquant.errors import UsageError
from jaxquant.options import build
from jaxquant.quant import ActivationGrid

Activation = Literal["silu", "gelu_tanh", "gelu"]

#: Taps of a block in execution order, each with the linears that read it. Linears of one tap share its
#: Hessian. `(tap, (path, ...))`; a path addresses `params["blocks"][part][name]["kernel"]`.
LINEARS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attn_in", ("attn.q", "attn.k", "attn.v")),
    ("attn_out", ("attn.o",)),
    ("mlp_in", ("mlp.gate", "mlp.up")),
    ("mlp_hidden", ("mlp.down",)),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding: frequencies `theta ** (-2 i / head_dim)`, optionally rescaled.

    `kind` is `"default"`, `"linear"`, `"llama3"` or `"yarn"`; the remaining fields are those of the
    Hugging Face `rope_parameters` with the same names.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """What is quantized while the model runs, and the rotation that goes with it; by default nothing is.

    Attributes:
      attn_in, attn_out, mlp_in, mlp_hidden: grids of what the linears read (see `LINEARS`).
      keys, values: grids of what attention reads and the cache keeps, each head of a token by itself.
      hidden_hadamard: the inputs of `down` are multiplied by the Hadamard matrix of this order, a block of
        channels at a time (`linalg.hadamard_transform`), before they are quantized; 0: they are not.
    """

    attn_in: ActivationGrid | None = None
    attn_out: ActivationGrid | None = None
    mlp_in: ActivationGrid | None = None
    mlp_hidden: ActivationGrid | None = None
    keys: ActivationGrid | None = None
    values: ActivationGrid | None = None
    hidden_hadamard: int = 0

    @classmethod
    def uniform(cls, activations: ActivationGrid | None, cache: ActivationGrid | None) -> Precision:
        """One grid for what all linears read and one for keys and values; `None`: not quantized."""
        sites = {tap: activations for tap, _ in LINEARS}
        return cls(**sites, keys=cache, values=cache)  # pyright: ignore[reportArgumentType]

    @property
    def grids(self) -> dict[str, ActivationGrid]:
        """The places that are quantized, in the order of the fields."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: grid for name, grid in fields.items() if isinstance(grid, ActivationGrid)}

    def check(self, config: ModelConfig) -> None:
        """That the groups divide the channels of the model.

        Raises:
          UsageError: they do not, somewhere; names the place.
        """
        widths = {tap: config.linear_shape(paths[0])[0] for tap, paths in LINEARS}
        for name, grid in self.grids.items():
            grid.groups(widths.get(name, config.head_dim), where=name)

    def __str__(self) -> str:
        named: dict[str, list[str]] = {}
        for name, grid in self.grids.items():
            named.setdefault(str(grid), []).append(name)
        return "; ".join(f"{' '.join(names)}: {grid}" for grid, names in named.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without what is not set; `from_dict` inverts it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: dataclasses.asdict(value) if isinstance(value, ActivationGrid) else value
            for name, value in fields.items()
            if value
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Precision:
        """The precision that `to_dict` wrote.

        Raises:
          UsageError: an unknown place, or no grid; names it.
        """
        built = dict(fields)
        for name in set(fields) - {"hidden_hadamard"}:
            where = f"precision.{name}"
            if not isinstance(fields[name], Mapping):
                raise UsageError(f"{where}: {fields[name]!r} is no grid; give a table such as {{ bits = 4 }}")
            try:
                built[name] = build(ActivationGrid, where, fields[name])
            except UsageError as error:
                text = str(error)
                raise UsageError(text if text.startswith(where) else f"{where}: {text}") from None
        return build(cls, "precision", built)


#: Nothing is quantized while the model runs.
EXACT = Precision()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything static about one model: hashable, JSON round trip by `to_dict` / `from_dict`.

    One decoder covers Llama 2/3, SmolLM2, Mistral, Qwen 2/2.5/3 and Gemma 3 (text); the families differ
    only in these fields.

    Attributes:
      family: `model_type` of the Hugging Face config (`llama`, `mistral`, `qwen2`, `qwen3`, `gemma3_text`).
      head_dim: size of one attention head; not `hidden_size / num_heads` in Qwen3 and Gemma 3.
      query_scale: factor on `q k^T`; `head_dim ** -0.5` unless the config says otherwise.
      qkv_bias, o_bias, mlp_bias: which linears carry a bias.
      qk_norm: RMSNorm over each query and key head before the rotation.
      norm_plus_one: RMSNorm scales by `1 + weight` (Gemma).
      post_norms: a second norm after attention and after the MLP, before the residual sum (Gemma 3).
      embed_scale: factor on the embedding (`sqrt(hidden_size)` for Gemma, rounded as there).
      sliding_window: keys further back than this are masked in sliding layers; `None` for full attention.
      sliding_layers: one flag a layer; empty means no layer slides.
      rope, rope_local: rotation of full and of sliding layers (`None`: the same).
      dtype: dtype of the activations in the forward pass.
      precision: what of them is quantized.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    activation: Activation = "silu"
    query_scale: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    rope: Rope = Rope()
    rope_local: Rope | None = None
    tie_embeddings: bool = False
    max_position: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    dtype: str = "float32"
    precision: Precision = EXACT

    def linear_shape(self, path: str) -> tuple[int, int]:
        """`(in, out)` of the linear at `path` (see `LINEARS`)."""
        d, f, heads = self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        return {
            "attn.q": (d, heads), "attn.k": (d, kv), "attn.v": (d, kv), "attn.o": (heads, d),
            "mlp.gate": (d, f), "mlp.up": (d, f), "mlp.down": (f, d),
        }[path]  # fmt: skip

    def in_floats(self) -> ModelConfig:
        """The same model, nothing quantized while it runs; what a rotation left to run time stays."""
        return dataclasses.replace(self, precision=Precision(hidden_hadamard=self.precision.hidden_hadamard))

    def slides(self, layer: int) -> bool:
        """Whether the attention of block `layer` is windowed."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` inverts it. A precision that quantizes nothing is left out."""
        fields = dataclasses.asdict(self)
        del fields["precision"]
        return fields | ({"precision": self.precision.to_dict()} if self.precision != EXACT else {})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """The config that `to_dict` wrote."""
        fields = dict(fields)
        fields["rope"] = Rope(**fields["rope"])
        if fields.get("rope_local") is not None:
            fields["rope_local"] = Rope(**fields["rope_local"])
        fields["precision"] = Precision.from_dict(fields.get("precision", {}))
        for name in ("sliding_layers", "eos_ids"):
            fields[name] = tuple(fields[name])
        return cls(**fields)
