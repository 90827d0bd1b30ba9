"""Safetensors, one tensor at a time.

Plain reads of what is wanted: a mapped file would count as memory, and a library that loads whole files would hold a
second copy of them.
"""

import json
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from napo_jax.hub_files import read_json

DTYPES = {"F16": jnp.float16, "BF16": jnp.bfloat16, "F32": jnp.float32}  # those of weights


class Tensor(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    file: epath.Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    def read(self):
        """Reads it, and nothing around it."""
        dtype = np.dtype(DTYPES[self.dtype])
        with self.file.open("rb") as f:
            f.seek(self.start)
            return np.frombuffer(f.read(int(np.prod(self.shape)) * dtype.itemsize), dtype).reshape(self.shape)


def weight_files(folder):
    """Returns the safetensors of a checkpoint; raises one line if there are none, or not all."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index} has no weight_map of tensors to their files; fetch it again")
        files = [folder / name for name in sorted(set(names.values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
        return files
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files and any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has its weights in .bin files, which are pickles and not read here; convert them once: python "
            f'-c "import glob, torch, safetensors.torch as s; [s.save_file(torch.load(f, weights_only=True), f[:-3] + '
            f"'safetensors') for f in glob.glob('{folder}/pytorch_model*.bin')]\""
        )
    if not files:
        raise ValueError(f"{folder} holds no weights; expected *.safetensors")
    return files


def read_header(file):
    """Yields (name, Tensor): a safetensors file is the length of a JSON header, the header, and the bytes."""
    size = file.stat().length
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = f.read(length) if length <= size - 8 else b""
    try:
        header = json.loads(header)
    except ValueError:
        raise ValueError(f"{file} is not a safetensors file, or is the pointer to one that was not fetched") from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{file} is cut short or damaged: expected {8 + length + end} bytes, got {size}")
    for name, entry in header.items():
        yield name, Tensor(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))


def write_tensors(file, specs, tensors):
    """Writes a safetensors file.

    Args:
      file: epath.Path.
      specs: name -> (dtype, shape), in the order of the tensors.
      tensors: an iterable of numpy arrays, each of which is written before the next is asked for.
    """
    codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for the format
    for name, (dtype, shape) in specs.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            f.write(tensor.reshape(-1).view(np.uint8))
