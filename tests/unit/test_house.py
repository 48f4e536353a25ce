"""The house's rules that a program can check."""

import re
from pathlib import Path

import pytest
import yaml

from sermll import config, pooling
from sermll.campaign import load_campaign
from sermll.config import load_experiment, read_yaml, validate
from sermll.corpora import CORPORA, FORMATS
from sermll.matrix import MatrixFile
from sermll.search_plan import read_search

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))
VERBS = (
    "corpora",
    "download",
    "prepare",
    "audit",
    "train",
    "run",
    "matrix",
    "report",
    "compare",
    "ensemble",
    "robustness",
    "search",
)
VERBS += ("predict", "track", "ui")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]


KEYS = {"axes": "run", "corpora": "matrix", "space": "search"}
"""What tells the files of experiments/ apart."""


def kind_of(path: Path) -> str:
    """What a file of experiments/ is for: the verb that takes it."""
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    return next((verb for key, verb in KEYS.items() if key in keys), "train")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_experiment_loads_and_opens_with_question_and_command(path: Path) -> None:
    verb = kind_of(path)
    if verb == "train":
        load_experiment(path)
    elif verb == "run":
        load_campaign(path, {})
    elif verb == "search":
        read_search(path, {})
    else:  # what the corpora share is known once they are prepared
        validate(MatrixFile, read_yaml(path, "matrix"), str(path))
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "?" in header[0]
    assert any(f"sermll {verb}" in line for line in header)
    assert any("expect" in line.lower() for line in header)


@pytest.mark.parametrize(
    "path",
    [path for path in EXPERIMENTS if kind_of(path) == "train"],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_experiments_say_only_what_differs_from_the_defaults(path: Path) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole = load_experiment(path)

    def walk(node: dict, model: config.Section, where: str) -> None:
        for key, value in node.items():
            below = getattr(model, key)
            if isinstance(below, config.Section):
                walk(value, below, f"{where}{key}.")
            elif key != "kind":
                assert below != type(model).model_fields[key].default, f"{where}{key} is the default"

    walk(tree, whole, "")


def test_no_drawer_for_everything() -> None:
    names = {path.stem for path in (ROOT / "sermll").rglob("*.py")}
    assert names.isdisjoint({"utils", "helpers", "common", "misc", "manager", "base"})


def test_every_pool_of_the_settings_exists() -> None:
    kinds = {section().kind for section in (config.FLAM, config.MeanPool, config.MaxPool, config.FirstFrame)}
    assert kinds == set(pooling.POOLS)


def test_corpora_are_named_as_they_are_registered() -> None:
    for name, corpus in CORPORA.items():
        assert corpus.name == name
        assert set(corpus.counts) == {*corpus.classes, *corpus.other_labels}


def test_the_readme_knows_the_targets_the_verbs_and_the_corpora() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"\bmake ([a-z-]+)\b", page.read_text(encoding="utf-8"))) <= targets, page
    assert {"demo", "test"} <= set(re.findall(r"\bmake ([a-z-]+)\b", README))
    for verb in VERBS:
        assert f"sermll {verb}" in README
    for name in (*CORPORA, *FORMATS):
        assert f"`{name}`" in README or f"prepare {name}" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_files_that_a_page_shows_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_leads_to_every_page() -> None:
    assert {page.name for page in PAGES if page.parent.name == "docs"} <= set(
        re.findall(r"\]\(docs/([^)#]+)\)", README)
    )
