"""Accuracy over seconds: the numbers of the table and the lines of the figure, from run folders written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from figs import common, pace
from tests.figs.test_figs_runs import run
from tests.files import refused

Points = Sequence[tuple[float, float]]  # seconds without experts, accuracy


def timed(root: Path, name: str, points: Points, *, card: dict[str, Any] | None = None, **options: Any) -> str:
    """A run that ended by --seconds in its first outer iteration."""
    folder = Path(run(root, name, {}, {}, seconds=8, **options))
    events = [{"iteration": 0, "accuracy_mean": value, "seconds": seconds} for seconds, value in points]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "data.json").write_text(json.dumps({"finished": True, **(card or {})}))
    return str(folder)


def three_methods(root: Path) -> list[str]:
    """dream ends at 72 and 74 after 8 s; dance, after 1 s for its experts, is there at 4 and 8 s; dm never."""
    experts = {"expert_seconds": 1.0, "random_real": {"accuracy_mean": 40.0}}
    dance: dict[str, Any] = dict(method="dance", select="random", networks="middle", experts=5, card=experts)
    dm: dict[str, Any] = dict(method="dm", select="random", match="embed")
    return [
        timed(root, "a0", [(1, 50), (2, 60), (4, 70), (8, 72)], seed=0),
        timed(root, "a1", [(1.1, 52), (2.1, 62), (4.1, 71), (8, 74)], seed=1),
        timed(root, "b0", [(1, 66), (3, 72), (7, 80)], seed=0, **dance),
        timed(root, "b1", [(1, 65), (3, 73), (7, 82)], seed=1, **dance),
        timed(root, "c0", [(0, 9), (1, 40), (2, 60), (4, 60.2), (8, 60.4)], seed=0, **dm),
        timed(root, "c1", [(0, 11), (1, 42), (2, 62), (4, 62.2), (8, 62.4)], seed=1, **dm),
    ]


TABLE = [
    ["digits, ipc 1", "accuracy % at the end", "seconds", "of them experts",
     "times sooner at the 73.0 % of dream, select=kmeans", "stops paying"],
    ["dream, select=kmeans", "73.0 +- 1.4 (n=2)", "8", "0", "1.0 +- 0.0 (n=2)", "still rising"],
    ["dance, select=random", "81.0 +- 1.4 (n=2)", "8", "1", "1.5 +- 0.7 (n=2)", "still rising"],
    ["dm, select=random", "61.4 +- 1.4 (n=2)", "8", "0", "never (n=2)", "at 61.0 %, after 2 s"],
]  # fmt: skip


def test_the_table_says_when_a_method_gets_there_and_where_it_stops_paying(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, out = three_methods(tmp_path), tmp_path / "pace.png"
    assert pace.main([*words, "--out", str(out), "--table", str(tmp_path / "pace.md")]) == 0
    said = capsys.readouterr().out
    assert "unfinished" not in said and out.read_bytes().startswith(b"\x89PNG")
    assert said.startswith(pace.text(TABLE) + "\n")
    first, rule, *rows = (tmp_path / "pace.md").read_text().splitlines()
    assert [line.strip("| ").split(" | ") for line in (first, *rows)] == TABLE and rule == "|---" * 6 + "|"


def test_what_is_saved_gives_the_same_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, saved = three_methods(tmp_path), str(tmp_path / "pace.json")
    out = ["--out", str(tmp_path / "x.png"), "--baseline", "dm, select=random"]
    assert pace.main([*words, "--save", saved, *out]) == 0
    said, drawn = capsys.readouterr().out.replace(f"wrote {saved}\n", ""), (tmp_path / "x.png").read_bytes()
    assert "61.4 % of dm, select=random" in said
    assert pace.main([saved, *out]) == 0
    assert capsys.readouterr().out == said and (tmp_path / "x.png").read_bytes() == drawn


def test_a_method_has_one_colour_and_is_dashed_without_representatives(tmp_path: Path) -> None:
    for number, ipc in enumerate((1, 10)):
        for select in ("kmeans", "random"):
            for networks, experts, card in (("fresh", 10, {}), ("early", 5, {"expert_seconds": 2})):
                name, pool = f"{number}{select}{networks}", {"networks": networks, "experts": experts}
                timed(tmp_path, name, [(0, 10), (1, 50), (8, 60)], card=card, ipc=ipc, select=select, **pool)
    rows = pace.measured(sorted(tmp_path.iterdir()))
    assert {row.label for row in rows} == {
        "dream, select=kmeans", "dream, select=random", "dream, networks=early, select=kmeans",
        "dream, networks=early, select=random",
    }  # fmt: skip
    panels = pace.in_panels(rows, None)
    figure = pace.draw(panels)
    assert [axes.get_title() for axes in figure.axes] == ["digits, ipc 1", "digits, ipc 10"] == list(map(str, panels))
    for (panel, lines), axes in zip(panels.items(), figure.axes, strict=True):
        drawn = [line for line in axes.lines if len(line.get_xdata()) > 1]  # type: ignore[arg-type]
        looks = {line.label: (d.get_color(), d.get_linestyle()) for line, d in zip(lines, drawn, strict=True)}
        assert {label: style for label, (_, style) in looks.items()} == {
            line.label: "--" if "random" in line.label else "-" for line in lines
        }, panel
        colours = {label: colour for label, (colour, _) in looks.items()}
        assert colours["dream, select=kmeans"] == colours["dream, select=random"]
        assert len(set(colours.values())) == 2
        early = next(d for line, d in zip(lines, drawn, strict=True) if "early" in line.label)
        assert list(early.get_xdata()) == [2, 3, 10]  # type: ignore[arg-type]
        triangles = [line.get_xdata() for line in axes.lines if line.get_marker() == "^"]
        assert list(map(list, triangles)) == [[2], [2]]  # type: ignore[arg-type]


def test_a_place_without_a_panel_stays_empty(tmp_path: Path) -> None:
    runs = [timed(tmp_path, f"p{ipc}", [(1, 50), (2, 60)], ipc=ipc) for ipc in (1, 10, 50)]
    figure = pace.draw(pace.in_panels(pace.measured([Path(r) for r in runs]), None))
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles == ["digits, ipc 1", "digits, ipc 10", "digits, ipc 50"] and len(figure.axes) == 4


def test_repeats_with_other_numbers_of_evaluations_are_averaged_at_the_nearest_times(tmp_path: Path) -> None:
    timed(tmp_path, "a", [(0, 10), (1, 30), (2, 40), (4, 50), (8, 60)], seed=0)
    timed(tmp_path, "b", [(2.2, 50), (4.2, 60), (8, 80)], seed=1)
    ((line,),) = pace.in_panels(pace.measured(sorted(tmp_path.iterdir())), None).values()
    assert line.curve.seconds.tolist() == pytest.approx([2.1, 4.1, 8]) and line.curve.mean.tolist() == [45, 55, 70]


def test_a_method_that_pauses_and_rises_again_still_pays(tmp_path: Path) -> None:
    pausing = [(1, 50), (2, 50.1), (4, 50.2), (8, 60)]
    rows = [pace.Timed("digits", 1, {"method": "dm", "select": "random"}, seed, [s for s, _ in pausing],
                       [a + seed for _, a in pausing], 0.0, None) for seed in (0, 1)]  # fmt: skip
    assert pace.Line(rows).stops_paying == "still rising"
    assert pace.Line(rows[:1]).stops_paying == "unknown: one seed"
    assert "too few" in pace.Line([pace.Timed(*row_of(r, [8.0], [60.0])) for r in rows]).stops_paying


def row_of(run: pace.Timed, seconds: list[float], accuracies: list[float]) -> tuple[Any, ...]:
    return run.dataset, run.ipc, run.parts, run.seed, seconds, accuracies, run.expert_seconds, run.random_real


def test_a_name_says_what_the_method_leaves_open(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {}, {"networks": "early", "experts": 5}, {"networks": "early", "experts": 5, "keep": 0.2},
        {"method": "dance", "networks": "middle", "experts": 7, "select": "random"},
    ]  # fmt: skip
    words = [timed(tmp_path, str(i), [(8, 60)], **options) for i, options in enumerate(rows)]
    assert [run.name for run in pace.measured(list(map(Path, words)))] == [
        "dream", "dream, networks=early", "dream, networks=early, keep=0.2", "dance",
    ]  # fmt: skip


def test_without_dream_times_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = timed(tmp_path, "c", [(8, 60)], method="dm", select="random")
    assert pace.main([word, "--out", str(tmp_path / "x.pdf")]) == 0
    assert "sooner" not in capsys.readouterr().out


def test_mistakes_are_named(tmp_path: Path) -> None:
    words, out = three_methods(tmp_path), ["--out", str(tmp_path / "x.png")]
    labels = "dream, select=kmeans; dance, select=random; dm, select=random"
    refused(pace.main, [*words, "--baseline", "dm", *out], "--baseline dm", labels, status=2, unchanged=tmp_path)
    bare = timed(tmp_path, "bare", [], seed=3)
    refused(pace.main, [*words, bare, *out], bare, "no evaluation", status=1, unchanged=tmp_path)
    again = timed(tmp_path, "again", [(8, 1)], seed=1)
    refused(pace.main, [*words, again, *out], again, words[1], "no repeat", status=1, unchanged=tmp_path)
    for card in ({"expert_seconds": "1"}, {"random_real": {"accuracy_mean": [1]}}, {"expert_seconds": float("nan")}):
        odd = timed(tmp_path, f"odd{len(list(tmp_path.iterdir()))}", [(8, 1)], card=card)
        refused(pace.main, [odd, *out], f"{odd}/data.json", next(iter(card)), status=1, unchanged=tmp_path)
    odd = timed(tmp_path, "odd", [(8, "x")])  # type: ignore[list-item]
    refused(pace.main, [odd, *out], odd, "accuracies are damaged", status=1, unchanged=tmp_path)
    good = {"dataset": "digits", "ipc": 1, "parts": {"method": "dm", "select": "random"}, "seed": 0, "seconds": [1, 2],
            "accuracies": [3, 4], "expert_seconds": 0, "random_real": None}  # fmt: skip
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [good]}))
    assert [row.label for row in pace.read(file)] == ["dm, select=random"]
    changes: list[dict[str, Any]] = [
        {"seconds": [2, 1]}, {"seconds": [1]}, {"accuracies": ["3", 4]}, {"parts": []}, {"parts": {}}, {"colour": 1},
        {"seconds": 1}, {"seconds": [-1, 2]}, {"dataset": ["x"]}, {"parts": {"method": [], "select": "random"}},
    ]  # fmt: skip
    contents: list[dict[str, Any]] = [{"rows": [{**good, **change}]} for change in changes]
    for content in (*contents, {}, {"rows": 1}, {"rows": [1]}, {"rows": []}):
        file.write_text(json.dumps(content))
        refused(pace.main, [str(file), *out], str(file), "name another", status=1, unchanged=tmp_path)


def test_an_unfinished_run_of_seconds_is_still_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = timed(tmp_path, "a", [(1, 50), (8, 60)], card={"finished": False})
    assert pace.main([word, "--out", str(tmp_path / "x.png")]) == 0
    assert f"warning: {word}: is unfinished" in capsys.readouterr().out
    assert common.Run(Path(word)).scores() == ([0], [8], [60])  # in figs.curves, the last of an outer iteration
