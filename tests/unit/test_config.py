"""Settings: what is refused, with which words; what an override does; what the run id depends on."""

from pathlib import Path

import pytest

from sermll.config import (
    Experiment,
    load_experiment,
    parse_overrides,
    resolve,
    run_id,
    to_yaml,
    with_overrides,
    without_password,
)
from sermll.errors import ConfigError

LEAST = {"name": "x", "data": {"path": "data/x"}}


def build(*words: str) -> Experiment:
    return resolve(LEAST, parse_overrides(words))


def test_defaults_are_the_papers() -> None:
    experiment = build()
    assert experiment.optim.model_dump() | {"clip_norm": 0} == {
        "epochs": 20,
        "batch_size": 16,
        "lr": 1e-4,
        "center_lr": 5e-3,
        "decay": 7 / 8,
        "decay_epochs": 20,
        "weight_decay": 0.0,
        "average": 0.0,
        "clip_norm": 0,
        "precision": "fp32",
    }
    assert experiment.mixup.kind == "eam" and experiment.mixup.snr_db == (-5.0, 10.0)
    assert experiment.model.pool.model_dump() == {"kind": "flam", "heads": 16} and experiment.model.embedding_dim == 64
    assert all(getattr(experiment.losses, name) is not None for name in ("kl", "focal", "center", "supcon"))


@pytest.mark.parametrize(
    ("word", "words_of_the_error"),
    [
        ("losses.focla=null", ["losses.focla", "did you mean 'focal'?"]),
        ("optm.lr=1", ["optm", "did you mean 'optim'?"]),
        ("mixup.snrdb=[1,2]", ["mixup.snrdb", "did you mean 'snr_db'?"]),
        ("mixup.snr_db=[5,2]", ["snr_db", "[5.0, 2.0]"]),
        ("mixup.kind=foo", ["mixup", "'eam'", "'lam'", "'none'", "'foo'"]),
        ("model.encoder.mels=3", ["model.encoder.mels", "known keys", "layer"]),
        ("optim.lr=.nan", ["optim.lr", "finite", "nan"]),
        ("optim.lr=-1", ["optim.lr", "-1"]),
        ("optim=null", ["optim"]),
        ("fold=x", ["fold", "integer", "'x'"]),
        ("fold=-1", ["fold", "-1"]),
        ("name='a b'", ["name"]),
        ("losses.supcon.weight=abc", ["losses.supcon.weight", "'auto'", "'abc'"]),
        ("losses.kl.weight=0", ["kl.weight must be positive"]),
        ("protocol.dev_speakers=0", ["never on test"]),
        ("optim.batch_size=1", ["optim.batch_size"]),
        ("resources.workers=9", ["two utterances a worker"]),
        ("resources.workers=[1,9]", ["too small for 9 of resources.workers"]),
        ("resources.workers=[2,2]", ["resources.workers", "one number", "[2, 2]"]),
        ("resources.workers=[3,1]", ["resources.workers", "the smaller first"]),
        ("resources.workers=[0,1]", ["resources.workers", "greater than or equal to 1"]),
        ("optim.lr.x=1", ["optim.lr"]),
        ("model.pool=flam", ["model.pool: got 'flam'", "give model.pool.kind=flam"]),
        ("mixup=lam", ["mixup: got 'lam'", "give mixup.kind=lam"]),
        ("mixup=null", ["mixup: got null", "give mixup.kind=none"]),
        ("mixup.kind=null", ["mixup: got null", "give mixup.kind=none"]),
        ("model.encoder=null", ["got null", "give model.encoder.kind=pretrained or logmel or mfcc or resnet"]),
        ("model.encoder=[whisper]", ["got ['whisper']", "model.encoder.kind=pretrained or logmel"]),
        ("seed=true", ["seed", "a number is wanted", "True"]),
        ("optim.epochs=true", ["optim.epochs", "a number is wanted"]),
        ("optim.lr=on", ["optim.lr", "a number is wanted"]),
        ("fold=false", ["fold", "a number is wanted"]),
        ("protocol.dev_speakers=true", ["protocol.dev_speakers", "a number is wanted"]),
        ("losses.focal.weight=true", ["losses.focal.weight", "a number is wanted"]),
        ("mixup.snr_db=[true, 5]", ["mixup.snr_db", "a number is wanted", "[True, 5]"]),
        ("resources.workers=[true, 4]", ["resources.workers", "a number is wanted"]),
        ("model.encoder={kind: logmel, dim: 33}", ["model.encoder.dim", "multiple of 2", "33"]),
        (
            "model={encoder: {kind: logmel}, pool: {heads: 5}}",
            ["5 heads (model.pool.heads)", "128 (model.encoder.dim)"],
        ),
        ("model.encoder.kind=mfcc", ["16 heads (model.pool.heads)", "39 (model.encoder.channels)"]),
        ("model.encoder={kind: resnet, channels: 5}", ["16 heads", "40 (eight times model.encoder.channels)"]),
    ],
)
def test_a_fault_is_named_with_what_is_allowed(word: str, words_of_the_error: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(word)
    for words in words_of_the_error:
        assert words in str(caught.value)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.pool\.heads: no such key"):
        build("model.pool.kind=mean", "model.pool.heads=4")
    with pytest.raises(ConfigError, match="center_lr has no effect"):
        build("losses.center=null", "optim.center_lr=1")
    with pytest.raises(ConfigError, match="gradient_checkpointing has no effect"):
        build("model.encoder.tune=none", "model.encoder.gradient_checkpointing=true")
    with pytest.raises(ConfigError, match=r"gather=false has no effect with resources\.workers=1"):
        build("losses.gather=false")
    with pytest.raises(ConfigError, match=r"gather=false has no effect when losses\.supcon is null"):
        build("losses.gather=false", "losses.supcon=null", "resources.workers=2")
    with pytest.raises(ConfigError, match="kl or focal must be on"):
        build("losses.kl=null", "losses.focal=null")


def test_heads_matter_to_the_pool_that_has_them_and_where_the_width_is_known() -> None:
    assert build("model.encoder.kind=mfcc", "model.pool.kind=mean").model.encoder.kind == "mfcc"
    assert build("model.encoder.kind=mfcc", "model.pool.heads=13").model.encoder.kind == "mfcc"
    assert build("model.pool.heads=7").model.encoder.kind == "pretrained"  # the files tell, when they are loaded


def test_true_and_false_are_values_where_they_are_meant() -> None:
    assert build("protocol.allow_leak=true", "tracking.mlflow=false").protocol.allow_leak is True
    assert build("losses.gather=true", "seed=1", "optim.lr=1").seed == 1


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build("optim.lr=-1", "losses.focla=1", "seed=x")
    assert len(str(caught.value).splitlines()) == 4  # the file, then one line each


def test_overrides_read_yaml_values() -> None:
    words = ["a.b=1e-4", "c=null", "d=[-5, 10]", "e=true", "f=text", "g=", "h=x=y"]
    expected = {"a.b": 1e-4, "c": None, "d": [-5, 10], "e": True, "f": "text", "g": None, "h": "x=y"}
    assert parse_overrides(words) == expected


@pytest.mark.parametrize("word", ["novalue", "=1", "a=[1"])
def test_words_that_are_not_overrides_are_refused(word: str) -> None:
    with pytest.raises(ConfigError):
        parse_overrides([word])


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        parse_overrides(["a=1", "a=2"])


@pytest.mark.parametrize("words", [["a=null", "a.b=2"], ["a.b=2", "a={}"]])
def test_a_key_within_another_that_is_given_too_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="one lies within the other"):
        parse_overrides(words)
    assert parse_overrides(["a.b=1", "a.bc=2"]) == {"a.b": 1, "a.bc": 2}


