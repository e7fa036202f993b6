"""The numbers that figures take from run folders, which are written by hand here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from figs import ablation, common, curves
from tests.files import refused
from utils.system.errors import UserError

Points = Mapping[int, tuple[float, float]]  # iteration: seconds, value


def run(root: Path, name: str, scores: Points, losses: Points | None = None, **options: Any) -> str:
    """A run folder's options and metrics."""
    folder = root / name
    folder.mkdir(parents=True)
    content = {"dataset": "digits", "niter": 10, "seed": 0, "tag": name, "results_dir": str(root), **options}
    (folder / "options.json").write_text(json.dumps({"options": content, "sessions": []}))
    losses = {it: (float(it), 1.0) for it in range(1, 11)} if losses is None else losses
    events = [{"iteration": it, "loss": value, "seconds": s} for it, (s, value) in losses.items()]
    events += [{"iteration": it, "accuracy_mean": value, "n": 1, "seconds": s} for it, (s, value) in scores.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(folder)


def two_strategies(root: Path) -> list[str]:
    """k-means with means 20, 38, 44 and random with means 10, 30, 37 at iterations 0, 4, 10."""
    return [
        run(root, "k0", {0: (0, 21), 4: (9, 37), 10: (23, 46)}, select="kmeans", seed=0),
        run(root, "k1", {0: (0, 19), 4: (11, 39), 10: (25, 42)}, select="kmeans", seed=1),
        run(root, "r0", {0: (0, 9), 4: (5, 30), 10: (13, 37.2)}, select="random", seed=0),
        run(root, "r1", {0: (0, 11), 4: (5, 30), 10: (13, 37.0)}, select="random", seed=1, device="cuda"),
    ]


def test_curves_say_when_a_group_reaches_the_end_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, out = two_strategies(tmp_path), tmp_path / "curves.pdf"
    assert curves.main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "select=kmeans reaches the final accuracy of select=random (37.1 %) at iteration 4 of 10: "
        "2.5 times fewer iterations, 1.3 times less time; by seed: 1.0, 2.5, 1.8 +- 1.1 (n=2)",
        "select=random never reaches the final accuracy of select=kmeans (44.0 %); its best is 37.1 %",
        f"wrote {out}",
    ]
    assert out.read_bytes().startswith(b"%PDF")


def test_the_factor_of_a_seed_says_when_a_run_begins_there_or_never_comes(tmp_path: Path) -> None:
    paths = [
        run(tmp_path, "k0", {0: (0, 40), 10: (9, 41)}, select="kmeans", seed=0),
        run(tmp_path, "k1", {0: (0, 20), 10: (9, 30)}, select="kmeans", seed=1),
        run(tmp_path, "r0", {0: (0, 10), 10: (9, 35)}, select="random", seed=0),
        run(tmp_path, "r1", {0: (0, 10), 10: (9, 35)}, select="random", seed=1),
    ]
    groups = common.group_runs(common.read_runs([Path(path) for path in paths]))
    (reached,) = curves.reaching(groups, "select=random")
    assert reached.by_seed == [float("inf"), 0] and str(reached).endswith("; by seed: at once, never")


