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
        steps = result["num_inference_steps"]
        assert row[4:8] == ["64×32", str(steps), "3.0", str(2 * steps)]


def test_the_differences_hold_the_metrics_and_columns_say_what_they_are(report, tmp_path):
    page, results = report
    seen = browser.ask(
        page,
        """const cells = (selector) => [...page.querySelectorAll(selector)];
        return {
          titles: Object.fromEntries(cells('#headline th[title]').map(h => [h.innerText, h.title])),
          meanings: Object.fromEntries(cells('#headline dt').map(t => [t.textContent, t.nextSibling.textContent])),
          differences: cells('#differences tr').map(r => [...r.cells].map(c => c.innerText.split('\\n')[0])),
        };""",
        *(1200, 900, tmp_path),
    )
    assert seen["titles"]["ocr_exact"] == "whether OCR reads exactly the text asked for"
    assert "1 - cosine" in seen["titles"]["diversity"]
    assert seen["meanings"].items() <= seen["titles"].items()
    heads, (name, *values) = seen["differences"]
    assert (heads, name) == (["checkpoint", "ocr_exact", "ocr_graded", "diversity"], "rough")
    checkpoints = results["checkpoints"].values()
    for shown, key in zip(values, heads[1:], strict=True):
        plain, rough = ({**c["rewards"], **c["metrics"]}[key]["value"] for c in checkpoints)
        assert float(shown) == pytest.approx(rough - plain, abs=6e-4)


def test_an_image_opens_large_with_its_prompt_seed_and_scores(report, tmp_path):
    page, _ = report
    seen = browser.ask(
        page,
        """const figure = [...page.querySelectorAll('figure')].find(f => f.innerText.startsWith('"7"'));
        const link = figure.querySelectorAll('a[data-about]')[1], large = page.getElementById('large');
        link.click();
        const opened = large.open;
        const answer = {
          href: link.getAttribute('href'), src: large.querySelector('img').getAttribute('src'),
          text: [...large.querySelectorAll('p')].map(p => p.textContent), opened,
          title: page.title,
        };
        large.click();
        return {...answer, closed: !large.open};""",
        *(1200, 900, tmp_path),
    )
    assert seen["opened"]
    assert seen["closed"]
    assert seen["src"].endswith(seen["href"])
    assert (page.parent / seen["href"]).is_file()
    prompt, about = seen["text"]
    assert prompt.strip() == HOSTILE
    assert about.startswith("rough, seed 0: ocr_exact ")
    assert "ocr_graded -" in about
    assert seen["title"] != "owned"


def test_a_click_on_a_heading_sorts_the_table(report, tmp_path):
    page, _ = report
    seen = browser.ask(
        page,
        """const table = page.querySelector('.slices table'), head = table.rows[0].cells[2];
        const column = () => [...table.rows].slice(1).map(r => parseFloat(r.cells[2].innerText));
        head.click();
        const falling = column();
        head.click();
        return {falling, rising: column(), sort: head.getAttribute('aria-sort')};""",
        *(1200, 900, tmp_path),
    )
    known = [value for value in seen["falling"] if value is not None]
    assert known == sorted(known, reverse=True)
    assert len(set(known)) > 1
    assert [value for value in seen["rising"] if value is not None] == sorted(known)
    assert seen["sort"] == "ascending"


def test_every_image_shows_and_every_part_is_there(report, tmp_path):
    page, results = report
    seen = browser.ask(
        page,
        """return {
          broken: [...page.images].filter(i => !i.naturalWidth).length,
          images: page.images.length,
          headings: [...page.querySelectorAll('h2')].map(h => h.innerText),
          steps: [...page.querySelectorAll('.strip')].map(s => s.children.length),
          bars: [...page.querySelectorAll('.bar b')].map(b => b.offsetWidth / b.parentNode.offsetWidth),
          histogram: page.querySelectorAll('polygon').length,
        };""",
        *(1200, 900, tmp_path),
    )
    assert seen["broken"] == 0
    assert seen["images"] >= 2 * 24
    assert seen["steps"] == [4, 2, 4, 2]  # two prompts, two checkpoints
    assert seen["bars"] == pytest.approx([e["value"] for e in results["wins"]["rough"].values()], abs=0.01)
    assert seen["histogram"] == 4
    for heading in ("Headline", "Wins over plain", "By group", "Side by side", "Worst of rough", "Step by step"):
        assert heading in seen["headings"]


