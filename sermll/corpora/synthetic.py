"""Synthetic: speech-like recordings with four emotions, made on the spot for demonstration and tests.

Source: this module. Each clip comes from a random generator of its own, keyed by the clip's name, so that the
corpus is the same wherever it is made. It is no substitute for speech. It shows that a pipeline learns what
there is to learn, that this carries over to unheard speakers, and that loudness alone does not give it away.

Layout: `<speaker>/<speaker>_<emotion>_<sentence>_<repetition>.flac`, such as `f1/f1_angry_s2_3.flac`, 16 kHz
mono 16-bit, 1.3 to 2.3 s. Speakers f1 to f4 (female) and m1 to m4 (male), emotions angry happy neutral sad,
sentences s1 to s4, repetitions 1 to 4.

Counts: 512 utterances in all (14 minutes), 64 of each speaker and 128 of each emotion.

Folds `pairs`: four folds of one female and one male speaker.

How a clip is made: a sentence is a row of phones. A phone has formants (resonances of the vocal tract), a
voiced level and a noise level, held in its middle and joined by straight lines. The sources, a train of
glottal pulses with breath and the noise of frication, are filtered frame by frame in the short-time spectrum.
Speakers differ in pitch, length of the vocal tract, tempo, voice quality, expressiveness and background
noise.

How an emotion is heard: in the mean, range and contour of pitch, in tempo, in the course of the level, in
spectral tilt, breath and jitter. All of these are drawn for each clip from distributions that overlap. The
level itself is random in every clip, but for a small shift.

How hard it is (UA, one pair left out): chance 0.25; nearest mean of the level in dB 0.33; RBF SVM on duration
alone 0.44, and on mean, deviation and deviation of differences of 80 log-mel bands 0.86 (0.90 without the
level).

Traps: all speakers say the same four sentences, so every split by speaker has the same texts on both sides.

Licence: CC0 1.0 (the recordings). Citation: sermll, synthetic corpus.
"""

import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path, PurePosixPath

import numpy as np
import soundfile
from numpy.typing import NDArray

from sermll.audio import SAMPLE_RATE_HZ, to_int16
from sermll.corpora.folder import read_folder
from sermll.errors import CorpusError
from sermll.rows import Corpus, Problem, Utterance

REPETITIONS = (1, 2, 3, 4)

_LAYOUT = "the synthetic corpus: f1/f1_angry_s1_1.flac to m4/m4_sad_s4_4.flac, as generated"
_NAME = re.compile(r"([a-z]\d)_([a-z]+)_(s\d)_(\d+)", re.ASCII)

_WINDOW = 512  # samples of a frame of the short-time spectrum
_HOP = 128  # samples from one frame to the next
_EDGE_S = 0.12  # silence before and after the speech
_SILENT_DB = -70.0
_LEVEL_DB = -30.0  # mean level of a clip, relative to full scale
_HIGHER_FORMANTS_HZ = (3500.0, 4500.0, 5500.0, 6500.0, 7500.0)  # a uniform tube of 17.5 cm

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Voice:
    """What stays with a speaker."""

    pitch_hz: float
    tract: float
    """Factor on formant frequencies; 1 is an adult male vocal tract, more is shorter."""
    tempo: float
    tilt_db: float
    """Change of the source spectrum per octave, added to the emotion's."""
    level_db: float
    expressiveness: float
    """Factor on how far an emotion departs from neutral."""
    noise_db: float
    """Mean level of background noise relative to the speech."""


VOICES = {
    "f1": Voice(198.0, 1.16, 1.05, 0.4, 1.0, 1.10, -36.0),
    "f2": Voice(222.0, 1.20, 0.96, -0.4, -1.0, 0.90, -33.0),
    "f3": Voice(190.0, 1.15, 1.02, 0.2, 1.5, 0.95, -38.0),
    "f4": Voice(210.0, 1.18, 0.98, -0.1, -2.0, 1.05, -35.0),
    "m1": Voice(112.0, 1.00, 1.00, -0.2, 0.0, 1.05, -35.0),
    "m2": Voice(128.0, 1.04, 1.06, 0.3, 2.0, 0.90, -38.0),
    "m3": Voice(106.0, 0.98, 0.97, -0.2, -1.5, 1.00, -33.0),
    "m4": Voice(119.0, 1.02, 1.01, 0.3, 0.5, 1.10, -36.0),
}


