"""load_model: a checkpoint's tensors, streamed shard by shard into a model.

Hides shards, FP8 block scales and names. The headers of all shards are checked against the model before anything is
allocated, so that a wrong checkpoint is reported whole; then one tensor at a time is read, dequantised and copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nextn.errors import CheckpointError
from nextn.model.config import ModelConfig, load_config
from nextn.model.deepseek import DeepseekV32ForCausalLM
from nextn.model.parameters import TensorTarget
from nextn.model.rowwise import pack_weights

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
_QUANTISED = "F8_E4M3"
_FLOATS = ("F32", "BF16")
_ITEM_BYTES = {"F32": 4, "BF16": 2, _QUANTISED: 1}
_MAX_NAMED = 8  # problems of one kind that a message spells out


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """What a shard's header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * _ITEM_BYTES.get(self.dtype, 0)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def load_model(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> DeepseekV32ForCausalLM:
    """Load a Hugging Face folder: config.json and safetensors, FP8 with block scales, BF16 or F32.

    Peak memory is the model's and one tensor's.

    Args:
        folder: the checkpoint's folder.
        device: where the model is to lie.
        dtype: what large weights are dequantised to.
        progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
        ConfigError: see :func:`nextn.model.config.load_config`.
        CheckpointError: a file is missing or truncated, or tensors are missing, unexpected, misshapen or of another
            dtype; the message names them all, up to a readable number.

    Example:
        >>> model = load_model("path/to/checkpoint", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    folder = Path(folder)
    config = load_config(folder)
    stored = scan_checkpoint(folder)
    check_checkpoint(config, stored, folder)
    model = DeepseekV32ForCausalLM(config, device=device, dtype=dtype)
    _fill(model, stored, config.weight_block_size, progress)
    pack_weights(model)
    return model.eval()


def scan_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of every shard in a folder: tensor name to what is stored.

    Raises:
        CheckpointError: there are no shards, the index names a file that is not there, a header cannot be read, or two
            shards hold a tensor of one name.
    """
    stored: dict[str, StoredTensor] = {}
    for path in _list_shards(folder):
        for name, tensor in _read_header(path):
            if name in stored:
                raise CheckpointError(f"{name} is in both {stored[name].file.name} and {path.name} of {folder}")
            stored[name] = tensor
    return stored


