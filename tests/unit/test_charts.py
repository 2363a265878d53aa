"""Points, lines and ticks of the report's line charts, by hand."""

import math

import pytest

from prx_post.evaluation.charts import axis_ticks, quality_charts, series_of
from prx_post.evaluation.metrics import Estimate
from prx_post.model.inference import Inference


def checkpoint(source, number, guidance=1.0, rewards=None, metrics=None):
    settings = {"source": source, "guidance_scale": guidance, "num_network_evaluations": number}
    return {**settings, "rewards": rewards or {}, "metrics": metrics or {}}


def scored(*values):
    """Checkpoints of NFE 1, 2, 4, ... of one source, with these estimates of one reward."""
    rewards = [{} if value is None else {"ocr": value} for value in values]
    return {"checkpoints": {f"s-{2**i}": checkpoint("s", 2**i, rewards=given) for i, given in enumerate(rewards)}}


def only_chart(summary):
    (chart,) = quality_charts(summary)[1]
    return chart


@pytest.mark.parametrize(("guidance", "number"), [(1.0, 8), (1.01, 16), (5.0, 16)])
def test_guidance_doubles_network_evaluations(guidance, number):
    assert Inference(8, guidance).num_network_evaluations == number


def test_a_series_is_of_one_source_and_one_guidance_by_network_evaluations():
    checkpoints = {
        "teacher": checkpoint("t", 56, 5.0),
        "student-8": checkpoint("s", 8),
        "student-4": checkpoint("s", 4),
        "teacher-8": checkpoint("t", 16, 5.0),
        "unguided": checkpoint("t", 28),
    }
    found = [(series.label, series.names) for series in series_of(checkpoints)]
    assert found == [
        ("teacher", ["teacher-8", "teacher"]),
        ("student", ["student-4", "student-8"]),
        ("unguided", ["unguided"]),
    ]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["student@8", "student@4"], "student"),
        (["my_student_8", "my_student_16"], "my_student"),
        (["a-b-18", "a-b-1"], "a-b"),
        (["student", "student-4"], "student"),
        (["step18", "step16"], "step18"),
        (["plain", "rough"], "plain"),
        (["-8", "-4"], "-8"),
        (["student-8"], "student-8"),
    ],
)
def test_a_series_is_named_by_what_its_names_begin_with(names, label):
    checkpoints = {name: checkpoint("s", 8 - i) for i, name in enumerate(names)}
    assert [series.label for series in series_of(checkpoints)] == [label]


def test_series_whose_names_begin_alike_are_told_apart():
    by_guidance = {"s-8": checkpoint("s", 8), "s-4": checkpoint("s", 4)}
    by_guidance |= {"s-8-cfg": checkpoint("s", 16, 4.5), "s-4-cfg": checkpoint("s", 8, 4.5)}
    assert [series.label for series in series_of(by_guidance)] == ["s, guidance 1", "s, guidance 4.5"]
    by_source = {"s-1": checkpoint("a", 1), "s-2": checkpoint("a", 2)}
    by_source |= {"s-3": checkpoint("b", 1), "s-4": checkpoint("b", 2)}
    assert [series.label for series in series_of(by_source)] == ["s-1", "s-3"]


def test_coordinates_by_hand():
    # The plot is 142 high (8 to 150). Values from 0 to 1, with a margin of 0.05: 142 / 1.1 to the unit, 0 above 150.
    # Three characters are 30.9 wide with their room, so the left edge is 34; points go from 48 to 278.
    unit = 142 / 1.1
    zero = 150 - 0.05 * unit
    chart = only_chart(scored(Estimate(0.25, 0.0, 0.5), Estimate(0.5), Estimate(1.0)))
    assert (chart.title, chart.lower_is_better, chart.left) == ("ocr", False, 34)
    (line,) = chart.lines
    assert [point.x for point in line.points] == pytest.approx([48, 163, 278])
    assert [point.y for point in line.points] == pytest.approx([zero - 0.25 * unit, zero - 0.5 * unit, zero - unit])
    assert (line.points[0].low, line.points[0].high) == pytest.approx((zero, zero - 0.5 * unit))
    assert (line.points[1].low, line.points[1].high) == (None, None)
    assert line.polyline == "48.0,111.3 163.0,79.0 278.0,14.5"
    assert [point.title for point in line.points] == [
        "s-1, NFE 1: 0.250 [0.000, 0.500]",
        "s-2, NFE 2: 0.500",
        "s-4, NFE 4: 1.000",
    ]
    assert [(tick.at, tick.label) for tick in chart.x_ticks] == [(48, "1"), (163, "2"), (278, "4")]
    assert [tick.label for tick in chart.y_ticks] == ["0.0", "0.5", "1.0"]
    assert [tick.at for tick in chart.y_ticks] == pytest.approx([zero, zero - 0.5 * unit, zero - unit])


