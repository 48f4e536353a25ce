"""Pre-trained speech encoders from Hugging Face: waveforms in, frames of one utterance each out.

The weights and layers are transformers' own; the order in which they run is written here, because its forward
pass lets padding change an utterance's frames (group norm over padding, data2vec's stack of positional
convolutions), draws random layer drops and SpecAugment masks, and keeps layers nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name every torch text uses
from torch.utils.checkpoint import checkpoint

from sermll.errors import CheckpointError, ConfigError, DataError
from sermll.layers import (
    QKV,
    WavLMShape,
    attention_kernels,
    converted,
    convolve,
    plain,
    position_bias,
    positional_convolution,
    precision,
    wavlm_layer,
)

if TYPE_CHECKING:
    from sermll.config import Pretrained

SAMPLE_RATE_HZ = 16_000
FAMILIES = {
    "wavlm": "WavLM",
    "hubert": "HuBERT",
    "wav2vec2": "wav2vec 2.0",
    "data2vec-audio": "data2vec",
    "whisper": "Whisper",
}
"""Supported `model_type` of a model's config.json, and its name in print."""
ALIGNED_FRAMES = 8
"""WavLM's frames are padded to a multiple of so many: a GPU's attention copies scores whose rows are not aligned."""
CONVERTED_LAYERS = 6
"""Layers whose weights are converted together. Data-parallel workers exchange one group's gradients during the next."""
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that hold or list a model's weights, the preferred first."""


class PretrainedEncoder(nn.Module):
    """A pre-trained encoder whose frames of an utterance do not depend on what it is batched with.

    Frames are 320 samples (20 ms) apart. Dropout is the checkpoint's own; layer drop and SpecAugment are off.
    What the chosen layer does not need is removed or frozen: a parameter that requires a gradient gets one.

    Attributes:
        dim: Width of a frame.
        fingerprint: sha256 (hex) of the weights as loaded, before any training, and of the model's settings.

    Args:
        config: Name or folder, what is trained, which layer is read; see `sermll.config.Pretrained`.

    Raises:
        ConfigError: no such folder or model, not cached and no network, a family that is not supported, or a
            layer index the model does not have.
        CheckpointError: the weights are missing, damaged or incomplete, or hold more than tensors.
    """

    def __init__(self, config: Pretrained) -> None:
        super().__init__()
        self.config = config
        self.backbone, self.fingerprint = _load(config.name)
        self.dim = self.backbone.dim
        self.backbone.checkpointing = config.gradient_checkpointing

        count = len(self.backbone.layers)
        self.layer_weights: nn.Parameter | None = None
        if config.layer == "weighted":
            self.layer_weights = nn.Parameter(torch.zeros(count + 1))
        if config.layer != "last":
            index = count if config.layer == "weighted" else config.layer
            if index > count:
                raise ConfigError(f"layer {index} is out of range: {config.name} has layers 0 (front end) to {count}")
            self.backbone.read_hidden_state(index)

        if config.tune == "none":
            self.backbone.requires_grad_(False)
        elif config.tune == "transformer":
            for module in self.backbone.front_end_modules():
                module.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """Set training mode; a frozen encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.config.tune == "none":
            self.backbone.eval()
        return self

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch of utterances.

        Args:
            waveform: float32[batch, samples] at 16 kHz, zero after each utterance's end.
            lengths: int64[batch], samples of each utterance. One shorter than a frame's receptive field (400
                samples; 1 for Whisper) is taken as that long, its missing samples as zeros.

        Returns:
            Frames float[batch, frames, dim], zero where padded, and the mask bool[batch, frames] of the valid
            ones, at least one for each utterance.

        Raises:
            DataError: Whisper, and an utterance is longer than the 30 s its encoder takes in.
        """
        backbone = self.backbone
        # The transformer under tune=none needs no such guard: with all inputs and weights frozen autograd
        # records nothing, while the learned weights of layer=weighted still get their gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.tune == "all"):
            features, mask = backbone.front_end(waveform, lengths)
        states = backbone.hidden_states(features, mask)
        if self.layer_weights is None:
            frames = features
            for state in states:  # a loop, not a list: only the last state is kept alive
                frames = state
        else:
            # Weighted sum of all hidden states with softmax weights (Yang et al., SUPERB, Interspeech 2021).
            weights = self.layer_weights.softmax(dim=0)
            frames = sum((weight * state for weight, state in zip(weights, states, strict=True)), start=0)
        return cast(Tensor, frames).masked_fill(~mask[..., None], 0.0), mask


