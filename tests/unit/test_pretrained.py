"""Pre-trained encoders, on tiny random models of every family saved to a folder.

The reference is transformers' unmodified model on each utterance alone, so one comparison covers the order of
the layers, normalization, padding and the choice of hidden states.
"""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sermll.pretrained as pretrained_module
from sermll.config import Pretrained
from sermll.errors import CheckpointError, ConfigError, DataError
from sermll.layers import converted, position_bias, positional_convolution, windows
from sermll.pooling import FrameLevelAttention
from sermll.pretrained import PretrainedEncoder, masked_group_norm, standardize, weights_hash

transformers = pytest.importorskip("transformers")

LAYERS = 3
LENGTHS = (4000, 399, 1700, 2923)
COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.5,
    "layerdrop": 0.5,
}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
DATA2VEC = {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}
WHISPER = {
    "d_model": 16,
    "encoder_layers": LAYERS,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "max_source_positions": 50,  # one second instead of thirty
    "dropout": 0.1,
    "encoder_layerdrop": 0.5,
}
MODELS = {
    "wavlm-group": ("WavLM", COMMON, False),
    "wavlm-layer": ("WavLM", COMMON | STABLE, True),
    "hubert-group": ("Hubert", COMMON, True),
    "hubert-layer": ("Hubert", COMMON | STABLE, True),
    "wav2vec2-group": ("Wav2Vec2", COMMON, False),
    "wav2vec2-layer": ("Wav2Vec2", COMMON | {"feat_extract_norm": "layer"}, True),
    "wav2vec2-stable": ("Wav2Vec2", COMMON | STABLE, True),
    "data2vec": ("Data2VecAudio", COMMON | DATA2VEC, True),
    "whisper": ("Whisper", WHISPER, False),
}


