"""Hostile pickles and zips: nothing of them runs, nothing of ours changes, nothing is written.

Every attack is planted into a real checkpoint that converts without it, and goes through the
public functions.
"""

from __future__ import annotations

import copyreg
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mtt_convert
from mtt_convert import (
    CorruptError,
    MTTError,
    SourceError,
    UnsafePickleError,
    UnsupportedError,
    open_checkpoint,
)
from mtt_convert.dtypes import DTYPES, FROM_SAFETENSORS
from mtt_convert.formats import pickles
from tests.convert.surgery import (
    FALSE,
    ITERATION,
    NONE,
    PLACEHOLDER,
    TORCH,
    TORCH_DIST,
    CommandsApart,
    Golden,
    binary,
    build,
    copy_of,
    edited,
    edited_metadata,
    items,
    listed,
    mapping,
    model_of,
    named,
    number,
    plant,
    plant_in,
    planted,
    program,
    records_of,
    reduce,
    refused,
    run,
    set_arguments,
    shard,
    slots,
    stack_named,
    storage,
    tensor,
    text,
    torch_file,
    zipped,
)

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
NORM = "decoder.layers.0.input_layernorm.weight"
CLASS = reduce(named("megatron.core.enums", "ModelType"), number(1))


@pytest.fixture
def root(golden: Golden, tmp_path: Path) -> Path:
    """A copy of a `torch` checkpoint."""
    return copy_of(golden, TORCH, tmp_path)


