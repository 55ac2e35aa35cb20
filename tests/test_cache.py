"""Teacher caches on disk: what is read is what was written, whatever is killed, and nothing damaged is read."""

import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels import SparseTeacher
from kdkernels.cache import CacheError, Reader, Writer

V, K, T = 300, 5, 2.0


def example(i, vocab=V):
    """-> tokens (R,), teacher logits (R, V)."""
    g = torch.Generator().manual_seed(i)
    rows = 3 + i % 4
    return torch.randint(vocab, (rows,), generator=g), 3 * torch.randn(rows, vocab, generator=g)


def write(folder, count, vocab=V, stop=None, **options):
    given = dict(vocab_size=vocab, k=K, temperature=T, teacher="big", data="text", shard_rows=12) | options
    with Writer(folder, **given) as writer:
        for i in range(len(writer), count):
            tokens, logits = example(i, vocab)
            writer.add(SparseTeacher.from_logits(logits, K, T), tokens)
    return folder


def files(folder) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def cache(tmp_path):
    return write(tmp_path / "cache", 11)


@pytest.mark.parametrize(("vocab", "kind"), [(V, "uint16"), (65535, "uint16"), (65536, "int32"), (70000, "int32")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_read_is_what_was_written(tmp_path, vocab, kind, dtype):
    reader = Reader(write(tmp_path / "c", 4, vocab, dtype=dtype), teacher="big", temperature=T)
    assert len(reader) == 4 and reader.about["indices"] == kind and reader.about["vocab_size"] == vocab
    for i in range(4):
        tokens, logits = example(i, vocab)
        want, got = SparseTeacher.from_logits(logits, K, T), reader.example(i, tokens)
        assert torch.equal(got.indices, want.indices) and got.values.dtype == dtype
        assert (got.values.float() - want.values).abs().max() <= torch.finfo(dtype).eps * want.values.abs().max()
        torch.testing.assert_close(got.log_tail, want.log_tail, rtol=1e-6, atol=1e-7)
        assert (got.temperature, got.tail) == (T, "bucket")


def test_rows_cross_shards(cache):
    reader = Reader(cache)
    whole = [reader[i] for i in range(len(reader))]
    assert len(reader.shards) > 2 and reader.rows == sum(map(len, whole))
    values, tails = torch.cat([x.values for x in whole]), torch.cat([x.log_tail for x in whole])
    for first, end in ((0, reader.rows), (0, 1), (7, 30), (reader.rows - 1, reader.rows), (12, 13)):
        part = reader.row_range(first, end)
        assert torch.equal(part.values, values[first:end]) and torch.equal(part.log_tail, tails[first:end])


def test_equal_examples_make_a_batch(cache):
    reader, numbers = Reader(cache), [9, 1, 5]
    tokens = torch.stack([example(i)[0] for i in numbers])
    batch = reader.examples(numbers, tokens)
    assert batch.shape == (3, 4, K)
    assert torch.equal(batch.values[1], reader[1].values)
    with pytest.raises(ValueError, match=r"equal numbers of rows, got \[3, 4\]"):
        reader.examples([0, 1])
    with pytest.raises(CacheError, match="example 1 was made from other tokens"):
        reader.examples(numbers, tokens[[0, 2, 1]])


def test_a_loss_of_a_cached_teacher(cache):
    tokens, logits = example(6)
    s = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    loss = kd.KDLoss(temperature=T)
    want = loss(s, SparseTeacher.from_logits(logits, K, T), tokens)
    torch.testing.assert_close(loss(s, Reader(cache).example(6, tokens), tokens), want, rtol=2e-3, atol=0)
    with pytest.raises(ValueError, match="tail at temperature 2, and the loss has a teacher at 1"):
        kd.ForwardKLLoss()(s, Reader(cache)[6])
    kd.ForwardKLLoss()(s, Reader(cache, tail="renormalise")[6])


def test_rows_with_fewer_classes_and_no_tail(tmp_path):
    indices = torch.tensor([[0, -1, 299], [5, 6, 7]])
    teacher = SparseTeacher(indices, logits=torch.tensor([[1.0, 9.0, 2.0], [3.0, -torch.inf, 1.0]]))
    with Writer(tmp_path / "c", vocab_size=V, k=3, log_tail=False) as writer:
        writer.add(teacher, torch.tensor([1, 2]))
    got = Reader(tmp_path / "c")[0]
    assert torch.equal(got.indices, indices) and got.log_tail is None and got.tail == "renormalise"
    s = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kd.ForwardKLLoss()(s, got), kd.ForwardKLLoss()(s, teacher), rtol=1e-3, atol=0)


def test_it_is_mapped_and_not_read(tmp_path):
    """A reader holds the pages it looks at, not the cache; and a worker process opens its files for itself."""
    reader = Reader(write(tmp_path / "c", 20))
    reader.verify()
    assert len(pickle.loads(pickle.dumps(reader))._files) == 0
    maps = Path("/proc/self/maps").read_text()
    assert all(str(reader._path(i)) in maps for i in range(len(reader.shards)))


class Killed(BaseException):
    pass


def test_a_kill_at_any_call_of_the_system(tmp_path, monkeypatch):
    """fsync and rename are where files change state: stop before each of them in turn, without a clean-up, go on."""
    whole, count = files(write(tmp_path / "whole", 11)), 0
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    while True:
        folder, left = tmp_path / f"killed-{count}", iter(range(count))

        def stopping(name, *args, left=left):
            if next(left, None) is None:
                raise Killed
            return real[name](*args)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, functools.partial(stopping, name))
            try:
                write(folder, 11)
                break
            except Killed:
                pass
        if (folder / "index.json").exists():  # what there is can be read
            partial = Reader(folder, partial=True)
            partial.verify()
            if not json.loads((folder / "index.json").read_text())["complete"]:
                with pytest.raises(CacheError, match=f"not complete: .* after {len(partial)} examples"):
                    Reader(folder)
                write(folder, 11)
        else:
            write(folder, 11)
        assert {n: x for n, x in files(folder).items() if not n.startswith(".")} == whole
        count += 1
    assert count >= 4 * 6  # a file is two fsyncs and a rename; five shards, and the index as often and once more


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import test_cache
print("ready", flush=True)
test_cache.write({folder!r}, 400)
"""


def test_kill_9_again_and_again(tmp_path):
    folder = tmp_path / "cache"
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    for shards in (4, 9):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            while len(list(folder.glob("shard-*"))) < shards:
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        with pytest.raises(CacheError, match=r"is not complete|no teacher cache"):
            Reader(folder)
    write(folder, 400)
    assert files(folder) == files(write(tmp_path / "whole", 400))


def damage(path, where, what):
    raw = bytearray(path.read_bytes())
    raw[where] ^= what
    path.write_bytes(raw)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def cut_to_nothing(path):
    path.write_bytes(b"")


def flip_a_bit_of_the_values(path):
    damage(path, -3, 1)


def flip_a_bit_of_the_header(path):
    damage(path, 20, 1)


def pickled(path):
    path.write_bytes(pickle.dumps({"indices": torch.zeros(3)}))


def from_another_cache(path):
    shutil.copy(write(path.parent.parent / "other", 11, teacher="small") / path.name, path)


def another_of_this_one(path):
    shutil.copy(path.parent / "shard-00000.safetensors", path)


def from_another_run(path):
    other = path.parent.parent / "other"
    with Writer(other, vocab_size=V, k=K, temperature=T, teacher="big", data="text", shard_rows=12) as writer:
        for i in range(50, 61):
            writer.add(SparseTeacher.from_logits(example(i)[1], K, T), example(i)[0])
    shutil.copy(other / path.name, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "is missing"),
        (truncate, "is damaged"),
        (cut_to_nothing, "is damaged"),
        (flip_a_bit_of_the_values, "its checksum is not the index's"),
        (flip_a_bit_of_the_header, "is damaged|belongs to another"),
        (pickled, "is damaged"),
        (from_another_cache, "belongs to another cache"),
        (another_of_this_one, "belongs to another cache, or to another place of this one"),
        (from_another_run, "from another run|is damaged"),
    ],
)
def test_a_shard_that_is_not_right_is_named(cache, harm, message):
    path = cache / "shard-00001.safetensors"
    harm(path)
    reader = Reader(cache)
    reader[0]  # the first shard is whole
    with pytest.raises(CacheError, match=f"{path.name}.*({message})"):
        reader[len(reader) // 2]
    with pytest.raises(CacheError, match=path.name):
        reader.verify()
    with pytest.raises(CacheError, match=path.name):
        reader.row_range(0, reader.rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[1]", "is damaged, or no index"),
        ("{}", "is damaged, or no index"),
        ('{"format": "other", "crc32": 1}', "of the format 'other'"),
    ],
)
def test_an_index_that_is_not_right_is_named(cache, text, message):
    (cache / "index.json").write_text(text)
    for use in (Reader, lambda folder: write(folder, 11)):
        with pytest.raises(CacheError, match=f"index.json.*{message}"):
            use(cache)


def test_an_index_that_was_edited_is_refused(cache):
    path = cache / "index.json"
    path.write_text(path.read_text().replace('"temperature": 2.0', '"temperature": 1.0'))
    with pytest.raises(CacheError, match=r"index.json is damaged: its checksum differs"):
        Reader(cache)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (dict(teacher="small"), "its teacher is 'big', not 'small'"),
        (dict(data="other"), "its data is 'text', not 'other'"),
        (dict(vocab_size=301), "its vocab_size is 300, not 301"),
        (dict(temperature=1.0), "its temperature is 2.0, not 1.0"),
    ],
)
def test_a_cache_of_something_else_is_refused(cache, wanted, message):
    with pytest.raises(CacheError, match=message):
        Reader(cache, **wanted)
    with pytest.raises(CacheError, match=message):
        write(cache, 12, **wanted)


def test_other_tokens_are_refused(cache):
    with pytest.raises(CacheError, match=r"shard-0000\d.safetensors: example 4 was made from other tokens"):
        Reader(cache).example(4, example(5)[0])


def test_wrong_use(cache, tmp_path):
    tokens, logits = example(0)
    one = SparseTeacher.from_logits(logits, K, T)
    with pytest.raises(CacheError, match="no teacher cache"):
        Reader(tmp_path)
    with pytest.raises(TypeError, match="has no 'top_k'; it has vocab_size, k"):
        Reader(cache, top_k=3)
    with pytest.raises(CacheError, match="is complete"):
        Writer(cache, vocab_size=V, k=K, temperature=T, teacher="big", data="text").add(one, tokens)
    with pytest.raises(ValueError, match="dtype must be"):
        Writer(tmp_path / "x", vocab_size=V, k=K, dtype=torch.float32)
    writer = Writer(tmp_path / "x", vocab_size=290, k=K, temperature=T)
    for wrong, message in [
        (SparseTeacher.from_logits(logits, 4, T), r"shape \(R, 5\), got \(3, 4\)"),
        (SparseTeacher.from_logits(logits, K, 1.0), "temperature 2, got 1"),
        (SparseTeacher(one.indices, one.values, temperature=T), "must have a log_tail"),
        (SparseTeacher(one.indices * 0 + torch.arange(290, 295), one.values, one.log_tail, temperature=T), "294"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.add(wrong, tokens)
    with pytest.raises(ValueError, match=r"k must be in \[1, 5\], got 8"):
        Writer(tmp_path / "y", vocab_size=5, k=8)
    for wrong in (slice(0, 2), 1.0, "0"):
        with pytest.raises(TypeError, match=r"example must be an int, got .*examples\(numbers\) reads several"):
            Reader(cache)[wrong]
    for number in (-1, 11):
        with pytest.raises(IndexError, match=rf"\[0, 11\), got {number}"):
            Reader(cache)[number]
    with pytest.raises(IndexError, match="at least one, got 4 to 4"):
        Reader(cache).row_range(4, 4)