@dataclass(frozen=True)
class Manner:
    """How an emotion is spoken on average."""

    pitch_semitones: float
    """Mean pitch above the speaker's own."""
    range_semitones: float
    """Height of pitch accents."""
    fall_semitones: float
    """Descent of pitch from the first to the last syllable."""
    final_semitones: float
    """Rise of pitch in the last fifth of the sentence."""
    tempo: float
    """Natural logarithm of the factor on the speech rate."""
    accent_db: float
    """Level of stressed syllables above the others."""
    fade_db: float
    """Descent of the level from the first to the last syllable."""
    tilt_db: float
    """Change of the source spectrum per octave; more is a more pressed, brighter voice."""
    breath_db: float
    """Breath relative to the voice."""
    jitter: float
    """Standard deviation of the period from one cycle to the next, relative."""
    level_db: float


MANNERS = {
    "angry": Manner(2.5, 4.0, 5.0, -1.5, 0.08, 8.0, 1.0, 1.9, -30.0, 0.024, 1.5),
    "happy": Manner(3.5, 6.0, 0.0, 3.5, 0.05, 5.0, 1.5, 0.6, -27.0, 0.006, 0.8),
    "neutral": Manner(0.0, 2.2, 2.5, -0.5, 0.00, 3.5, 4.0, 0.0, -28.0, 0.008, 0.0),
    "sad": Manner(-0.8, 1.2, 1.5, -1.0, -0.15, 2.0, 7.0, -1.3, -20.0, 0.014, -1.2),
}
# Standard deviation of every item within an emotion: this is what makes emotions overlap.
_SPREAD = Manner(0.8, 0.6, 0.7, 0.6, 0.045, 0.8, 1.1, 0.35, 1.7, 0.003, 4.5)


@dataclass(frozen=True)
class Phone:
    """One speech sound: three formants in Hz, levels in dB (None: none), and how long it lasts."""

    formants_hz: tuple[float, float, float]
    voice_db: float | None
    noise_db: float | None
    noise_hz: float
    duration_s: float


PHONES = {
    "i": Phone((280, 2250, 2950), 0.0, None, 4000, 0.10),
    "e": Phone((480, 1900, 2500), 0.0, None, 4000, 0.11),
    "a": Phone((730, 1150, 2450), 0.0, None, 4000, 0.13),
    "o": Phone((500, 880, 2400), 0.0, None, 4000, 0.12),
    "u": Phone((310, 870, 2250), -1.0, None, 4000, 0.11),
    "m": Phone((250, 1050, 2200), -9.0, None, 4000, 0.07),
    "n": Phone((260, 1500, 2500), -9.0, None, 4000, 0.06),
    "l": Phone((360, 1200, 2700), -6.0, None, 4000, 0.06),
    "z": Phone((270, 1600, 2550), -12.0, -20.0, 5500, 0.08),
    "s": Phone((300, 1650, 2600), None, -16.0, 5800, 0.10),
    "x": Phone((320, 1800, 2500), None, -14.0, 3200, 0.10),
    "f": Phone((300, 1100, 2300), None, -20.0, 4500, 0.09),
    "t": Phone((320, 1750, 2650), None, None, 4000, 0.06),
    "k": Phone((320, 2000, 2300), None, None, 2500, 0.06),
    "'": Phone((320, 1750, 2650), None, -15.0, 4800, 0.02),
    " ": Phone((480, 1500, 2500), None, None, 4000, 0.07),
}
# t and k are closures and ' is the burst after them; a capital letter is a stressed vowel; a space is a short
# pause.
SENTENCES = {
    "s1": "mAlonisE latu't",
    "s2": "xiz nOmek'el fAni",
    "s3": "lUtosema nik'Al",
    "s4": "zEfolan sImat'oxu",
}


