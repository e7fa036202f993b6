"""Figures that draw images and networks, at a tiny size."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

import condense
import models
from figs import ablation, common, compare, curves, distilled, evolution, gradient_norms, selection, subject
from tests.files import image_folder, refused
from utils.method.selection import select
from utils.system.errors import UserError

TINY = shlex.split(
    "--device cpu --niter 1 --inner_loop 2 --interval 2 --batch_real 4 --n_data 4 --width 4 --epochs 1 --repeat 2"
)
NETWORK = shlex.split("--device cpu --width 4 --updates 2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run folders of two strategies, the first one with two seeds."""
    root = tmp_path_factory.mktemp("results")
    for select_by, seed in (("kmeans", 0), ("kmeans", 1), ("random", 0)):
        words = ["--niter", "2", "-f", "2", "--eval_every", "1", "--snapshot_every", "1", "--select", select_by]
        words += ["--seed", str(seed), "--tag", f"{select_by}{seed}", "--results_dir", str(root)]
        assert condense.main([*TINY, *words]) == 0
    return sorted(root.glob("digits/*"))


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_a_picture_has_a_row_per_class(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "picture.png"
    assert distilled.main([str(runs[0]), "--out", str(out), "--classes", "3", "8", "0", "--columns", "3"]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    width, height = size(out)
    side = 72 + 4  # 3 columns and 3 rows of enlarged 8 x 8 images, and names of one letter
    assert 3 * side < width < 4 * side and 3 * side - 4 <= height < 3 * side + 20
    refused(distilled.main, [str(tmp_path), "--out", str(out)], "no such file", status=1, unchanged=tmp_path)


def test_the_tiles_of_a_mosaic_are_the_images() -> None:
    rows = [torch.rand(2, 1, 8, 8), torch.rand(1, 3, 8, 8)]
    picture, centres, step = common.mosaic(rows, apart=[1])
    assert picture.shape == (72 + 4 + 12 + 72, 2 * 72 + 4, 3) and centres == [36, 72 + 16 + 36] and step == 76
    assert torch.equal(
        torch.from_numpy(picture[4:72:9, 76 + 4 : 148 : 9, 1].copy()), (rows[0][1, 0] * 255).round().byte()
    )
    assert torch.equal(
        torch.from_numpy(picture[92::9, 4:72:9].copy()), (rows[1][0] * 255).round().byte().permute(1, 2, 0)
    )
    assert (picture[72:88] == 255).all() and (picture[88:, 76:] == 255).all()


def test_runs_are_compared_class_by_class(runs: list[Path], tmp_path: Path) -> None:
    out, words = tmp_path / "new" / "compare.png", [str(run) for run in runs]
    assert compare.main([*words, "--classes", "2", "7", "--columns", "3", "--out", str(out), "--pdf"]) == 0
    width, height = size(out)
    assert width > 3 * 76 + 100 and 6 * 76 < height < 7 * 76
    assert out.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    here = ["--out", str(out)]
    refused(compare.main, [words[0], *here], "RUN", "two", status=2, unchanged=tmp_path)
    refused(compare.main, [words[0], words[0], *here], words[0], "twice", status=2, unchanged=tmp_path)
    refused(
        compare.main, [*words, "--classes", "10", *here], "--classes 10", "number up to 9", status=2, unchanged=tmp_path
    )


def test_runs_are_drawn_side_by_side_under_titles(runs: list[Path], tmp_path: Path) -> None:
    out, words = tmp_path / "blocks.png", [str(runs[0]), str(runs[2]), "--side_by_side", "--columns", "3"]
    here = ["--out", str(out)]
    assert compare.main([*words, "--classes", "2", "7", "--titles", "DC", "DC + DREAM", *here]) == 0
    width, height = size(out)
    assert 6 * 76 + compare.BETWEEN - 8 < width < 7 * 76 + compare.BETWEEN and 2 * 76 < height < 3 * 76
    names, first = common.decoded(runs[0])
    _, second = common.decoded(runs[2])
    figure = compare.draw_blocks([[first[c][:3], second[c][:3]] for c in (2, 7)], [names[2], names[7]], ["a", "b"])
    picture = torch.from_numpy(figure.axes[0].images[0].get_array())
    left, right = picture[:, : 3 * 76 - 4], picture[:, 3 * 76 - 4 + compare.BETWEEN :]
    for block, images in ((left, first), (right, second)):
        for row, c in enumerate((2, 7)):
            seen = block[row * 76 : row * 76 + 72 : 9, 76 : 76 + 72 : 9, 0]  # its second image
            assert torch.equal(seen, (images[c][1, 0] * 255).round().byte())
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b", "2", "7"]
    small, large = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 16, 16)  # of other tile sides: 72 and 64
    assert compare.draw_blocks([[small, large]], ["x"], ["a", "b"]).axes[0].images[0].get_size() == (72, 2 * 148 + 40)
    refused(compare.main, [*words, "--titles", "DC", *here], "--titles", "1 for 2 runs", status=2, unchanged=tmp_path)


def test_labels_name_what_differs_and_the_seed_where_it_is_needed(runs: list[Path]) -> None:
    found = common.read_runs(runs)
    assert [run.options["seed"] for run in found] == [0, 1, 0]
    assert common.run_labels(found) == ["select=kmeans, seed=0", "select=kmeans, seed=1", "select=random, seed=0"]
    assert common.run_labels(found[1:]) == ["select=kmeans", "select=random"]
    assert [str(group) for group in common.group_runs(found)] == ["select=kmeans (n=2)", "select=random (n=1)"]
    assert [str(group) for group in common.group_runs(found[:2])] == ["digits, ipc=1, factor=2 (n=2)"]


def test_real_runs_give_curves_and_bars(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, out = [str(run) for run in runs], tmp_path / "figure.png"
    assert [len(common.Run(run).losses().values) for run in runs] == [2, 2, 2]
    assert [common.Run(run).scores().iterations for run in runs] == [[0, 1, 2]] * 3
    assert curves.main([*words, "--out", str(out)]) == 0
    assert 850 < size(out)[0] < 920 and size(out)[1] > 550
    assert curves.main([*words, "--out", str(out), "--no_time", "--baseline", "select=random"]) == 0
    assert 850 < size(out)[0] < 920 and size(out)[1] < 450
    said = capsys.readouterr().out
    assert "select=kmeans " in said and "the final accuracy of select=random" in said
    assert ablation.main([*words, "--random_real", "--out", str(out)]) == 0
    assert "select=random: " in capsys.readouterr().out


def test_snapshots_become_a_strip_and_an_animation(runs: list[Path], tmp_path: Path) -> None:
    out, gif = tmp_path / "strip.png", tmp_path / "moving.gif"
    assert evolution.main([str(runs[0]), "--classes", "1", "4", "--out", str(out), "--gif", str(gif)]) == 0
    width, height = size(out)
    assert width > 3 * 76 and 2 * 76 < height < 3 * 76
    with Image.open(gif) as image:
        assert len(list(ImageSequence.Iterator(image))) == 3
        # Four decoded images per class: two classes in a line.
        assert image.size == (8 * 76 - 4, 5 * 76 - 4 + evolution.HEAD)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("data.pt", "data.json", "options.json"):
        shutil.copy(runs[0] / name, bare / name)
    here = ["--out", str(out)]
    refused(evolution.main, [str(bare), *here], str(bare), "--snapshot_every N", status=1, unchanged=tmp_path)
    refused(evolution.main, [str(runs[0]), "--image", "4", *here], "--image 4", "up to 3", status=2, unchanged=tmp_path)
    refused(evolution.main, [str(runs[0]), "--gif", "x.png", *here], "--gif", ".gif", status=2, unchanged=tmp_path)


def test_a_strip_holds_the_first_and_the_last_snapshot() -> None:
    found = [(it, Path(str(it))) for it in range(0, 110, 10)]
    assert [it for it, _ in evolution.spread(found, 3)] == [0, 50, 100]
    assert evolution.spread(found, 11) == evolution.spread(found, 50) == found


@pytest.mark.parametrize("network", ["convnet2", "resnet10"])  # instance and batch norm
def test_gradient_norms_equal_those_of_one_image_at_a_time(network: str) -> None:
    torch.manual_seed(0)
    net = models.build(models.resolve(network, channels=3, classes=4, side=8, width=4)).double().eval()
    x, y = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    weights = [p for m in net.modules() if isinstance(m, torch.nn.Conv2d) for p in [m.weight]]
    found = gradient_norms.gradient_norms(net, x, y)
    for gradient, parameters in ((gradient_norms.ALL, list(net.parameters())), (gradient_norms.CONVOLUTIONS, weights)):
        for got, image, label in zip(found[gradient], x, y, strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(net(image[None]), label[None]), parameters)
            assert got.item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-12)


def test_gradient_norms_of_digits_are_drawn_tabulated_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, record = tmp_path / "norms.png", tmp_path / "norms.jsonl"
    words = [*NETWORK, "2", "0", "--count", "8", "20", "--draws", "3", "--save", str(record), "--out", str(out)]
    assert gradient_norms.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert said.count(f"wrote {record}") == 2 and said[2] == "gradient norms, class 0 of digits, convnet2"
    lines = said[4:-1]
    assert len(lines) == 2 * 2 * (1 + 2 * 2) and "published" not in "".join(said)
    assert [line.split()[0] for line in lines] == ["0"] * 10 + ["2"] * 10
    assert [line.split()[4:6] for line in lines[1:5]] == [
        ["random", "8"], ["representatives", "8"], ["random", "20"], ["representatives", "20"]
    ]  # fmt: skip
    assert "(3 draws)" in lines[1] and 850 < size(out)[0] < 920
    picture = out.read_bytes()

    about, states = gradient_norms.read(record)
    assert about["class"] == "0" and [state.updates for state in states] == [0, 2]
    for row in states[1].rows:
        assert sum(row.histogram) == pytest.approx(row.n, abs=0.1)
    assert gradient_norms.main([str(record), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == said[2:] and out.read_bytes() == picture
    assert gradient_norms.main([str(record), "--at", "0", "--out", str(out)]) == 0
    assert out.read_bytes() != picture
    here = ["--out", str(out)]
    refused(
        gradient_norms.main, [str(record), "--at", "1", *here], "--at 1", "0, 2 updates", status=2, unchanged=tmp_path
    )
    refused(gradient_norms.main, [*NETWORK, "--at", "1", *here], "--at 1", "--updates", status=2, unchanged=tmp_path)
    refused(gradient_norms.main, [str(out), *here], str(out), "no file of --save", status=1, unchanged=tmp_path)


def test_published_norms_stand_below_ours() -> None:
    lines = gradient_norms.table([], gradient_norms.PUBLISHED["cifar10", "airplane"]).splitlines()
    assert [line.split()[-4:] for line in lines[1:]] == [
        ["random,", "published", "10.0", "8.8"], ["representatives,", "published", "6.4", "7.1"]
    ]  # fmt: skip


def test_networks_on_the_way_do_not_change_what_comes_after_them() -> None:
    parser = common.figure_parser("x", None)
    subject.add_flags(parser, count=8)
    straight, stopping = (subject.prepare(common.parse(parser, NETWORK), count=8, updates=2) for _ in range(2))
    straight.train(2)
    list(gradient_norms.measured(stopping, [0, 1, 2], [8], 1))
    assert stopping.about == "convnet2 after 2 updates" and not stopping.net.training
    for name, value in straight.net.state_dict().items():
        assert torch.equal(value, stopping.net.state_dict()[name]), name


def test_the_network_is_that_of_the_first_outer_iteration_of_condense(tmp_path: Path) -> None:
    # One inner step more than the figure's two updates: after the last one the network is not trained any more.
    words = shlex.split("--device cpu --width 4 --niter 1 --inner_loop 3 --interval 2 --epochs 1 --repeat 1")
    assert condense.main([*words, "--results_dir", str(tmp_path)]) == 0
    saved = torch.load(next(tmp_path.glob("digits/*/checkpoint.pt")), weights_only=True)["net"]
    parser = common.figure_parser("x", None)
    subject.add_flags(parser, count=8)
    observed = subject.prepare(common.parse(parser, NETWORK), count=8, updates=2)
    observed.train(2)
    for name, value in observed.net.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_the_class_is_named_or_numbered(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", {"ant": 5, "bee": 9, "wasp": 6})
    parser = common.figure_parser("x", None)
    subject.add_flags(parser, count=3)
    words = ["--image_folder", str(root), "--width", "4", "--depth", "2", "--device", "cpu", "--updates", "0"]
    by_name, by_number = (
        subject.prepare(common.parse(parser, [*words, "--class", c]), count=3, updates=0) for c in ("bee", "1")
    )
    assert by_name.class_name == by_number.class_name == "bee" and len(by_name.images) == 9 and by_name.label == 1
    assert by_name.about == "convnet2 as initialised" and not by_name.net.training
    out = ["--out", str(tmp_path / "x.png")]
    for more, says in (
        (["--class", "cat"], ["--class cat", "ant, bee, wasp"]),
        (["--count", "5"], ["--count 5", "ant"]),
        (["-d", "cifar10"], ["--image_folder", "3 classes"]),
    ):
        refused(gradient_norms.main, [*words, *out, *more], *says, status=2, unchanged=tmp_path)


def test_sub_clusters_belong_to_the_representatives_that_select_chooses() -> None:
    parser = common.figure_parser("x", None)
    subject.add_flags(parser, count=8)
    found = subject.prepare(common.parse(parser, [*NETWORK, "--class", "4"]), count=8, updates=2)
    found.train(2)
    draws = found.draws("somewhere")
    clusters = selection.cluster(found.embedding(), 8, draws)
    assert torch.equal(clusters.picks, select(found.context(found.draws("somewhere")), 8, strategy="kmeans")[0])
    assert clusters.sizes.sum() == len(found.images) and (clusters.sizes > 0).all()
    assert sorted(clusters.nearest[clusters.picks].tolist()) == list(range(8))


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_selection_is_drawn(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "selection.png"
    assert selection.main([*NETWORK, "--count", "8", "--method", method, "--out", str(out)]) == 0
    assert "133 images\n8 sub-clusters of" in capsys.readouterr().out
    assert 850 < size(out)[0] < 920


def test_a_set_that_its_card_does_not_describe_is_refused(runs: list[Path], tmp_path: Path) -> None:
    shutil.copy(runs[0] / "data.pt", tmp_path / "data.pt")
    with pytest.raises(UserError, match=r"has no data\.json"):
        common.decoded(tmp_path)
    card = (runs[0] / "data.json").read_text()
    for old, new in (('"factor": 2', '"factor": 9'), ('"single"', '"double"'), ('"class_names"', '"names"')):
        assert old in card
        (tmp_path / "data.json").write_text(card.replace(old, new))
        with pytest.raises(UserError, match=r"data\.json"):
            common.decoded(tmp_path)
