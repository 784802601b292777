"""Weight files: bit for bit what safetensors and torch read and write, damage refused, one tensor in memory at a time."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from payload import Payload
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from torchtitan_bio.weight_files import open_meta, open_safetensors, write_pth, write_safetensors
from torchtitan_bio.weight_files.safetensors import DTYPES

ROOT = Path(__file__).parent.parent
# dim 0, dim 1 and whole: the three ways in which Meta's shards hold a tensor.
SPLIT = {"tok_embeddings.weight": 1, "layers.0.attention.wq.weight": 0, "layers.0.attention.wo.weight": 1, "norm.weight": None}


def random_bits(shape, dtype, seed=0):
    """Any bits: NaNs, infinities and subnormal numbers too."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    largest = 2 if dtype == torch.bool else 256
    return torch.randint(0, largest, (num_bytes,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor):
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def all_bits(tensors):
    return {name: bits(tensor) for name, tensor in tensors.items()}


def some_of_all():
    """Every dtype, in shapes that leave the next tensor at odd addresses, empty ones and scalars among them."""
    shapes = [(3, 5), (), (0, 4), (7,)]
    return {f"{name} {shape}": random_bits(shape, dtype) for name, dtype in DTYPES.items() for shape in shapes}


def entries_of(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def fingerprint(path):
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def refusal(function, *arguments):
    """What the one line of the ValueError says."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_safetensors_package_loads_what_is_written_bit_for_bit(tmp_path):
    tensors = some_of_all()
    files = write_safetensors(tmp_path, entries_of(tensors), tensors.__getitem__, max_shard_bytes=10**6, metadata={"step": "5"})
    path = tmp_path / "model.safetensors"
    assert [*tmp_path.iterdir()] == [path] and files == {path.name: fingerprint(path)}
    assert all_bits(load_file(path)) == all_bits(tensors)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "5"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_what_the_safetensors_package_writes_is_read_bit_for_bit(tmp_path, metadata):
    tensors = some_of_all()
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata=metadata)
    weights = open_safetensors(tmp_path)
    assert all_bits({name: weights.read(name) for name in weights.tensors}) == all_bits(tensors)
    assert {name: (entry.shape, entry.dtype) for name, entry in weights.tensors.items()} == entries_of(tensors)
    assert weights.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert weights.largest_file_bytes == path.stat().st_size
    name = "F32 (3, 5)"
    weights.read(name).zero_()
    assert bits(weights.read(name)) == bits(tensors[name])


def test_a_file_without_tensors_goes_both_ways(tmp_path):
    write_safetensors(tmp_path, {}, None, max_shard_bytes=1)
    assert load_file(tmp_path / "model.safetensors") == {} and open_safetensors(tmp_path).tensors == {}


def test_shards_are_filled_in_order_and_a_larger_tensor_has_one_of_its_own(tmp_path):
    sizes = {"a": 10, "b": 10, "large": 50, "c": 10, "empty": 0, "d": 16, "e": 1}  # floats; a shard takes 20
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    asked, progress = [], []
    files = write_safetensors(
        tmp_path,
        entries_of(tensors),
        lambda name: asked.append(name) or tensors[name],
        max_shard_bytes=80,
        progress=progress.append,
    )
    assert asked == list(tensors) and progress == [4 * size for size in sizes.values()]
    assert files == {path.name: fingerprint(path) for path in tmp_path.iterdir()}
    shards = [load_file(tmp_path / f"model-{number:05d}-of-00004.safetensors") for number in (1, 2, 3, 4)]
    assert [sorted(shard) for shard in shards] == [["a", "b"], ["large"], ["c", "empty"], ["d", "e"]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 97, "total_parameters": 97}
    assert list(index["weight_map"]) == list(tensors)
    assert {name: bits(load_file(tmp_path / shard)[name]) for name, shard in index["weight_map"].items()} == all_bits(tensors)
    weights = open_safetensors(tmp_path)
    assert all_bits({name: weights.read(name) for name in tensors}) == all_bits(tensors)
    assert weights.largest_file_bytes == files["model-00002-of-00004.safetensors"]["bytes"]


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def claim(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = raw({"w": claim()}, bytes(8))
DAMAGED = {
    "empty": (b"", "is no safetensors file (it has 0 bytes"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull` if it is a pointer of git-lfs"),
    "header beyond the file": (GOOD[:20], f"truncated inside its header; at least {len(GOOD) - 8 - 20} bytes are missing"),
    "data cut": (GOOD[:-3], f"truncated; 3 of its {len(GOOD)} bytes are missing"),
    "data too long": (GOOD + b"x", f"has {len(GOOD) + 1} bytes; its header accounts for {len(GOOD)}"),
    "no JSON": (raw(b"{'w': 1}  "), "has a damaged header (JSONDecodeError"),
    "no text": (raw(b'{"\xff": 1}'), "has a damaged header (UnicodeDecodeError"),
    "nested": (raw(b"[" * 100_000), "has a damaged header (RecursionError"),
    "a list": (raw([1, 2]), "has a damaged header"),
    "no offsets": (raw({"w": {"dtype": "F32"}}), "has a damaged header (KeyError: 'data_offsets'"),
    "unknown dtype": (raw({"w": claim("F4")}, bytes(8)), "w has dtype 'F4'; those that can be read are BOOL, U8"),
    "dtype of no text": (raw({"w": claim(["F32"])}, bytes(8)), "w has dtype ['F32']"),
    "negative shape": (raw({"w": claim(shape=(-1, -2))}, bytes(8)), "w has shape [-1, -2] and data_offsets [0, 8]"),
    "truth as a size": (raw({"w": claim(shape=(True, 2))}, bytes(8)), "w has shape [True, 2]"),
    "three offsets": (raw({"w": claim(offsets=(0, 8, 8))}, bytes(8)), "data_offsets [0, 8, 8], as no tensor has"),
    "empty and endless": (raw({"w": claim(shape=(0, 2**62, 2), offsets=(0, 0))}), ", as no tensor has"),
    "too few bytes": (raw({"w": claim(shape=(3,))}, bytes(8)), "w has 8 bytes; shape [3] of torch.float32 has 12"),
    "offsets backwards": (raw({"w": claim(offsets=(0, -8))}, bytes(8)), "data_offsets [0, -8], as no tensor has"),
    "a gap": (
        raw({"v": claim(), "w": claim(offsets=(9, 17))}, bytes(17)),
        "w begins at byte 9 of the data; what is before it ends at 8",
    ),
    "overlap": (
        raw({"v": claim(), "w": claim(offsets=(4, 12))}, bytes(12)),
        "w begins at byte 4 of the data; what is before it ends at 8",
    ),
    "beyond the data": (raw({"w": claim(shape=(9,), offsets=(0, 36))}, bytes(8)), "truncated; 28 of its"),
}


@pytest.mark.parametrize("data, words", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_safetensors_file_is_refused(tmp_path, data, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    message = refusal(open_safetensors, tmp_path)
    assert str(path) in message and words in message
    assert ": download it again" in message or "dtype" in words


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    weights = open_safetensors(tmp_path)
    os.truncate(path, len(GOOD) - 3)
    assert f"{path} has become 3 bytes too short" in refusal(weights.read, "w")


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(open_safetensors, tmp_path)
    for damage in ("{", "[]", '{"weight_map": []}', '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": {"v": 1}}'):
        index.write_text(damage)
        assert f"{index} is damaged (" in refusal(open_safetensors, tmp_path)
    index.write_text(json.dumps({"weight_map": {"v": "../elsewhere.safetensors"}}))
    assert "names what is no file of the folder" in refusal(open_safetensors, tmp_path)

    def promise(**weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    for name in ("one", "two"):
        save_file({name: torch.ones(2), f"{name} more": torch.ones(1)}, tmp_path / name)
    promise(one="one", two="two", three="three")
    assert "names 3 shards, of which three are not there" in refusal(open_safetensors, tmp_path)
    promise(one="one", two="one")
    assert "says that two lies in one, which does not hold it" in refusal(open_safetensors, tmp_path)
    promise(one="one", two="two")
    assert sorted(open_safetensors(tmp_path).tensors) == ["one", "one more", "two", "two more"]
    save_file({"two": torch.ones(2), "one": torch.ones(2)}, tmp_path / "two")
    assert f"one lies both in {tmp_path / 'one'} and in two" in refusal(open_safetensors, tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "holds both model.safetensors and model.safetensors.index.json" in refusal(open_safetensors, tmp_path)


def test_torch_loads_the_pth_that_is_written_bit_for_bit(tmp_path):
    tensors, progress = some_of_all(), []
    path = tmp_path / "consolidated.00.pth"
    written = write_pth(path, entries_of(tensors), tensors.__getitem__, progress.append)
    assert written == fingerprint(path) and progress == [tensor.nbytes for tensor in tensors.values()]
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert all_bits(loaded) == all_bits(tensors) and list(loaded) == list(tensors)
    assert {tensor.data_ptr() % 64 for tensor in loaded.values()} == {0}  # mapped
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    data = bytearray(path.read_bytes())
    data[data.index(bits(tensors["F32 (3, 5)"])[2])] ^= 1
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is not None


def test_the_pickle_of_a_pth_is_that_of_torch_save(tmp_path):
    tensors = {name: torch.zeros(2, 3, dtype=dtype) for name, dtype in DTYPES.items()}
    torch.save(tensors, tmp_path / "theirs")
    write_pth(tmp_path / "ours", entries_of(tensors), tensors.__getitem__)

    def pickled(name):
        with zipfile.ZipFile(tmp_path / name) as archive:
            (record,) = (record for record in archive.namelist() if record.endswith("/data.pkl"))
            return set(re.findall(rb"c(torch[\w.]*\n\w+)\n", archive.read(record)))

    assert pickled("ours") == pickled("theirs") and b"torch._utils\n_rebuild_tensor_v2" in pickled("ours")


def meta_folder(folder, num_shards):
    """Shards as Meta cuts them, and the whole tensors."""
    whole = {
        name: random_bits((8, 12) if dim is not None else (12,), torch.bfloat16, seed)
        for seed, (name, dim) in enumerate(SPLIT.items())
    }
    for number in range(num_shards):
        shard = {
            # A share along dimension 1 is saved as torch cuts it: a view with gaps into the whole storage.
            name: tensor if SPLIT[name] is None else tensor.chunk(num_shards, SPLIT[name])[number]
            for name, tensor in whole.items()
        }
        torch.save(shard | {"rope.freqs": torch.ones(number + 1)}, folder / f"consolidated.{number:02d}.pth")
    return whole


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_of_meta_join_to_the_whole_tensors(tmp_path, num_shards):
    whole = meta_folder(tmp_path, num_shards)
    weights = open_meta(tmp_path, SPLIT.__getitem__)
    assert all_bits({name: weights.read(name) for name in weights.tensors}) == all_bits(whole)
    assert {name: (entry.shape, entry.dtype) for name, entry in weights.tensors.items()} == entries_of(whole)
    assert weights.num_bytes == sum(tensor.nbytes for tensor in whole.values())
    assert weights.largest_file_bytes == max(path.stat().st_size for path in tmp_path.iterdir())


def test_a_pth_of_views_and_shared_storages_is_read_as_torch_reads_it(tmp_path):
    whole = torch.randn(6, 8)
    tensors = {"row": whole[2], "column": whole[:, 3], "turned": whole.T, "again": whole, "spread": torch.ones(1).expand(3, 2)}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(5), "parameter": torch.nn.Parameter(torch.ones(2))}
    tensors |= {"strange": torch.ones(2, dtype=torch.complex128), "flags": torch.tensor([True, False])}
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    weights = open_meta(tmp_path, lambda name: None)
    assert all_bits({name: weights.read(name) for name in weights.tensors}) == all_bits(
        {name: tensor.detach() for name, tensor in tensors.items()}
    )


def test_shards_of_meta_that_do_not_belong_together_are_refused(tmp_path):
    zero, one = tmp_path / "consolidated.00.pth", tmp_path / "consolidated.01.pth"

    def split(name):
        return None

    def refuse(first, second, split_dim=split):
        torch.save(first, zero)
        torch.save(second, one)
        return refusal(open_meta, tmp_path, split_dim)

    assert "holds no consolidated.00.pth" in refusal(open_meta, tmp_path, split)
    torch.save({"w": torch.ones(2)}, one)
    assert "holds consolidated.01.pth but no consolidated.00.pth" in refusal(open_meta, tmp_path, split)
    assert "do not both hold v;" in refuse({"w": torch.ones(2), "v": torch.ones(2)}, {"w": torch.ones(2)})
    assert "do not both hold v;" in refuse({"w": torch.ones(2)}, {"w": torch.ones(2), "v": torch.ones(2)})
    message = refuse({"w": torch.ones(2)}, {"w": torch.ones(3)})
    assert f"w is (2,) of torch.float32 in {zero}, (3,) of torch.float32 in {one.name}" in message
    assert "torch.float16" in refuse({"w": torch.ones(2)}, {"w": torch.ones(2).half()})
    assert "w has shape (2,); shards of it are cut along dimension 1" in refuse(*[{"w": torch.ones(2)}] * 2, lambda name: 1)
    torch.save({"w": torch.zeros(2)}, one)
    weights = open_meta(tmp_path, split)
    assert f"{zero} and {one.name} differ in w, which is the same in all shards" in refusal(weights.read, "w")


def test_a_pth_that_is_no_state_dict_is_refused_and_nothing_in_it_runs(tmp_path):
    path, made = tmp_path / "consolidated.00.pth", tmp_path / "made"

    def refuse():
        message = refusal(open_meta, tmp_path, lambda name: None)
        assert message.startswith(str(path))
        return message

    torch.save({"w": torch.ones(2), "planted": Payload(made)}, path)
    assert "wants to run code when it is loaded (io.open). Nothing was run" in refuse()
    assert not made.exists()
    torch.load(path, weights_only=False)["planted"].close()
    assert made.exists(), "the payload is a real one"

    torch.save({"w": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for length in (0, 100, 3000, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is truncated, or not of torch.save since 1.6" in refuse()
    path.write_bytes(whole.replace(b"FloatStorage", b"FloatSt\xffrage"))
    assert "is damaged (UnicodeDecodeError" in refuse()
    path.write_bytes(whole.replace(b"collections\nOrderedDict\n", b"collections\nOrderedDicd\n"))
    assert "wants to run code when it is loaded (collections.OrderedDicd)" in refuse()
    path.write_bytes(whole.replace(b"cpuq", b"cpu\xff"))
    assert "holds no weights (UnpicklingError" in refuse()
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "is truncated, or not of torch.save since 1.6" in refuse()
    torch.save([torch.ones(2)], path)
    assert "holds a list, no dict of tensors" in refuse()
    torch.save({"model": {"w": torch.ones(2)}}, path)
    assert "model is no plain tensor" in refuse()
    torch.save({"w": torch.ones(2).to_sparse()}, path)
    assert "w is no plain tensor" in refuse()


def test_a_compressed_pth_is_refused_and_not_read_as_numbers(tmp_path):
    torch.save({"w": torch.randn(1000)}, tmp_path / "stored")  # noise: compressed, it takes no less
    with zipfile.ZipFile(tmp_path / "stored") as stored:
        with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "w") as archive:
            for name in stored.namelist():
                kind = zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED
                archive.writestr(name, stored.read(name), kind)
    assert "the bytes of w are no plain record of the file" in refusal(open_meta, tmp_path, lambda name: None)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    tensor = torch.ones(10**6)
    entries = {"w": ((10**6,), torch.float32), "v": ((10**6,), torch.float32)}
    for name, write in {
        "model.safetensors": lambda path: write_safetensors(tmp_path, entries, lambda name: tensor, max_shard_bytes=10**9),
        "consolidated.00.pth": lambda path: write_pth(path, entries, lambda name: tensor),
    }.items():
        (tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(OSError) as caught:
            write(tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / name))


def test_a_tensor_that_is_not_as_declared_is_never_written(tmp_path):
    with pytest.raises(AssertionError, match="w was declared as .*float32.* and read as .*float16"):
        write_pth(tmp_path / "x.pth", {"w": ((2,), torch.float32)}, lambda name: torch.ones(2).half())
    with pytest.raises(AssertionError, match=r"w was declared as \(\(2,\).* and read as \(\(3,\)"):
        write_safetensors(tmp_path, {"w": ((2,), torch.float32)}, lambda name: torch.ones(3), max_shard_bytes=100)


CONVERT = """
import sys
from pathlib import Path
import torch
from torchtitan_bio.weight_files import open_meta, open_safetensors, write_pth, write_safetensors

def memory(field):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

def convert(folder):
    weights = open_meta(folder, lambda name: None)
    entries = {name: (entry.shape, entry.dtype) for name, entry in weights.tensors.items()}
    write_safetensors(folder, entries, weights.read, max_shard_bytes=10**12)
    write_pth(folder / "consolidated.01.pth", entries, open_safetensors(folder).read)
    joined = open_meta(folder, lambda name: 1)
    for name in joined.tensors:
        assert (joined.read(name)[:, ::500] == int(name)).all()

convert(Path(sys.argv[1]))
before = memory("VmRSS")
convert(Path(sys.argv[2]))
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory")
def test_twenty_tensors_are_converted_both_ways_in_the_memory_of_three(tmp_path):
    # What a child reports to getrusage begins at its parent's peak, so the child reads its own from /proc.
    sizes = {"small": 100, "large": 1250}
    for folder, size in sizes.items():
        entries = {str(number): ((size, 1000), torch.float32) for number in range(20)}
        (tmp_path / folder).mkdir()
        write_pth(
            tmp_path / folder / "consolidated.00.pth", entries, lambda name, size=size: torch.full((size, 1000), float(name))
        )
    command = [sys.executable, "-c", CONVERT, *(str(tmp_path / folder) for folder in sizes)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    # Joining two shards takes the whole, which is of two tensors, and one more; 2 MB for what Python itself grows by.
    assert int(answer.stdout) < 3 * 5_000_000 + 2_000_000