def read(root: Path) -> Iterator[Utterance | Problem]:
    """Rows of the audio files below `root`, sorted by path.

    Raises:
        CorpusError: `root` cannot be read or holds no synthetic utterance.
    """
    return read_folder(root, _LAYOUT, _parse)


def generate(root: Path) -> None:
    """Write all recordings into the new folder `root`; takes about ten seconds on one core.

    They are written beside it and moved there as a whole, so `root` is never half full.

    Raises:
        CorpusError: `root` exists and is not an empty folder, or cannot be written.
    """
    root = root.absolute()
    partial = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise CorpusError(f"{root}: exists already; remove it or give another folder")
        partial.mkdir(parents=True)
        try:
            for speaker in VOICES:
                (partial / speaker).mkdir()
            for speaker, emotion, sentence, repetition in product(VOICES, MANNERS, SENTENCES, REPETITIONS):
                name = f"{speaker}_{emotion}_{sentence}_{repetition}.flac"
                waveform = render(speaker, emotion, sentence, repetition)
                soundfile.write(partial / speaker / name, to_int16(waveform), SAMPLE_RATE_HZ)
            partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise CorpusError(f"{root}: the synthetic corpus cannot be written ({error})") from None


def render(speaker: str, emotion: str, sentence: str, repetition: int) -> NDArray[np.float32]:
    """One clip as samples in [-1, 1] at 16 kHz, always the same for the same arguments.

    Raises:
        KeyError: no such speaker, emotion or sentence.
    """
    voice, manner, phones = VOICES[speaker], MANNERS[emotion], SENTENCES[sentence]
    tables = ((VOICES, speaker), (MANNERS, emotion), (SENTENCES, sentence))
    generator = np.random.default_rng([*(list(table).index(entry) for table, entry in tables), repetition])
    style = _draw_style(voice, manner, generator)
    track = _articulate(phones, voice.tempo * np.exp(style.tempo), generator)
    samples = (len(track.progress) - 1) * _HOP

    pulses = _pulses(_pitch_hz(track, voice, style, generator), style.jitter, generator)
    breath = _gain(style.breath_db) * generator.standard_normal(samples)
    frication = generator.standard_normal(samples)
    spectrum = _spectrum(pulses + breath) * _tract_gain(track, voice, style) * _gain(track.voice_db)
    spectrum += _spectrum(frication) * _frication_gain(track) * _gain(track.noise_db)
    spectrum *= _gain(style.accent_db * track.stress - style.fade_db * track.progress)
    from scipy.signal import istft  # as below: a second to load, which every command would wait for

    speech = np.asarray(istft(spectrum, SAMPLE_RATE_HZ, nperseg=_WINDOW, noverlap=_WINDOW - _HOP)[1])

    background = _unit_power(_smooth_noise(samples, 0.8, generator))
    background *= _gain(voice.noise_db + 2.0 * generator.standard_normal())
    clip = _unit_power(_unit_power(speech) + background)
    clip *= _gain(_LEVEL_DB + voice.level_db + style.level_db)
    clip *= min(1.0, 0.98 / np.abs(clip).max())  # a loud clip is turned down rather than clipped
    return clip.astype(np.float32)


@dataclass(frozen=True)
class _Track:
    """What the mouth does in each of F frames, `_HOP` samples apart."""

    formants_hz: FloatArray
    """F x 3."""
    voice_db: FloatArray
    noise_db: FloatArray
    noise_hz: FloatArray
    stress: FloatArray
    """From 0 to 1 in the middle of a stressed vowel."""
    progress: FloatArray
    """From 0 at the first phone to 1 at the last."""


