"""The synthetic corpus: deterministic, well-formed, learnable from the spectrum and not from loudness."""

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
from protocols import fewest_dev_classes
from scipy.signal import stft
from sklearn.metrics import recall_score
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sermll.corpora import synthetic
from sermll.corpora.synthetic import CORPUS, MANNERS, REPETITIONS, SENTENCES, VOICES, generate, read, render
from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance

Clip = tuple[str, str, str, int]


@pytest.fixture(scope="module")
def clips() -> dict[Clip, np.ndarray]:
    """Half of the corpus: two of the four repetitions."""
    return {clip: render(*clip) for clip in product(VOICES, MANNERS, SENTENCES, REPETITIONS[:2])}


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of a tenth of a second, for what does not depend on their sound."""
    monkeypatch.setattr(synthetic, "render", lambda *clip: np.full(1600, 0.25, np.float32))


def test_clips_are_sound(clips: dict[Clip, np.ndarray]) -> None:
    for waveform in clips.values():
        assert waveform.dtype == np.float32
        assert waveform.ndim == 1
        assert 1.0 < len(waveform) / 16_000 < 2.6
        assert np.isfinite(waveform).all()
        assert 0.005 < np.abs(waveform).max() < 0.99
        assert abs(waveform.mean()) < 0.05 * waveform.std()


def test_same_clip_is_the_same_and_others_differ(clips: dict[Clip, np.ndarray]) -> None:
    clip = ("m2", "happy", "s3", 2)
    assert np.array_equal(render(*clip), clips[clip])
    assert len({waveform.tobytes() for waveform in clips.values()}) == len(clips) == 256


def test_no_global_randomness() -> None:
    np.random.seed(0)
    first = np.random.random()
    np.random.seed(0)
    render("f1", "sad", "s1", 1)
    assert np.random.random() == first


def test_total_length_fits_the_demonstration(clips: dict[Clip, np.ndarray]) -> None:
    seconds = 2 * sum(len(waveform) for waveform in clips.values()) / 16_000
    assert 13 * 60 < seconds < 16 * 60


@pytest.mark.parametrize("speaker", ["f2", "m3"])
def test_pitch_is_the_voices(speaker: str) -> None:
    """The strongest lag of the autocorrelation of neutral speech is near the speaker's period."""
    pitches = []
    for sentence, repetition in product(SENTENCES, REPETITIONS):
        waveform = render(speaker, "neutral", sentence, repetition)
        spectrum = np.fft.rfft(waveform, 2 * len(waveform))
        correlation = np.fft.irfft(np.abs(spectrum) ** 2)
        shortest, longest = 16_000 // 350, 16_000 // 70
        pitches.append(16_000 / (shortest + np.argmax(correlation[shortest:longest])))
    assert np.median(pitches) == pytest.approx(VOICES[speaker].pitch_hz, rel=0.15)


def test_unknown_clip_is_refused() -> None:
    for clip in (("x1", "sad", "s1", 1), ("f1", "bored", "s1", 1), ("f1", "sad", "s9", 1)):
        with pytest.raises(KeyError):
            render(*clip)


def test_spectrum_tells_emotions_and_loudness_does_not(
    clips: dict[Clip, np.ndarray],
) -> None:
    emotions = np.array([emotion for _, emotion, _, _ in clips])
    speakers = np.array([speaker for speaker, _, _, _ in clips])
    level_db = np.array([[10 * np.log10(np.mean(w.astype(float) ** 2))] for w in clips.values()])
    statistics = np.array([band_statistics(waveform) for waveform in clips.values()])

    def unweighted_accuracy(features: np.ndarray, model: object) -> float:
        predicted = emotions.copy()
        for pair in CORPUS.folds["pairs"]:
            test = np.isin(speakers, pair)
            predicted[test] = model.fit(features[~test], emotions[~test]).predict(features[test])  # type: ignore
        return float(recall_score(emotions, predicted, average="macro"))

    assert Counter(emotions.tolist()) == dict.fromkeys(MANNERS, 64)  # a majority guess is right in a quarter
    assert unweighted_accuracy(level_db, NearestCentroid()) < 0.45
    assert 0.75 < unweighted_accuracy(statistics, make_pipeline(StandardScaler(), SVC(C=10))) < 0.97


