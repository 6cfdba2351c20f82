import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fedsam_core.data.cohort import Case, Cohort
from fedsam_core.data.geometry import Geometry
from fedsam_core.errors import DataError
from fedsam_core.evaluation.metrics import CaseScore, score_case, summarize, truth_on_scan_grid
from fedsam_core.evaluation.overlays import _slice_numbers, dice_bars, overlay, pick_cases, pick_slices
from fedsam_core.evaluation.surfaces import SurfaceConfig

from .conftest import MakeCase, blobs

CLASSES = ("kidney", "tumor")


def cohort_of(*cases: Case, synthetic: bool = False) -> Cohort:
    return Cohort(name="study", source="nifti", modality="mri", classes=CLASSES, synthetic=synthetic, cases=cases)


def drawn(cohort: Cohort, prediction: np.ndarray, path: Path, panels: int = 6) -> np.ndarray:
    """The picture as float [rows, columns, 3]."""
    overlay(cohort, score_case(prediction, cohort.cases[0], CLASSES), prediction, path, panels)
    return imread(path)[..., :3]


def share(picture: np.ndarray, color: str) -> float:
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return float((np.abs(picture - rgb).max(axis=-1) < 0.05).mean())


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "IPL", "SAL"])
@pytest.mark.parametrize("thick", [0, 1, 2])
def test_right_is_left_and_front_and_top_are_up(
    make_case: MakeCase, tmp_path: Path, orientation: str, thick: int
) -> None:
    image = np.zeros((30, 30, 30))
    image[15:, 15:, 15:] = 1  # the right, front, upper eighth of the body is bright
    spacing = tuple(3.0 if axis == thick else 1.0 for axis in range(3))
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[tuple(slice(20, 22) if axis == thick else slice(2, 28) for axis in range(3))] = 1
    case = make_case(labels, image=image, spacing=spacing, orientation=orientation)

    picture = drawn(cohort_of(case), truth_on_scan_grid(case), tmp_path / "o.png", panels=1)

    # The panel is what the frame's black lines enclose.
    dark = (picture.max(axis=-1) < 0.2).mean(axis=1) > 0.2
    top, bottom = np.flatnonzero(dark)[[0, -1]]
    inside = picture[top:bottom]
    columns = np.flatnonzero((inside.max(axis=-1) < 0.2).mean(axis=0) > 0.4)
    panel = inside[:, columns[0] : columns[-1]]
    rows, cols = panel.shape[0] // 2, panel.shape[1] // 2
    quarters = {
        "upper left": panel[:rows, :cols].mean(),
        "upper right": panel[:rows, cols:].mean(),
        "lower left": panel[rows:, :cols].mean(),
        "lower right": panel[rows:, cols:].mean(),
    }
    assert max(quarters, key=lambda name: quarters[name]) == "upper left"
    assert quarters["upper left"] > 0.6
    assert all(value < 0.3 for name, value in quarters.items() if name != "upper left")


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "IPL", "SAR"])
def test_slices_are_numbered_as_in_the_file(orientation: str) -> None:
    # A label map that holds in every voxel its index along the axis that runs up or down.
    along = next(axis for axis, code in enumerate(orientation) if code in "SI")
    shape = (7, 8, 9)
    volume = np.indices(shape)[along]
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, code in enumerate(orientation):
        affine["RAS".index({"L": "R", "P": "A", "I": "S"}.get(code, code)), axis] = 1 if code in "RAS" else -1
    geometry = Geometry.plan(affine, shape, "axial", None)
    case = Case(
        id="c", site="s", split="test", image="", label=None, shape=shape, spacing=(1, 1, 1), orientation=orientation,
        label_values=(), intensity={}, image_sha256="", label_sha256=None,
    )  # fmt: skip
    assert _slice_numbers(geometry, case).tolist() == geometry.to_slices(volume, 0)[:, 0, 0].tolist()


def test_slices_cover_every_class_from_end_to_end() -> None:
    labels = np.zeros((40, 20, 20), np.uint8)
    labels[5:35, 2:18, 2:18] = 1
    labels[12, 5:8, 5:8] = 2  # a tumor in one slice: as heavy as the whole kidney
    chosen = pick_slices(labels, 6)
    assert len(chosen) == 6
    assert chosen == sorted(chosen)
    assert 12 in chosen
    assert all(labels[index].any() for index in chosen)
    assert chosen[-1] - chosen[0] > 20
    assert pick_slices(labels[:7], 6) == [5, 6]
    assert pick_slices(np.zeros((9, 4, 4), np.uint8), 3) == [1, 4, 7]
    assert pick_slices(np.zeros((2, 4, 4), np.uint8), 6) == [0, 1]


