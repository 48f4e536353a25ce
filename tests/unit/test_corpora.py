"""What holds for every corpus."""

import re
from pathlib import Path

import pytest

import sermll.corpora as corpora
from sermll.corpora import CORPORA
from sermll.errors import CorpusError
from sermll.rows import Corpus

every_corpus = pytest.mark.parametrize("corpus", CORPORA.values(), ids=list(CORPORA))


def test_names() -> None:
    assert list(CORPORA) == ["ravdess", "emodb", "synthetic"]
    assert all(corpus.name == name for name, corpus in CORPORA.items())


@every_corpus
def test_datasheet_is_complete(corpus: Corpus) -> None:
    assert tuple(corpus.counts) == corpus.classes
    assert all(count > 0 for count in corpus.counts.values())
    assert corpus.licence
    assert corpus.citation
    sheet = getattr(corpora, corpus.name).__doc__
    for entry in ("Source:", "Layout:", "Counts:", "Traps:", "Licence:", "Citation:"):
        assert entry in sheet
    assert re.search(rf"\b{sum(corpus.counts.values())} utterances", sheet)


@every_corpus
def test_folds_test_every_speaker_once(corpus: Corpus) -> None:
    for folds in corpus.folds.values():
        speakers = [speaker for fold in folds for speaker in fold]
        assert len(set(speakers)) == len(speakers)
        assert len({len(fold) for fold in folds}) == 1


@every_corpus
def test_errors_come_with_the_call_not_with_the_first_row(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere: no such folder; expected"):
        corpus.read(tmp_path / "nowhere")


@every_corpus
def test_noise_folder_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "kitchen.wav").touch()
    with pytest.raises(CorpusError, match=r"none of the 1 audio files fits \(kitchen\.wav"):
        corpus.read(tmp_path)


def test_no_corpus_takes_another_for_itself(tmp_path: Path) -> None:
    samples = {
        "ravdess": "03-01-03-01-01-01-01.wav",
        "emodb": "03a01Fa.wav",
        "synthetic": "f1_sad_s1_1.flac",
    }
    for owner, name in samples.items():
        (tmp_path / owner).mkdir()
        (tmp_path / owner / name).touch()
        for reader, corpus in CORPORA.items():
            if reader == owner:
                assert len(list(corpus.read(tmp_path / owner))) == 1
            else:
                with pytest.raises(CorpusError, match="none of the 1 audio files"):
                    corpus.read(tmp_path / owner)