@pytest.mark.parametrize("width", [1200, 390])
def test_quality_stands_against_network_evaluations_and_no_label_is_cut_or_covered(report, tmp_path, width):
    page, results = report
    seen = browser.ask(
        page,
        """const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
        const charts = [...page.querySelectorAll('#evaluations svg')];
        return {
          legend: [...page.querySelectorAll('#evaluations .legend span')].map(s => s.innerText),
          titles: charts.map(c => c.parentNode.querySelector('b').innerText),
          points: charts.map(c => [...c.querySelectorAll('title')].map(t => t.textContent)),
          intervals: charts.map(c => c.querySelectorAll('.interval').length),
          lines: charts.map(c => c.querySelector('polyline').points.length),
          frames: charts.map(box),
          labels: charts.map(c => [...c.querySelectorAll('text')].map(t => [t.textContent, ...box(t)])),
        };""",
        *(width, 900, tmp_path),
    )
    assert seen["titles"] == ["ocr_exact", "ocr_graded", "diversity"]
    assert seen["legend"] == ["plain"]  # the same weights and guidance, in 8 and in 4 evaluations
    assert seen["lines"] == [2, 2, 2]
    assert seen["intervals"] == [2, 2, 2]
    exact = {name: result["rewards"]["ocr_exact"]["value"] for name, result in results["checkpoints"].items()}
    for shown, start in zip(seen["points"][0], ("rough, NFE 4: ", "plain, NFE 8: "), strict=True):
        assert shown.startswith(f"{start}{exact[start.split(',')[0]]:.3f} [")
    for (left, top, right, bottom), labels in zip(seen["frames"], seen["labels"], strict=True):
        assert [text for text, *_ in labels if text in ("4", "8")] == ["4", "8"]
        for i, (_, x0, y0, x1, y1) in enumerate(labels):
            assert left <= x0 < x1 <= right
            assert top - 1 <= y0 < y1 <= bottom + 1
            assert all(x1 <= a or c <= x0 or y1 <= b or d <= y0 for _, a, b, c, d in labels[:i])


def test_checkpoints_of_equal_network_evaluations_get_no_such_charts(tmp_path):
    write_prompts([{"prompt": "12"}, {"prompt": "31"}], tmp_path / "p.jsonl")
    config = evaluate.EvalConfig(
        checkpoints=["one=tiny?guidance_scale=2", "two=tiny?num_inference_steps=2"],
        prompts_file=[str(tmp_path / "p.jsonl")],
        rewards=["ocr_exact"],
        num_inference_steps=1,
        guidance_scale=1.0,
        height=32,
        width=64,
        trajectory_prompts=0,
        output_dir=str(tmp_path / "out"),
    )
    results = evaluate.evaluate(config)
    assert [result["num_network_evaluations"] for result in results["checkpoints"].values()] == [2, 2]
    assert 'id="evaluations"' not in (tmp_path / "out" / "report.html").read_text()


def test_what_a_prompt_says_is_shown_and_not_run(report, tmp_path):
    page, _ = report
    seen = browser.ask(
        page,
        """return {title: page.title, scripts: page.scripts.length, text: page.body.innerText,
          handlers: page.querySelectorAll('[onerror]').length};""",
        *(1200, 900, tmp_path),
    )
    assert seen["title"] == "prx-post evaluation: plain against rough"
    assert (seen["scripts"], seen["handlers"]) == (1, 0)  # the script is the page's own
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
