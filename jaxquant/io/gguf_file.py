"""The GGUF container: metadata and tensors of one file, read with bounds checks and without loading the file.

Layout (GGUF v2/v3, little endian): magic, version, tensor count, key-value count, key-values, tensor infos
(name, dims innermost first, type, offset), padding to `general.alignment`, tensor data.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxquant.errors import InputError

# Value types of the format; strings and arrays are variable-sized and handled apart.
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# Values de-quantized at a time: a multiple of every block size (32 and 256).
_PIECE = 1 << 20
_REFETCH = "the file is incomplete or damaged: fetch or convert it again"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `shape` is outermost first, `offset` and `size` are bytes in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


class GGUFFile:
    """Metadata and lazily de-quantized tensors of the GGUF file at `path`.

    Only the header is parsed here, and every tensor's range is checked against the file's size, so that a
    truncated file fails now and not as a bus error in the middle of a run.

    Raises:
      InputError: not a GGUF file, or its header or tensor data are cut off or inconsistent.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path}: not a GGUF file (it does not start with the bytes GGUF)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Header(data, self).read()

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor `name`, de-quantized to float32, outermost axis first.

        Raises:
          InputError: no such tensor, a shape other than `shape`, or a type that cannot be de-quantized.
        """
        import gguf

        if name not in self.tensors:
            raise InputError(
                f"{self.path}: tensor {name} is missing; the file is no complete model of its architecture"
            )
        info = self.tensors[name]
        if info.shape != shape:
            raise InputError(
                f"{self.path}: tensor {name} has shape {info.shape}, but the metadata implies {shape}; "
                "the file is inconsistent: convert it again"
            )
        kind = gguf.GGMLQuantizationType(info.kind)
        try:
            # One short-lived map a tensor: its pages leave the resident set as soon as it is de-quantized.
            raw = np.memmap(self.path, np.uint8, "r", offset=info.offset, shape=(info.size,))
            # Piece by piece, because de-quantizing takes several times the memory of its result.
            values = np.empty(prod(shape), np.float32)
            block, width = gguf.GGML_QUANT_SIZES[kind]
            for start in range(0, len(values), _PIECE):
                stop = min(start + _PIECE, len(values))
                piece = np.asarray(raw[start // block * width : stop // block * width])
                values[start:stop] = gguf.dequantize(piece, kind)
            return values.reshape(shape)
        except NotImplementedError:
            raise InputError(
                f"{self.path}: tensor {name} has type {kind.name}, which cannot be de-quantized; "
                "convert the model to another type, for example Q8_0 or F16"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: tensor {name} cannot be read ({error}); {_REFETCH}") from error


class _Header:
    """A cursor over the mapped header; each read checks that the bytes exist."""

    def __init__(self, data: mmap.mmap, target: GGUFFile):
        self.data, self.at, self.target = data, 4, target

    def read(self) -> None:
        version = self.scalar("<I")
        if version not in (2, 3):
            hint = "big-endian files are not read" if version & 0xFFFF == 0 else "versions 2 and 3 are read"
            raise InputError(f"{self.target.path}: GGUF version {version}; {hint}")
        tensors, fields = self.scalar("<Q"), self.scalar("<Q")
        for _ in range(fields):
            name = self.string()
            self.target.metadata[name] = self.value(self.scalar("<I"), name)
        infos = [self.info() for _ in range(tensors)]
        alignment = self.target.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            self.fail(f"general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        for name, shape, kind, offset in infos:
            self.place(name, shape, kind, start + offset)

    def place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> None:
        """Record the tensor after checking its type, row length and range."""
        import gguf

        if kind not in list(gguf.GGMLQuantizationType):
            raise InputError(
                f"{self.target.path}: tensor {name} has type {kind}, which the installed gguf package "
                "does not know; update gguf"
            )
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if name in self.target.tensors or not shape or shape[-1] % block:
            self.fail(f"tensor {name} with shape {shape} is a duplicate or not in blocks of {block}")
        size = prod(shape) // block * width
        if offset + size > len(self.data):
            raise InputError(
                f"{self.target.path}: tensor {name} should end at byte {offset + size}, but the file has "
                f"only {len(self.data)}; {_REFETCH}"
            )
        self.target.tensors[name] = TensorInfo(shape, kind, offset, size)

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self.string(), self.scalar("<I")
        if rank > 4:
            self.fail(f"tensor {name!r} has {rank} dimensions")
        innermost_first = [self.scalar("<Q") for _ in range(rank)]
        return name, tuple(reversed(innermost_first)), self.scalar("<I"), self.scalar("<Q")

    def value(self, kind: int, name: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.fail(f"key {name!r} has value type {kind}")
        element, count = self.scalar("<I"), self.scalar("<Q")
        if element in _SCALARS:
            dtype = np.dtype(_SCALARS[element])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        if count > len(self.data) - self.at:
            self.fail(f"key {name!r} claims {count} elements")
        return [self.value(element, name) for _ in range(count)]

    def scalar(self, layout: str) -> Any:
        value = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        # The shortest decimal of a float32: 1e-05 as converted from JSON, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if layout == "<f" else value

    def string(self) -> str:
        try:
            return self.take(self.scalar("<Q")).decode("utf-8")
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8")

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            self.fail(f"{count} bytes are expected there, the file ends at byte {len(self.data)}")
        start, self.at = self.at, end
        return self.data[start:end]

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.target.path}: broken GGUF header at byte {self.at}: {what}; {_REFETCH}")
