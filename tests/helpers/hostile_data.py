"""Files that somebody made to run code, to fill the memory, or to be taken for something else."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import torch

MAGIC = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, ran):
        self.ran = str(ran)

    def __reduce__(self):
        return os.mkdir, (self.ran,)


def saved(value, **words) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **words)
    return content.getvalue()


def torch_zip(pickled: bytes, compression=zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """What `torch.save` writes, with this as its pickle."""
    content = io.BytesIO()
    files = {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **more}
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, part in files.items():
            archive.writestr(f"archive/{name}", part)
    return content.getvalue()


def old_tar(ran) -> bytes:
    """What torch wrote before version 0.4."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            part = pickle.dumps(Bomb(ran) if name == "pickle" else 0, 2)
            info = tarfile.TarInfo(name)
            info.size = len(part)
            archive.addfile(info, io.BytesIO(part))
    return content.getvalue()


def object_array(ran) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([Bomb(ran)], object), allow_pickle=True)
    return content.getvalue()


def nested(depth=200_000) -> bytes:
    """A pickle of lists within lists."""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def sparse(shape) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.zeros(len(shape), 1, dtype=torch.long), torch.ones(1), shape)


# Name -> (where code would leave a trace) -> the file. Those of the first list would run code.
CODE = {
    "a pickle": lambda ran: pickle.dumps(Bomb(ran)),
    "an old pickle": lambda ran: pickle.dumps(Bomb(ran), 2),
    "torch's zip": lambda ran: saved(Bomb(ran)),
    "a field of a checkpoint": lambda ran: saved({"version": 1, "state_dict": {"a": Bomb(ran)}}),
    "torch's older format": lambda ran: saved(Bomb(ran), _use_new_zipfile_serialization=False),
    "a second pickle": lambda ran: b"".join(pickle.dumps(v, 2) for v in MAGIC) + pickle.dumps(Bomb(ran), 2),
    "torch's first format": old_tar,
    "a script": lambda ran: torch_zip(
        pickle.dumps(Bomb(ran), 2),
        **{"constants.pkl": pickle.dumps(Bomb(ran), 2), "code/__torch__.py": b"raise SystemExit\n"},
    ),
    "an object array": object_array,
}
ABSURD = {
    "nothing": lambda ran: b"",
    "a text": lambda ran: b"weights: none\n",
    "a list": lambda ran: saved([1, 2]),
    "names that are numbers": lambda ran: saved({"version": 1, "state_dict": {1: torch.ones(1)}}),
    "no tensors": lambda ran: saved({"version": 1, "state_dict": {"a": "b"}}),
    "a header of exabytes": lambda ran: struct.pack("<Q", 2**62) + b"{}",
    "what unpacks to far more": lambda ran: torch_zip(nested(2_000_000), zipfile.ZIP_DEFLATED),
    "lists within lists": lambda ran: torch_zip(nested()),
    "four terabytes of one value": lambda ran: saved({"version": 1, "state_dict": {"a": torch.ones(1).expand(2**40)}}),
    "a tensor without values": lambda ran: saved({"state_dict": {"a": torch.ones(2**40, device="meta")}}),
    "a tensor of nothing but zeros": lambda ran: saved({"state_dict": {"a": sparse((2**20, 2**20))}}),
}
FILES = CODE | ABSURD

# Text of each kind that is worse than wrong.
YAML = {
    "a tag that runs code": "a: !!python/object/apply:os.mkdir ['{ran}']\n",
    "another one": "!!python/object/new:os.mkdir ['{ran}']\n",
    "a module": "a: !!python/module:antigravity\n",
    "aliases that unfold": "l0: &l0 [x, x]\n"
    + "".join(f"l{k}: &l{k} [{', '.join([f'*l{k - 1}'] * 9)}]\n" for k in range(1, 30)),
    "an alias of itself": "a: &a [*a]\n",
    "lists within lists": "[" * 100_000,
    "a date that is none": "!!timestamp x\n",
    "a list": "- a\n- b\n",
    "a mapping by lists": "? [a]\n: b\n",
    "bytes": "a: \x00\n",
}
JSON = {
    "lists within lists": "[" * 200_000,
    "mappings within mappings": '{"a":' * 200_000,
    "a number of thousands of digits": "9" * 10_000,
    "a list": "[1, 2]",
    "a word": '"a"',
    "null bytes": "\x00",
}
