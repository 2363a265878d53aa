"""Preference pairs: which are usable, and what a batch of them holds."""

import json

import pytest
import torch

from prx_post.base.ranks import ALONE
from prx_post.data.buckets import Buckets
from prx_post.data.config import PreferenceConfig
from prx_post.data.encoders import Encoders
from prx_post.data.pairs import TIE, PairSource, prepare_pairs, read_pairs, without_contradictions
from prx_post.data.pairs import Pair as Pair_
from prx_post.data.plan import DrawPlan
from prx_post.data.rows import DataError
from prx_post.data.scan import Sample
from prx_post.data.source import timestep_and_noise
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.text import PromptCleaner
from prx_post.recipes.pairs import Pair
from tests.pairing import number_pairs, write_pairs


def prepared(folder, cache, out, **changes):
    config = PreferenceConfig(dataset_name=str(folder), height=32, width=64, cache_dir=str(cache), **changes)
    pipeline, rows = open_pipeline("tiny"), read_pairs(config)
    encoders = Encoders(pipeline, PromptCleaner(False), torch.device("cpu"), torch.float32)
    out.mkdir(exist_ok=True)
    return *prepare_pairs(config, rows, encoders, Buckets(pipeline, 32, 64), out, [], ALONE), encoders


def test_identical_images_duplicates_and_ties_are_left_out_counted_and_listed(warm_cache, tmp_path, capsys):
    a, b, c = number_pairs(3)
    same = Pair(b.prompt, b.chosen, b.chosen)
    tie = Pair(c.prompt, c.rejected, c.chosen)
    pairs, _, _ = prepared(write_pairs([a, same, b, a, c, tie], tmp_path / "set"), warm_cache, tmp_path / "run")
    assert [pair.number for pair in pairs] == [0, 2]
    lines = [json.loads(line) for line in (tmp_path / "run" / "filtered_pairs.jsonl").read_text().splitlines()]
    assert [(line["pair"], line["reason"].split()[0]) for line in lines] == [
        *((1, "both"), (3, "an"), (4, "another"), (5, "another"))
    ]
    assert "4 of 6 pairs say nothing and are left out" in capsys.readouterr().out


def test_the_same_images_under_another_prompt_are_another_pair(warm_cache, tmp_path):
    (a,) = number_pairs(1)
    pairs, _, _ = prepared(
        write_pairs([a, Pair("another", a.rejected, a.chosen)], tmp_path / "set"), warm_cache, tmp_path / "run"
    )
    assert len(pairs) == 2


def test_an_image_is_encoded_once_however_many_pairs_hold_it(tmp_path):
    a, b, _ = number_pairs(3)
    cross = Pair(a.prompt, a.chosen, b.rejected)
    pairs, cache, _ = prepared(write_pairs([a, b, cross], tmp_path / "set"), tmp_path / "cache", tmp_path / "run")
    assert len(pairs) == 3
    assert len(cache.latents._shard_of) == 4  # of six


def test_a_pair_with_a_missing_image_or_prompt_is_bad(warm_cache, tmp_path):
    a, b, c = number_pairs(3)
    broken = [a, Pair(b.prompt, b.chosen, b"no image"), Pair(" ", c.chosen, c.rejected)]
    folder = write_pairs(broken, tmp_path / "set")
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be used.*The first is pair 1, rejected"):
        prepared(folder, warm_cache, tmp_path / "run")
    pairs, _, _ = prepared(folder, warm_cache, tmp_path / "run", max_bad_fraction=0.7)
    assert [pair.number for pair in pairs] == [0]


def test_a_set_of_which_nothing_is_left_is_an_error(warm_cache, tmp_path):
    (a,) = number_pairs(1)
    folder = write_pairs([Pair(a.prompt, a.chosen, a.chosen)], tmp_path / "set")
    with pytest.raises(DataError, match="of whose 1 pairs none is left: both images are the same, for one"):
        prepared(folder, warm_cache, tmp_path / "run")


def test_columns_that_are_not_there_are_named(tmp_path):
    folder = write_pairs(number_pairs(1), tmp_path / "set")
    with pytest.raises(DataError, match="rejected_column is 'worse', but .* has only the columns prompt, chosen, reje"):
        read_pairs(PreferenceConfig(dataset_name=str(folder), rejected_column="worse"))
    with pytest.raises(DataError, match="chosen_column is 'chosen', but so is rejected_column"):
        read_pairs(PreferenceConfig(dataset_name=str(folder), rejected_column="chosen"))


def test_both_images_of_a_pair_have_one_prompt_noise_and_timestep(warm_cache, tmp_path):
    pairs, cache, encoders = prepared(write_pairs(number_pairs(4), tmp_path / "set"), warm_cache, tmp_path / "run")
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    plan = DrawPlan([sample.size for sample in chosen], 4, seed=0, num_steps=2)
    source = PairSource(chosen, None, cache, encoders, plan, 4, randomness=timestep_and_noise, pairs=pairs)
    (batch,) = source.batches(1)
    assert batch["t"].shape == (4,)
    assert batch["noise"].shape == batch["latents"].shape == batch["rejected"].shape
    places = {sample.row // 2: place for place, sample in enumerate(chosen)}
    for i, number in enumerate(places[row] for row in batch["rows"]):
        assert torch.equal(batch["latents"][i], cache.latents[chosen[number].image_key])
        assert torch.equal(batch["rejected"][i], cache.latents[rejected[number].image_key])
        length = int(batch["prompt_mask"][i].sum())
        assert torch.equal(batch["prompt_embeds"][i, :length], cache.embeddings[chosen[number].prompt_key])
    assert sorted(batch["rows"]) == [0, 1, 2, 3]


def test_pairs_may_stand_in_an_image_folder(warm_cache, tmp_path):
    folder, lines = tmp_path / "set", []
    folder.mkdir()
    for i, pair in enumerate(number_pairs(2)):
        (folder / f"{i}-a.png").write_bytes(pair.chosen)
        (folder / f"{i}-b.png").write_bytes(pair.rejected)
        line = {"prompt": pair.prompt, "chosen_file_name": f"{i}-a.png", "rejected_file_name": f"{i}-b.png"}
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    pairs, _, _ = prepared(folder, warm_cache, tmp_path / "run")
    assert [pair.chosen.prompt for pair in pairs] == [pair.prompt for pair in number_pairs(2)]
    rows = read_pairs(PreferenceConfig(dataset_name=str(folder)))
    assert rows.image_bytes(3) == number_pairs(2)[1].rejected


def test_a_tie_is_found_whatever_the_buckets_of_its_images(warm_cache):
    """The chosen image's bucket is the pair's, so the two ways round have images of different sizes."""

    def sample(row, image, size):
        return Sample(row, "a cat", size, f"{image}-{size[0]}x{size[1]}", "cat")

    wide, square = (384, 640), (512, 512)
    pairs = [
        Pair_(sample(0, "a", square), sample(1, "b", square)),
        Pair_(sample(2, "b", wide), sample(3, "a", wide)),
    ]
    kept, left_out = without_contradictions(pairs)
    assert kept == []
    assert {row.reason for row in left_out} == {TIE}


def test_nothing_left_after_decoding_is_an_error_and_a_pair_counts_once(tmp_path):
    (a,) = number_pairs(1)
    torn = Pair(a.prompt, a.chosen[:-60], a.rejected[:-60])
    folder = write_pairs([torn], tmp_path / "set")
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        prepared(folder, tmp_path / "cache", tmp_path / "run", max_bad_fraction=1.0)