@pytest.fixture
def dist(golden: Golden, tmp_path: Path) -> Path:
    """A copy of a `torch_dist` checkpoint."""
    return copy_of(golden, TORCH_DIST, tmp_path)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that the attacks make if they run, and a module that makes it if it is imported."""
    path = tmp_path / "canary"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "mtt_bait.py").write_text(
        f"open({str(path)!r}, 'w').close()\n"
        "class Bait:\n    def __setstate__(self, state): pass\n"
        "def boom(*args): pass\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield path
    assert not path.exists(), "an attack ran"
    assert "mtt_bait" not in sys.modules


# Calls


def _touch(canary: Path) -> bytes:
    return text(f"touch '{canary}'")


def _python(canary: Path) -> bytes:
    return text(f"open({str(canary)!r}, 'w').close()")


def _chain(canary: Path) -> bytes:
    """getattr(__import__('os'), 'system')(...), as exploits spell it."""
    module = reduce(named("builtins", "__import__"), text("os"))
    return reduce(reduce(named("builtins", "getattr"), module, text("system")), _touch(canary))


def _partial(canary: Path) -> bytes:
    return reduce(reduce(named("functools", "partial"), named("os", "system"), _touch(canary)))


def _nested(canary: Path) -> bytes:
    inner = program(reduce(named("os", "system"), _touch(canary)))
    return reduce(named("pickle", "loads"), binary(inner))


def _popen(canary: Path) -> bytes:
    return listed(text("touch"), text(str(canary)))


def _import(canary: Path) -> bytes:
    return reduce(named("importlib", "import_module"), text("mtt_bait"))


Attack = Callable[[Path], bytes]

# Real attacks: plain pickle.loads runs each of them.
LIVE: dict[str, Attack] = {
    "os.system": lambda c: reduce(named("os", "system"), _touch(c)),
    "posix.system": lambda c: reduce(named("posix", "system"), _touch(c)),
    "eval": lambda c: reduce(named("builtins", "eval"), _python(c)),
    "exec": lambda c: reduce(named("builtins", "exec"), _python(c)),
    "getattr": _chain,
    "functools.partial": _partial,
    "nested": _nested,
    "STACK_GLOBAL": lambda c: reduce(stack_named("os", "system"), _touch(c)),
    "INST": lambda c: b"(" + _touch(c) + b"ios\nsystem\n",
    "OBJ": lambda c: b"(" + named("os", "system") + _touch(c) + b"o",
    "NEWOBJ": lambda c: named("mtt_bait", "Bait") + b")\x81",
    "dotted": lambda c: reduce(
        stack_named("os", "path.os.system"),
        _touch(c),
    ),
    "import_module": _import,
    "memo": lambda c: (
        named("os", "system")
        + b"r\x00\x01\x00\x00"
        + b"0"
        + b"j\x00\x01\x00\x00"
        + items(_touch(c))
        + b"R"
    ),
}
# Never of use to a checkpoint; some need another protocol or more files to do harm.
DORMANT: dict[str, Attack] = {
    "Popen by NEWOBJ": lambda c: named("subprocess", "Popen") + items(_popen(c)) + b"\x81",
    "Popen by NEWOBJ_EX": lambda c: (
        named("subprocess", "Popen") + items() + mapping({"args": _popen(c)}) + b"\x92"
    ),
    "globals": lambda c: named("collections", "OrderedDict.__init__.__globals__"),
    "subclasses": lambda c: reduce(named("builtins", "object.__subclasses__")),
    "torch.load by its dotted name": lambda c: reduce(
        named("torch", "serialization.load"), text(str(c))
    ),
    "torch.load": lambda c: reduce(named("torch", "load"), text(str(c))),
    "torch.storage._load_from_bytes": lambda c: reduce(
        named("torch.storage", "_load_from_bytes"), binary(b"x")
    ),
    "torch.hub.load": lambda c: reduce(named("torch.hub", "load"), text("x/y"), text("z")),
    "numpy.load": lambda c: reduce(named("numpy", "load"), text(str(c))),
    "ctypes": lambda c: reduce(named("ctypes", "CDLL"), NONE),
    "attrgetter": lambda c: reduce(named("operator", "attrgetter"), text("system")),
    "code": lambda c: reduce(named("types", "CodeType")),
    "open": lambda c: reduce(named("io", "open"), text(str(c)), text("w")),
    "type": lambda c: reduce(named("builtins", "type"), text("x")),
    "a class of ours": lambda c: named("builtins", "globals"),
    "enum lookup": lambda c: reduce(named("builtins", "getattr"), CLASS, text("__class__")),
}


@pytest.mark.parametrize("attack", LIVE.values(), ids=LIVE)
def test_the_bait_is_real(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the standard unpickler every one of these attacks does what it says."""
    canary = tmp_path / "canary"
    (tmp_path / "mtt_bait.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Bait: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    pickle.loads(program(attack(canary)))
    sys.modules.pop("mtt_bait", None)
    assert canary.exists()


STANDARD = {key: attack for key, attack in LIVE.items() if key != "NEWOBJ"} | DORMANT


@pytest.mark.parametrize("attack", STANDARD.values(), ids=STANDARD)
def test_calls_are_refused(attack: Attack, root: Path, tmp_path: Path, canary: Path) -> None:
    """A name of the standard library, torch or numpy that is not data stops the conversion."""
    path = shard(root, 0, 1)
    plant_in(path, lambda content: vars(content["args"]).update(x=PLACEHOLDER), attack(canary))
    error = refused(root, tmp_path / "out", UnsafePickleError, says="nothing of it was run")
    assert str(path) in error.message
    assert error.found and error.found in error.message
    assert error.expected and error.fix


def _in_arguments(content: Any) -> None:
    content["args"].x = PLACEHOLDER


def _in_model(content: Any) -> None:
    content["model0"][QKV] = PLACEHOLDER


def _in_nested_value(content: Any) -> None:
    content["args"].x = {"a": [1, (2, {"b": PLACEHOLDER})]}


def _beside_model(content: Any) -> None:
    content["x"] = PLACEHOLDER


def _in_random_state(content: Any) -> None:
    content["rng_state"] = PLACEHOLDER


def _in_optimizer(content: Any) -> None:
    content["optimizer"] = {"state": [PLACEHOLDER]}


PLACES = (
    _in_arguments,
    _in_model,
    _in_nested_value,
    _beside_model,
    _in_random_state,
    _in_optimizer,
)
WORST = {key: LIVE[key] for key in ("os.system", "getattr", "STACK_GLOBAL")}


@pytest.mark.parametrize("attack", WORST.values(), ids=WORST)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_a_rank_file(
    place: Callable[[Any], None], attack: Attack, root: Path, tmp_path: Path, canary: Path
) -> None:
    """What would be dropped later is guarded as well as what is kept."""
    plant_in(shard(root, 1, 1), place, attack(canary))
    refused(root, tmp_path / "out", UnsafePickleError)
    code, _, err = run("inspect", root)
    assert code == 3 and err.startswith("error: ")


@pytest.mark.parametrize("attack", WORST.values(), ids=WORST)
def test_in_a_storage_reference(attack: Attack, root: Path, tmp_path: Path, canary: Path) -> None:
    path = shard(root)
    records = records_of(path)
    key = "model_optim_rng/data.pkl"
    records[key] = records[key].replace(text("cpu"), attack(canary), 1)
    path.write_bytes(zipped(records))
    refused(root, tmp_path / "out", UnsafePickleError)


@pytest.mark.parametrize("attack", WORST.values(), ids=WORST)
def test_in_the_metadata(attack: Attack, dist: Path, tmp_path: Path, canary: Path) -> None:
    with edited_metadata(dist) as metadata:
        metadata.planner_data = PLACEHOLDER
    path = dist / ITERATION / ".metadata"
    path.write_bytes(planted(path.read_bytes(), attack(canary)))
    refused(dist, tmp_path / "out", UnsafePickleError)


@pytest.mark.parametrize("attack", WORST.values(), ids=WORST)
def test_in_common(attack: Attack, dist: Path, tmp_path: Path, canary: Path) -> None:
    plant_in(dist / ITERATION / "common.pt", _in_arguments, attack(canary))
    refused(dist, tmp_path / "out", UnsafePickleError)


def _redirect(root: Path, data: bytes, prefix: str = "embedding.") -> None:
    """Let a chunk of a tensor stand in a new file of these bytes."""
    (root / ITERATION / "new.distcp").write_bytes(data)
    with edited_metadata(root) as metadata:
        index = next(index for index in metadata.storage_data if index.fqn.startswith(prefix))
        info = metadata.storage_data[index]
        info.relative_path, info.offset, info.length = "new.distcp", 0, len(data)


@pytest.mark.parametrize("attack", WORST.values(), ids=WORST)
def test_in_a_distcp_entry(attack: Attack, dist: Path, tmp_path: Path, canary: Path) -> None:
    _redirect(dist, torch_file(program(attack(canary))))
    refused(dist, tmp_path / "out", UnsafePickleError)


def test_storage_references_outside_tensor_files(dist: Path, tmp_path: Path) -> None:
    path = dist / ITERATION / ".metadata"
    with edited_metadata(dist) as metadata:
        metadata.planner_data = PLACEHOLDER
    path.write_bytes(planted(path.read_bytes(), tensor()))
    refused(dist, tmp_path / "out", CorruptError, says="storage reference")


# Names without a class


def test_classes_of_others_are_data(root: Path, tmp_path: Path, canary: Path) -> None:
    """Unknown classes in the arguments are noted and not imported, whatever they are."""
    bait = build(named("mtt_bait", "Bait") + b")\x81", mapping({"a": NONE}))
    body = listed(
        CLASS,
        bait,
        reduce(named("mtt_bait", "boom"), text("x")),
        reduce(named("apex.optimizers", "FusedAdam")),
        reduce(named("__main__", "MyConfig")),
        b"(" + text("x") + b"imtt_bait\nboom\n",
    )
    plant_in(shard(root), _in_arguments, body)
    result = mtt_convert.convert(root, tmp_path / "out")
    assert mtt_convert.verify(result.output).problems == ()


def test_old_names_of_python_2_run_nothing(root: Path, tmp_path: Path, canary: Path) -> None:
    """Protocol 2 says __builtin__ and copy_reg; they must not reach the real modules."""
    body = reduce(named("__builtin__", "eval"), _python(canary))
    plant_in(shard(root), _in_arguments, body)
    code, _, _ = run("convert", root, tmp_path / "out")
    assert code in (0, 3)


@pytest.mark.parametrize(
    "body",
    [
        reduce(
            named(
                "transformer_engine.pytorch.tensor.float8_tensor",
                "Float8Tensor._make_in_reduce_ex",
            ),
            text("x"),
        ),
        CLASS,
        named("megatron.core.enums", "ModelType"),
        named("torch", "float32"),
        named("torch._utils", "_rebuild_tensor_v2"),
        named("collections", "OrderedDict"),
    ],
    ids=["Float8Tensor", "object", "class", "dtype", "function", "known class"],
)
def test_what_is_no_tensor_in_the_model(body: bytes, root: Path, tmp_path: Path) -> None:
    plant_in(shard(root), _in_model, body)
    refused(root, tmp_path / "out", SourceError, says=QKV)


def test_a_quantised_tensor_class_is_unsupported(root: Path, tmp_path: Path) -> None:
    module = "transformer_engine.pytorch.tensor.float8_tensor"
    body = reduce(named(module, "Float8Tensor._make_in_reduce_ex"), tensor(of=storage()))
    with edited(shard(root)) as content:
        _in_model(content)
    _plant_with_storage(shard(root), body)
    error = refused(root, tmp_path / "out", UnsupportedError, says=QKV)
    assert error.found and "Float8Tensor" in error.found
    assert error.expected and error.fix


def _plant_with_storage(path: Path, body: bytes, data: bytes = bytes(16)) -> None:
    """Opcodes in place of the placeholder, which may use storage "mtt"."""
    plant(path, body.replace(text("0") + text("cpu"), text("mtt") + text("cpu")))
    records = records_of(path)
    records["model_optim_rng/data/mtt"] = data
    path.write_bytes(zipped(records))


def _rebuild_as(kind: bytes, of: bytes) -> bytes:
    function = named("torch._utils", "_rebuild_tensor_v2")
    arguments = items(of, number(0), items(number(64)), items(number(1)), FALSE, NONE)
    return reduce(
        named("torch._tensor", "_rebuild_from_type_v2"), function, kind, arguments, mapping({})
    )


def test_tensors_of_an_unknown_class_are_unsupported(root: Path, tmp_path: Path) -> None:
    """A subclass may read its storage in another way: taking it as it is could be wrong."""
    with edited(shard(root)) as content:
        chunk = model_of(content, NORM)
        data = chunk[NORM].numpy().tobytes()
        chunk[NORM] = PLACEHOLDER
    body = _rebuild_as(named("some_library.quantised", "PackedTensor"), storage(count=64))
    _plant_with_storage(shard(root), body, data)
    refused(root, tmp_path / "out", UnsupportedError, says="PackedTensor")


@pytest.mark.parametrize("kind", ["torch.Tensor", "torch.nn.parameter.Parameter"])
def test_tensors_with_attributes_are_tensors(
    kind: str, golden: Golden, root: Path, tmp_path: Path
) -> None:
    """Megatron puts attributes on parameters; torch then names the class."""
    with edited(shard(root)) as content:
        chunk = model_of(content, NORM)
        data = chunk[NORM].numpy().tobytes()
        chunk[NORM] = PLACEHOLDER
    body = _rebuild_as(named(*kind.rsplit(".", 1)), storage(count=64))
    _plant_with_storage(shard(root), body, data)
    mtt_convert.convert(root, tmp_path / "out")
    assert mtt_convert.diff(tmp_path / "out", golden(TORCH)).differences == ()


def test_negated_views_are_not_taken_as_they_are(root: Path, tmp_path: Path) -> None:
    """A tensor with torch's negative bit stands in its storage with the other sign."""
    with edited(shard(root)) as content:
        chunk = model_of(content, NORM)
        data = chunk[NORM].numpy().tobytes()
        chunk[NORM] = PLACEHOLDER
    body = reduce(
        named("torch._utils", "_rebuild_tensor_v2"),
        storage(count=64),
        number(0),
        items(number(64)),
        items(number(1)),
        FALSE,
        reduce(named("collections", "OrderedDict")),
        mapping({"neg": b"\x88", "conj": FALSE}),
    )
    _plant_with_storage(shard(root), body, data)
    refused(root, tmp_path / "out", SourceError)


# Changing what we are


def _tables() -> str:
    """Everything of ours that a pickle can name, as text."""
    classes = (pickles.Stub, pickles.Record, pickles.PlainDict)
    namespaces = [sorted((k, repr(v)) for k, v in vars(c).items()) for c in classes]
    return repr((DTYPES, FROM_SAFETENSORS, namespaces, sorted(pickles._TABLE.items(), key=str)))


FIELDS = {"itemsize": number(1), "name": text("int8"), "path": text("/etc/hostname")}
VICTIMS = {
    "an object": CLASS,
    "a class": named("argparse", "Namespace"),
    "an unknown class": named("megatron.core.enums", "ModelType"),
    "a dict class": named("collections", "OrderedDict"),
    "a dict": reduce(named("collections", "OrderedDict")),
    "a dtype": named("torch", "float32"),
    "a storage class": named("torch", "FloatStorage"),
    "a function": named("torch._utils", "_rebuild_tensor_v2"),
    "a storage": storage(),
    "a tensor": tensor(),
    "a size": reduce(named("torch", "Size"), items(number(1))),
    "a text": text("x"),
    "bytes": reduce(named("_codecs", "encode"), text("x"), text("latin1")),
    "a set": reduce(named("builtins", "set"), listed(number(1))),
}
CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "state": lambda victim: build(victim, mapping(FIELDS)),
    "slots": lambda victim: build(victim, slots(FIELDS)),
    "class": lambda v: build(v, slots({"__class__": named("argparse", "Namespace")})),
    "methods": lambda v: build(
        v,
        slots({"__setstate__": NONE, "__call__": NONE, "__new__": NONE, "function": NONE}),
    ),
    "list": lambda victim: build(
        victim, listed(named("torch", "float64"), items(number(1)), items())
    ),
    "item": lambda victim: victim + text("itemsize") + number(1) + b"s",
    "append": lambda victim: victim + number(1) + b"a",
    "add": lambda victim: victim + b"(" + number(1) + b"\x90",
}


