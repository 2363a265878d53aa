import pytest
import torch

from prx_post.base.errors import PrxPostError
from prx_post.data import cache as cache_module
from prx_post.data.cache import TensorCache, check_free_space, content_key, fingerprint


def test_what_is_written_is_read_back_bit_for_bit_by_another_instance(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(2).to(torch.bfloat16)}
    TensorCache(tmp_path).write(tensors.items())
    again = TensorCache(tmp_path)
    for key, tensor in tensors.items():
        assert key in again
        assert again[key].dtype == tensor.dtype
        assert torch.equal(again[key], tensor)
    assert "c" not in again


def test_large_writes_are_split_into_shards_and_nothing_computed_is_lost_by_an_error_later_on(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 100)

    def items():
        for i in range(10):
            yield str(i), torch.full((10,), float(i))  # 40 bytes each: a shard every 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorCache(tmp_path).write(items())
    again = TensorCache(tmp_path)
    assert [str(i) in again for i in range(10)] == [True] * 10
    assert again["9"][0].item() == 9.0


def test_a_damaged_shard_is_named_and_its_content_is_a_miss(tmp_path, capsys):
    TensorCache(tmp_path).write([("a", torch.zeros(3))])
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:20])
    again = TensorCache(tmp_path)
    assert "a" not in again
    assert f"{shard} is damaged" in capsys.readouterr().out
    again.write([("a", torch.ones(3))])
    assert TensorCache(tmp_path)["a"].sum().item() == 3.0


def test_a_full_disk_while_writing_is_one_line_and_leaves_no_rubbish(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.raises(PrxPostError, match="cannot be written: .*No space left"):
        TensorCache(tmp_path).write([("a", torch.zeros(3))])
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_shard_is_not_picked_up(tmp_path):
    (tmp_path / ".abc.partial").write_bytes(b"half")
    assert "abc" not in TensorCache(tmp_path)


def test_fingerprint_follows_content_not_names_or_dates(tmp_path):
    def folder(name: str, weights: bytes):
        path = tmp_path / name / "vae"
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(weights)
        return path

    first, copy, other = folder("a", b"weights"), folder("b", b"weights"), folder("c", b"Weights")
    cache_dir = tmp_path / "cache"
    assert fingerprint(cache_dir, first) == fingerprint(cache_dir, copy)
    assert fingerprint(cache_dir, first) != fingerprint(cache_dir, other)
    (first / "model.safetensors").write_bytes(b"changed")  # the remembered digest must not be used
    assert fingerprint(cache_dir, first) != fingerprint(cache_dir, copy)


def test_too_little_disk_is_an_error_that_says_how_much_is_needed(tmp_path):
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(PrxPostError, match=r"must have 1048576\.0 GiB.* Choose another cache_dir, or cache: none"):
        check_free_space(tmp_path / "not" / "yet", 2**50)


def test_keys_are_content_digests():
    assert content_key("472") == content_key(b"472") != content_key("473")
