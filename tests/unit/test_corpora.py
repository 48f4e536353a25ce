"""What holds for every corpus."""

import re
from pathlib import Path

import pytest
from trees import write

import sermll.corpora as corpora
from sermll.corpora import CORPORA
from sermll.errors import CorpusError
from sermll.rows import Corpus

every_corpus = pytest.mark.parametrize("corpus", CORPORA.values(), ids=list(CORPORA))


def test_names() -> None:
    assert list(CORPORA) == ["iemocap", "msp_improv", "ravdess", "savee", "emodb", "cremad", "synthetic"]
    assert all(corpus.name == name for name, corpus in CORPORA.items())


@every_corpus
def test_datasheet_is_complete(corpus: Corpus) -> None:
    assert tuple(corpus.counts) == corpus.classes + corpus.other_labels
    assert all(count > 0 for count in corpus.counts.values())
    assert corpus.licence
    assert corpus.citation
    assert corpus.source
    assert corpus.default_folds in {*corpus.folds, "speaker", "session"}
    sheet = getattr(corpora, corpus.name).__doc__
    for entry in ("Source:", "Layout:", "Counts:", "Traps:", "Licence:", "Citation:"):
        assert entry in sheet
    assert re.search(rf"\b{sum(corpus.counts.values())} utterances", sheet)


@every_corpus
def test_folds_test_every_speaker_once(corpus: Corpus) -> None:
    for folds in corpus.folds.values():
        speakers = [speaker for fold in folds for speaker in fold]
        assert len(set(speakers)) == len(speakers)
        sizes = [len(fold) for fold in folds]
        assert max(sizes) - min(sizes) <= 1


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
    iemocap = "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]\n"
    msp_improv = "UTD-IMPROV-S01A-F01-P-FM01.avi; N; A:3.0; V:3.0; D:3.0 ; N:4.0;\n"
    samples = {
        "iemocap": {"Ses01F_impro01_F000.wav": "", "EmoEvaluation/Ses01F_impro01.txt": iemocap},
        "msp_improv": {"MSP-IMPROV-S01A-F01-P-FM01.wav": "", "Evalution.txt": msp_improv},
        "ravdess": {"03-01-03-01-01-01-01.wav": ""},
        "savee": {"DC_a01.wav": ""},
        "emodb": {"03a01Fa.wav": ""},
        "cremad": {"1001_DFA_ANG_XX.wav": ""},
        "synthetic": {"f1_sad_s1_1.flac": ""},
    }
    assert samples.keys() == CORPORA.keys()
    for owner, files in samples.items():
        write(tmp_path / owner, files)
        for reader, corpus in CORPORA.items():
            if reader == owner:
                assert len(list(corpus.read(tmp_path / owner))) == 1
            else:
                with pytest.raises(CorpusError, match="none of the 1 audio files"):
                    corpus.read(tmp_path / owner)