@pytest.fixture(scope="module")
def weights(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What the untouched checkpoint becomes."""
    folder = tmp_path_factory.mktemp("untouched") / "out"
    mtt_convert.convert(golden(TORCH), folder)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("victim", VICTIMS.values(), ids=VICTIMS)
def test_nothing_of_ours_can_be_changed(
    victim: bytes, golden: Golden, root: Path, tmp_path: Path, weights: bytes, canary: Path
) -> None:
    """Whatever a stream does to a value, the tables and the next conversion are as before."""
    before = _tables()
    with edited(shard(root)) as content:
        _in_arguments(content)
    saved = shard(root).read_bytes()
    for change in CHANGES.values():
        shard(root).write_bytes(saved)
        _plant_with_storage(shard(root), change(victim))
        try:
            checkpoint = open_checkpoint(root)
        except SourceError as error:
            assert "Traceback" not in str(error)
        else:
            used = {piece.path for t in checkpoint.tensors.values() for piece in t.pieces}
            assert used == {str(path) for path in root.rglob("*.pt")}
        assert _tables() == before
    mtt_convert.convert(golden(TORCH), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("victim", ["a dtype", "a storage", "a tensor", "a function", "a class"])
@pytest.mark.parametrize("change", ["state", "slots", "list", "item", "append"])
def test_changes_of_what_matters_are_refused(
    change: str, victim: str, root: Path, tmp_path: Path
) -> None:
    with edited(shard(root)) as content:
        _in_arguments(content)
    _plant_with_storage(shard(root), CHANGES[change](VICTIMS[victim]))
    refused(root, tmp_path / "out", CorruptError)


@pytest.mark.parametrize(
    "relative", ["/etc/hostname", "../../../../../../etc/hostname", "..", "", "a/b.distcp", "x\0y"]
)
def test_metadata_cannot_point_elsewhere(relative: str, dist: Path, tmp_path: Path) -> None:
    """Chunks are read from beside .metadata or not at all."""
    with edited_metadata(dist) as metadata:
        for index, info in metadata.storage_data.items():
            if index.fqn.startswith("embedding."):
                info.relative_path = relative
    refused(dist, tmp_path / "out", SourceError)


# Extension codes


@pytest.fixture
def extension() -> Iterator[int]:
    """A registered extension code for os.system."""
    copyreg.add_extension("os", "system", 240)
    yield 240
    copyreg.remove_extension("os", "system", 240)
    copyreg.clear_extension_cache()


EXTENSIONS = {"EXT1": b"\x82\xf0", "EXT2": b"\x83\xf0\x00", "EXT4": b"\x84\xf0\x00\x00\x00"}


@pytest.mark.parametrize("opcode", EXTENSIONS.values(), ids=EXTENSIONS)
def test_extension_codes(
    opcode: bytes, root: Path, tmp_path: Path, canary: Path, extension: int
) -> None:
    plant_in(shard(root), _in_arguments, reduce(opcode, _touch(canary)))
    refused(root, tmp_path / "out", UnsafePickleError, says="extension codes")


def test_extension_codes_that_this_process_has_used(
    root: Path, tmp_path: Path, canary: Path, extension: int
) -> None:
    """pickle keeps what it loaded by code, and gives it out without asking again."""
    assert pickle.loads(program(EXTENSIONS["EXT1"]))
    plant_in(shard(root), _in_arguments, reduce(EXTENSIONS["EXT1"], _touch(canary)))
    refused(root, tmp_path / "out", UnsafePickleError, says="extension codes")


def test_unregistered_extension_codes(root: Path, tmp_path: Path) -> None:
    plant_in(shard(root), _in_arguments, b"\x82\xf1")
    refused(root, tmp_path / "out", UnsafePickleError)


# Storages and views


def _reference(*values: bytes) -> bytes:
    return items(*values) + b"Q"


FLOATS = named("torch", "FloatStorage")
GEOMETRY = {
    "begins beyond": tensor(offset=4),
    "ends beyond": tensor((5,)),
    "strides beyond": tensor((2,), (4,)),
    "strides beyond on two axes": tensor((2, 2), (2, 2)),
    "offset below zero": tensor(offset=-1),
    "size below zero": tensor((-4,)),
    "stride below zero": tensor((4,), (-1,), offset=3),
    "more strides than sizes": tensor((4,), (1, 1)),
    "sizes of 2**63": tensor((2**63, 2**63), (2**63, 1)),
    "no storage": tensor(of=NONE),
    "a tensor for a storage": tensor(of=tensor()),
    "a dtype for a storage": tensor(of=FLOATS),
    "storage of 2**62 elements": tensor(of=storage(count=2**62)),
    "storage below zero": tensor(of=storage(count=-4)),
    "storage longer than its record": tensor(of=storage(count=5)),
    "storage shorter than its record": tensor((2,), of=storage(count=3)),
    "storage of another type": tensor(of=storage(kind=named("torch", "DoubleStorage"))),
    "storage of no type": tensor(of=storage(kind=text("torch.FloatStorage"))),
    "storage of an unknown type": tensor(of=storage(kind=named("torch", "Size"))),
    "no such record": tensor(of=storage(key="none")),
    "record outside": tensor(of=storage(key="../data.pkl")),
    "reference to nothing": _reference(),
    "reference of text": text("storage") + b"Q",
    "reference of a list": listed(text("storage"), FLOATS, text("0"), NONE, number(4)) + b"Q",
    "reference of another kind": _reference(text("module"), FLOATS, text("0"), NONE, number(4)),
    "reference with a number for a key": _reference(
        text("storage"), FLOATS, number(0), NONE, number(4)
    ),
    "reference by line": b"Pstorage\n",
    "count of another type": _reference(text("storage"), FLOATS, text("0"), NONE, text("4")),
}


@pytest.mark.parametrize("body", GEOMETRY.values(), ids=GEOMETRY)
def test_storages_and_views_must_fit(body: bytes, root: Path, tmp_path: Path) -> None:
    """Sizes that contradict the file are refused wherever the tensor stands."""
    with edited(shard(root)) as content:
        _in_model(content)
    _plant_with_storage(shard(root), body)
    error = refused(root, tmp_path / "out", CorruptError)
    assert len(str(error)) < 2000


def test_sizes_of_other_types(root: Path, tmp_path: Path) -> None:
    with edited(shard(root)) as content:
        _in_model(content)
    saved = shard(root).read_bytes()
    for size in (b"G" + struct.pack(">d", 4.0), b"\x88", text("4"), NONE, listed(number(4))):
        body = reduce(
            named("torch._utils", "_rebuild_tensor_v2"),
            storage(),
            number(0),
            items(size),
            items(number(1)),
        )
        shard(root).write_bytes(saved)
        _plant_with_storage(shard(root), body)
        refused(root, tmp_path / "out", CorruptError)


# Containers


def _changed_zip(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(bytes(data))


def _compress(path: Path) -> None:
    path.write_bytes(zipped(records_of(path), zipfile.ZIP_DEFLATED))


def _claim_newer(path: Path) -> None:
    """A version needed to extract that Python's zipfile does not know."""

    def change(data: bytearray) -> None:
        data[data.index(b"PK\x01\x02") + 6] = 200

    _changed_zip(path, change)


def _two_pickles(path: Path) -> None:
    path.write_bytes(zipped(records_of(path) | {"other/data.pkl": program(NONE)}))


def _no_pickle(path: Path) -> None:
    path.write_bytes(zipped({"model_optim_rng/version": b"3\n"}))


def _big_endian(path: Path) -> None:
    path.write_bytes(zipped(records_of(path) | {"model_optim_rng/byteorder": b"big"}))


def _no_zip(path: Path) -> None:
    path.write_bytes(program(NONE))


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _huge_record(path: Path) -> None:
    """A record that says it is as long as 4 GiB."""

    def change(data: bytearray) -> None:
        start = data.index(b"PK\x01\x02")
        data[start + 20 : start + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)

    _changed_zip(path, change)


def _no_local_header(path: Path) -> None:
    def change(data: bytearray) -> None:
        data[0:4] = b"XXXX"

    _changed_zip(path, change)


def _names_that_are_no_text(path: Path) -> None:
    def change(data: bytearray) -> None:
        start = data.index(b"PK\x01\x02")
        data[start + 9] |= 0x08  # names are UTF-8
        data[start + 46] = 0xFF

    _changed_zip(path, change)


def _twice(path: Path) -> None:
    """Two records of one name: which of them counts depends on who reads."""
    records = list(records_of(path).items())
    key = "model_optim_rng/data/0"
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records:
            if record == key:
                archive.writestr(record, bytes(len(data)))
                with pytest.warns(UserWarning, match="Duplicate name"):
                    archive.writestr(record, data)
            else:
                archive.writestr(record, data)


CONTAINERS = (
    _compress,
    _claim_newer,
    _two_pickles,
    _no_pickle,
    _big_endian,
    _no_zip,
    _zeros,
    _huge_record,
    _no_local_header,
    _names_that_are_no_text,
    _twice,
)


@pytest.mark.parametrize("change", CONTAINERS)
def test_containers(change: Callable[[Path], None], root: Path, tmp_path: Path) -> None:
    path = shard(root, 1, 0)
    change(path)
    error = refused(root, tmp_path / "out", CorruptError)
    assert str(path) in error.message
    assert error.found and error.expected


# Streams


STREAMS = {
    "empty": b"",
    "only a stop": b".",
    "no stop": b"\x80\x02}",
    "protocol 255": b"\x80\xff}.",
    "pop of nothing": b"\x80\x020.",
    "no mark": b"\x80\x02}u.",
    "unknown opcode": b"\x80\x02\xff.",
    "memo that is not there": b"\x80\x02h\x05.",
    "key that cannot be hashed": program(b"}" + listed() + NONE + b"s"),
    "calling a number": program(number(1) + b")R"),
    "making a number": program(number(1) + b")\x81"),
    "out of band buffer": program(b"\x97"),
    "name of numbers": program(number(1) + number(2) + b"\x93"),
    "number of a million digits": b"\x80\x02L" + b"9" * 10**6 + b"L\n.",
    "text that is no UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
}
NO_DICT = {
    "a list": program(listed()),
    "None": program(NONE),
    "a tensor": program(tensor()),
    "a class": program(named("collections", "OrderedDict")),
    "an object": program(CLASS),
    "a number of 100 000 bits": program(number(1 << 100_000)),
}


@pytest.mark.parametrize("stream", [*STREAMS.values(), *NO_DICT.values()], ids=[*STREAMS, *NO_DICT])
def test_streams_that_are_no_checkpoint(stream: bytes, root: Path, tmp_path: Path) -> None:
    shard(root, 0, 1).write_bytes(torch_file(stream))
    error = refused(root, tmp_path / "out", CorruptError)
    assert str(shard(root, 0, 1)) in error.message


@pytest.mark.parametrize("stream", [*STREAMS.values(), *NO_DICT.values()], ids=[*STREAMS, *NO_DICT])
def test_streams_that_are_no_metadata(stream: bytes, dist: Path, tmp_path: Path) -> None:
    (dist / ITERATION / ".metadata").write_bytes(stream)
    refused(dist, tmp_path / "out", CorruptError)


@pytest.mark.parametrize("stream", [*STREAMS.values(), *NO_DICT.values()], ids=[*STREAMS, *NO_DICT])
def test_streams_that_are_no_chunk(stream: bytes, dist: Path, tmp_path: Path) -> None:
    _redirect(dist, torch_file(stream))
    refused(dist, tmp_path / "out", CorruptError)


# Values that hold themselves, and values that are too many

DEEP = b"]" * 50_000 + b"a" * 49_999
LOOP = b"]r\x00\x00\x01\x00j\x00\x00\x01\x00a"
HUGE = number(1 << 100_000)


def _laughs(depth: int = 60) -> bytes:
    """A list of two lists of two lists ...: 2**60 leaves in 600 bytes."""
    body = listed(text("ha"))
    for level in range(depth):
        memo = struct.pack("<I", 2**16 + level)
        body = body + b"r" + memo + b"0](j" + memo + b"j" + memo + b"e"
    return body


MANY = {"deep": DEEP, "loop": LOOP, "laughs": _laughs(), "huge": HUGE}
KEYS = ("x", "args", "iteration", "checkpoint_version", "model0")


@pytest.mark.parametrize("body", MANY.values(), ids=MANY)
@pytest.mark.parametrize("key", KEYS)
def test_endless_values(
    key: str, body: bytes, root: Path, tmp_path: Path, apart: CommandsApart
) -> None:
    """They end in an answer of a readable length, within a second or so, wherever they stand."""
    plant_in(shard(root), lambda content: content.update({key: PLACEHOLDER}), body)
    _answers(apart, root, tmp_path / "out")


ARGUMENTS = ("x", "num_layers", "tensor_model_parallel_size", "softmax_type", "normalization")


@pytest.mark.parametrize("body", MANY.values(), ids=MANY)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_endless_arguments(
    argument: str, body: bytes, root: Path, tmp_path: Path, apart: CommandsApart
) -> None:
    def place(content: Any) -> None:
        setattr(content["args"], argument, PLACEHOLDER)

    plant_in(shard(root), place, body)
    _answers(apart, root, tmp_path / "out")


@pytest.mark.parametrize("body", MANY.values(), ids=MANY)
def test_endless_tensors(body: bytes, root: Path, tmp_path: Path, apart: CommandsApart) -> None:
    plant_in(shard(root), _in_model, body)
    _answers(apart, root, tmp_path / "out")


@pytest.fixture(scope="module")
def apart() -> Iterator[CommandsApart]:
    """Where commands run that may hang or take all memory."""
    if not sys.platform.startswith("linux"):
        pytest.skip("measures memory by /proc")
    commands = CommandsApart()
    yield commands
    commands.close()


def _answers(
    apart: CommandsApart, root: Path, target: Path, codes: tuple[int, ...] = (0, 2, 3)
) -> None:
    """The command ends with a proper answer, fast and small."""
    answer = apart.run("convert", root, target)
    assert "code" in answer, f"killed: {answer}"
    assert answer["code"] in codes, answer["err"][:1000]
    assert answer["megabytes"] < 200
    assert len(answer["err"]) < 4000
    if answer["code"]:
        assert "\nerror: " in "\n" + answer["err"]  # Python itself may complain before
        assert not target.exists()


LENGTHS = {
    "memo index 2**25": b"\x80\x02}r\x00\x00\x00\x02.",
    "memo index 2**32 - 1": b"\x80\x02}r\xff\xff\xff\xff.",
    "text of 2**40": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "text of 2**63": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
    "bytes of 2**31": b"\x80\x04\x8e" + struct.pack("<Q", 2**31) + b"x.",
    "bytes of 2**62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "bytearray of 2**30": b"\x80\x05\x96" + struct.pack("<Q", 2**30) + b"x.",
    "bytearray of 2**50": b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"x.",
    "frame of 2**40": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.",
    "number of 2**31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "a list of 10**7 items by tuple": program(
        reduce(named("builtins", "list"), items(number(10**7)))
    ),
    "bytes by number": program(reduce(named("builtins", "bytes"), number(2**33))),
    "bytearray by number": program(reduce(named("builtins", "bytearray"), number(2**33))),
}