def check_checkpoint(config: ModelConfig, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Compare what is stored with what the model needs.

    Raises:
        CheckpointError: they differ; every difference is listed, up to a readable number of each kind.
    """
    targets = {target.name: target for target in DeepseekV32ForCausalLM(config, device="meta").targets()}
    required = [name for name, target in targets.items() if not target.is_copy]
    block = config.weight_block_size
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "wrong shape": [], "wrong dtype": []}
    problems["missing"] = [f"{name} {list(targets[name].destination.shape)}" for name in required if name not in stored]
    for name, tensor in stored.items():
        owner = name.removesuffix(SCALE_SUFFIX)
        if name in targets:
            _compare(name, tensor, targets[name].destination, block, stored, problems)
        elif owner == name or owner not in targets or stored.get(owner, tensor).dtype != _QUANTISED:
            problems["unexpected"].append(f"{name} {tensor}")
    found = {kind: names for kind, names in problems.items() if names}
    if found:
        listed = "; ".join(f"{len(names)} {kind}: {_shorten(names)}" for kind, names in found.items())
        raise CheckpointError(f"{folder} does not match its config.json: {listed}{_hint(config, problems)}")


def dequantise_blocks(weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """Multiply each block of an FP8 matrix by its scale.

    Args:
        weight: e4m3 ``[rows, columns]``.
        scale: float ``[ceil(rows / block[0]), ceil(columns / block[1])]``; despite its name in checkpoints
            (``weight_scale_inv``) it multiplies.
        block: rows and columns of a block; the last blocks may be ragged.

    Returns:
        float32 ``[rows, columns]``.
    """
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(block[1], dim=1)[:, :columns]
    values = weight.float()
    for start in range(0, rows, block[0]):
        values[start : start + block[0]] *= spread[start // block[0]]
    return values


def _list_shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass one in the Hugging Face format")
    index = folder / INDEX_FILE
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return [folder / SINGLE_FILE]
        raise CheckpointError(f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}; is the download complete?")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [folder / name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read: {type(error).__name__}: {error}; fetch it again") from None
    absent = [path.name for path in shards if not path.is_file()]
    if absent:
        raise CheckpointError(f"{index} names shards that are not there: {_shorten(absent)}; fetch them")
    return shards


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - a shard is no mapping
                part = shard.get_slice(name)
                yield name, StoredTensor(file=path, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from None


def _compare(
    name: str,
    tensor: StoredTensor,
    destination: torch.Tensor,
    block: tuple[int, int] | None,
    stored: dict[str, StoredTensor],
    problems: dict[str, list[str]],
) -> None:
    """Add what is wrong with one stored tensor, or with its scales, to ``problems``."""
    shape = tuple(destination.shape)
    if tensor.shape != shape:
        problems["wrong shape"].append(f"{name} {list(tensor.shape)}, expected {list(shape)}")
        return
    if tensor.dtype in _FLOATS:
        return
    if tensor.dtype != _QUANTISED or len(shape) != 2 or block is None:
        accepted = list(_FLOATS) + [f"{_QUANTISED} if quantization_config is given"] * (len(shape) == 2)
        problems["wrong dtype"].append(f"{name} {tensor.dtype}, expected one of {accepted}")
        return
    scale_name = name + SCALE_SUFFIX
    scale_shape = tuple(-(-size // step) for size, step in zip(shape, block))
    scale = stored.get(scale_name)
    if scale is None:
        problems["missing"].append(f"{scale_name} {list(scale_shape)}")
    elif scale.shape != scale_shape:
        problems["wrong shape"].append(f"{scale_name} {list(scale.shape)}, expected {list(scale_shape)}")
    elif scale.dtype not in _FLOATS:
        problems["wrong dtype"].append(f"{scale_name} {scale.dtype}, expected one of {list(_FLOATS)}")


def _shorten(names: list[str]) -> str:
    rest = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + rest


def _hint(config: ModelConfig, problems: dict[str, list[str]]) -> str:
    """The one mistake that is common: the NextN layer was dropped, or is not announced."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    if any(name.startswith(prefix) for name in problems["missing"]):
        return "; set num_nextn_predict_layers to 0 if the NextN layer was left out on purpose"
    if any(name.startswith(prefix) for name in problems["unexpected"]):
        return "; set num_nextn_predict_layers to 1 if this checkpoint has a NextN layer"
    return ""


def _fill(
    model: DeepseekV32ForCausalLM,
    stored: dict[str, StoredTensor],
    block: tuple[int, int] | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Copy every stored tensor to its target, shard by shard; copies of others are compared at the end."""
    present = [target for target in model.targets() if target.name in stored]
    present.sort(key=lambda target: (target.is_copy, stored[target.name].file))
    total = sum(stored[target.name].num_bytes for target in present)
    done = 0
    reader = _ShardReader()
    for target in present:
        tensor = reader.read(stored[target.name].file, target.name)
        if stored[target.name].dtype == _QUANTISED:
            scale_name = target.name + SCALE_SUFFIX
            assert block is not None
            tensor = dequantise_blocks(tensor, reader.read(stored[scale_name].file, scale_name), block)
        if target.is_copy:
            _check_copy(target, tensor)
        else:
            target.destination.copy_(tensor)
        done += stored[target.name].num_bytes
        if progress is not None:
            progress(done, total)


def _check_copy(target: TensorTarget, tensor: torch.Tensor) -> None:
    kept = target.destination
    if not torch.equal(kept, tensor.to(device=kept.device, dtype=kept.dtype)):
        raise CheckpointError(
            f"{target.name} differs from the tensor it should repeat; models with a second embedding or head are not "
            "supported"
        )


class _ShardReader:
    """Reads tensors by file and name, keeping the last file open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._shard = None

    def read(self, path: Path, name: str) -> torch.Tensor:
        try:
            if path != self._path:
                self._path, self._shard = path, safe_open(path, framework="pt")
            assert self._shard is not None
            return self._shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read at {name} ({error}); fetch it again") from None
