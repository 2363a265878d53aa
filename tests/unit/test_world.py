import itertools

import numpy as np
import pytest

from prx_post.model.text import PromptCleaner
from prx_post.tiny import datasets, world
from prx_post.tiny.handwriting import POOL_BOUNDS, digit_pools, write_number


def test_numbers_are_split_by_value_without_overlap():
    splits = world.split_of_numbers()
    assert {name: len(numbers) for name, numbers in splits.items()} == {"test": 120, "validation": 60, "train": 810}
    assert sorted(n for numbers in splits.values() for n in numbers) == list(range(10, 1000))


def test_captions_come_in_digits_and_five_languages():
    captions = [world.caption(472, form) for form in world.FORMS]
    assert captions[:2] == ["472", "four hundred and seventy-two"]
    assert captions[3] == "vierhundertzweiundsiebzig"
    assert len(set(captions)) == 6


def test_the_pipelines_cleaning_keeps_every_caption_and_its_number():
    clean = PromptCleaner()
    for number in world.NUMBERS:
        for form in world.FORMS:
            assert world.number_of(clean(world.caption(number, form))) == number
    assert world.number_of("a red cube") is None


def test_pools_of_digits_never_mix():
    bounds = sorted(POOL_BOUNDS.values())
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(bounds))
    pools = digit_pools()
    seen = {name: {p.tobytes() for digits in pool for p in digits} for name, pool in pools.items()}
    assert not seen["generator"] & seen["judge"]
    assert not (seen["generator"] | seen["judge"]) & seen["reference"]


def test_a_image_is_dark_ink_on_white_paper_of_the_worlds_size():
    image = write_number(88, "generator", np.random.default_rng(0))
    assert (image.mode, image.size) == ("RGB", (64, 32))
    grey = np.asarray(image.convert("L"))
    assert grey[0].min() == 255  # the edge is paper
    assert 0.03 < (grey < 128).mean() < 0.4


def test_training_sets_never_show_or_name_a_held_out_number():
    held_out = {*world.split_of_numbers()["test"], *world.split_of_numbers()["validation"]}
    images = [p for p, _ in zip(datasets.pretraining_images(0), range(3000), strict=False)]
    assert not held_out & {p.number for p in images}
    assert not held_out & {world.number_of(p.prompt) for p in images}
    wrong = np.mean([world.number_of(p.prompt) != p.number for p in images])
    assert wrong == pytest.approx(datasets.PRETRAIN_WRONG_CAPTIONS, abs=0.03)


def test_prompt_sets_ask_for_every_number_of_a_split_in_every_form():
    rows = datasets.prompt_set("validation")
    assert len(rows) == 60 * 6
    assert {row["group"] for row in rows} == set(world.FORMS)
    assert all(world.number_of(row["prompt"]) == int(row["target"]) for row in rows)
