"""What a run is made of: frozen sections, dotted overrides, and the run id.

A run is described by one `Experiment`. Its defaults are the paper's; a YAML file holds what differs, and an
*override* (`dotted.key=value`) is the only way to vary it, for the command line, search trials and campaigns alike.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sermll.errors import ConfigError

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]


Kind = TypeVar("Kind", bound="Section")


def without_password(url: str) -> str:
    """A URL, or a text with some, that may be written and shown: user, password and tokens are replaced by ***."""
    shown = re.sub(r"://[^/@\s]*:(?:[^/\s]*|[^@\s]*)@", "://***@", url)
    return re.sub(
        r"([?&][^=&\s]*(?:passw(?:or)?d|pwd|token|secret|(?:api|access|secret)[-_]?key)=)[^&\s]+",
        r"\1***",
        shown,
        flags=re.IGNORECASE,
    )


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused, NaN, infinity and truth values for numbers refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, field: ValidationInfo) -> Any:  # whatever a file holds
        if any(isinstance(one, bool) for one in (value if isinstance(value, list | tuple) else [value])):
            types = _types(cls.model_fields[str(field.field_name)].annotation)
            if bool not in types and (int in types or float in types):  # to pydantic, true is 1
                raise ValueError("a number is wanted, not true or false")
        return value


def _kind_or(default: str) -> Discriminator:
    """Tell the variants of a section apart by `kind`; where it is not given, take the default variant."""

    def tag(value: Any) -> Any:  # a mapping before validation, a section after
        return value.get("kind", default) if isinstance(value, Mapping) else getattr(value, "kind", None)

    return Discriminator(tag)


class Data(Section):
    """Which prepared data, and how much of each utterance the model hears."""

    path: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="folder written by `sermll prepare`; or several, each of another corpus, which are joined"
    )
    crop_s: float = Field(
        default=6.25, gt=0.1, description="longest training crop in seconds, placed at random each epoch"
    )
    labels: str | dict[str, tuple[str, ...]] = Field(
        default="default",
        description="label space: native, 4class, shared (what all joined corpora have), shared:CORPUS+CORPUS, or "
        "classes with their labels; default: the corpus's usual one, which joined corpora have not",
    )
    targets: Literal["hard", "soft"] = Field(
        default="hard", description="soft: the shares of the annotators' votes are what the losses are told"
    )
    eval_crop_s: float = Field(
        default=30.0, gt=0.1, description="longest crop scored, in seconds, taken from the middle"
    )


class Protocol(Section):
    """Who is tested, who is held back for choosing, who is trained on."""

    folds: str = Field(
        default="default",
        description="a fold list of the corpus; 'speaker', 'session' or 'fold' to leave one out; of joined corpora "
        "'corpus' to leave one out or 'one_corpus' to train on one, dev speakers then being spread over each training "
        "corpus; or a YAML file",
    )
    dev_speakers: int | Auto = Field(
        default="auto",
        description="the next so many speakers after the test group are dev; auto: a tenth of the rest, of "
        "folds=session the whole next session",
    )

    select: Literal["dev_ua", "dev_loss", "last"] = Field(
        default="dev_ua", description="which epoch is the result: the best by dev UA or by dev loss, or the last"
    )
    allow_leak: bool = Field(
        default=False, description="run although train, dev and test overlap; every result says that it leaks"
    )

    @model_validator(mode="after")
    def _dev_not_empty(self) -> Self:
        if self.dev_speakers != "auto" and self.dev_speakers < 1:
            raise ValueError("dev_speakers must be at least 1: checkpoints are chosen on dev, never on test")
        return self


class EAM(Section):
    """Energy-adaptive mixup, equations 1 to 4."""

    kind: Literal["eam"] = "eam"
    probability: float = Field(default=0.5, gt=0, le=1, description="chance that an utterance is mixed in an epoch")
    snr_db: tuple[float, float] = Field(
        default=(-5.0, 10.0), description="range of the uniform signal-to-mix ratio in dB"
    )

    @model_validator(mode="after")
    def _range(self) -> Self:
        if not -60 <= self.snr_db[0] <= self.snr_db[1] <= 60:
            raise ValueError(f"snr_db needs -60 <= low <= high <= 60, got {list(self.snr_db)}")
        return self


class LAM(Section):
    """Label-adaptive mixup, the baseline: whole-length half-and-half sum (Kang et al., ICASSP 2023)."""

    kind: Literal["lam"] = "lam"
    probability: float = Field(default=0.5, gt=0, le=1, description="chance that an utterance is mixed in an epoch")


class NoMixup(Section):
    """Utterances as they are."""

    kind: Literal["none"] = "none"


class Pretrained(Section):
    """A Hugging Face speech encoder by name or local folder."""

    kind: Literal["pretrained"] = "pretrained"
    name: str = Field(
        default="microsoft/wavlm-large", description="model name or folder: WavLM, HuBERT, wav2vec 2.0, ..."
    )
    tune: Literal["all", "transformer", "none"] = Field(
        default="transformer", description="what is trained: everything, all but the CNN front end, or nothing"
    )
    layer: Literal["last", "weighted"] | Annotated[int, Field(ge=0)] = Field(
        default="last",
        description="last layer, a learned weighting of all layers, or one layer by index (0: front end)",
    )
    gradient_checkpointing: bool = Field(default=False, description="trade a third more compute for less memory")

    @model_validator(mode="after")
    def _checkpointing_has_effect(self) -> Self:
        if self.gradient_checkpointing and self.tune == "none":
            raise ValueError("gradient_checkpointing has no effect when tune=none")
        return self


class LogMel(Section):
    """A compact encoder trained from scratch on log-mel spectrograms."""

    kind: Literal["logmel"] = "logmel"
    mels: int = Field(default=80, ge=16, le=128, description="mel bands")
    dim: int = Field(
        default=128,
        ge=16,
        le=1024,
        multiple_of=2,
        description="width of a frame, half of it for each direction of time",
    )
    dropout: float = Field(default=0.2, ge=0, lt=1, description="share of values dropped in training")
    spec_augment: bool = Field(default=True, description="mask bands of time and frequency in training")
    channels: int = Field(default=16, ge=4, le=256, description="channels of the first of four convolutions")
    warp: float = Field(
        default=0.0, ge=0, le=0.3, description="scale frequencies in training by up to this share, as other speakers'"
    )

    @property
    def width(self) -> tuple[int, str]:
        """Width of a frame, and the setting that it is."""
        return self.dim, "model.encoder.dim"


class MFCC(Section):
    """A baseline trained from scratch: MFCC and gated dilated 1-D convolutions (TIM-Net, Ye et al., ICASSP 2023)."""

    kind: Literal["mfcc"] = "mfcc"
    coefficients: int = Field(default=39, ge=1, le=80, description="MFCC of a frame, the zeroth included")
    channels: int = Field(default=39, ge=4, le=1024, description="channels of every convolution, the width of a frame")
    blocks: int = Field(default=8, ge=1, le=12, description="blocks in each direction, dilated by 1, 2, 4, ... frames")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="share of channels dropped in training")

    @property
    def width(self) -> tuple[int, str]:
        """Width of a frame, and the setting that it is."""
        return self.channels, "model.encoder.channels"


class ResNet(Section):
    """A baseline trained from scratch: ResNet-18 (He et al., CVPR 2016) on log-mel spectrograms."""

    kind: Literal["resnet"] = "resnet"
    mels: int = Field(default=80, ge=32, le=128, description="mel bands")
    channels: int = Field(
        default=16, ge=4, le=256, description="channels of the first of four stages, an eighth of the width of a frame"
    )
    spec_augment: bool = Field(default=True, description="mask bands of time and frequency in training")
    warp: float = Field(
        default=0.0, ge=0, le=0.3, description="scale frequencies in training by up to this share, as other speakers'"
    )

    @property
    def width(self) -> tuple[int, str]:
        """Width of a frame, and the setting that it comes of."""
        return 8 * self.channels, "eight times model.encoder.channels"


class FLAM(Section):
    """Frame-level attention, equation 5."""

    kind: Literal["flam"] = "flam"
    heads: int = Field(default=16, ge=1, description="attention heads; they divide the encoder's width")


class MeanPool(Section):
    """Mean over the heard frames."""

    kind: Literal["mean"] = "mean"


class MaxPool(Section):
    """Largest value over the heard frames."""

    kind: Literal["max"] = "max"


class FirstFrame(Section):
    """The first frame alone."""

    kind: Literal["first"] = "first"


class Model(Section):
    """Encoder, pooling over frames, and the two linear heads."""

    encoder: Annotated[
        Annotated[Pretrained, Tag("pretrained")]
        | Annotated[LogMel, Tag("logmel")]
        | Annotated[MFCC, Tag("mfcc")]
        | Annotated[ResNet, Tag("resnet")],
        _kind_or("pretrained"),
    ] = Pretrained()
    pool: Annotated[
        Annotated[FLAM, Tag("flam")]
        | Annotated[MeanPool, Tag("mean")]
        | Annotated[MaxPool, Tag("max")]
        | Annotated[FirstFrame, Tag("first")],
        _kind_or("flam"),
    ] = FLAM()
    embedding_dim: int = Field(default=64, ge=2, description="width of the embedding z and of the frame projections h")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        # A pre-trained encoder's width is known from its files alone: `FrameLevelAttention` refuses it.
        if isinstance(self.pool, FLAM) and not isinstance(self.encoder, Pretrained):
            width, setting = self.encoder.width
            if width % self.pool.heads:
                raise ValueError(
                    f"{self.pool.heads} heads (model.pool.heads) do not divide a frame's width of {width} ({setting}); "
                    "change one of them"
                )
        return self


class KL(Section):
    """Kullback-Leibler divergence to the soft label, equation 6."""

    weight: float | Auto = Field(default="auto", description="factor in the sum; auto: 1 / ln(classes)")


class Focal(Section):
    """Focal loss on soft labels, equation 7."""

    weight: float | Auto = Field(default="auto", description="factor in the sum; auto: 1 / ln(classes)")
    gamma: float = Field(default=2.0, ge=0, description="focusing exponent")


class Center(Section):
    """Distance of embeddings to learned class centers, equation 8."""

    weight: float = Field(default=0.002, gt=0, description="factor in the sum")


class SupCon(Section):
    """Supervised contrastive loss over all frames of the batch, equations 9 and 10."""

    weight: float | Auto = Field(default="auto", description="factor in the sum; auto: 1 / ln(valid frames - 1)")
    temperature: float = Field(default=0.1, gt=0, description="divisor of the dot products")
    normalize: bool = Field(default=True, description="scale frame projections to unit length first")
    projection: Literal["shared", "separate"] = Field(
        default="shared", description="frames use the embedding's linear map, or one of their own"
    )


class Losses(Section):
    """The objective. A loss is on when its section is present; `losses.focal=null` turns it off."""

    kl: KL | None = KL()
    focal: Focal | None = Focal()
    center: Center | None = Center()
    supcon: SupCon | None = SupCon()
    gather: bool = Field(
        default=True,
        description="SupCon compares the frames of the global batch; false: of each worker's share alone",
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        for name in ("kl", "focal", "supcon"):
            section = getattr(self, name)
            if section is not None and section.weight != "auto" and section.weight <= 0:
                raise ValueError(f"{name}.weight must be positive, got {section.weight}; {name}=null turns it off")
        if self.kl is None and self.focal is None:
            raise ValueError("kl or focal must be on: center and supcon alone do not train the classifier")
        return self


class Optim(Section):
    """Adam with two groups and the paper's stepwise decay."""

    epochs: int = Field(default=20, ge=1, le=10_000)
    batch_size: int = Field(default=16, ge=2, description="utterances of the global batch, over all workers")
    lr: float = Field(default=1e-4, gt=0, description="learning rate of the model")
    center_lr: float = Field(default=5e-3, gt=0, description="learning rate of the class centers")
    decay: float = Field(default=0.875, gt=0, le=1, description="factor on both rates after each epoch")
    decay_epochs: int = Field(default=20, ge=0, description="epochs after which the rates stay")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay (0: plain Adam)")
    average: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share that the scored weights keep of themselves at each step, the rest comes from the trained "
        "ones; 0: the trained ones are scored, 0.995: roughly their mean over 200 steps",
    )
    clip_norm: float = Field(default=5.0, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast of the model's forward pass")


class Resources(Section):
    """Machines, not science: a run's id does not depend on them, but for `workers` where `losses.gather` is off.

    Of the rest, the number of workers alone changes what is computed: each draws its own dropout and masks.
    """

    workers: Count | tuple[Count, Count] = Field(
        default=1,
        description="training processes per fold, which share the global batch; [fewest, most]: as many as the cluster "
        "has room for, more when nodes come and fewer when they go",
    )
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float | Auto = Field(default="auto", description="auto: one if the cluster has any, else none")
    memory_gb: float = Field(
        default=0.0,
        ge=0,
        description="of each training process: no more run on a machine than fit; 0: not reckoned with",
    )
    parallel_folds: int | Auto = Field(default="auto", description="folds trained at once; auto: as many as fit")
    max_failures: int = Field(default=3, ge=0, description="restarts of a fold after lost workers or nodes")
    wait_s: float = Field(
        default=0.0,
        ge=0,
        description="ask a cluster that grows for machines, and wait so long for the first; 0: it is as large as it is",
    )

    @field_validator("workers")
    @classmethod
    def _is_a_range(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] >= workers[1]:
            raise ValueError("[fewest, most] wants the smaller first, and one number where they are equal")
        return workers

    @property
    def fewest(self) -> int:
        """Training processes without which a fold is not trained."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Training processes that a fold can use."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Tracking(Section):
    """Where results go. Nothing here changes what a run computes or its id."""

    runs: str = Field(default="runs", description="folder that receives the run's folder")
    mlflow: str | Literal[False] | None = Field(
        default=None,
        description="MLflow URI; null: MLFLOW_TRACKING_URI, else a SQLite file in the runs folder; off: none",
    )
    experiment: str | None = Field(default=None, description="MLflow experiment; null: the experiment's name")

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        if isinstance(self.mlflow, str) and without_password(self.mlflow) != self.mlflow:
            raise ValueError(
                "mlflow holds a password, and settings are written into every result; give the address as "
                "MLFLOW_TRACKING_URI, or the password as MLFLOW_TRACKING_PASSWORD"
            )
        return self


class Experiment(Section):
    """Everything that decides a run's numbers, and where and on what it runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="short name, part of the run's folder")
    seed: int = Field(default=0, ge=0, lt=2**31)
    fold: int | None = Field(default=None, ge=0, description="one fold to train; null: every fold")
    data: Data
    protocol: Protocol = Protocol()
    mixup: Annotated[
        Annotated[EAM, Tag("eam")] | Annotated[LAM, Tag("lam")] | Annotated[NoMixup, Tag("none")],
        _kind_or("eam"),
    ] = EAM()
    model: Model = Model()
    losses: Losses = Losses()
    optim: Optim = Optim()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optim.batch_size < 2 * self.resources.most:
            raise ValueError(
                f"optim.batch_size is the batch of all workers: {self.optim.batch_size} is too small for "
                f"{self.resources.most} of resources.workers (two utterances a worker at least)"
            )
        if not self.losses.gather:
            self._gather_has_one_effect()
        if self.losses.center is None and "center_lr" in self.optim.model_fields_set and self.optim.center_lr != 5e-3:
            raise ValueError("optim.center_lr has no effect when losses.center is null")
        return self

    def _gather_has_one_effect(self) -> None:
        if self.losses.supcon is None:
            raise ValueError(
                "losses.gather=false has no effect when losses.supcon is null: the other losses are means over "
                "utterances, whoever computes them"
            )
        if self.resources.most == 1:
            raise ValueError("losses.gather=false has no effect with resources.workers=1, whose share is the batch")
        if not isinstance(self.resources.workers, int):
            raise ValueError(
                f"losses.gather=false with resources.workers={list(self.resources.workers)}: what SupCon compares "
                "would depend on how many machines there happen to be; give one number of workers"
            )

    def science(self) -> dict[str, Any]:
        """The settings that decide the numbers, beside the protocol: not the machines, nor the choice of folds.

        Where workers compare the frames of their own shares alone, how many they are decides, too.
        """
        protocol = {"data": {"path": True, "labels": True, "targets": True}, "protocol": True}
        outside = {"name": True, "fold": True, "resources": True, "tracking": True, **protocol}
        told = self.model_dump(mode="json", exclude=outside)
        return told if self.losses.gather else told | {"resources": {"workers": self.resources.workers}}


def run_id(experiment: Experiment, protocol_hash: str) -> str:
    """Twelve hex digits naming the run: same settings, data and folds give the same id on any machine.

    Args:
        experiment: the settings.
        protocol_hash: names data, label space, targets, folds, dev rule and selection rule, see `Design.hash`.
    """
    text = json.dumps({"config": experiment.science(), "protocol": protocol_hash}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Read `dotted.key=value` words; values are YAML, so `null`, `true`, `[-5, 10]` and `1e-4` mean what they say.

    Raises:
        ConfigError: a word has no `=`, an empty key, a value that is not YAML, or repeats a key or one it lies within.
    """
    overrides: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r}: an override is key=value, for example optim.epochs=10")
        if key in overrides:
            raise ConfigError(f"{key}: given twice")
        for other in overrides:
            if other.startswith(f"{key}.") or key.startswith(f"{other}."):
                raise ConfigError(f"{key} and {other}: one lies within the other; give one of them")
        overrides[key] = parse_value(key, text)
    return overrides


def parse_value(key: str, text: str) -> Any:  # YAML may be anything
    """One YAML value, with `1e-4` read as a number (plain YAML 1.1 calls it a string)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} is not a YAML value ({error})") from None
    return _numbers(value)


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; every other reader, and every person, as a number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def with_overrides(
    tree: Mapping[str, Any], overrides: Mapping[str, Any], sections: Sequence[type[BaseModel]] = (Experiment,)
) -> dict[str, Any]:
    """A copy of the settings `tree` with each dotted key set; neither argument is changed.

    Changing the `kind` of a section keeps what the new kind has, too, and leaves the other settings of the former kind
    behind, which would mean nothing to the new one; kinds are set before other keys, whatever their order. `sections`
    are what `tree` may hold, the default first.
    """
    result = dict(tree)
    for key, value in sorted(overrides.items(), key=lambda item: item[0].rpartition(".")[2] != "kind"):
        head, _, rest = key.partition(".")
        fields = [section.model_fields[head] for section in sections if head in section.model_fields]
        if rest:
            below = result.get(head)
            if below is not None and not isinstance(below, Mapping):
                raise ConfigError(f"{key}: {head} is the value {below!r}, not a section")
            known = [type(field.default) for field in fields if isinstance(field.default, BaseModel)]
            known += [section for field in fields for section in _sections(field.annotation)]
            result[head] = with_overrides(below or {}, {rest: value}, known)
        elif head == "kind" and fields and result.get("kind", fields[0].default) != value:
            known_to = {section.model_fields["kind"].default: section.model_fields for section in sections}
            result = {name: it for name, it in result.items() if name in known_to.get(value, ())} | {"kind": value}
        else:
            result[head] = value
    return result


def load_experiment(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Read an experiment file, apply overrides, validate.

    Raises:
        ConfigError: missing or unreadable file, unknown key (with the nearest known one), or a value out of range;
            one line for each fault.
    """
    return resolve(read_yaml(Path(path), "experiment"), overrides or {}, source=str(path))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; `what` it should be is told where it is not.

    Raises:
        ConfigError: missing, unreadable, or no mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what} file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys ({what}), found {type(tree).__name__}")
    return _numbers(tree)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, the names an override uses."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def resolve(tree: Mapping[str, Any], overrides: Mapping[str, Any], source: str = "config") -> Experiment:
    """Validate the settings `tree` with `overrides`; see `load_experiment`."""
    return validate(Experiment, with_overrides(tree, overrides), f"{source}: not a valid experiment")


def validate(kind: type[Kind], tree: Mapping[str, Any], source: str) -> Kind:
    """Make a section of a tree.

    Raises:
        ConfigError: `source`, and one line for each fault.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}\n{_describe(error.errors(), kind)}") from None


def to_yaml(experiment: Experiment) -> str:
    """The resolved settings as YAML, every default written out."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _describe(faults: Iterable[Any], root: type[BaseModel]) -> str:
    """The faults in words, one line a key: the dotted key, what is wrong, what was found."""
    lines: dict[str, str] = {}
    for fault in faults:
        key, sections = _locate(fault["loc"], root)
        known = sorted({name for section in sections for name in section.model_fields})
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(key.rpartition(".")[2], known, n=1)
            message = "no such key; " + (f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}")
        elif fault["type"] == "missing":
            message = f"missing; give it in the file or as {key}=value"
        elif fault["type"] == "union_tag_invalid":
            message = f"kind must be one of {fault['ctx']['expected_tags']}, got {fault['ctx']['tag']!r}"
        elif fault["type"] == "union_tag_not_found":
            message = _no_kind(key, fault["input"], [section.model_fields["kind"].default for section in sections])
        else:
            found = "" if isinstance(fault["input"], dict) else f", got {fault['input']!r}"
            message = fault["msg"].removeprefix("Value error, ") + found
        # A value that fits no branch of a union is one fault to a person, several to pydantic.
        lines[key] = f"{lines[key]}; or: {message}" if key in lines else message
    return "\n".join(f"{key}: {message}" if key else message for key, message in lines.items())


def _no_kind(key: str, found: Any, kinds: list[str]) -> str:  # whatever a file holds
    """What to say of a section that was given as something else, or with a kind that is nothing."""
    given = found.get("kind") if isinstance(found, Mapping) else found
    likely = [kind for kind in kinds if kind == ("none" if given is None else given)]
    shown = "null" if given is None else repr(given)
    return f"got {shown} where a section is meant; give {key}.kind={' or '.join(likely or kinds)}"


def _locate(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, list[type[BaseModel]]]:
    """The dotted key a fault's location means, and the sections it may hold, or of an unknown key those it is in."""
    sections: list[type[BaseModel]] = [root]
    steps: list[str] = []
    for place, part in enumerate(location):
        chosen = [s for s in sections if "kind" in s.model_fields and s.model_fields["kind"].default == part]
        if chosen:  # the tag of a union, not a key
            sections = chosen
            continue
        fields = [s.model_fields[part].annotation for s in sections if part in s.model_fields]
        if not fields and not (place == len(location) - 1 and sections):
            continue  # the branch of a union of values, such as 'float' or 'literal'
        steps.append(str(part))
        if fields:
            sections = [section for annotation in fields for section in _sections(annotation)]
    return ".".join(steps), sections


def _sections(annotation: Any) -> list[type[BaseModel]]:  # a typing form
    """The section classes an annotation may hold."""
    return [part for part in _types(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _types(annotation: Any) -> list[Any]:  # a typing form
    """What an annotation is made of, once its unions and collections are taken apart."""
    parts = get_args(annotation)
    return [single for part in parts for single in _types(part)] if parts else [annotation]