def frame_width(name: str) -> int:
    """Width of the frames of a model name or folder; of a name, its config.json alone is downloaded.

    Raises:
        ConfigError: there is no such model, or its config.json cannot be had.
    """
    with _quiet_hub():
        settings = _read_json(_settings_file(name), name)
    found = settings.get("d_model" if settings.get("model_type") == "whisper" else "hidden_size")
    if not isinstance(found, int):
        raise ConfigError(f"{name}: config.json does not tell the width of its frames; use another encoder")
    return found


def weights_hash(module: nn.Module) -> str:
    """sha256 (hex) over names, types, shapes and bytes of a module's tensors, read one at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def standardize(waveform: Tensor, lengths: Tensor) -> Tensor:
    """Zero mean and unit variance over the valid samples of each utterance; the padding stays zero.

    Args:
        waveform: float32[batch, samples].
        lengths: int64[batch], at least 1.

    Returns:
        float32[batch, samples]; a silent utterance stays silent.
    """
    valid = _valid(lengths, waveform.shape[1])
    count = lengths[:, None]
    mean = waveform.masked_fill(~valid, 0.0).sum(dim=1, keepdim=True) / count
    centered = (waveform - mean).masked_fill(~valid, 0.0)
    variance = centered.square().sum(dim=1, keepdim=True) / count
    return centered / (variance + 1e-7).sqrt()  # the constant of transformers' Wav2Vec2FeatureExtractor


def masked_group_norm(norm: nn.GroupNorm, features: Tensor, valid: Tensor) -> Tensor:
    """Group norm with one group per channel, its statistics over the valid frames of each utterance only.

    Args:
        norm: A GroupNorm with as many groups as channels.
        features: float[batch, channels, frames].
        valid: bool[batch, frames], at least one true in each row.

    Returns:
        float32[batch, channels, frames]; at valid frames what `norm` gives the utterance alone.
    """
    features = features.float()
    padded = ~valid[:, None]
    count = valid.sum(dim=1)[:, None, None]
    mean = features.masked_fill(padded, 0.0).sum(dim=2, keepdim=True) / count
    centered = features - mean
    variance = centered.masked_fill(padded, 0.0).square().sum(dim=2, keepdim=True) / count
    return torch.addcmul(norm.bias[:, None], centered, norm.weight[:, None] * (variance + norm.eps).rsqrt())


class _Backbone(nn.Module):
    """What the families share: a front end, transformer layers, and a norm after the last layer."""

    dim: int
    layers: nn.ModuleList
    final_norm: nn.Module
    checkpointing = False

    def front_end_modules(self) -> list[nn.Module]:
        """The convolutions that tune=transformer freezes."""
        raise NotImplementedError

    def front_end(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Convolution features float[batch, frames, channels] and their mask bool[batch, frames]."""
        raise NotImplementedError

    def hidden_states(self, features: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """The input of the first layer, then the output of each layer, float[batch, frames, dim]."""
        raise NotImplementedError

    def read_hidden_state(self, index: int) -> None:
        """Drop what transformers' `hidden_states[index]` does not depend on."""
        self.layers = self.layers[:index]
        self.final_norm = nn.Identity()

    def run(self, function: Any, *inputs: Any, **options: Any) -> Any:  # a layer of any family
        """Call a layer, by recomputing it in the backward pass if checkpointing is on."""

        def call(_: Tensor | None = None) -> Any:
            with attention_kernels():
                return function(*inputs, **options)

        if self.checkpointing and self.training and torch.is_grad_enabled():
            # By an argument torch learns of which GPU it is to keep the random state: dropout is to be drawn again.
            return checkpoint(call, next(it for it in inputs if isinstance(it, Tensor)), use_reentrant=False)
        return call()


class _WaveBackbone(_Backbone):
    """WavLM, HuBERT, wav2vec 2.0 and data2vec: convolutions on the waveform, then a transformer."""

    def __init__(self, model: Any, normalize: bool) -> None:  # a transformers model
        super().__init__()
        config, encoder = model.config, model.encoder
        self.dim = config.hidden_size
        self.family = config.model_type
        self.normalize = normalize
        self.windows = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.convolutions = model.feature_extractor.conv_layers
        self.projection = model.feature_projection
        self.positions = encoder.pos_conv_embed
        # "Stable layer norm" models norm inside each layer and after the last; the others before the first.
        stable = type(encoder).__name__.endswith("StableLayerNorm")
        self.input_norm = nn.Identity() if stable else encoder.layer_norm
        self.dropout = encoder.dropout
        self.layers = encoder.layers
        self.final_norm = encoder.layer_norm if stable else nn.Identity()
        if self.family == "wavlm":
            self.shape = WavLMShape.of(encoder.layers[0])

    def front_end_modules(self) -> list[nn.Module]:
        return [self.convolutions]

    def front_end(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        shortest = 1
        for kernel, stride in reversed(self.windows):
            shortest = (shortest - 1) * stride + kernel
        waveform = F.pad(waveform, (0, max(0, shortest - waveform.shape[1])))
        lengths = lengths.clamp(min=shortest)
        if self.normalize:
            waveform = standardize(waveform, lengths)
        # The convolutions do not pad, so a valid frame never sees the padding.
        if all(isinstance(cast(Any, layer).layer_norm, nn.LayerNorm) for layer in self.convolutions):
            features = waveform[:, :, None].to(precision(waveform))
            with plain(waveform.device):
                for layer, window in zip(self.convolutions, self.windows, strict=True):
                    features = self.run(convolve, layer, features, *window)
        else:
            features = waveform[:, None]
            remaining = lengths
            for layer, (kernel, stride) in zip(self.convolutions, self.windows, strict=True):
                remaining = (remaining - kernel) // stride + 1
                features = self.run(self._convolve, layer, features, remaining)
            features = features.transpose(1, 2)
        for kernel, stride in self.windows:
            lengths = (lengths - kernel) // stride + 1
        return features, _valid(lengths, features.shape[1])

    @staticmethod
    def _convolve(layer: Any, features: Tensor, lengths: Tensor) -> Tensor:
        """One convolution layer; `lengths` are the valid frames of its output."""
        if not isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
            return layer(features)
        features = layer.conv(features)
        valid = _valid(lengths, features.shape[2])
        return layer.activation(masked_group_norm(layer.layer_norm, features, valid))

    def hidden_states(self, features: Tensor, mask: Tensor) -> Iterator[Tensor]:
        projected = self.projection(features)
        if not isinstance(projected, Tensor):  # all but HuBERT return the normed features, too
            projected = projected[0]
        hidden = projected.masked_fill(~mask[..., None], 0.0)
        hidden = self.dropout(self.input_norm(hidden + self._position(hidden, mask)))
        yield hidden
        heard = mask[:, None, None]
        if self.family != "wavlm":
            for index, layer in enumerate(self.layers):
                hidden = self.run(layer, hidden, attention_mask=heard)
                yield self.final_norm(hidden) if index == len(self.layers) - 1 else hidden
            return
        yield from self._wavlm(hidden, heard)

    def _wavlm(self, hidden: Tensor, heard: Tensor) -> Iterator[Tensor]:
        """The output of each layer of WavLM; bool[batch, 1, 1, frames] are the valid frames."""
        if not self.layers:
            return
        dtype, frames = precision(hidden), hidden.shape[1]
        missing = -frames % ALIGNED_FRAMES
        hidden = F.pad(hidden.to(dtype), (0, 0, 0, missing)).flatten(0, 1)
        heard = F.pad(heard, (0, missing))
        padding = torch.zeros_like(heard, dtype=dtype).masked_fill(~heard, -torch.inf)
        # Made by the first layer and gated by each.
        attention = cast(Any, self.layers[0]).attention
        bias = position_bias(attention, frames + missing)[None].to(dtype).contiguous()
        for start in range(0, len(self.layers), CONVERTED_LAYERS):
            group = self.layers[start : start + CONVERTED_LAYERS]
            for index, weights in enumerate(converted(group, dtype, QKV), start):
                with plain(hidden.device):
                    hidden = self.run(wavlm_layer, self.shape, self.training, weights, hidden, padding, bias)
                output = hidden.unflatten(0, (len(heard), -1))[:, :frames]
                yield self.final_norm(output) if index == len(self.layers) - 1 else output

    def _position(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Positional convolution of `hidden`, whose padded frames are zero, as beyond an utterance alone."""
        if self.family != "data2vec-audio":
            positions = cast(Any, self.positions)
            return positions.activation(positional_convolution(positions.conv, hidden).to(hidden.dtype))
        hidden = hidden.transpose(1, 2)
        for layer in cast(nn.ModuleList, self.positions.layers):
            # each layer's bias and norm put values other than 0 into the padding
            hidden = layer(hidden.masked_fill(~mask[:, None], 0.0))
        return hidden.transpose(1, 2)


class _WhisperBackbone(_Backbone):
    """Whisper's encoder: log-mel spectrogram of the utterance padded to 30 s, convolutions, transformer.

    Attention reaches over all 30 s, as in its training; only frames of the utterance are returned.
    """

    window: Tensor
    mel_filters: Tensor
    SAMPLES_PER_FRAME = 320
    FFT_SAMPLES = 400
    HOP_SAMPLES = 160

    def __init__(self, model: Any, normalize: bool) -> None:  # a transformers model
        super().__init__()
        from transformers import WhisperFeatureExtractor

        encoder = model.encoder
        self.dim = encoder.config.d_model
        self.normalize = normalize
        self.samples = encoder.config.max_source_positions * self.SAMPLES_PER_FRAME
        self.dropout = nn.Dropout(encoder.config.dropout)
        self.conv1, self.conv2 = encoder.conv1, encoder.conv2
        self.embed_positions = encoder.embed_positions.requires_grad_(False)  # sinusoids, never trained
        self.layers = encoder.layers
        self.final_norm = encoder.layer_norm
        filters = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins).mel_filters
        filters = torch.from_numpy(filters).float().T.contiguous()
        self.register_buffer("mel_filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(self.FFT_SAMPLES), persistent=False)

    def front_end_modules(self) -> list[nn.Module]:
        return [self.conv1, self.conv2]

    def read_hidden_state(self, index: int) -> None:
        if index < len(self.layers):  # transformers counts the final norm as part of the last state
            super().read_hidden_state(index)

    def front_end(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        frames = max(1, -(-min(waveform.shape[1], self.samples) // self.SAMPLES_PER_FRAME))
        if waveform.shape[1] > self.samples and int(lengths.max()) > self.samples:
            raise DataError(
                f"an utterance of {int(lengths.max()) / SAMPLE_RATE_HZ:.2f} s is longer than the "
                f"{self.samples / SAMPLE_RATE_HZ:g} s that Whisper takes in: set data.crop_s and "
                "data.eval_crop_s to no more than that"
            )
        lengths = lengths.clamp(min=1)
        waveform = F.pad(waveform, (0, self.samples - waveform.shape[1]))  # cuts where negative
        if self.normalize:
            waveform = standardize(waveform, lengths)
        features = F.gelu(self.run(self.conv1, self.log_mel(waveform)))
        features = F.gelu(self.run(self.conv2, features))
        lengths = (lengths + self.SAMPLES_PER_FRAME - 1) // self.SAMPLES_PER_FRAME
        return features.transpose(1, 2), _valid(lengths, frames)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Whisper's log-mel spectrogram float32[batch, mels, samples / 160] of float32[batch, samples]."""
        with torch.autocast(waveform.device.type, enabled=False):  # half precision would lose the quiet bands
            spectrum = torch.stft(
                waveform.float(), self.FFT_SAMPLES, self.HOP_SAMPLES, window=self.window, return_complex=True
            )
            mel = self.mel_filters @ spectrum[..., :-1].abs().square()
        log_mel = mel.clamp(min=1e-10).log10()
        log_mel = torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (log_mel + 4.0) / 4.0

    def hidden_states(self, features: Tensor, mask: Tensor) -> Iterator[Tensor]:
        frames = mask.shape[1]
        hidden = self.dropout(features + self.embed_positions.weight)
        yield hidden[:, :frames]
        for index, layer in enumerate(self.layers):
            hidden = self.run(layer, hidden, None)
            yield (self.final_norm(hidden) if index == len(self.layers) - 1 else hidden)[:, :frames]


def _valid(lengths: Tensor, frames: int) -> Tensor:
    """bool[batch, frames], true before each length."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def _load(name: str) -> tuple[_Backbone, str]:
    """The backbone of a model name or folder, and its fingerprint; see `PretrainedEncoder` for the errors."""
    with _quiet_hub():
        folder = _locate(name)
    settings = _read_json(folder / "config.json", name)
    family = settings.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(f"{key} ({title})" for key, title in FAMILIES.items())
        raise ConfigError(f"{name}: model_type {family!r} is not supported; supported are {known}")
    if settings.get("add_adapter") or settings.get("conv_pos_batch_norm"):
        option = "add_adapter" if settings.get("add_adapter") else "conv_pos_batch_norm"
        raise ConfigError(f"{name}: config.json sets {option}, which is not supported; use another encoder")
    normalize = _normalizes(folder, settings, name)
    model = _load_model(folder, family, name)
    if family == "whisper":
        fingerprinted, backbone = model.encoder, _WhisperBackbone(model, normalize)
    else:
        fingerprinted, backbone = model, _WaveBackbone(model, normalize)
    bookkeeping = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
    used = {key: value for key, value in settings.items() if key not in bookkeeping}
    facts = {"config": used, "normalize": normalize, "weights": weights_hash(fingerprinted)}
    return backbone, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _load_model(folder: Path, family: str, name: str) -> Any:  # a transformers model
    """The bare transformers model of a local folder, in float32, all of its weights found."""
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise CheckpointError(f"{name}: no weights in {folder}; looked for {', '.join(WEIGHT_FILES)}")
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    # With both probabilities at 0 the model has no masked_spec_embed, which would never get a gradient.
    without_masks = {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    try:
        # transformers draws initial weights before it reads the saved ones: not from the caller's generator.
        with _quiet_transformers(), torch.random.fork_rng(devices=[]):
            config = AutoConfig.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, **without_masks
            )
            model, report = AutoModel.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                # WavLM has but one implementation in transformers, which `wavlm_layer` replaces.
                attn_implementation="eager" if family == "wavlm" else "sdpa",
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
                weights_only=True,
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        EOFError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise CheckpointError(
            f"{name}: the weights in {folder} cannot be loaded ({_first_line(error)}); fetch them again"
        ) from error
    # transformers fills gaps with random numbers and goes on.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("decoder."))
    if missing:
        raise CheckpointError(
            f"{name}: the weights in {folder} lack {len(missing)} tensors, as {missing[0]}; fetch them again"
        )
    return model


def _normalizes(folder: Path, settings: Mapping[str, Any], name: str) -> bool:
    """Whether the model was trained on waveforms of zero mean and unit variance.

    Its feature extractor tells. A folder without one is judged by its convolutions: models with a layer norm
    in each (WavLM-Large, wav2vec2-large-lv60) were trained on normalized waveforms; of those with one group
    norm, WavLM-Base was not, HuBERT-Base was, and raw is assumed. Whisper was not.
    """
    extractor: Mapping[str, Any] | None = None
    if (folder / "processor_config.json").is_file():
        extractor = _read_json(folder / "processor_config.json", name).get("feature_extractor")
    if extractor is None and (folder / "preprocessor_config.json").is_file():
        extractor = _read_json(folder / "preprocessor_config.json", name)
    whisper = settings["model_type"] == "whisper"
    if extractor is None:
        return not whisper and settings.get("feat_extract_norm", "group") == "layer"
    expected = {"sampling_rate": SAMPLE_RATE_HZ}
    if whisper:
        expected |= {"n_fft": _WhisperBackbone.FFT_SAMPLES, "hop_length": _WhisperBackbone.HOP_SAMPLES}
    for key, value in expected.items():
        if extractor.get(key, value) != value:
            raise ConfigError(f"{name}: feature extractor has {key}={extractor[key]}, supported is {value}")
    return bool(extractor.get("do_normalize", not whisper))  # the defaults of transformers' extractors


def _settings_file(name: str) -> Path:
    """The config.json of a model: in the folder `name`, else in the Hugging Face cache, filled by download."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{name}: no config.json there; give the folder of a saved Hugging Face model")
        return folder / "config.json"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ConfigError(f"{name}: no such folder; give that of a saved Hugging Face model, or a model name")
    config = _fetch(name, "config.json", None)
    if config is None:
        raise ConfigError(f"{name}: no config.json on Hugging Face; give another name, or a local folder")
    return config


def _locate(name: str) -> Path:
    """The local folder of a model: `name` itself, else in the Hugging Face cache, filled by download."""
    config = _settings_file(name)
    if Path(name).expanduser().is_dir():
        return config.parent
    revision = config.parent.name  # a snapshot's folder is its commit: all files are taken from the same one
    for file in ("preprocessor_config.json", "processor_config.json"):
        _fetch(name, file, revision)
    for file in WEIGHT_FILES:
        weights = _fetch(name, file, revision)
        if weights is not None:
            if file.endswith(".index.json"):
                for shard in sorted(set(_read_json(weights, name).get("weight_map", {}).values())):
                    _fetch(name, shard, revision)
            break
    return config.parent


def _fetch(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a Hugging Face model, from the cache if it is there; None if the model has no such file."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(name, file, revision=revision)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # else: known to be absent
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError as error:  # offline or unreachable
        reason: Exception = error
    except EntryNotFoundError:  # the parent class: there is no such file on the hub
        return None
    except Exception as error:  # an unknown, private or gated model, or whatever a network may do
        reason = error
    raise ConfigError(
        f"{name}: no such folder, {file} is not in the Hugging Face cache, and it could not be downloaded "
        f"({_first_line(reason)}); give a local folder, or run once with network to download the model"
    ) from reason


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {path} is not JSON ({_first_line(error)}); fetch it again") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: {path} is not a JSON object; fetch it again")
    return tree


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No progress bars of downloads, and the setting as it was afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Only errors from transformers, no progress bars, and the settings as they were afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