def test_curves_of_the_published_statistic_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, out = two_strategies(tmp_path), tmp_path / "x.png"
    older = [*words, "--show_best", "--out", str(out)]
    refused(curves.main, older, words[0], "leave out --show_best", status=1, unchanged=tmp_path)
    for word in words:
        file = Path(word) / "metrics.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()]
        for event in events:
            if "accuracy_mean" in event:
                event["best_of_four"] = {"accuracy_mean": event["accuracy_mean"] + 5}
        file.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert curves.main([*words, "--out", str(out)]) == 0
    assert "chosen on the test set" not in capsys.readouterr().out
    assert curves.main([*words, "--show_best", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "accuracies: best of 4 tests %, as published: chosen on the test set"
    assert "the final accuracy of select=random (42.1 %) at iteration 4 of 10" in said[1]
    groups = common.group_runs(common.read_runs([Path(word) for word in words]))
    figure = curves.draw(groups, curves.reaching(groups, best=True), time=False, best=True)
    assert "chosen on the test set" in figure.axes[0].get_ylabel()
    assert figure.axes[0].lines[0].get_ydata().tolist() == [25, 43, 49]  # type: ignore[union-attr]


def test_a_curve_is_the_mean_over_repeats_with_their_sample_standard_deviation(tmp_path: Path) -> None:
    group = common.group_runs(common.read_runs([Path(word) for word in two_strategies(tmp_path)]))[0]
    curve = curves.accuracy(group)
    assert curve.std is not None
    assert curve.iterations.tolist() == [0, 4, 10] and curve.mean.tolist() == [20, 38, 44]
    assert curve.seconds.tolist() == [0, 10, 24]
    assert curve.std.tolist() == pytest.approx([2**0.5, 2**0.5, 8**0.5])


def test_repeats_are_averaged_where_all_of_them_have_been(tmp_path: Path) -> None:
    words = [
        run(tmp_path, "a", {0: (0, 10), 5: (5, 20), 10: (10, 30)}, seed=0, eval_every=5),
        run(tmp_path, "b", {0: (0, 20), 2: (2, 99), 10: (20, 50)}, seed=1, eval_every=2),
    ]
    (group,) = common.group_runs(common.read_runs([Path(word) for word in words]))
    curve = curves.accuracy(group)
    assert curve.iterations.tolist() == [0, 10] and curve.mean.tolist() == [15, 40]
    words.append(run(tmp_path, "c", {7: (0, 10)}, seed=2))
    refused(curves.main, words, words[0], "shares no iteration", status=1, unchanged=tmp_path)


def test_a_group_that_begins_above_the_goal_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        run(tmp_path, "a", {0: (0, 40), 10: (8, 50)}, init="kmeans"),
        run(tmp_path, "b", {0: (0, 10), 10: (8, 40)}, init="noise"),
        run(tmp_path, "c", {0: (0, 10), 10: (16, 60)}, init="random"),
    ]
    out = tmp_path / "x.png"
    assert curves.main([*words, "--out", str(out), "--baseline", "init=noise", "--no_time"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "init=kmeans reaches the final accuracy of init=noise (40.0 %) at iteration 0 of 10",
        "init=random reaches the final accuracy of init=noise (40.0 %) at iteration 10 of 10: "
        "as many iterations, 2.0 times more time",
        f"wrote {out}",
    ]
    with Image.open(out) as image:
        assert image.width > 2 * image.height


def test_curves_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "x.png"), *two_strategies(tmp_path)]
    bare = run(tmp_path, "bare", {}, select="random", seed=2)
    refused(curves.main, [*words, bare], bare, "--eval_every N", status=1, unchanged=tmp_path)
    refused(
        curves.main, [*words, "--baseline", "x"], "--baseline x", "select=kmeans; select=random", status=2,
        unchanged=tmp_path,
    )  # fmt: skip
    refused(curves.main, [*words, "--out", "x.jpg"], "--out", ".png or .pdf", status=2, unchanged=tmp_path)
    refused(curves.main, [*words, "--bse"], "--bse", "did you mean", status=2, unchanged=tmp_path)
    refused(curves.main, [], "RUN", status=2, unchanged=tmp_path)
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "x.png")
    refused(curves.main, [*words, "--out", below], f"--out {below}", "cannot be written", status=1, unchanged=tmp_path)


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    words = two_strategies(tmp_path)
    refused(curves.main, [str(tmp_path)], str(tmp_path), "no run folder", status=1, unchanged=tmp_path)
    refused(curves.main, [words[0], words[0]], words[0], "given twice", status=2, unchanged=tmp_path)
    same = run(tmp_path, "again", {10: (1, 1)}, select="random", seed=1)
    refused(curves.main, [*words, same], same, words[3], "no repeat", status=1, unchanged=tmp_path)
    metrics = Path(same) / "metrics.jsonl"
    metrics.write_text('{"iteration": 1, "seconds": 1, "loss": 2}\nnonsense\n')
    refused(curves.main, [same], f"{metrics}: line 2", status=1, unchanged=tmp_path)
    metrics.unlink()
    refused(curves.main, [same], str(metrics), "condense.py", status=1, unchanged=tmp_path)
    (Path(same) / "options.json").write_text("{}")
    refused(curves.main, [same], "options.json", status=1, unchanged=tmp_path)


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path: Path) -> None:
    folder = Path(run(tmp_path, "a", {}, {1: (1, 0.5)}))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 2, "lo')
    assert common.Run(folder).losses() == ([1], [1], [0.5])


def test_an_unfinished_run_is_drawn_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = run(tmp_path, "a", {0: (0, 10), 4: (4, 20)}, {4: (4, 1.0)})
    assert curves.main([word, "--out", str(tmp_path / "x.png")]) == 0
    assert f"warning: {word}: is unfinished, after 4 of 10 outer iterations" in capsys.readouterr().out


def test_times_include_those_of_the_experts(tmp_path: Path) -> None:
    folder = Path(run(tmp_path, "a", {0: (0, 10), 10: (60, 20)}, {10: (60, 0.5)}))
    (folder / "data.json").write_text(json.dumps({"expert_seconds": 30.0}))
    (group,) = common.group_runs(common.read_runs([folder]))
    assert group.runs[0].scores().seconds == [30, 90] and group.runs[0].losses() == ([10], [90], [0.5])
    assert curves.accuracy(group).minutes.tolist() == [0.5, 1.5]


