"""NeMo 1's `.nemo` archives: a tar of a configuration and torch files, read where they stand.

    model.nemo = model_config.yaml
                 model_weights.ckpt                               one rank
                 mp_rank_TT/model_weights.ckpt                    tensor-parallel rank TT
                 tp_rank_TT_pp_rank_PPP/model_weights.ckpt        ... and pipeline rank PPP

A `.ckpt` is a torch.save file of one flat state dict, `model.decoder.layers.0...` with
Megatron-Core, `model.language_model.encoder.layers.0...` before. Archives are tars without
compression, so a tensor is a range of bytes of the archive and nothing is unpacked.
(nemo/core/connectors/save_restore_connector.py, NeMo 1.23.)
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection
from typing import BinaryIO, cast

from .. import sources
from ..checkpoint import Layout, RawCheckpoint, Shard
from ..errors import CorruptError, IncompleteError, SourceError, UnsupportedError
from ..mapping import shorten
from ..tensors import LazyTensor
from .folders import Place
from .nemo_config import from_model_config
from .state_dicts import Dropped, tensors_of
from .torch_zip import load
from .values import plain_values
from .yaml_files import read_yaml

NAME = "nemo"
ENDING = ".nemo"
_WEIGHTS = re.compile(
    r"(?:mp_rank_(?P<mp>\d+)/|tp_rank_(?P<tp>\d+)_pp_rank_(?P<pp>\d+)/)?model_weights\.ckpt"
)
_CONFIG = "model_config.yaml"
_FOLDER = re.compile(r"mp_rank_\d+|tp_rank_\d+_pp_rank_\d+|model_weights\.ckpt")
_WRAPPERS = re.compile(r"(model\.|module\.)+")
_MOST_MEMBERS = 100_000


def holds_model(folder: str) -> bool:
    """Whether this is an archive, or a folder with just one in it."""
    return archive_in(folder) is not None


def archive_in(path: str) -> str | None:
    """The archive at a path, or the only one in a folder."""
    if path.endswith(ENDING) and sources.is_file(path):
        return path
    if not sources.is_dir(path):
        return None
    found = [name for name in sources.listing(path) if name.endswith(ENDING)]
    return os.path.join(path, found[0]) if len(found) == 1 else None


def is_unpacked(names: Collection[str]) -> bool:
    """Whether these names in a folder are those of an archive's members."""
    return _CONFIG in names and any(_FOLDER.fullmatch(name) for name in names)


def open_folder(place: Place, skip_keys: frozenset[str] = frozenset()) -> RawCheckpoint:
    """Read the metadata of all ranks in an archive.

    Raises:
        IncompleteError: the configuration, or a rank's weights, are missing.
        UnsupportedError: the archive is compressed, or has no plain weights.
        CorruptError, UnsafePickleError: something in it cannot be read as data.
    """
    path = archive_in(place.folder)
    assert path is not None, place
    members = _members(path)
    if _CONFIG not in members:
        raise IncompleteError(
            f"{path} has no {_CONFIG}",
            found=shorten(members, 4) or "an empty archive",
            expected="an archive that NeMo saved",
        )
    offset, length = members[_CONFIG]
    with sources.open_file(path) as file:
        config = read_yaml(file.pread(length, offset), f"{path}/{_CONFIG}")
    args = plain_values(from_model_config(config, f"{path}/{_CONFIG}"))
    ranks = {hit: name for name in members if (hit := _WEIGHTS.fullmatch(name))}
    if not ranks:
        is_dist = any(name.startswith("model_weights/") for name in members)
        raise UnsupportedError(
            f"{path} keeps its weights in a way mtt cannot read in an archive",
            found="a distributed checkpoint, model_weights/" if is_dist else shorten(members, 4),
            expected="model_weights.ckpt",
            fix=f"tar -xf {os.path.basename(path)}, then give the folder model_weights"
            if is_dist
            else "save it with NeMo's save_to",
        )
    dropped: Dropped = defaultdict(list)
    shards = []
    for hit, name in sorted(ranks.items(), key=lambda item: item[1]):
        tp, pp = int(hit["tp"] or hit["mp"] or 0), int(hit["pp"] or 0)
        tensors = _tensors(path, name, members[name], dropped, skip_keys)
        shards.append(Shard(f"{os.path.basename(path)}/{name}", tensors, args, tp, pp))
    layout = Layout(tp=1 + max(s.tp for s in shards), pp=1 + max(s.pp for s in shards))
    if len(shards) != layout.tp * layout.pp:
        raise IncompleteError(
            f"{path} is incomplete; nothing was written",
            found=f"weights of {len(shards)} ranks",
            expected=f"{layout.tp * layout.pp} ({layout})",
        )
    return RawCheckpoint(
        format=NAME,
        folder=place.folder,
        layout=layout,
        shards=tuple(shards),
        args=args,
        dropped={kind: tuple(sorted(set(names))) for kind, names in dropped.items()},
        evidence=(f"a tar of {_CONFIG} and {len(shards)} model_weights.ckpt",),
        num_files=1,
    )


def _members(path: str) -> dict[str, tuple[int, int]]:
    """Name -> where its bytes stand in the archive; only the tar's headers are read."""
    import tarfile

    members: dict[str, tuple[int, int]] = {}
    try:
        with sources.open_file(path) as file:
            if file.pread(2, 0) == b"\x1f\x8b":
                raise UnsupportedError(
                    f"{path} is compressed, so tensors in it cannot be found without unpacking",
                    found="gzip",
                    expected="a plain tar",
                    fix=f"mv {path} {path}.gz, then gunzip {path}.gz",
                )
            window = cast(BinaryIO, sources.Window(file, 0, file.size))
            with tarfile.open(fileobj=window, mode="r:") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isfile():
                        members[name] = (member.offset_data, member.size)
                    if len(members) > _MOST_MEMBERS or member.offset_data + member.size > file.size:
                        raise CorruptError(
                            f"{path} is truncated or damaged",
                            found=f"{name} beyond {file.size} bytes",
                            expected="a complete tar",
                            fix="copy the file again",
                        )
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise CorruptError(
            f"{path} is truncated or damaged", found=str(error), expected="a complete tar"
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error
    return members


def _tensors(
    path: str,
    name: str,
    place: tuple[int, int],
    dropped: Dropped,
    skip_keys: frozenset[str],
) -> dict[str, LazyTensor]:
    """A rank's tensors, under the names of the model's modules."""
    content = load(path, *place)
    if not isinstance(content, dict):
        raise CorruptError(f"{name} in {path} is no state dict", found=type(content).__name__)
    model: dict[str, object] = {}
    for key, value in content.items():
        short = _WRAPPERS.sub("", key, count=1) if isinstance(key, str) else key
        if key in skip_keys:
            dropped["skipped"].append(key)
        elif short in model:
            raise CorruptError(f"{name} in {path} has one parameter twice", found=str(short))
        else:
            model[short] = value
    return tensors_of(model, name, path, dropped)