def test_overrides_copy() -> None:
    tree = {"a": {"b": 1}}
    assert with_overrides(tree, {"a.b": 2, "a.c": 3}) == {"a": {"b": 2, "c": 3}}
    assert tree == {"a": {"b": 1}}


def test_changing_a_kind_leaves_the_former_kinds_settings_behind() -> None:
    tree = {
        **LEAST,
        "mixup": {"kind": "eam", "snr_db": [0, 5]},
        "model": {"encoder": {"kind": "logmel", "mels": 40}},
    }
    assert resolve(tree, {"mixup.kind": "none"}).mixup.model_dump() == {"kind": "none"}
    assert resolve(tree, {"mixup.kind": "eam"}).mixup.snr_db == (0.0, 5.0)  # type: ignore[union-attr]
    words = {"model.encoder.layer": 3, "model.encoder.kind": "pretrained"}  # the kind counts first
    assert resolve(tree, words).model.encoder.layer == 3  # type: ignore[union-attr]


def test_changing_a_kind_keeps_what_both_kinds_have() -> None:
    tree = {**LEAST, "mixup": {"probability": 1.0, "snr_db": [0, 5]}}
    assert resolve(tree, {"mixup.kind": "lam"}).mixup.model_dump() == {"kind": "lam", "probability": 1.0}
    assert resolve(tree, {"mixup.kind": "lam", "mixup.probability": 0.2}).mixup.probability == 0.2  # type: ignore[union-attr]
    resnet = resolve(
        {**LEAST, "model": {"encoder": {"kind": "logmel", "mels": 40, "dim": 64, "warp": 0.1}}},
        {"model.encoder.kind": "resnet"},
    )
    assert resnet.model.encoder.model_dump() == {
        "kind": "resnet", "mels": 40, "channels": 16, "spec_augment": True, "warp": 0.1,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="kind must be one of"):
        resolve(tree, {"mixup.kind": "cutmix"})