@pytest.mark.parametrize("stream", LENGTHS.values(), ids=LENGTHS)
def test_lengths_are_not_believed(
    stream: bytes, root: Path, tmp_path: Path, apart: CommandsApart
) -> None:
    """A length or an index in the stream takes no memory that the stream does not fill."""
    shard(root, 1, 1).write_bytes(torch_file(stream))
    _answers(apart, root, tmp_path / "out", codes=(3,))


@pytest.mark.parametrize(
    "argument",
    "num_layers hidden_size padded_vocab_size tensor_model_parallel_size "
    "pipeline_model_parallel_size expert_model_parallel_size".split(),
)
def test_sizes_in_arguments_are_not_believed(
    argument: str, root: Path, tmp_path: Path, apart: CommandsApart
) -> None:
    set_arguments(root, **{argument: 10**11})
    _answers(apart, root, tmp_path / "out", codes=(2, 3))


def test_repeated_elements_take_no_memory(dist: Path, tmp_path: Path, apart: CommandsApart) -> None:
    """A stride of zero makes 2**40 rows of 16 bytes."""
    rows, name = 2**40, "decoder.layers.mlp.linear_fc3.weight"
    data = torch_file(program(tensor((rows, 4), (0, 1))))
    (dist / ITERATION / "new.distcp").write_bytes(data)
    with edited_metadata(dist) as metadata:
        entries, places = metadata.state_dict_metadata, metadata.storage_data
        fqn = "embedding.word_embeddings.weight"
        index = next(i for i in places if i.fqn == fqn)
        chunk = type(entries[fqn].chunks[0])(torch.Size((0, 0)), torch.Size((rows, 4)))
        entries[name] = type(entries[fqn])(entries[fqn].properties, torch.Size((rows, 4)), [chunk])
        place = type(places[index])("new.distcp", 0, len(data))
        places[type(index)(name, torch.Size((0, 0)))] = place
    _answers(apart, dist, tmp_path / "out", codes=(3,))