def _draw_style(voice: Voice, manner: Manner, generator: np.random.Generator) -> Manner:
    """The manner of one clip: the speaker's version of the emotion, plus a normal deviation of each item."""
    plain, mean, spread = (np.array(astuple(item)) for item in (MANNERS["neutral"], manner, _SPREAD))
    drawn = plain + voice.expressiveness * (mean - plain) + spread * generator.standard_normal(len(spread))
    style = Manner(*drawn.tolist())
    return replace(style, jitter=max(style.jitter, 0.0))


def _articulate(phones: str, tempo: float, generator: np.random.Generator) -> _Track:
    """Targets held in the middle half of each phone and joined by straight lines."""
    spoken = [PHONES[symbol.lower()] for symbol in phones]
    stressed = np.array([symbol.isupper() for symbol in phones], dtype=float)
    durations_s = np.array([phone.duration_s for phone in spoken]) * (1 + 0.3 * stressed) / tempo
    durations_s *= np.exp(0.1 * generator.standard_normal(len(spoken)))
    ends_s = _EDGE_S + np.cumsum(durations_s)
    starts_s = ends_s - durations_s
    knots_s = np.stack([starts_s + 0.25 * durations_s, ends_s - 0.25 * durations_s], axis=1).ravel()
    times_s = np.arange(0.0, ends_s[-1] + _EDGE_S, _HOP / SAMPLE_RATE_HZ)

    def joined(targets: list[float] | FloatArray, edge: float | None = None) -> FloatArray:
        """Targets of the phones in all frames; outside the sentence `edge`, or else the nearest phone's."""
        values = np.repeat(np.asarray(targets, dtype=float), 2)
        if edge is None:
            return np.interp(times_s, knots_s, values)
        outer_s = [starts_s[0] - 0.02, *knots_s, ends_s[-1] + 0.02]
        return np.interp(times_s, outer_s, [edge, *values, edge])

    def level(decibels: float | None) -> float:
        return _SILENT_DB if decibels is None else decibels

    # Vowels are not articulated twice alike.
    formants_hz = np.array([phone.formants_hz for phone in spoken])
    formants_hz = formants_hz * np.exp(0.04 * generator.standard_normal(formants_hz.shape))
    return _Track(
        formants_hz=np.stack([joined(column) for column in formants_hz.T], axis=1),
        voice_db=joined([level(phone.voice_db) for phone in spoken], _SILENT_DB),
        noise_db=joined([level(phone.noise_db) for phone in spoken], _SILENT_DB),
        noise_hz=joined([phone.noise_hz for phone in spoken]),
        stress=joined(stressed, 0.0),
        progress=np.clip((times_s - starts_s[0]) / (ends_s[-1] - starts_s[0]), 0.0, 1.0),
    )


def _pitch_hz(track: _Track, voice: Voice, style: Manner, generator: np.random.Generator) -> FloatArray:
    """Pitch of each frame: the speaker's, moved by accents, a steady fall, a final rise and a slow wander."""
    wander = _smooth_noise(len(track.progress), 0.9, generator)
    semitones = (
        style.pitch_semitones
        + style.range_semitones * track.stress
        + style.fall_semitones * (0.5 - track.progress)
        + style.final_semitones * np.clip(5 * track.progress - 4, 0.0, 1.0)
        + 0.15 * wander
    )
    return voice.pitch_hz * 2 ** (semitones / 12)


def _pulses(pitch_hz: FloatArray, jitter: float, generator: np.random.Generator) -> FloatArray:
    """Glottal pulses of unit power and irregular periods, each split over two samples to keep its time."""
    samples = (len(pitch_hz) - 1) * _HOP
    steps = np.interp(np.arange(samples) / _HOP, np.arange(len(pitch_hz)), pitch_hz) / SAMPLE_RATE_HZ
    cycle = np.cumsum(steps).astype(int)
    deviation = np.clip(jitter * generator.standard_normal(cycle[-1] + 1), -0.2, 0.2)
    phase = np.cumsum(steps * (1 + deviation[cycle]))
    at = np.flatnonzero(np.diff(np.floor(phase))) + 1
    late = np.clip((phase[at] % 1) / steps[at], 0.0, 1.0)  # samples since the cycle ended
    height = (1 + 0.05 * generator.standard_normal(len(at))) / np.sqrt(steps[at])
    pulses = -np.sqrt(steps)  # balances the pulses: lips radiate no constant flow of air
    pulses[at] += height * (1 - late)
    pulses[at - 1] += height * late
    return pulses


