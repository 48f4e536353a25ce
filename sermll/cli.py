"""The command line: each verb calls one function, prints what came of it and what to do next.

Results go to standard output, progress and errors to standard error. With --json the last line of standard output is
one JSON value, whose form the README documents.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sermll import __version__
from sermll.errors import DataError, SermllError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 well, 1 a named error, 2 wrong usage, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except SermllError as error:
        print(f"sermll {options.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nsermll {options.verb}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sermll",
        description="Speech emotion recognition experiments whose numbers can be trusted.",
        epilog="start with: sermll prepare synthetic --out data/synthetic && sermll train experiments/synthetic.yaml",
    )
    parser.add_argument("--version", action="version", version=f"sermll {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    prepare = _verb(
        verbs,
        "prepare",
        _prepare,
        "corpus folder to content-hashed Arrow shards",
        "sermll prepare ravdess --root ~/RAVDESS --out data/ravdess",
    )
    prepare.add_argument("corpus", help="ravdess, emodb, or synthetic (built in)")
    prepare.add_argument("--root", type=Path, help="the corpus folder; synthetic: made beside --out if not given")
    prepare.add_argument("--out", type=Path, required=True, help="folder for the prepared data")
    prepare.add_argument("--trim-db", type=float, metavar="DB", help="cut ends this far below the loudest part")
    prepare.add_argument(
        "--max-problems",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="fail above this share of files (0.01)",
    )

    train = _verb(
        verbs,
        "train",
        _train,
        "train and score every fold of an experiment; finished folds are kept",
        "sermll train experiments/ravdess.yaml fold=0 optim.epochs=5",
    )
    train.add_argument("experiment", type=Path, help="experiment file, see experiments/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file")

    report = _verb(
        verbs,
        "report",
        _report,
        "tables, pictures and one HTML page of one or several runs",
        "sermll report runs/ravdess-0123456789ab",
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders printed by `sermll train`")
    report.add_argument("--out", type=Path, help="folder for the page; default: RUN/report, or report/ for several")

    predict = _verb(
        verbs,
        "predict",
        _predict,
        "label recordings with the models of a run",
        "sermll predict runs/ravdess-0123456789ab a.wav b.flac",
    )
    predict.add_argument("run_dir", type=Path, metavar="RUN", help="folder printed by `sermll train`")
    predict.add_argument("files", type=Path, nargs="+", metavar="AUDIO", help="WAV, FLAC or other recordings")
    predict.add_argument("--fold", type=int, help="use this fold's model; default: average over all folds' models")

    track = _verb(
        verbs,
        "track",
        _track,
        "send a run's results to MLflow, when its server was away or another should have them",
        "sermll track runs/ravdess-0123456789ab --uri http://mlflow:5000",
    )
    track.add_argument("run_dir", type=Path, metavar="RUN", help="folder printed by `sermll train`")
    track.add_argument("--uri", help="MLflow URI; default: the run's own, else MLFLOW_TRACKING_URI")
    return parser


def _verb(
    verbs: Any,  # noqa: ANN401 - argparse's private type
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
    verb.set_defaults(run=run)
    verb.add_argument("--json", action="store_true", help="end standard output with one line of JSON")
    return verb


def _prepare(options: argparse.Namespace) -> int:
    from sermll.corpora import CORPORA
    from sermll.errors import ConfigError
    from sermll.prepare import prepare

    corpus = CORPORA.get(options.corpus)
    if corpus is None:
        raise ConfigError(f"no corpus {options.corpus!r}; known: {', '.join(CORPORA)}")
    root = options.root
    if root is None:
        if corpus.generate is None:
            raise ConfigError(f"--root is needed: the folder that holds {corpus.title}")
        root = options.out.with_name(f"{options.out.name}-audio")
        if not root.exists():
            print(f"generating {corpus.title} in {root}", file=sys.stderr)
            corpus.generate(root)
    done = prepare(corpus, root, options.out, options.trim_db)
    manifest = done.prepared.manifest
    problems = sum(manifest["problems"].values())
    print(f"{corpus.title}: {manifest['utterances']} utterances, {manifest['hours']:.2f} h, ", end="")
    print(f"{len(manifest['speakers'])} speakers{'' if done.made else ' (already prepared, nothing done)'}")
    for name, count in manifest["counts"].items():
        published = manifest["published_counts"][name]
        print(f"  {name:<12} {count:>6}{'' if count == published else f'   published: {published}'}")
    for group in manifest["identical_audio"]:
        print(f"  identical audio: {' = '.join(group)}")
    print(f"problems: {problems}" + (f", listed in {options.out / 'problems.csv'}" if problems else ""))
    for reason, count in manifest["problems"].items():
        print(f"  {reason:<12} {count:>6}")
    print(f"data hash {manifest['data_hash'][:12]} in {options.out}")
    if options.json:
        _print_json(
            {
                "path": str(options.out),
                "data_hash": manifest["data_hash"],
                "utterances": manifest["utterances"],
                "problems": problems,
                "hours": manifest["hours"],
            }
        )
    share = problems / (problems + manifest["utterances"])
    if share > options.max_problems:
        raise DataError(
            f"{problems} of {problems + manifest['utterances']} files ({share:.1%}) are unusable, more than "
            f"{options.max_problems:.1%}: see {options.out / 'problems.csv'}. The rest is prepared; "
            "--max-problems accepts it"
        )
    if not options.json:
        print(f"next: sermll train experiments/{corpus.name}.yaml data.path={options.out}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from sermll.config import load_experiment, parse_overrides
    from sermll.report import load, text_table
    from sermll.train import train

    experiment = load_experiment(options.experiment, parse_overrides(options.overrides))
    outcome = train(experiment)
    print(text_table(load(outcome.run_dir)))
    print(f"run      {outcome.run_dir}")
    print(f"report   {outcome.report}")
    if outcome.not_tracked:
        print(f"MLflow does not have everything ({outcome.not_tracked})")
        print(f"next: sermll track {outcome.run_dir}")
    else:
        print(f"next: sermll predict {outcome.run_dir} your.wav")
    if options.json:
        selected, last = outcome.metrics["selected"], outcome.metrics["last"]
        _print_json(
            {
                "run_dir": str(outcome.run_dir),
                "metrics": {
                    **{name: selected[name]["value"] for name in ("ua", "wa", "macro_f1")},
                    "ua_low": selected["ua"]["low"],
                    "ua_high": selected["ua"]["high"],
                    "last_epoch_ua": last["ua"]["value"],
                },
                "folds": [
                    {name: fold[name] for name in ("fold", "ua", "wa", "epochs", "best_epoch")}
                    for fold in outcome.metrics["folds"]
                ],
            }
        )
    return 0


def _report(options: argparse.Namespace) -> int:
    from sermll.report import build, load, text_table

    default = options.runs[0] / "report" if len(options.runs) == 1 else Path("report")
    page = build(options.runs, options.out or default)
    for run in options.runs:
        print(text_table(load(run)))
    print(f"report   {page}")
    if options.json:
        _print_json({"report": str(page)})
    return 0


def _predict(options: argparse.Namespace) -> int:
    from sermll.predict import predict

    predictions, faults = predict(options.run_dir, options.files, options.fold)
    width = max((len(prediction.file) for prediction in predictions), default=0)
    for prediction in predictions:
        ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
        shares = "  ".join(f"{name} {value:.2f}" for name, value in ranked[:4])
        print(f"{prediction.file:<{width}}  {prediction.label:<12} {shares}")
    if options.json:
        _print_json([{"file": p.file, "label": p.label, "probabilities": p.probabilities} for p in predictions])
    if faults:
        raise DataError("\n".join([f"{len(faults)} of {len(options.files)} files could not be used", *faults]))
    return 0


def _track(options: argparse.Namespace) -> int:
    from sermll.track import upload

    fault = upload(options.run_dir, options.uri)
    if fault:
        raise SermllError(f"MLflow did not take the results ({fault}); the run's folder is complete, try again later")
    print(f"MLflow has everything of {options.run_dir}")
    if options.json:
        _print_json({"run_dir": str(options.run_dir), "complete": True})
    return 0


def _print_json(value: Any) -> None:  # noqa: ANN401 - anything JSON holds
    sys.stdout.flush()
    print(json.dumps(value), flush=True)