def test_tracking_is_turned_off_by_the_word_that_yaml_reads_as_false() -> None:
    assert build("tracking.mlflow=off").tracking.mlflow is False
    assert build("tracking.mlflow=http://x").tracking.mlflow == "http://x"
    assert build().tracking.mlflow is None


def test_sections_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        build().optim.lr = 1.0


def test_run_id_depends_on_the_science_alone() -> None:
    reference = run_id(build(), "hash")
    same = [
        "resources.workers=4",
        "resources.workers=[1,4]",
        "tracking.runs=elsewhere",
        "fold=2",
        "data.path=/other",
        "name=y",
        "optim.lr=1e-4",
        # These are in the protocol's hash, by what they mean and not by how they are said.
        "protocol.folds=speaker",
        "data.labels=4class",
    ]
    for word in same:
        tree = {key: value for key, value in LEAST.items() if key != word.partition("=")[0]}
        assert run_id(resolve(tree, parse_overrides([word])), "hash") == reference or word == "data.path=/other"
    assert run_id(build("data.path=/other"), "hash") == reference
    for word in ("optim.lr=2e-4", "seed=1", "losses.focal=null", "data.crop_s=3"):
        assert run_id(build(word), "hash") != reference
    assert run_id(build(), "other hash") != reference


def test_a_run_has_its_id_for_ever() -> None:
    """Runs are named by it: a change here makes every finished run another one."""
    scratch = ("model.encoder.kind=logmel", "mixup.kind=none", "losses.supcon=null")
    assert run_id(build(), "hash") == run_id(build("resources.workers=[1,4]"), "hash") == "56a7dc094bb9"
    assert run_id(build(*scratch), "hash") == "a005043aad2a"
    assert run_id(build("model.encoder.kind=mfcc", "model.pool.kind=mean"), "hash") == "2a025e8b1303"
    plain = ("losses.center=null", "losses.supcon=null", "optim.epochs=3", "seed=7")
    assert run_id(build(*plain), "hash") == run_id(build(*plain, "resources.workers=4"), "hash") == "563f2ab10c14"


def test_workers_are_science_where_each_compares_its_own_share() -> None:
    apart = [run_id(build("losses.gather=false", f"resources.workers={count}"), "hash") for count in (2, 3)]
    assert len({run_id(build(), "hash"), *apart}) == 3
    same = build("losses.gather=false", "resources.workers=2", "resources.memory_gb=4", "resources.parallel_folds=1")
    assert run_id(same, "hash") == apart[0]
    for words in ("[1,4]", "[2,4]"):
        with pytest.raises(ConfigError, match="depend on how many machines there happen to be; give one number"):
            build("losses.gather=false", f"resources.workers={words}")


def test_resolved_settings_round_trip_through_yaml(tmp_path: Path) -> None:
    experiment = build("losses.focal=null", "mixup.kind=none", "model.encoder.kind=logmel", "optim.lr=3e-5")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(experiment))
    assert load_experiment(path) == experiment


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "name: 3"])
def test_files_that_are_no_experiment_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_experiment(path)
    with pytest.raises(ConfigError, match="no such experiment file"):
        load_experiment(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://***@host:5432/db"),
        ("https://:token@host", "https://***@host"),
        ("cannot reach http://a:b@c/d or http://e:f@g", "cannot reach http://***@c/d or http://***@g"),
        ("sqlite:////data/a@b:c/mlflow.db", "sqlite:////data/a@b:c/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
        ("mysql://h/x?user=me&passwd=s3", "mysql://h/x?user=me&passwd=***"),
        (
            "http://h/?token=s3&a=b at http://h/?access_token=s4",
            "http://h/?token=***&a=b at http://h/?access_token=***",
        ),
        ("http://h/?client_secret=s3&Api-Key=s4&pwd=s5", "http://h/?client_secret=***&Api-Key=***&pwd=***"),
        ("postgresql:///x?host=/tmp&sslkey=/k", "postgresql:///x?host=/tmp&sslkey=/k"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_a_password_has_no_place_in_settings() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        resolve({"name": "x", "data": {"path": "y"}}, {"tracking.mlflow": "postgresql://me:secret@host/db"})