def band_statistics(waveform: np.ndarray) -> np.ndarray:
    """Mean, deviation and deviation of differences of log energies in 40 bands, the mean level removed."""
    power = np.abs(stft(waveform, 16_000, nperseg=400, noverlap=240)[2]) ** 2
    edges = np.unique(np.round(np.geomspace(4, len(power), 41)).astype(int)) - 1
    bands = np.log(np.add.reduceat(power, edges[:-1], axis=0) + 1e-12)
    bands -= bands.mean()
    return np.concatenate([bands.mean(1), bands.std(1), np.diff(bands, axis=1).std(1)])


@pytest.mark.usefixtures("cheap")
def test_generated_folder_reads_as_published(tmp_path: Path) -> None:
    root = tmp_path / "new" / "synthetic"
    generate(root)
    rows = list(read(root))
    utterances = [row for row in rows if isinstance(row, Utterance)]
    assert len(rows) == len(utterances) == 512
    assert Counter(u.label for u in utterances) == CORPUS.counts
    assert Counter(u.speaker for u in utterances) == dict.fromkeys(VOICES, 64)
    assert Counter(u.text for u in utterances) == dict.fromkeys(SENTENCES, 128)
    assert fewest_dev_classes(CORPUS, rows) == 4
    assert utterances[0] == Utterance("f1_angry_s1_1", "f1/f1_angry_s1_1.flac", "angry", "f1", text="s1", sex="female")
    assert [p.name for p in root.parent.iterdir()] == ["synthetic"]  # nothing is left beside it
    info = soundfile.info(root / utterances[-1].path)
    assert (info.samplerate, info.channels, info.subtype, info.format) == (16_000, 1, "PCM_16", "FLAC")


def test_files_hold_the_rendered_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "VOICES", {"f1": VOICES["f1"]})
    monkeypatch.setattr(synthetic, "SENTENCES", {"s1": SENTENCES["s1"]})
    generate(tmp_path / "one")
    generate(tmp_path / "two")
    paths = sorted((tmp_path / "one").rglob("*.flac"))
    assert len(paths) == 16
    for path in paths:
        samples, _ = soundfile.read(path, dtype="int16")
        again, _ = soundfile.read(tmp_path / "two" / path.relative_to(tmp_path / "one"), dtype="int16")
        speaker, emotion, sentence, repetition = path.stem.split("_")
        expected = render(speaker, emotion, sentence, int(repetition)).astype(float) * 32_768
        assert np.array_equal(samples, again)
        assert np.abs(samples - expected).max() <= 0.5


@pytest.mark.usefixtures("cheap")
def test_existing_folder_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "REPETITIONS", (1,))
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CorpusError, match="exists already"):
        generate(tmp_path)
    with pytest.raises(CorpusError, match="exists already"):
        generate(tmp_path / "mine.txt")
    with pytest.raises(CorpusError, match="cannot be written"):
        generate(tmp_path / "mine.txt" / "below")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    generate(tmp_path / "empty")
    assert len(list(read(tmp_path / "empty"))) == 32 * 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_generation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(speaker: str, *rest: object) -> np.ndarray:
        if speaker == "f2":
            raise error
        return np.zeros(1600, np.float32)

    monkeypatch.setattr(synthetic, "render", fail)
    with pytest.raises(CorpusError if isinstance(error, OSError) else KeyboardInterrupt):
        generate(tmp_path / "synthetic")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("f1_bored_s1_1", "label"),
        ("f5_sad_s1_1", "name"),
        ("x1_sad_s1_1", "name"),
        ("f1_sad_s5_1", "name"),
        ("f1_sad_s1_5", "name"),
        ("f1_sad_s1_01", "name"),
        ("f1_sad_s1", "name"),
    ],
)
def test_wrong_names_become_problems(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "f1").mkdir()
    for stem in ("f1_sad_s1_1", name):
        (tmp_path / "f1" / f"{stem}.flac").touch()
    problems = [row for row in read(tmp_path) if isinstance(row, Problem)]
    assert [(p.path, p.reason) for p in problems] == [(f"f1/{name}.flac", reason)]


def test_pairs_hold_one_of_each_sex() -> None:
    assert list(CORPUS.folds) == ["pairs"]
    assert [sorted(speaker[0] for speaker in pair) for pair in CORPUS.folds["pairs"]] == [["f", "m"]] * 4
    assert sorted(speaker for pair in CORPUS.folds["pairs"] for speaker in pair) == sorted(VOICES)
