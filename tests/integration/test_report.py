"""The report as a browser shows it."""

import json

import pytest

from prx_post.evaluation import evaluate
from prx_post.tiny.datasets import prompt_set, write_prompts
from tests import browser

HOSTILE = '"7" </td><script>document.title = "owned"</script><img src=x onerror="document.title = \'owned\'">'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    browser.find()
    folder = tmp_path_factory.mktemp("report")
    long = " ".join(["wort" * 30, '"12"', *["and so on"] * 20])
    rows = [{"prompt": HOSTILE, "group": HOSTILE}, {"prompt": long}, *prompt_set("validation")]
    write_prompts(rows, folder / "p.jsonl")
    config = evaluate.EvalConfig(
        checkpoints=["plain=tiny", "rough=tiny?num_inference_steps=2"],
        prompts_file=[str(folder / "p.jsonl")],
        num_prompts=30,
        seeds=[0, 1],
        metrics=["diversity=judge"],
        rewards=["ocr_exact", "ocr_graded"],
        num_inference_steps=4,
        guidance_scale=3.0,
        height=32,
        width=64,
        batch_size=20,
        output_dir=str(folder / "out"),
    )
    evaluate.evaluate(config)
    return folder / "out" / "report.html", json.loads((folder / "out" / "results.json").read_text())


def test_the_headline_shows_the_results(report, tmp_path):
    page, results = report
    table = browser.ask(
        page,
        "return [...page.querySelectorAll('#headline tr')].map(r => [...r.cells].map(c => c.innerText.trim()));",
        *(1200, 900, tmp_path),
    )
    assert table[0][:4] == ["checkpoint", "ocr_exact", "ocr_graded", "diversity"]
    for row, (name, result) in zip(table[1:], results["checkpoints"].items(), strict=True):
        assert row[0] == name
        for cell, estimate in zip(row[1:3], result["rewards"].values(), strict=True):
            value, interval = cell.split("\n")
            assert float(value) == pytest.approx(estimate["value"], abs=5e-4)
            low, high = (float(end) for end in interval.strip("[]").split(", "))
            assert (low, high) == pytest.approx((estimate["low"], estimate["high"]), abs=5e-4)
        assert row[4:6] == [str(result["num_inference_steps"]), "3.0"]


def test_every_picture_shows_and_every_part_is_there(report, tmp_path):
    page, results = report
    seen = browser.ask(
        page,
        """return {
          broken: [...page.images].filter(i => !i.naturalWidth).length,
          pictures: page.images.length,
          headings: [...page.querySelectorAll('h2')].map(h => h.innerText),
          steps: [...page.querySelectorAll('.strip')].map(s => s.children.length),
          bars: [...page.querySelectorAll('.bar b')].map(b => b.offsetWidth / b.parentNode.offsetWidth),
          histogram: page.querySelectorAll('polygon').length,
        };""",
        *(1200, 900, tmp_path),
    )
    assert seen["broken"] == 0
    assert seen["pictures"] >= 2 * 24
    assert seen["steps"] == [4, 2, 4, 2]  # two prompts, two checkpoints
    assert seen["bars"] == pytest.approx([e["value"] for e in results["wins"]["rough"].values()], abs=0.01)
    assert seen["histogram"] == 4
    for heading in ("Headline", "Wins over plain", "By group", "Side by side", "Worst of rough", "Step by step"):
        assert heading in seen["headings"]


def test_what_a_prompt_says_is_shown_and_not_run(report, tmp_path):
    page, _ = report
    seen = browser.ask(
        page,
        """return {title: page.title, scripts: page.scripts.length, text: page.body.innerText,
          handlers: page.querySelectorAll('[onerror]').length};""",
        *(1200, 900, tmp_path),
    )
    assert seen["title"] == "prx-post evaluation: plain against rough"
    assert (seen["scripts"], seen["handlers"]) == (0, 0)
    assert HOSTILE in seen["text"]


def test_a_phone_scrolls_down_only(report, tmp_path):
    page, _ = report
    wide, shown = browser.ask(
        page,
        "return [page.documentElement.scrollWidth, page.documentElement.clientWidth];",
        *(390, 800, tmp_path),
    )
    assert shown == 390
    assert wide <= 390