def test_bars_are_the_final_accuracies_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        run(tmp_path, "c", {0: (0, 90), 10: (1, 60)}, interval=10),
        run(tmp_path, "a", {0: (0, 90), 10: (1, 50)}, interval=2, seed=0),
        run(tmp_path, "b", {10: (1, 54)}, interval=2, seed=1),
    ]
    (Path(words[1]) / "data.json").write_text(json.dumps({"random_real": {"accuracy_mean": 33.0}}))
    runs = common.read_runs([Path(word) for word in words])
    assert ablation.bars(common.group_runs(runs), ablation.the_flag(runs, None)) == [
        ablation.Bar(2, [50, 54], [33]),
        ablation.Bar(10, [60], []),
    ]
    out = tmp_path / "bars.png"
    assert ablation.main([*words, "--out", str(out), "--random_real", "--ymin", "20"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == ["interval=2: 52.0 +- 2.8 (n=2)", "interval=10: 60.0 (n=1)", f"wrote {out}"]
    with Image.open(out) as image:
        assert image.width > 300 and image.height > 350


def test_bars_need_one_flag_that_differs(tmp_path: Path) -> None:
    a, b = (run(tmp_path, name, {10: (1, 50)}, interval=i, ipc=i) for i, name in enumerate("ab", 1))
    out = ["--out", str(tmp_path / "x.png")]
    refused(ablation.main, [a, b, *out], "--flag", "ipc, interval", status=2, unchanged=tmp_path)
    refused(ablation.main, [a, b, "--flag", "ipc", *out], "differ in interval", status=2, unchanged=tmp_path)
    refused(ablation.main, [a, "--flag", "pic", *out], "--flag pic", "no such flag", status=2, unchanged=tmp_path)
    refused(ablation.main, [a, *out], "--flag", "no flag but their seeds", status=2, unchanged=tmp_path)
    refused(ablation.main, [a, "--flag", "ipc", "--random_real", *out], "--random_real", status=2, unchanged=tmp_path)
    bare = run(tmp_path, "bare", {}, interval=1, ipc=1, seed=1)
    refused(ablation.main, [a, bare, "--flag", "ipc", *out], bare, "no evaluation", status=1, unchanged=tmp_path)


def test_an_option_that_an_older_run_lacks_has_its_default(tmp_path: Path) -> None:
    a, b = run(tmp_path, "a", {}, select="kmeans"), run(tmp_path, "b", {}, seed=1)
    runs = common.read_runs([Path(a), Path(b)])
    assert common.differing(runs) == [] and len(common.group_runs(runs)) == 1


def test_a_class_is_found_by_name_before_number() -> None:
    names = ["7", "cat", "0"]
    assert [common.class_number(word, names, "--class") for word in ("cat", "0", "1", "7")] == [1, 2, 1, 0]
    assert common.class_numbers(None, [str(c) for c in range(30)]) == list(range(10))
    with pytest.raises(UserError, match=r"--class 3: no such class; use a name \(7, cat, 0\) or a number up to 2"):
        common.class_number("3", names, "--class")


def test_runs_of_different_methods_are_named_by_method_and_not_by_what_follows_from_it(tmp_path: Path) -> None:
    def made(name: str, **options: Any) -> Path:
        return Path(run(tmp_path, name, {10: (1, 50)}, **options))

    paths = [
        made("a", method="dc", select="random", metric="cos", interval=1, seed=0),
        made("b", method="dc", select="kmeans", metric="cos", interval=10, seed=0),
        made("c", method="dm", select="random", metric="mse", interval=1, seed=0),
        made("d", method="dm", select="random", metric="mse", interval=1, seed=1),
    ]
    assert common.differing(common.read_runs(paths[::2])) == ["method"]
    assert sorted(common.differing(common.read_runs(paths))) == ["method", "select"]
    other = made("e", method="dm", select="random", metric="l1", interval=1, seed=2)
    assert sorted(common.differing(common.read_runs([*paths, other]))) == ["method", "metric", "select"]
    paths += [made("f", method="dance", networks="middle", experts=5, seed=0)]
    assert sorted(common.differing(common.read_runs(paths))) == ["method", "select"]
    paths += [made("g", method="dm", networks="early", experts=5, metric="mse", select="random", interval=1, seed=0)]
    assert sorted(common.differing(common.read_runs(paths))) == ["method", "networks", "select"]