def test_truth_and_prediction_are_both_drawn(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(blobs((40, 40, 24), (1, 1, 1)), image=np.random.default_rng(0).random((40, 40, 24)))
    cohort = cohort_of(case)
    truth = truth_on_scan_grid(case)
    both = drawn(cohort, np.roll(truth, 5, axis=0), tmp_path / "both.png")
    alone = drawn(cohort, np.zeros_like(truth), tmp_path / "alone.png")
    for color in ("#E69F00", "#56B4E9"):
        assert share(both, color) > 1.2 * share(alone, color) > 0
    assert both.shape[0] > 500
    assert both.shape[1] > 700


def test_a_case_without_any_structure_has_a_picture(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(np.zeros((12, 12, 8), np.uint8), image=np.random.default_rng(0).random((12, 12, 8)))
    assert drawn(cohort_of(case), np.zeros((12, 12, 8), np.uint8), tmp_path / "o.png").shape[0] > 300


def test_pictures_repeat_bit_for_bit_and_touch_no_global_state(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(blobs((30, 30, 10), (1, 1, 1)))
    truth = truth_on_scan_grid(case)
    scores = [score_case(truth, case, CLASSES)]
    for name in ("a", "b"):
        drawn(cohort_of(case), truth, tmp_path / f"{name}.png")
        summary = summarize(scores, CLASSES, intervals=True)
        dice_bars(summary, cohort_of(case), tmp_path / f"bars_{name}.png", scores=scores)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "bars_a.png").read_bytes() == (tmp_path / "bars_b.png").read_bytes()
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
    assert not list(tmp_path.glob(".*"))


def test_synthetic_pictures_say_so(make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(blobs((30, 30, 10), (1, 1, 1)))
    truth = truth_on_scan_grid(case)
    summary = summarize([score_case(truth, case, CLASSES)], CLASSES)
    titles: list[str] = []
    panels: list[str] = []
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    suptitle, text = Figure.suptitle, Axes.text
    monkeypatch.setattr(Figure, "suptitle", lambda self, t, **kw: (titles.append(t), suptitle(self, t, **kw))[1])
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **kw: (panels.append(s), text(self, x, y, s, **kw))[1])
    for synthetic in (True, False):
        cohort = cohort_of(case, synthetic=synthetic)
        drawn(cohort, truth, tmp_path / "o.png", panels=2)
        dice_bars(summary, cohort, tmp_path / "b.png")
    assert ["SYNTHETIC PHANTOM DATA" in title for title in titles] == [True, True, False, False]
    assert panels.count("synthetic") == 2
    assert "study · site-a · case" in titles[2]
    assert "kidney 1.000, tumor 1.000" in titles[2]


def test_what_belongs_to_no_case(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(blobs((12, 12, 8), (1, 1, 1)))
    scored = score_case(truth_on_scan_grid(case), case, CLASSES)
    with pytest.raises(ValueError, match="other"):
        overlay(cohort_of(case.model_copy(update={"id": "other2"})), CaseScore(
            "other", "s", "test", CLASSES, scored.dice, scored.truth_voxels, scored.predicted_voxels
        ), truth_on_scan_grid(case), tmp_path / "o.png")  # fmt: skip
    with pytest.raises(ValueError, match=r"\(12, 12, 7\)"):
        overlay(cohort_of(case), scored, truth_on_scan_grid(case)[..., 1:], tmp_path / "o.png")
    Path(case.image).unlink()
    with pytest.raises(DataError, match=r"case\.nii\.gz"):
        overlay(cohort_of(case), scored, np.zeros(case.shape, np.uint8), tmp_path / "o.png")
    assert not (tmp_path / "o.png").exists()


def test_bars_show_before_and_after_and_what_has_no_score(tmp_path: Path) -> None:
    def scores(kidney: float) -> list[CaseScore]:
        nan = float("nan")
        return [
            CaseScore("a1", "a", "test", CLASSES, (kidney, 0.3), (5, 5), (5, 5)),
            CaseScore("b1", "b", "test", CLASSES, (kidney, nan), (5, 0), (5, 0)),
        ]

    before, after = summarize(scores(0.2), CLASSES), summarize(scores(0.9), CLASSES)
    cohort = cohort_of()
    dice_bars(after, cohort, tmp_path / "after.png")
    dice_bars(after, cohort, tmp_path / "both.png", before)
    dice_bars(before, cohort, tmp_path / "before.png")
    both, late, early = (imread(tmp_path / f"{name}.png")[..., :3] for name in ("both", "after", "before"))
    assert both.shape[1] > late.shape[1]
    assert share(late, "#E69F00") > 3 * share(early, "#E69F00") > 0  # bars as high as the Dice


def test_what_is_drawn_is_what_is_scored(make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kidney that holds its tumour is outlined around the tumour, and the title tells the distances."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    labels = np.zeros((40, 40, 6), np.uint8)
    labels[10:30, 10:30] = 1
    labels[20:30, 10:30] = 2  # half of the kidney
    case = make_case(labels, image=np.random.default_rng(0).random(labels.shape))
    truth = truth_on_scan_grid(case)
    outlined: list[float] = []
    titles: list[str] = []
    contour, suptitle = Axes.contour, Figure.suptitle
    monkeypatch.setattr(
        Axes, "contour", lambda s, x, y, mask, **kw: (outlined.append(mask.sum()), contour(s, x, y, mask, **kw))[1]
    )
    monkeypatch.setattr(Figure, "suptitle", lambda s, text, **kw: (titles.append(text), suptitle(s, text, **kw))[1])
    for scored_as, areas in (({}, [200, 200]), ({"kidney": CLASSES}, [400, 200])):
        cohort = cohort_of(case).model_copy(update={"scored_as": scored_as})
        scored = score_case(truth, case, CLASSES, cohort.structures, SurfaceConfig())
        outlined.clear()
        overlay(cohort, scored, truth, tmp_path / "o.png", panels=1)
        assert outlined == [areas[0], areas[0], areas[1], areas[1]]  # each class: truth, prediction
        assert "Dice: kidney 1.000, tumor 1.000 · HD95, mm: kidney 0.0, tumor 0.0" in titles[-1]


def test_cases_worth_a_look() -> None:
    def case(site: str, name: str, dice: float) -> CaseScore:
        return CaseScore(name, site, "test", ("kidney",), (dice,), (5,), (5,))

    scores = [case("a", f"a{k}", dice) for k, dice in enumerate([0.4, 0.9, 0.1, 0.7])]
    scores += [case("a", "a8", float("nan")), case("b", "b0", 0.5), case("b", "b1", 0.6), case("c", "c0", 0.2)]
    scores += [case("d", "d1", float("nan")), case("d", "d0", float("nan")), case("e", "e1", 0.5), case("e", "e0", 0.5)]
    picked = pick_cases(scores)
    assert {site: {name: score.case for name, score in picks.items()} for site, picks in picked.items()} == {
        "a": {"best": "a1", "median": "a0", "worst": "a2"},
        "b": {"best": "b1", "worst": "b0"},
        "c": {"median": "c0"},
        "d": {"median": "d1"},
        "e": {"best": "e1", "worst": "e0"},
    }


def test_bars_with_intervals_and_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    scores = [
        CaseScore(f"a{k}", "a", "test", CLASSES, (dice, 1.0), (5, 5), (5, 5)) for k, dice in enumerate([0.2, 0.6])
    ]
    scores += [CaseScore("b0", "b", "test", CLASSES, (0.9, float("nan")), (5, 0), (5, 0))]
    summary = summarize(scores, CLASSES, intervals=True)
    dots: list[list[float]] = []
    bars: list[tuple[list[float], np.ndarray]] = []
    scatter, errorbar = Axes.scatter, Axes.errorbar
    monkeypatch.setattr(Axes, "scatter", lambda self, x, y, **kw: (dots.append(list(y)), scatter(self, x, y, **kw))[1])
    monkeypatch.setattr(Axes, "errorbar", lambda s, x, y, e, **kw: (bars.append((y, e)), errorbar(s, x, y, e, **kw))[1])
    dice_bars(summary, cohort_of(), tmp_path / "bars.png", scores=scores)
    assert dots == [[0.2, 0.6], [0.9], [0.2, 0.6, 0.9], [1.0, 1.0], [], [1.0, 1.0]]
    (kidney, kidney_reach), (tumor, tumor_reach) = bars
    assert kidney == pytest.approx([0.4, 1.7 / 3])  # site b has a single case, and no interval
    assert kidney_reach[:, 0] == pytest.approx([0.2, 0.2])
    low, high = summary["per_class"]["kidney"]["ci95"]["dice"]
    assert kidney_reach[:, 1] == pytest.approx([1.7 / 3 - low, high - 1.7 / 3])
    assert tumor == [1.0, 1.0]
    assert not tumor_reach.any()
    dice_bars(summarize(scores, CLASSES), cohort_of(), tmp_path / "plain.png")
    assert len(bars) == 2
    assert len(dots) == 6