def _tract_gain(track: _Track, voice: Voice, style: Manner) -> FloatArray:
    """Gain of glottis, vocal tract and lips at each frequency and frame: resonances over a falling source."""
    frequency_hz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE_HZ)[:, None]
    octaves = np.log2(np.maximum(frequency_hz, 100.0) / 100.0)
    gain = _gain((-6.0 + voice.tilt_db + style.tilt_db) * octaves)
    for formant_hz in (*track.formants_hz.T, *_HIGHER_FORMANTS_HZ):
        center_hz = voice.tract * formant_hz
        bandwidth_hz = 50 + 0.04 * center_hz
        gain = gain * center_hz**2 / np.hypot(center_hz**2 - frequency_hz**2, bandwidth_hz * frequency_hz)
    return gain


def _frication_gain(track: _Track) -> FloatArray:
    """Gain of frication at each frequency and frame: a band an octave wide or so."""
    frequency_hz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE_HZ)[:, None]
    return np.exp(-0.5 * ((frequency_hz - track.noise_hz) / (0.25 * track.noise_hz)) ** 2)


def _spectrum(waveform: FloatArray) -> NDArray[np.complex128]:
    """Short-time spectrum, (frequencies, frames): frame k is centred on sample k * _HOP."""
    from scipy.signal import stft

    return stft(waveform, SAMPLE_RATE_HZ, nperseg=_WINDOW, noverlap=_WINDOW - _HOP)[2]


def _unit_power(waveform: FloatArray) -> FloatArray:
    """Scaled to a mean square of 1."""
    return waveform / np.sqrt(np.mean(waveform**2))


def _smooth_noise(length: int, smoothness: float, generator: np.random.Generator) -> FloatArray:
    """White noise through a one-pole low pass; `smoothness` is the pole, from 0 (white) to below 1."""
    from scipy.signal import lfilter

    return np.asarray(lfilter([1.0], [1.0, -smoothness], generator.standard_normal(length)))


def _gain(decibels: float | FloatArray) -> FloatArray:
    """Factor on amplitude."""
    return np.power(10.0, np.asarray(decibels) / 20)


def _parse(path: PurePosixPath) -> Utterance | Problem:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        return Problem(str(path), "name", "the name is not speaker, emotion, sentence, repetition, as in f1_angry_s1_1")
    speaker, emotion, sentence, repetition = match.groups()
    for field, value, known in (
        ("speaker", speaker, tuple(VOICES)),
        ("sentence", sentence, tuple(SENTENCES)),
        ("repetition", repetition, tuple(map(str, REPETITIONS))),
    ):
        if value not in known:
            return Problem(str(path), "name", f"{field} {value} does not exist: {' '.join(known)} do")
    if emotion not in MANNERS:
        return Problem(str(path), "label", f"emotion {emotion} does not exist: {' '.join(MANNERS)} do")
    return Utterance(
        id=path.stem,
        path=str(path),
        label=emotion,
        speaker=speaker,
        text=sentence,
        sex="female" if speaker.startswith("f") else "male",
    )


CORPUS = Corpus(
    name="synthetic",
    title="Synthetic",
    classes=tuple(MANNERS),
    counts={emotion: len(VOICES) * len(SENTENCES) * len(REPETITIONS) for emotion in MANNERS},
    folds={"pairs": tuple((f"f{number}", f"m{number}") for number in (1, 2, 3, 4))},
    licence="CC0 1.0",
    citation="sermll, synthetic corpus",
    source="built in",
    read=read,
    default_folds="pairs",
    generate=generate,
)
