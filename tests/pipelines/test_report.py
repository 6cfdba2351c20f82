"""`fedsam report` as a person calls it, on made-up studies."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.studies import SITES, made, study_about, study_trials, write_study

from fedsam_core.store import LocalStore
from pipelines import cli, figures, report
from pipelines.analysis import rows_of
from pipelines.figures import dice_against_bytes, styles_of
from pipelines.page import Page, Section, Table, Text, html, markdown

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "br", "link", "hr"}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    error: str


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels, which are made sooner."""
    monkeypatch.setattr(figures, "DPI", 50)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """call("presets", ...) runs the command on the store in `tmp_path`."""

    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            report.main([*arguments, "--store", str(tmp_path)])
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


class Reader(HTMLParser):
    """Collects text and links, and demands that every element is closed where it should be."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_a_study_becomes_a_page_with_all_its_rows(store, call):
    trials = study_trials()
    write_study(store, study_about(trials), trials)
    ended = call("presets")
    folder = store.root / "studies/presets/report"
    assert (ended.status, ended.out.strip(), ended.error) == (0, str(folder / "index.html"), "")

    page, text = Reader((folder / "index.html").read_text()), (folder / "report.md").read_text()
    for row in rows_of(trials):
        value = f"{row.dice.mean:.3f} [{row.dice.low:.3f}, {row.dice.high:.3f}]"
        for words in (row.group, value, *(f"{one.mean:.3f}" for one in row.per_site.values())):
            assert words in page.text
            assert words in text
    for trial in trials:
        assert trial.id in page.text
        assert trial.id in text
    for words in ("“flap” reaches 99% of the Dice of “lora-decoder”", "fedsam ablate presets.yaml", "seeds: 3"):
        assert words in page.text
        assert words in text

    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures == ["figure1.png", "gain.png", "atlas.png", "curves.png", "sites.png", "cross.png"]
    assert all((folder / name).read_bytes().startswith(PNG) for name in pictures)


def test_the_page_needs_no_other_file_and_no_network(store, call):
    trials = study_trials(seeds=1)
    write_study(store, study_about(trials), trials)
    call("presets")
    content = (store.root / "studies/presets/report/index.html").read_text()
    page = Reader(content)
    assert len(page.links) == 6
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in content
    assert "url(" not in content
    assert "There is one seed a row" in page.text


def test_equal_results_give_equal_pages(store, call, tmp_path):
    trials = study_trials(seeds=2)
    write_study(store, study_about(trials), trials)
    pages = []
    for name in ("a", "b"):
        ended = call("presets", "--out", str(tmp_path / name))
        assert ended.out.strip() == str(tmp_path / name / "index.html")
        pages.append((tmp_path / name / "index.html").read_bytes())
    assert pages[0] == pages[1]
    assert not (store.root / "studies/presets/report").exists()


def test_names_and_errors_of_others_are_text_and_nothing_else(store, call):
    wicked = '<script>alert("x")</script>'
    trials = [
        made(f"{wicked} $x_$", 0.6, seed, bytes_up=1_000_000, trainable=9, parts={"encoder.0.mlp": 9})
        for seed in (0, 1)
    ]
    trials.append(made("[x](javascript:y) | *b*", 0.5, 2, status="failed", error=f"`\n# {wicked} $x_$"))
    about = study_about(trials, cohort=f"{wicked}$\\frac{{}}$", sites=(*SITES, wicked), command=f"fedsam '{wicked}'")
    write_study(store, about, trials)
    assert call("presets").status == 0
    folder = store.root / "studies/presets/report"
    page = Reader((folder / "index.html").read_text())
    assert "script" not in page.tags
    assert f"{wicked} $x_$" in page.text
    outside = re.sub(r"^```.*?^```$", "", (folder / "report.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"(?<!\\)<", outside)
    assert "\n# \\<" not in outside
    assert not re.findall(r"(?<!\\)\]\(javascript", outside)
    assert "\\| \\*b\\*" in outside


def test_an_unfinished_study_says_what_is_missing_and_what_failed(store, call):
    trials = study_trials()
    failed = trials[4].model_copy(update={"status": "failed", "error": "CUDA out of memory"})
    stopped = trials[7].model_copy(update={"status": "stopped"})
    there = [failed, stopped, *(trial for n, trial in enumerate(trials) if n not in (4, 7, 12, 20))]
    about = study_about(trials, planned=[*(trial.id for trial in trials), "0" * 16])
    other = made("of another version", 0.99, 0, bytes_up=1)
    write_study(store, about, [*there, other])
    assert call("presets").status == 0
    text = Reader((store.root / "studies/presets/report/index.html").read_text()).text
    assert "28 of 31 trials have ended; 3 still missing" in text
    assert "3 of 31 planned trials have no result yet" in text
    assert "attention, seed 1, failed and is in no mean: CUDA out of memory" in text
    assert "decoder, seed 1, stopped and is in no mean" in text
    assert "1 results of the store belong to no planned trial" in text
    assert "of another version" not in text
    assert "attention (2), decoder (2)" in text


def test_a_study_of_failures_is_a_page_too(store, call):
    trials = [made("flap", 0.5, seed, status="failed", error="no space left") for seed in (0, 1)]
    write_study(store, study_about(trials), trials)
    assert call("presets").status == 0
    text = Reader((store.root / "studies/presets/report/index.html").read_text()).text
    assert "No federated trial has finished with a score" in text
    assert "no space left" in text


def test_baselines_alone_are_compared_by_site(store, call):
    trials = [trial for trial in study_trials() if trial.kind != "federated"]
    write_study(store, study_about(trials), trials)
    assert call("presets").status == 0
    text = (store.root / "studies/presets/report/report.md").read_text()
    assert "figure1.png" not in text
    assert "sites.png" in text
    assert "cross.png" in text


def test_scores_of_zero_are_a_finding_too(store, call):
    dead = {"dice": 0.0, "per_class": {}, "per_site": {}}
    trials = [
        made(name, 0.5, seed, test=dead, bytes_up=size, trainable=size)
        for name, size in (("a", 10), ("b", 20))
        for seed in (0, 1)
    ]
    write_study(store, study_about(trials), trials)
    assert call("presets").status == 0
    assert "every test Dice is 0" in (store.root / "studies/presets/report/report.md").read_text()


def test_synthetic_scans_random_weights_and_mixed_versions_are_warned_of(store, call):
    trials = study_trials()
    trials[0] = trials[0].model_copy(update={"code_hash": "0" * 64, "cohort_hash": "1" * 64})
    write_study(store, study_about(trials, synthetic=True), trials)
    store.write_bytes(f"runs/{trials[3].run}/config.yaml", b"model: {checkpoint: null}\n")
    store.write_bytes(f"runs/{trials[6].run}/config.yaml", b"model: {checkpoint: /sam.pth}\n")
    assert call("presets").status == 0
    text = Reader((store.root / "studies/presets/report/index.html").read_text()).text
    for words in (
        "synthetic phantoms",
        "attention started from random weights",
        "different versions of the code",
        "different versions of the cohort",
    ):
        assert words in text


def test_overlays_of_the_recommended_row_are_shown_where_its_run_left_them(store, call):
    trials = study_trials()
    write_study(store, study_about(trials), trials)
    rows = rows_of(trials)
    png = dice_against_bytes(rows, report.Look("x", False, styles_of(rows)))
    run = next(trial.run for trial in trials if trial.group == "flap" and trial.seed == 1)
    store.write_bytes(f"runs/{run}/pictures/B.png", png)
    store.write_bytes(f"runs/{run}/pictures/elsewhere.png", b"not asked for")
    assert call("presets").status == 0
    text = (store.root / "studies/presets/report/report.md").read_text()
    assert "overlay-0.png" in text
    assert "overlay-1.png" not in text
    assert "B: “flap”, seed 1" in text
    assert (store.root / "studies/presets/report/overlay-0.png").read_bytes() == png


def test_a_large_sweep_colors_the_front_and_draws_all(store, call):
    trials = study_trials(seeds=2, blocks=True)
    write_study(store, study_about(trials), trials)
    assert call("presets").status == 0
    text = Reader((store.root / "studies/presets/report/index.html").read_text()).text
    assert "Gray points, without a name, are in the table" in text
    assert "3 to 5: LoRA q, v" in text
    assert "two seeds a row" in text


@pytest.mark.parametrize("planned", [0, 3])
def test_a_study_without_any_ended_trial_is_an_error(store, call, planned):
    write_study(store, study_about([], planned=[f"{n:016x}" for n in range(planned)]), [])
    ended = call("presets")
    assert ended.status == 2
    assert f"none of its {planned} planned trials has ended yet" in ended.error
    assert "fedsam ablate presets.yaml" in ended.error


def test_an_unknown_study_is_an_error_that_names_those_there_are(store, call):
    trials = study_trials(seeds=1)
    write_study(store, study_about(trials), trials)
    ended = call("preset")
    assert ended.status == 2
    assert "no study preset" in ended.error
    assert "there is presets" in ended.error


@pytest.mark.parametrize("content", [b"{}", b'{"id": "x"}', b"\xff", b"[]"])
def test_a_foreign_file_among_the_trials_is_an_error_that_names_it(store, call, content):
    trials = study_trials(seeds=1)
    write_study(store, study_about(trials), trials)
    store.write_bytes("studies/presets/trials/x.json", content)
    ended = call("presets")
    assert ended.status == 2
    assert "trials/x.json is no result of this version of fedsam" in ended.error


def test_the_command_line_knows_it(capsys):
    assert "report" in cli.COMMANDS
    with pytest.raises(SystemExit):
        report.main(["--help"])
    assert "STUDY" in capsys.readouterr().out


def test_a_page_is_the_same_in_both_forms():
    blocks = [Text("a < b & c"), Table(["x", "y"], [["n|1", "2"]], "a_note", marked=frozenset({0}))]
    page = Page("T", "s", ["f"], [], [Section("S", blocks)])
    assert "a &lt; b &amp; c" in html(page)
    assert "a \\< b \\& c" in markdown(page)
    assert "| x | y |\n|---|---:|\n| **n\\|1** | 2 |\n\na\\_note" in markdown(page)