# Metadata of another shape than torch writes


def _entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata["embedding.word_embeddings.weight"]


def _index(metadata: Any) -> Any:
    return next(i for i in metadata.storage_data if i.fqn == "embedding.word_embeddings.weight")


def _set(target: Callable[[Any], Any], field: str, value: object) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        object.__setattr__(target(metadata), field, value)

    return change


def _place(metadata: Any) -> Any:
    return metadata.storage_data[_index(metadata)]


SHAPES: dict[str, Callable[[Any], None]] = {
    "no entries": _set(lambda m: m, "state_dict_metadata", {}),
    "entries of another kind": _set(lambda m: m, "state_dict_metadata", [1]),
    "entry of another kind": lambda m: m.state_dict_metadata.update({"decoder.x": 1}),
    "name of another kind": lambda m: m.state_dict_metadata.update({7: _entry(m)}),
    "no places": _set(lambda m: m, "storage_data", {}),
    "places of another kind": _set(lambda m: m, "storage_data", [1]),
    "place of another kind": lambda m: m.storage_data.update({_index(m): 1}),
    "place without an index": lambda m: m.storage_data.update({"x": _place(m)}),
    "size missing": _set(_entry, "size", None),
    "size of another kind": _set(_entry, "size", 7),
    "size of text": _set(_entry, "size", ("a", "b")),
    "size below zero": _set(_entry, "size", (-512, -64)),
    "size with an axis more": _set(_entry, "size", (1, 512, 64)),
    "no chunks": _set(_entry, "chunks", []),
    "chunks of another kind": _set(_entry, "chunks", [1, 2]),
    "chunks missing": _set(_entry, "chunks", None),
    "chunks twice": lambda m: _entry(m).chunks.append(_entry(m).chunks[0]),
    "chunk missing": lambda m: _entry(m).chunks.pop(),
    "chunk offsets of another kind": _set(lambda m: _entry(m).chunks[0], "offsets", 3),
    "chunk offsets of text": _set(lambda m: _entry(m).chunks[0], "offsets", ("a", "b")),
    "chunk sizes with an axis less": _set(lambda m: _entry(m).chunks[0], "sizes", (64,)),
    "index offsets of another kind": _set(_index, "offset", 3),
    "index offsets of lists": _set(_index, "offset", ([0], [0])),
    "index without a name": _set(_index, "fqn", None),
    "path of another kind": _set(_place, "relative_path", 3),
    "offset below zero": _set(_place, "offset", -1),
    "offset beyond": _set(_place, "offset", 2**70),
    "offset of text": _set(_place, "offset", "0"),
    "length of zero": _set(_place, "length", 0),
    "length beyond": _set(_place, "length", 2**70),
    "length below zero": _set(_place, "length", -5),
}