def test_points_of_equal_network_evaluations_stand_beside_one_another():
    checkpoints = {
        "a": checkpoint("a", 4, rewards={"ocr": Estimate(0.5)}),
        "b": checkpoint("b", 4, rewards={"ocr": Estimate(0.5)}),
        "c": checkpoint("c", 8, rewards={"ocr": Estimate(0.7)}),
    }
    lines = only_chart({"checkpoints": checkpoints}).lines
    # "0.50" has four characters, so the left edge is 12 + 4 · 6.3 = 37.2, and NFE 4 is 14 further right
    assert [line.points[0].x for line in lines] == pytest.approx([51.2 - 2.5, 51.2 + 2.5, 278])
    assert [line.series for line in lines] == [0, 1, 2]


def test_what_has_no_value_is_left_out():
    chart = only_chart(scored(Estimate(0.1), None, Estimate(math.nan), Estimate(0.4)))
    assert [point.title for point in chart.lines[0].points] == ["s-1, NFE 1: 0.100", "s-8, NFE 8: 0.400"]
    assert [tick.label for tick in chart.x_ticks] == ["1", "2", "4", "8"]
    assert quality_charts(scored(None, None))[1] == []


def test_there_are_charts_only_of_different_network_evaluations():
    checkpoints = {name: checkpoint(name, 8, rewards={"ocr": Estimate(0.5)}) for name in "ab"}
    assert quality_charts({"checkpoints": checkpoints}) == ([], [])


def test_distances_to_real_images_say_that_lower_is_better():
    metrics = {"fid": Estimate(20.0), "diversity": Estimate(0.3)}
    rewards = {"fid": Estimate(1.0)}  # a reward may be called so
    checkpoints = {f"a-{n}": checkpoint("a", n, rewards=rewards, metrics=metrics) for n in (1, 2)}
    charts = quality_charts({"checkpoints": checkpoints})[1]
    assert [(chart.title, chart.lower_is_better) for chart in charts] == [
        ("fid", False),
        ("fid", True),
        ("diversity", False),
    ]


def test_equal_values_still_have_an_axis():
    chart = only_chart(scored(Estimate(0.0), Estimate(0.0)))
    assert [point.y for point in chart.lines[0].points] == [79, 79]  # the middle of 8 and 150
    assert [tick.label for tick in chart.y_ticks] == ["-0.4", "-0.2", "0.0", "0.2", "0.4"]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.26, 0.284, ["0.260", "0.265", "0.270", "0.275", "0.280"]),
        (-5.2, -0.1, ["-4", "-2"]),
        (17.0, 52.0, ["20", "30", "40", "50"]),
        (168_000, 250_000, ["180000", "200000", "220000", "240000"]),
        (1_000_100, 1_000_420, ["1.0001e+06", "1.0002e+06", "1.0003e+06", "1.0004e+06"]),
        (-0.00001, 0.00021, ["0", "5.0e-05", "1.0e-04", "1.5e-04", "2.0e-04"]),
    ],
)
def test_ticks_are_few_and_round(low, high, labels):
    assert axis_ticks(low, high)[1] == labels


def test_labels_without_room_are_left_out_but_never_the_last():
    # 230 units between log2 28 and log2 56: 30 stands at 23, 54 at 218, 56 at 230; two digits need 19
    rewards = {"ocr": Estimate(1.0)}
    checkpoints = {f"a-{n}": checkpoint("a", n, rewards=rewards) for n in (28, 29, 30, 54, 56)}
    chart = only_chart({"checkpoints": checkpoints})
    assert [tick.label for tick in chart.x_ticks] == ["28", "", "30", "", "56"]