def every_model(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with each of the models, loaded once."""
    return pytest.mark.parametrize("kind", MODELS)(pytest.mark.usefixtures("load_once")(test))


def save(kind: str, folder: str | Path, seed: int = 1, **changes: Any) -> str:
    """Save a random model and its feature extractor; norms and biases are random, so that they matter."""
    family, settings, normalize = MODELS[kind]
    config = getattr(transformers, f"{family}Config")(**(settings | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}Model")(config)
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    if family == "Whisper":
        extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    else:
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
    extractor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save(kind, root / kind) for kind in MODELS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, str]) -> dict[str, tuple[Any, str]]:
    """What loading a folder gives."""
    return {folder: pretrained_module._load(folder) for folder in folders.values()}


@pytest.fixture
def load_once(loaded: dict[str, tuple[Any, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy what was loaded before: loading is most of a test's time."""
    load = pretrained_module._load
    copied = lambda name: copy.deepcopy(loaded[name]) if name in loaded else load(name)  # noqa: E731
    monkeypatch.setattr(pretrained_module, "_load", copied)


def encoder(folder: str | Path, **settings: Any) -> PretrainedEncoder:
    return PretrainedEncoder(Pretrained(name=str(folder), **settings))


def utterances(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(0.2 * rng.standard_normal(n) + 0.05).astype(np.float32) for n in lengths]


def batch(waves: list[np.ndarray], samples: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    samples = samples or max(map(len, waves))
    padded = np.stack([np.pad(wave, (0, samples - len(wave))) for wave in waves])
    return torch.from_numpy(padded), torch.tensor([len(wave) for wave in waves])


def references(folder: str | Path, waves: list[np.ndarray]) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Hidden states and last state by transformers' own model and feature extractor, each utterance alone."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    whisper = model.config.model_type == "whisper"
    for wave in waves:
        wave = wave if whisper else np.pad(wave, (0, max(0, 400 - len(wave))))
        inputs = extractor(wave, sampling_rate=16_000, return_tensors="pt")[extractor.model_input_names[0]]
        with torch.no_grad():
            output = (model.encoder if whisper else model)(inputs, output_hidden_states=True)
        count = -(-len(wave) // 320) if whisper else None
        yield [state[0, :count] for state in output.hidden_states], output.last_hidden_state[0, :count]


@every_model
def test_equals_transformers_on_the_utterance_alone(folders: dict[str, str], kind: str) -> None:
    waves = utterances()
    expected = list(references(folders[kind], waves))
    for layer in ("last", *range(LAYERS + 1)):
        model = encoder(folders[kind], layer=layer).eval()
        assert model.dim == 16
        with torch.no_grad():
            frames, mask = model(*batch(waves, samples=6000))
        for row, (states, last) in enumerate(expected):
            wanted = last if layer == "last" else states[layer]
            assert mask[row].sum() == len(wanted)
            torch.testing.assert_close(frames[row][mask[row]], wanted, atol=1e-5, rtol=1e-5)
            assert (frames[row][~mask[row]] == 0).all()


@every_model
def test_frames_do_not_depend_on_the_batch(folders: dict[str, str], kind: str) -> None:
    model = encoder(folders[kind]).eval()
    waves = utterances()
    with torch.no_grad():
        together, together_mask = model(*batch(waves, samples=9000))
        for row, wave in enumerate(waves):
            alone, alone_mask = model(*batch([wave]))
            assert alone_mask.all()
            valid = together[row][together_mask[row]]
            torch.testing.assert_close(valid, alone[0], atol=1e-5, rtol=1e-5)


@every_model
def test_empty_and_silent_utterances_give_finite_frames(folders: dict[str, str], kind: str) -> None:
    waveform, lengths = torch.zeros(3, 0), torch.tensor([0, 0, 0])
    frames, mask = encoder(folders[kind])(waveform, lengths)
    assert mask.tolist() == [[True]] * 3
    assert frames.isfinite().all()
    frames, mask = encoder(folders[kind])(torch.zeros(2, 4000), torch.tensor([4000, 1]))
    assert mask.sum(dim=1)[1] == 1
    assert frames.isfinite().all()
    frames.sum().backward()


@every_model
@pytest.mark.parametrize("tune", ["all", "transformer", "none"])
@pytest.mark.parametrize("layer", ["last", "weighted", 0, 1, LAYERS])
def test_every_trainable_parameter_gets_a_gradient(folders: dict[str, str], kind: str, tune: str, layer: Any) -> None:
    # what DistributedDataParallel needs without find_unused_parameters
    model = encoder(folders[kind], tune=tune, layer=layer)
    frames, _ = model(*batch(utterances([2000, 1200])))
    if frames.requires_grad:
        frames.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fronts = [f"backbone.{name}" for name in ("convolutions.", "conv1.", "conv2.")]
    front = {name for name in trained if any(name.startswith(prefix) for prefix in fronts)}
    assert bool(front) == (tune == "all")
    if tune == "none":
        assert trained == ({"layer_weights"} if layer == "weighted" else set())
    elif tune == "transformer" and (kind, layer) != ("whisper", 0):
        assert len(trained) > 1


@every_model
def test_layers_above_an_index_are_not_kept(folders: dict[str, str], kind: str) -> None:
    model = encoder(folders[kind], layer=1)
    assert len(model.backbone.layers) == 1
    full = sum(parameter.numel() for parameter in encoder(folders[kind]).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) < full


@every_model
def test_weighted_is_the_softmax_sum_of_all_hidden_states(folders: dict[str, str], kind: str) -> None:
    wave = utterances()[0]
    model = encoder(folders[kind], layer="weighted", tune="none").eval()
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5])
    [(states, _)] = references(folders[kind], [wave])
    even, _ = model(*batch([wave]))
    torch.testing.assert_close(even[0], sum(states) / 4, atol=1e-5, rtol=1e-5)
    model.load_state_dict({"layer_weights": logits}, strict=False)
    frames, _ = model(*batch([wave]))
    weights = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum()
    expected = sum(float(weight) * state for weight, state in zip(weights, states, strict=True))
    torch.testing.assert_close(frames[0], expected, atol=1e-5, rtol=1e-5)


@every_model
def test_frozen_encoder_stays_in_evaluation_mode_and_keeps_no_graph(folders: dict[str, str], kind: str) -> None:
    model = encoder(folders[kind], tune="none").train()
    inputs = batch(utterances())
    frames, _ = model(*inputs)
    assert not frames.requires_grad
    assert model.training
    assert not model.backbone.training
    assert torch.equal(frames, model.eval()(*inputs)[0])


@every_model
def test_front_end_keeps_no_graph_unless_everything_is_tuned(folders: dict[str, str], kind: str) -> None:
    seen = []
    for tune in ("all", "transformer"):
        model = encoder(folders[kind], tune=tune)
        last = model.backbone.front_end_modules()[-1]
        last = list(last.modules())[-1]
        last.register_forward_hook(lambda *call: seen.append(call[2].requires_grad))
        model(*batch(utterances()))
    assert seen == [True, False]


@every_model
def test_training_draws_no_random_masks_or_layer_drops(kind: str, tmp_path: Path) -> None:
    rates: dict[str, Any] = {
        "layerdrop": 0.9,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }
    if kind == "whisper":
        rates = {"encoder_layerdrop": 0.9, "dropout": 0.0}
    else:
        rates |= {"mask_time_prob": 0.9, "mask_feature_prob": 0.9, "feat_proj_dropout": 0.0}
    model = encoder(save(kind, tmp_path, **rates))
    inputs = batch(utterances())
    with torch.no_grad():
        trained, evaluated = model.train()(*inputs)[0], model.eval()(*inputs)[0]
    torch.testing.assert_close(trained, evaluated)
    assert not any("masked_spec_embed" in name for name in model.state_dict())


@every_model
def test_checkpointing_changes_no_gradient(folders: dict[str, str], kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = encoder(folders[kind], tune="all", gradient_checkpointing=checkpointing)
        torch.manual_seed(0)  # dropout
        frames, _ = model(*batch(utterances()))
        frames.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@every_model
def test_checkpointing_tells_torch_which_devices_random_state_to_keep(
    folders: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch looks for it among a layer's arguments; a CPU's it keeps anyway, so that no gradient here would tell."""
    from torch.utils import checkpoint

    given: list[tuple[Any, ...]] = []
    infer = checkpoint._infer_device_type

    def told(*arguments: Any) -> str:
        given.append(arguments)
        return infer(*arguments)

    monkeypatch.setattr(checkpoint, "_infer_device_type", told)
    encoder(folders[kind], tune="all", gradient_checkpointing=True)(*batch(utterances()))
    assert len(given) >= LAYERS
    assert all([type(argument) for argument in arguments] == [torch.Tensor] for arguments in given)


@pytest.mark.usefixtures("load_once")
def test_checkpointing_keeps_less_for_the_backward_pass(folders: dict[str, str]) -> None:
    def kept(checkpointing: bool) -> int:
        sizes: list[int] = []
        model = encoder(folders["wavlm-layer"], gradient_checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(*batch(utterances()))
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


@every_model
def test_bfloat16_autocast_stays_close(folders: dict[str, str], kind: str) -> None:
    model = encoder(folders[kind], tune="all").eval()
    inputs = batch(utterances())
    exact, mask = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model(*inputs)
        rough.float().sum().backward()
    assert (rough.float() - exact)[mask].abs().mean() < 0.05 * exact[mask].abs().mean()


WITHOUT_DROPOUT = dict.fromkeys(
    ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"), 0.0
)


@pytest.mark.parametrize("kind", ["wavlm-group", "wavlm-layer"])
@pytest.mark.parametrize("lengths", [(4000, 4000), LENGTHS], ids=["whole", "padded"])
def test_wavlms_gradients_equal_those_of_transformers(kind: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    """In float32 to 1e-4 of a parameter's largest, the position bias and its gates among them."""
    folder = save(kind, tmp_path, **WITHOUT_DROPOUT, apply_spec_augment=False)
    waves, ours = utterances(lengths), encoder(folder)
    frames, _ = ours(*batch(waves))
    frames.pow(3).sum().backward()
    theirs, extractor = (
        of.from_pretrained(folder) for of in (transformers.AutoModel, transformers.AutoFeatureExtractor)
    )
    for wave in waves:
        wave = np.pad(wave, (0, max(0, 400 - len(wave))))
        inputs = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values
        theirs.train()(inputs).last_hidden_state.pow(3).sum().backward()
    wanted = dict(theirs.encoder.layers.named_parameters())
    compared = 0
    for name, parameter in ours.backbone.layers.named_parameters():
        if "k_proj.bias" in name:  # which softmax cancels: what it gets is rounding
            continue
        gradient, expected = parameter.grad, wanted[name].grad
        assert gradient is not None and expected is not None, name
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * float(expected.abs().max()), msg=name)
        compared += "rel_attn_embed" in name or "gru_rel_pos" in name
    assert compared == 1 + 3 * LAYERS


@pytest.mark.parametrize("frames", [1, 8, 850])
def test_wavlms_position_bias_equals_that_of_transformers(folders: dict[str, str], frames: int) -> None:
    """All that is 800 frames apart or farther is one distance."""
    attention: Any = encoder(folders["wavlm-layer"]).backbone.layers[0].attention
    weight = attention.rel_attn_embed.weight
    weights = torch.randn(weight.shape[1], frames, frames, generator=torch.Generator().manual_seed(0))
    found = []
    for bias in (position_bias(attention, frames), attention.compute_bias(frames, frames)):
        weight.grad = None
        (weights * bias).sum().backward()
        found.append((bias.detach(), weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["wavlm-group", "wavlm-layer"])
def test_wavlm_under_bf16_is_as_close_as_transformers_own(folders: dict[str, str], kind: str) -> None:
    """Frames are no farther from those in float32 than half as far again as transformers' own."""
    wave = utterances()[0]
    [(_, exact)] = references(folders[kind], [wave])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        [(_, theirs)] = references(folders[kind], [wave])
        ours = encoder(folders[kind]).eval()(*batch([wave]))[0][0]
    assert (ours - exact).square().mean().sqrt() <= 1.5 * (theirs - exact).square().mean().sqrt()


@every_model
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_is_never_cudnns(
    folders: dict[str, str], kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor when a layer is recomputed in the backward pass: it may be asked for again then, outside of all contexts."""
    allowed: list[bool] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def told(*arguments: Any, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", told)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # unless it is forbidden
    frames, mask = encoder(folders[kind], gradient_checkpointing=checkpointing)(*batch(utterances()))
    frames.sum().backward()
    FrameLevelAttention(16, 2)(frames.detach(), mask)
    assert allowed == [False] * (1 + LAYERS * (1 + checkpointing))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_parameters_and_their_gradients_are_torchs(dtype: torch.dtype) -> None:
    """As by `to` and `cat`, bit for bit; a parameter that nothing uses gets no gradient."""
    torch.manual_seed(0)
    modules = [torch.nn.ModuleDict({name: torch.nn.Linear(4, rows) for name, rows in SIZES.items()}) for _ in "ab"]
    found = converted(modules, dtype, {"both.weight": ("one.weight", "two.weight")})
    wanted = []
    for module in modules:
        named = {name: parameter.to(dtype) for name, parameter in module.named_parameters()}
        both = torch.cat([named.pop("one.weight"), named.pop("two.weight")])
        wanted.append({"both.weight": both, **named})
    assert [list(of) for of in found] == [list(of) for of in wanted]
    used = [name for name in wanted[0] if name != "unused.weight"]
    gradients = []
    for each in (found, wanted):
        for module in modules:
            module.zero_grad()
        torch.stack([((1 + part[name].float()) ** 3).sum() for part in each for name in used]).sum().backward()
        gradients.append([parameter.grad for module in modules for parameter in module.parameters()])
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == dtype for name in other)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or (one.dtype == torch.float32 and torch.equal(one, other))
    assert sum(one is None for one in gradients[0]) == 2


SIZES = {"one": 3, "unused": 2, "two": 5}


def test_positional_convolution_equals_torchs() -> None:
    """In float32 to 1e-5 of the largest, with even and odd kernels, shorter and longer than they."""
    torch.manual_seed(0)
    for taps, count in ((128, 300), (128, 5), (19, 40), (2, 1)):
        convolution = torch.nn.Conv1d(12, 12, taps, padding=taps // 2, groups=3)
        frames = torch.randn(2, count, 12)
        wanted = convolution(frames.transpose(1, 2))[..., :count].transpose(1, 2)
        found = positional_convolution(convolution, frames)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize(("kernel", "stride", "channels"), [(10, 5, 1), (3, 2, 8), (2, 2, 8), (1, 1, 5)])
def test_windows_are_what_a_convolution_sees(kernel: int, stride: int, channels: int) -> None:
    frames = torch.randn(2, 23, channels, generator=torch.Generator().manual_seed(0))
    found = windows(frames, kernel, stride)
    starts = range(0, 23 - kernel + 1, stride)
    assert found.shape[1] == len(starts)
    for place, start in enumerate(starts):
        assert torch.equal(found[:, place], frames[:, start : start + kernel].flatten(1))


# --- normalization


def test_standardize_equals_the_feature_extractor() -> None:
    waves = utterances()
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    waveform, lengths = batch(waves)
    result = standardize(waveform, lengths)
    for row, wave in enumerate(waves):
        alone = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values[0]
        torch.testing.assert_close(result[row, : len(wave)], alone, atol=1e-5, rtol=1e-5)
        assert (result[row, len(wave) :] == 0).all()
    assert (standardize(torch.zeros(1, 9), torch.tensor([9])) == 0).all()


def test_masked_group_norm_equals_group_norm_of_the_valid_part() -> None:
    generator = torch.Generator().manual_seed(1)
    norm = torch.nn.GroupNorm(6, 6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6, generator=generator))
        norm.bias.copy_(torch.randn(6, generator=generator))
    features = 3 * torch.randn(3, 6, 20, generator=generator) + 5
    lengths = torch.tensor([20, 2, 7])
    result = masked_group_norm(norm, features, torch.arange(20) < lengths[:, None])
    for row, length in enumerate(lengths.tolist()):
        expected = norm(features[row : row + 1, :, :length])[0]
        torch.testing.assert_close(result[row, :, :length], expected, atol=1e-5, rtol=1e-5)
    single = masked_group_norm(norm, features, torch.arange(20) < torch.ones(3, 1))
    torch.testing.assert_close(single[:, :, 0], norm.bias.expand(3, 6))  # one frame is its own mean


@pytest.mark.parametrize(
    ("kind", "file", "extractor", "expected"),
    [
        ("hubert-group", "preprocessor_config.json", {"do_normalize": True}, True),
        ("hubert-group", "preprocessor_config.json", {}, True),  # the extractor's own default
        ("hubert-group", "processor_config.json", {"feature_extractor": {"do_normalize": True}}, True),
        ("hubert-group", None, None, False),
        ("wavlm-layer", "preprocessor_config.json", {"do_normalize": False}, False),
        ("wavlm-layer", "processor_config.json", {"processor_class": "Wav2Vec2Processor"}, True),
        ("wavlm-layer", None, None, True),
        ("whisper", "preprocessor_config.json", {}, False),
        ("whisper", None, None, False),
    ],
)
def test_normalization_follows_the_feature_extractor_else_the_convolutions(
    folders: dict[str, str],
    tmp_path: Path,
    kind: str,
    file: str | None,
    extractor: dict[str, Any] | None,
    expected: bool,
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    if file:
        (folder / file).write_text(json.dumps(extractor))
    assert encoder(folder).backbone.normalize is expected


def test_other_sampling_rates_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["hubert-group"], tmp_path / "model")
    (folder / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    with pytest.raises(ConfigError, match=r"sampling_rate=8000.*16000"):
        encoder(folder)


# --- Whisper


def test_log_mel_equals_the_feature_extractor(tmp_path: Path) -> None:
    model = encoder(save("whisper", tmp_path, max_source_positions=1500))
    waves = utterances([480_000, 16_000, 333])
    waveform, _ = batch(waves)
    assert isinstance(model.backbone, pretrained_module._WhisperBackbone)
    features = model.backbone.log_mel(waveform)
    assert features.shape == (3, 80, 3000)
    extractor = transformers.WhisperFeatureExtractor()
    for row, wave in enumerate(waves):
        expected = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features[0]
        torch.testing.assert_close(features[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("load_once")
def test_whisper_refuses_what_is_longer_than_its_window_but_not_its_padding(folders: dict[str, str]) -> None:
    model = encoder(folders["whisper"])
    with pytest.raises(DataError, match=r"1\.25 s is longer than the 1 s.*eval_crop_s"):
        model(*batch(utterances([100, 20_000])))
    frames, mask = model(*batch(utterances([100, 16_000]), samples=20_000))
    assert frames.shape == (2, 50, 16)
    assert mask.sum(dim=1).tolist() == [1, 50]


# --- names, folders and files


def test_families_are_named_when_one_is_not_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"'bert'.*wavlm.*hubert.*wav2vec2.*data2vec-audio.*whisper"):
        encoder(tmp_path)


@pytest.mark.parametrize("option", ["add_adapter", "conv_pos_batch_norm"])
def test_variants_that_break_the_frames_are_refused(tmp_path: Path, option: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert", option: True}))
    with pytest.raises(ConfigError, match=option):
        encoder(tmp_path)


def test_layer_out_of_range_names_the_range(folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"layer 4 .*0 \(front end\) to 3"):
        encoder(folders["wavlm-group"], layer=4)


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/x", "~/models/none", "a/b/c", "", ".."])
def test_missing_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such folder|no config\.json"):
        encoder(name)


def test_folder_without_model_or_with_damaged_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        encoder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        encoder(tmp_path)


def test_offline_and_not_cached_says_so_at_once_without_importing_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from sermll.config import Pretrained; from sermll.pretrained import PretrainedEncoder\n"
        "try: PretrainedEncoder(Pretrained())\n"
        "except Exception as error: print(type(error).__name__, error, 'transformers' in sys.modules)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    assert result.stdout.startswith("ConfigError microsoft/wavlm-large: no such folder, config.json is not in")
    assert "local folder" in result.stdout
    assert "network" in result.stdout
    assert result.stdout.strip().endswith("False")
    assert result.stderr == ""


@pytest.fixture
def hub_cache(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache, used offline, that holds the model `us/tiny`."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--us--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = shutil.copytree(folders["hubert-group"], repository / "snapshots" / ("a" * 40))
    absent = repository / ".no_exist" / ("a" * 40) / "processor_config.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    return snapshot


def test_a_cached_model_is_used_without_network(folders: dict[str, str], hub_cache: Path) -> None:
    assert encoder("us/tiny").fingerprint == encoder(folders["hubert-group"]).fingerprint


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_an_incomplete_cache_is_an_error_not_a_guess(hub_cache: Path, file: str) -> None:
    (hub_cache / file).unlink()
    with pytest.raises(ConfigError, match=rf"us/tiny.*{file}.*network"):
        encoder("us/tiny")


def test_truncated_weights(folders: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["wavlm-group"], tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        encoder(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no weights.*model\.safetensors"):
        encoder(folder)


def test_weights_of_another_shape_or_with_gaps(folders: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["wavlm-group"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "layers.2" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"lack \d+ tensors, as encoder\.layers\.2\."):
        encoder(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_size": 32}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        encoder(folder)


class Intruder:
    """Unpickling this would leave a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("intruder",)


def test_pickled_code_is_refused_and_plain_tensors_are_not(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from safetensors.torch import load_file

    folder = shutil.copytree(folders["hubert-group"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert encoder(folder).fingerprint == encoder(folders["hubert-group"]).fingerprint
    torch.save(tensors | {"x": Intruder()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        encoder(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Intruder()))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        encoder(folder)
    assert not (tmp_path / "intruder").exists()


def test_code_of_the_model_folder_is_never_run(folders: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["hubert-group"], tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    encoder(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("head", ["Wav2Vec2ForCTC", "WhisperForConditionalGeneration"])
def test_models_with_a_head_and_half_precision_weights_load_in_float32(tmp_path: Path, head: str) -> None:
    if head == "Wav2Vec2ForCTC":
        config = transformers.Wav2Vec2Config(**COMMON, vocab_size=8)
    else:
        config = transformers.WhisperConfig(**WHISPER)
    model = getattr(transformers, head)(config).half()
    model.save_pretrained(tmp_path)
    loaded = encoder(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded(*batch(utterances()))[0].isfinite().all()


def test_loading_is_quiet_and_restores_the_settings(
    folders: dict[str, str], capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        encoder(folders["wavlm-layer"]).train()(*batch(utterances()))
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()
    output = capfd.readouterr()
    assert output.out == output.err == ""
    assert not recwarn.list


def test_loading_does_not_touch_the_random_state(folders: dict[str, str]) -> None:
    before = torch.get_rng_state()
    first = encoder(folders["wavlm-group"], layer="weighted")
    assert torch.equal(torch.get_rng_state(), before)
    second = encoder(folders["wavlm-group"], layer="weighted")
    assert weights_hash(first) == weights_hash(second)


# --- fingerprints


def test_weights_hash_sees_names_types_shapes_and_values() -> None:
    def hashed(**tensors: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, value in tensors.items():
            module.register_buffer(name, value)
        return weights_hash(module)

    plain = hashed(a=torch.zeros(4), b=torch.tensor(1.0))
    assert plain == hashed(b=torch.tensor(1.0), a=torch.zeros(4))
    assert len(plain) == 64
    others = [
        hashed(a=torch.zeros(4), c=torch.tensor(1.0)),
        hashed(a=torch.zeros(2, 2), b=torch.tensor(1.0)),
        hashed(a=torch.zeros(8, dtype=torch.bfloat16)[:4], b=torch.tensor(1.0)),
        hashed(a=torch.tensor([0.0, 0.0, 0.0, 1e-30]), b=torch.tensor(1.0)),
        hashed(),
    ]
    assert len({plain, *others}) == 6


def test_fingerprint_names_the_pretrained_weights_not_what_is_done_with_them(
    folders: dict[str, str], tmp_path: Path
) -> None:
    plain = encoder(folders["wavlm-layer"])
    assert encoder(folders["wavlm-layer"], layer=1, tune="none").fingerprint == plain.fingerprint
    copy = shutil.copytree(folders["wavlm-layer"], tmp_path / "copy")
    assert encoder(copy).fingerprint == plain.fingerprint
    (copy / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert encoder(copy).fingerprint != plain.fingerprint
    other = save("wavlm-layer", tmp_path / "other", seed=2)  # the same settings, other random weights
    assert encoder(other).fingerprint != plain.fingerprint


def test_a_copy_has_its_own_weights_and_a_state_dict_restores_them(folders: dict[str, str]) -> None:
    model = encoder(folders["wavlm-layer"], layer="weighted").eval()
    inputs = batch(utterances())
    before = model(*inputs)[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert torch.equal(model(*inputs)[0], before)
    assert not torch.equal(twin(*inputs)[0], before)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(*inputs)[0], before)
    assert weights_hash(twin) == weights_hash(model)