@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_metadata_of_another_shape(
    change: Callable[[Any], None], dist: Path, tmp_path: Path
) -> None:
    with edited_metadata(dist) as metadata:
        change(metadata)
    refused(dist, tmp_path / "out", SourceError)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"sharded_backend": 3}', b"[" * 100_000],
    ids=["empty", "cut", "a list", "a number", "no text", "no name", "deep"],
)
def test_metadata_json_of_another_shape(data: bytes, dist: Path, tmp_path: Path) -> None:
    (dist / ITERATION / "metadata.json").write_bytes(data)
    refused(dist, tmp_path / "out", SourceError)


# Arguments of another shape


@pytest.mark.parametrize(
    "state",
    [NONE, number(1), listed(), items(NONE, NONE), items(number(1), mapping({})), text("x")],
    ids=["None", "number", "list", "pair", "odd pair", "text"],
)
def test_arguments_with_an_odd_state(state: bytes, root: Path, tmp_path: Path) -> None:
    body = build(reduce(named("argparse", "Namespace")), state)
    plant_in(shard(root), lambda content: content.update(args=PLACEHOLDER), body)
    _fails(root, tmp_path / "out")


@pytest.mark.parametrize(
    "values",
    [
        {3: 4},
        {None: "x", "zz": "y"},
        {"num_layers": "4"},
        {"num_layers": 4.0},
        {"num_layers": -1},
        {"num_layers": True},
        {"layernorm_epsilon": float("nan")},
        {"layernorm_epsilon": float("inf")},
        {"rotary_base": float("inf")},
        {"rotary_base": float("nan")},
        {"rotary_base": 10**400},
        {"rotary_percent": float("nan")},
        {"init_method_std": float("nan")},
        {"attention_dropout": float("nan")},
        {"kv_channels": 0},
        {"num_attention_heads": 0},
        {"num_query_groups": 3},
        {"position_embedding_type": ["rope"]},
        {"params_dtype": {}},
        {"params_dtype": "int8"},
        {"normalization": {"a": 1}},
        {"tokenizer_model": "a\0b"},
        {"tensor_model_parallel_size": "2"},
    ],
    ids=lambda values: repr(values)[:40],
)
def test_arguments_with_odd_values(values: dict[Any, Any], root: Path, tmp_path: Path) -> None:
    """An answer in words or a model that can be read again; never a traceback, never NaN."""
    set_arguments(root)
    for path in (shard(root, tp, pp) for tp in (0, 1) for pp in (0, 1)):
        with edited(path) as content:
            vars(content["args"]).update(values)
    code, _, err = run("convert", root, tmp_path / "out")
    assert code in (0, 2, 3), err
    if code:
        assert not (tmp_path / "out").exists()
    else:
        text_of_config = (tmp_path / "out/config.json").read_text()
        json.loads(text_of_config, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def _fails(source: Path, target: Path) -> None:
    """The command says what is wrong and leaves nothing."""
    code, _, err = run("convert", source, target)
    assert code in (2, 3) and err.startswith("error: ")
    assert not target.exists()
    with pytest.raises(MTTError):
        mtt_convert.convert(source, target)
