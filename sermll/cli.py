"""The command line: each verb calls one function, prints what came of it and what to do next.

Results go to standard output, progress and errors to standard error. With --json the last line of standard output is
one JSON value, whose form docs/programs.md documents.
"""

import argparse
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sermll import __version__
from sermll.errors import ConfigError, DataError, ProtocolError, SermllError, StorageError, TrainingError
from sermll.rows import Corpus
from sermll.storage import ROOT, address, place

if TYPE_CHECKING:  # what a verb needs is loaded when it is called, so that --help is quick
    from sermll.campaign import Campaign
    from sermll.campaign import Outcome as CampaignOutcome
    from sermll.shards import Prepared
    from sermll.submit import Jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 well, 1 a named error, 2 wrong usage, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if "overrides" in options and not any(word.startswith("-") for word in rest):
        options.overrides += rest  # argparse takes none that come after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"sermll {options.verb}: {error}; make room or mend the storage, and give it again", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sermll",
        description="Speech emotion recognition experiments whose numbers can be trusted.",
        epilog="start with: sermll prepare synthetic --out data/synthetic && sermll train experiments/synthetic.yaml",
    )
    parser.add_argument("--version", action="version", version=f"sermll {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    corpora = _verb(
        verbs,
        "corpora",
        _corpora,
        "the corpora sermll knows; with a name, its datasheet: layout, classes, folds, counts, traps, licence",
        "sermll corpora iemocap",
    )
    corpora.add_argument("corpus", nargs="?", help="show this one's datasheet")

    download = _verb(
        verbs,
        "download",
        _download,
        "fetch a corpus whose licence allows it; resumes what was cut off",
        "sermll download ravdess --out ~/RAVDESS --accept-licence",
    )
    download.add_argument("corpus", help="a corpus that `sermll corpora` marks as downloadable")
    download.add_argument("--out", type=_place, required=True, help="folder for the corpus")
    download.add_argument("--accept-licence", action="store_true", help="you have read the licence and agree to it")

    prepare = _verb(
        verbs,
        "prepare",
        _prepare,
        "corpus folder to content-hashed Arrow shards",
        "sermll prepare ravdess --root ~/RAVDESS --out data/ravdess",
    )
    prepare.add_argument("corpus", help="one of `sermll corpora`, or your own: manifest, audformat, audiofolder")
    prepare.add_argument("--root", type=_place, help="the corpus folder; synthetic: made beside --out if not given")
    prepare.add_argument("--out", type=_place, required=True, help="folder for the prepared data")
    prepare.add_argument("--classes", metavar="A,B,...", help="your own corpus: its classes in order (alphabetical)")
    prepare.add_argument("--trim-db", type=float, metavar="DB", help="cut ends this far below the loudest part")
    prepare.add_argument(
        "--max-problems",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="fail above this share of files (0.01)",
    )

    audit = _verb(
        verbs,
        "audit",
        _audit,
        "look for leaks, copies, label noise and bad recordings; exit status 1 if training and test overlap",
        "sermll audit data/ravdess emobox",
    )
    audit.add_argument("data", type=_place, metavar="DATA", help="folder written by `sermll prepare`")
    audit.add_argument("protocol", nargs="?", default="default", help="fold list or file, as protocol.folds (default)")
    audit.add_argument("--labels", default="default", help="label space, as data.labels")
    audit.add_argument(
        "--out", type=_place, help="folder for the page; default: audit-<data>, with the protocol if given"
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

    run = _verb(
        verbs,
        "run",
        _run,
        "train every cell of a campaign: folds x seeds x variants x corpora; goes on where it stopped",
        "sermll run experiments/ablation_small.campaign.yaml --dry-run",
    )
    run.add_argument("campaign", type=Path, help="campaign file, see experiments/*.campaign.yaml")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every cell")
    run.add_argument(
        "--dry-run", action="store_true", help="show the cells, what is done, needs and time; train nothing"
    )

    matrix = _verb(
        verbs,
        "matrix",
        _matrix,
        "train on one corpus, test on another, for every pair; and on all but one",
        "sermll matrix experiments/cross_corpus.yaml",
    )
    matrix.add_argument("matrix", type=Path, help="matrix file, see experiments/cross_corpus.yaml")
    matrix.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every cell")
    matrix.add_argument("--dry-run", action="store_true", help="show the cells, needs and time; train nothing")

    search = _verb(
        verbs,
        "search",
        _search,
        "find loss weights, SNR ranges or any settings by trials that never see the test speakers",
        "sermll search experiments/loss_search.yaml trials=20 --dry-run",
    )
    search.add_argument("search", type=Path, help="search file, see experiments/loss_search.yaml")
    search.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the file, such as trials, or settings of every trial"
    )
    search.add_argument("--dry-run", action="store_true", help="check the space, show it and the plan; train nothing")

    submit = _verb(
        verbs,
        "submit",
        _submit,
        "send the code to a Ray cluster and run a command there; data and runs are there already",
        "sermll submit --address http://head:8265 --root /shared/ser --follow -- train experiments/ravdess.yaml",
    )
    _add_address(submit)
    submit.add_argument("--follow", action="store_true", help="show what it prints; exit with its exit status")
    submit.add_argument(
        "--root",
        metavar="DIR",
        help="folder on the cluster that relative paths of data and runs mean; default: the working directory, which "
        "its machines then share with this one",
    )
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="send this environment variable; may be repeated"
    )
    submit.add_argument("command", nargs="+", metavar="-- VERB ...", help="a command of sermll, after two dashes")

    jobs = _verb(
        verbs, "jobs", _jobs, "the jobs of a Ray cluster", "sermll jobs logs train-20261123-081500-3f2a --follow"
    )
    _add_address(jobs)
    jobs.add_argument(
        "what",
        nargs="?",
        choices=("list", "logs", "stop"),
        default="list",
        help="show all, as without a word; show what one has printed; end one",
    )
    jobs.add_argument("job", nargs="?", help="the id that `sermll submit` printed")
    jobs.add_argument("--follow", action="store_true", help="logs: until it ends; exit with its exit status")

    report = _verb(
        verbs,
        "report",
        _report,
        "tables, pictures and one HTML page of one or several runs, or of a campaign as far as it got",
        "sermll report runs/ravdess-0123456789ab",
    )
    report.add_argument(
        "runs", type=_place, nargs="+", metavar="RUN", help="folders printed by `sermll train`, or one of a campaign"
    )
    report.add_argument("--out", type=_place, help="folder for the page; default: RUN/report, or report/ for several")

    compare = _verb(
        verbs,
        "compare",
        _compare,
        "is a variant better than another: paired differences with intervals over speakers and a permutation test",
        "sermll compare runs/ravdess-0123456789ab runs/ravdess-cafe01234567",
    )
    compare.add_argument("runs", type=_place, nargs="+", metavar="RUN", help="the run to compare with, then the others")

    ensemble = _verb(
        verbs,
        "ensemble",
        _ensemble,
        "join finished runs of one protocol by the probabilities they gave; training and models are not needed",
        "sermll ensemble runs/ravdess-0123456789ab runs/ravdess-cafe01234567 --out runs/ravdess-both",
    )
    ensemble.add_argument("runs", type=_place, nargs="+", metavar="RUN", help="two folders at least, of `sermll train`")
    ensemble.add_argument("--out", type=_place, required=True, help="folder for the ensemble, itself a run's folder")
    ensemble.add_argument(
        "--method",
        choices=("mean", "stack"),
        default="mean",
        help="mean of the probabilities, or weights and a temperature fitted on each fold's dev utterances (mean)",
    )

    robustness = _verb(
        verbs,
        "robustness",
        _robustness,
        "how a run's models bear noise: its test utterances with real noise at true SNR; goes on where it stopped",
        "sermll robustness runs/ravdess-0123456789ab --noise ~/noises --snr 20 10 5 0 -5",
    )
    robustness.add_argument("run_dir", type=_place, metavar="RUN", help="folder printed by `sermll train`")
    robustness.add_argument(
        "--noise", type=_place, required=True, metavar="DIR", help="folder of WAV and FLAC files, each one noise"
    )
    robustness.add_argument(
        "--snr",
        type=float,
        nargs="+",
        required=True,
        metavar="DB",
        help="signal-to-noise ratios: active speech level over noise level",
    )
    robustness.add_argument("--out", type=_place, help="folder for the results; default: RUN/robustness")
    robustness.add_argument("--seed", type=int, default=0, help="of the segments of noise (0); the same for all runs")

    predict = _verb(
        verbs,
        "predict",
        _predict,
        "label recordings with the models of a run",
        "sermll predict runs/ravdess-0123456789ab a.wav b.flac",
    )
    predict.add_argument("run_dir", type=_place, metavar="RUN", help="folder printed by `sermll train`")
    predict.add_argument("files", type=_place, nargs="+", metavar="AUDIO", help="WAV, FLAC or other recordings")
    predict.add_argument("--fold", type=int, help="use this fold's model; default: average over all folds' models")
    predict.add_argument(
        "--like", metavar="CORPUS", help="where the run's corpora were trimmed differently: cut ends as of this one"
    )

    track = _verb(
        verbs,
        "track",
        _track,
        "send results to MLflow, when its server was away or another should have them",
        "sermll track runs/ravdess-0123456789ab --uri http://mlflow:5000",
    )
    track.add_argument("folder", type=_place, metavar="FOLDER", help="of a run, a campaign or a search")
    track.add_argument("--uri", help="MLflow URI; default: the run's own, else MLFLOW_TRACKING_URI")

    ui = _verb(verbs, "ui", _ui, "MLflow's pages for the runs of a folder, in a browser", "sermll ui --port 5000")
    ui.add_argument("--runs", type=_place, default="runs", help="folder of the runs, as tracking.runs (runs)")
    ui.add_argument("--port", type=int, default=5000, help="of this machine (5000)")
    return parser


def _add_address(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--address", metavar="URL", help="of the dashboard (RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)"
    )


def _place(text: str) -> Path:
    try:
        return place(text)
    except (ConfigError, StorageError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share from 0 to 1 is wanted, 0.02 for 2 %")
    return share


def _verb(
    verbs: Any,  # argparse's private type
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
    from sermll.prepare import prepare

    corpus, root = _source(options)
    done = prepare(corpus, root, options.out, options.trim_db)
    manifest = done.prepared.manifest
    problems = sum(manifest["problems"].values())
    print(f"{corpus.title}: {manifest['utterances']} utterances, {manifest['hours']:.2f} h, ", end="")
    print(f"{len(manifest['speakers'])} speakers{'' if done.made else ' (already prepared, nothing done)'}")
    for name, count in manifest["counts"].items():
        published = manifest["published_counts"].get(name, count)
        print(f"  {name:<12} {count:>6}{'' if count == published else f'   published: {published}'}")
    for group in manifest["identical_audio"]:
        print(f"  identical audio: {' = '.join(group)}")
    out = address(options.out)
    print(f"problems: {problems}" + (f", listed in {out}/problems.csv" if problems else ""))
    for reason, count in manifest["problems"].items():
        print(f"  {reason:<12} {count:>6}")
    for reason, count in manifest["noted"].items():
        print(f"  {reason:<12} {count:>6}   used all the same, see {out}/problems.csv")
    print(f"data hash {manifest['data_hash'][:12]} in {out}")
    if options.json:
        _print_json(
            {
                "path": out,
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
            f"{options.max_problems:.1%}: see {out}/problems.csv. The rest is prepared; "
            "--max-problems accepts it"
        )
    if not options.json:
        print(f"next: {_after_prepare(done.prepared, out)}")
    return 0


def _after_prepare(prepared: "Prepared", out: str) -> str:
    """What comes next, with folds that fit the data: a part of a corpus cannot have those of the whole."""
    from sermll.config import Protocol
    from sermll.protocol import workable

    usual = prepared.manifest["default_folds"]
    fitting = workable(Protocol(), prepared.table, prepared.manifest["folds"])
    if usual in fitting:
        return f"sermll audit {out}"
    if not fitting:
        return "prepare more of the corpus; test, dev and train need a speaker each at least"
    return f"sermll audit {out} {fitting[0]}   (its usual folds, {usual}, need speakers that are not there)"


def _source(options: argparse.Namespace) -> tuple[Corpus, Path]:
    """The corpus that `prepare` is asked for, and its folder."""
    from sermll.corpora import FORMATS

    root = options.root
    if options.corpus in FORMATS:
        if root is None:
            raise ConfigError(f"--root is needed: your {options.corpus}")
        classes = tuple(options.classes.split(",")) if options.classes else None
        return FORMATS[options.corpus](root, options.out.name, classes)
    corpus = _known(options.corpus)
    if options.classes:
        raise ConfigError(f"--classes has no effect: {corpus.title} has its own; data.labels joins or drops them")
    if root is None:
        if corpus.generate is None:
            raise ConfigError(f"--root is needed: the folder that holds {corpus.title}")
        root = options.out.with_name(f"{options.out.name}-audio")
        if not root.exists():
            print(f"generating {corpus.title} in {root}", file=sys.stderr)
            corpus.generate(root)
    return corpus, root


def _known(name: str) -> Corpus:
    from sermll.corpora import CORPORA, FORMATS

    if name not in CORPORA:
        raise ConfigError(f"no corpus {name!r}; known: {', '.join(CORPORA)}; your own: {', '.join(FORMATS)}")
    return CORPORA[name]


def _corpora(options: argparse.Namespace) -> int:
    from sermll import corpora

    if options.corpus in corpora.FORMATS:
        print(f"{corpora.datasheet(options.corpus)}\n")
        print(f"next: sermll prepare {options.corpus} --root DIR --out data/mine")
        shown = []
    elif options.corpus is not None:
        corpus = _known(options.corpus)
        print(f"{corpora.datasheet(corpus.name)}\n")
        print(f"next: {_how_to_get(corpus)}")
        shown = [corpus]
    else:
        print(f"{'name':<12}{'utterances':>11}{'classes':>9}  {'folds':<18}{'get it':<10}licence")
        shown = list(corpora.CORPORA.values())
        for corpus in shown:
            folds = ", ".join([*corpus.folds] or [corpus.default_folds])
            row = f"{corpus.name:<12}{sum(corpus.counts.values()):>11}{len(corpus.classes):>9}  {folds:<18}"
            way = "built in" if corpus.generate else "download" if corpus.archives else "ask"
            print(f"{row}{way:<10}{corpus.licence}")
        print(f"\nyour own: sermll prepare {'|'.join(corpora.FORMATS)} --root DIR --out data/mine")
        print("next: sermll corpora NAME for a datasheet")
    if options.json:
        _print_json([corpora.facts(corpus) for corpus in shown])
    return 0


def _how_to_get(corpus: Corpus) -> str:
    """The command that comes after a datasheet."""
    prepare = f"sermll prepare {corpus.name} --root DIR --out data/{corpus.name}"
    if corpus.generate is not None:
        return f"sermll prepare {corpus.name} --out data/{corpus.name}"
    if corpus.archives:
        return f"sermll download {corpus.name} --out DIR --accept-licence, then {prepare}"
    return f"ask for it at {corpus.source}, then {prepare}"


def _download(options: argparse.Namespace) -> int:
    from sermll.download import download

    corpus = _known(options.corpus)
    folder = download(corpus, options.out, options.accept_licence)
    print(f"{corpus.title} in {folder}")
    print(f"licence {corpus.licence}; cite {corpus.citation}")
    print(f"next: sermll prepare {corpus.name} --root {folder} --out data/{corpus.name}")
    if options.json:
        _print_json({"path": str(folder), "corpus": corpus.name})
    return 0


def _audit(options: argparse.Namespace) -> int:
    from sermll.audit import audit, text
    from sermll.audit_page import build
    from sermll.config import Protocol, parse_value

    protocol = options.protocol.removeprefix("protocol.folds=")  # as our own messages call it
    found = audit(options.data, protocol, parse_value("--labels", options.labels))
    name = options.data.name if protocol == "default" else f"{options.data.name}-{Path(protocol).stem}"
    page = build(found, options.out or place(f"audit-{name}"))
    print(text(found))
    print(f"page     {page}")
    if options.json:
        _print_json(found.as_json())
    if found.leaks:
        raise ProtocolError(f"{len(found.leaks)} leaks, see above; numbers from these folds would be too high")
    if not options.json:
        try:
            found.design.check(Protocol())
        except ProtocolError as error:
            print(f"next: choose other folds or labels, `sermll train` refuses these: {error}")
            return 0
        file = Path("experiments") / f"{found.design.prepared.corpus}.yaml"
        words = [
            "sermll",
            "train",
            str(file) if file.is_file() else "EXPERIMENT.yaml",
            f"data.path={address(options.data)}",
        ]
        words += [f"protocol.folds={protocol}"] if protocol != "default" else []
        words += [f"data.labels={options.labels}"] if options.labels != "default" else []
        print(f"next: {shlex.join(words)}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from sermll.config import load_experiment, parse_overrides
    from sermll.report import load, text_table
    from sermll.train import train

    experiment = load_experiment(options.experiment, parse_overrides(options.overrides))
    outcome = train(experiment)
    print(text_table(load(outcome.run_dir)))
    print(f"run      {address(outcome.run_dir)}")
    print(f"report   {outcome.report}")
    if outcome.not_tracked:
        print(f"MLflow does not have everything ({outcome.not_tracked})")
        print(f"next: sermll track {address(outcome.run_dir)}")
    else:
        print(f"next: sermll predict {address(outcome.run_dir)} your.wav")
    if options.json:
        selected, last = outcome.metrics["selected"], outcome.metrics["last"]
        _print_json(
            {
                "run_dir": address(outcome.run_dir),
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
                "leaks": outcome.metrics["leaks"],
            }
        )
    return 0


def _run(options: argparse.Namespace) -> int:
    from sermll.campaign import Outcome, load_campaign
    from sermll.campaign_page import build, text
    from sermll.config import parse_overrides

    def told(outcome: Outcome) -> dict[str, Any]:
        return {
            "campaign_dir": address(outcome.folder),
            "cells": outcome.cells,
            "finished": outcome.finished,
            "failed": outcome.cells - outcome.finished,
            "table": str(outcome.page.with_name("table.csv")),
        }

    campaign = load_campaign(options.campaign, parse_overrides(options.overrides))
    return _cells(options, campaign, options.campaign, build, text, told)


def _search(options: argparse.Namespace) -> int:
    from sermll.config import parse_overrides, without_password
    from sermll.search import run_search
    from sermll.search_page import text
    from sermll.search_plan import load_search, plan_text

    search = load_search(options.search, parse_overrides(options.overrides))
    if options.dry_run:
        print(plan_text(search))
        if options.json:
            asked = search.file.trials * len(search.studies)
            _print_json({"study": address(search.folder), "trials": asked, "finished": search.finished()})
        else:
            print(
                f"next: {' '.join(['sermll search', str(options.search), *map(without_password, options.overrides)])}"
            )
        return 0
    outcome = run_search(search)
    print(text(outcome.found))
    print(f"page: {outcome.page}")
    if outcome.not_tracked:
        said = (
            f"MLflow does not have everything ({outcome.not_tracked}); sermll track {address(outcome.folder)} sends it"
        )
        print(said, file=sys.stderr)
    if options.json:
        _print_json(outcome.as_json())
    else:
        print("\n".join(f"next: sermll train {one}" for one in outcome.best))
    return 0


def _matrix(options: argparse.Namespace) -> int:
    from sermll.config import parse_overrides
    from sermll.matrix import build, load_matrix, text

    campaign = load_matrix(options.matrix, parse_overrides(options.overrides))
    return _cells(options, campaign, options.matrix, build, text, lambda outcome: outcome.found.as_json())


def _cells(
    options: argparse.Namespace,
    campaign: "Campaign",
    file: Path,
    build: Callable[[Path], tuple[Any, Path]],
    text: Callable[[Any], str],
    told: Callable[["CampaignOutcome"], Any],
) -> int:
    """Train the cells of a campaign, or say what would be done; `told` is for programs."""
    from sermll.campaign import Plan, run_campaign

    if options.dry_run:
        plan = Plan.of(campaign)
        print(plan.text())
        if options.json:
            cells, finished = len(plan.runs), sum(plan.done)
            _print_json({"campaign_dir": address(campaign.folder), "cells": cells, "finished": finished})
        else:
            print(f"next: {shlex.join(['sermll', options.verb, str(file), *options.overrides])}")
        return 0
    try:
        outcome = run_campaign(campaign, build)
    except KeyboardInterrupt:  # who interrupts does not want to wait for tables and pictures
        if (campaign.folder / "campaign.json").exists():
            print(f"\nsermll report {address(campaign.folder)} makes the table of what is finished", file=sys.stderr)
        raise
    print(text(outcome.found))
    print(f"campaign {address(outcome.folder)}")
    print(f"page     {outcome.page}")
    if outcome.not_tracked:
        print(
            f"MLflow does not have everything ({outcome.not_tracked}); sermll track {address(outcome.folder)} sends it"
        )
    if options.json:
        _print_json(told(outcome))
    if outcome.failures:
        named = "\n".join(f"  {failure}" for failure in outcome.failures)
        raise TrainingError(
            f"{len(outcome.failures)} folds could not be trained, the others are kept:\n{named}\n"
            "the same command tries them again"
        )
    if not options.json:
        print(f"next: sermll ui --runs {address(outcome.folder.parent)}")
    return 0


def _ui(options: argparse.Namespace) -> int:
    from sermll.track import serve, stored

    uri = stored(options.runs)
    print(f"http://127.0.0.1:{options.port} shows {options.runs} in some seconds; Ctrl-C ends it", flush=True)
    return serve(uri, options.port)


def _report(options: argparse.Namespace) -> int:
    from sermll.report import build, load, text_table
    from sermll.storage import fetch

    for folder in options.runs:
        fetch(folder / "campaign.json")
        if (folder / "campaign.json").is_file():
            if len(options.runs) > 1 or options.out:
                raise ConfigError(f"{address(folder)}: a campaign is reported by itself, into its own folder")
            return _report_campaign(options)
    default = options.runs[0] / "report" if len(options.runs) == 1 else Path("report")
    page = build(options.runs, options.out or default)
    for run in options.runs:
        print(text_table(load(run)))
    print(f"report   {page}")
    if options.json:
        _print_json({"report": str(page)})
    return 0


def _report_campaign(options: argparse.Namespace) -> int:
    from sermll import campaign_page, matrix, tally
    from sermll.campaign import count
    from sermll.files import naming

    (folder,) = options.runs
    with naming(folder / "campaign.json"):
        shown: Any = matrix if tally.read(folder)["kind"] == "matrix" else campaign_page
    found, page = count(folder, shown.build)
    print(shown.text(found))
    print(f"report   {page}")
    if options.json:
        _print_json({"report": str(page)})
    return 0


def _compare(options: argparse.Namespace) -> int:
    from sermll.compare import compare, text

    if len(options.runs) < 2:
        raise ConfigError("compare needs two runs at least: the one to compare with, and another")
    found = compare(options.runs)
    print(text(found))
    print("Chance is that of the speakers tested; other seeds vary the scores further.")
    if options.json:
        _print_json(found.as_json())
    return 0


def _ensemble(options: argparse.Namespace) -> int:
    from sermll.ensemble import ensemble, text
    from sermll.report import load, text_table

    found = ensemble(options.runs, options.out, options.method)
    print(text_table(load(found.run_dir)))
    print(text(found))
    print(f"run      {address(found.run_dir)}")
    if options.json:
        _print_json(found.as_json())
    else:
        print(f"next: sermll report {address(found.run_dir)}")
    return 0


def _robustness(options: argparse.Namespace) -> int:
    from sermll.robustness import robustness
    from sermll.robustness_page import text

    done = robustness(options.run_dir, options.noise, options.snr, options.out, options.seed)
    print(text(done.found))
    print(f"page     {done.page}")
    print(f"table    {done.folder / 'table.csv'}")
    if options.json:
        _print_json(done.as_json())
    else:
        print("next: the same command on another run; with the same seed both meet the same segments of noise")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from sermll.predict import predict

    found = predict(options.run_dir, options.files, options.fold, options.like)
    for notice in found.notices:
        print(notice)
    width = max((len(prediction.file) for prediction in found.predictions), default=0)
    for prediction in found.predictions:
        ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
        shares = "  ".join(f"{name} {value:.2f}" for name, value in ranked[:4])
        print(f"{prediction.file:<{width}}  {prediction.label:<12} {shares}")
    if options.json:
        _print_json(found.as_json())
    if found.faults:
        count = f"{len(found.faults)} of {len(options.files)} files could not be used"
        raise DataError("\n".join([count, *found.faults]))
    return 0


def _track(options: argparse.Namespace) -> int:
    from sermll.track import upload

    fault = upload(options.folder, options.uri)
    if fault:
        raise SermllError(f"MLflow did not take the results ({fault}); the folder is complete, try again later")
    print(f"MLflow has everything of {address(options.folder)}")
    if options.json:
        _print_json({"run_dir": address(options.folder), "complete": True})
    return 0


def _submit(options: argparse.Namespace) -> int:
    from sermll.submit import Jobs

    asked = _parser().parse_args(options.command)  # wrong usage is told here and now
    if asked.verb in ("submit", "jobs", "ui"):
        raise ConfigError(f"{asked.verb} is for this machine; submit what trains, prepares or reports")
    here = Path.cwd()
    needed = _read_there(asked, here)
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {missing[0]}: not set here")
    jobs = Jobs(options.address)
    root = options.root or os.environ.get(ROOT) or str(here)
    job = jobs.submit(options.command, here, root, {name: os.environ[name] for name in options.env}, needed)
    print(f"job {job} at {jobs.address}", flush=True)
    if options.follow:
        return _follow(jobs, job, options.json)
    if options.json:
        _print_json({"job": job, "status": jobs.find(job).status, "exit_code": None})
    else:
        print(f"next: sermll jobs logs {job} --follow --address {jobs.address}")
    return 0


def _read_there(asked: argparse.Namespace, here: Path) -> list[Path]:
    """Files below `here` that a command reads: its own, and the folds of an experiment or an audit."""

    def below(file: Path) -> Path:
        if file.is_absolute() or not file.is_file() or here not in file.resolve().parents:
            raise ConfigError(f"{file}: not a file below {here}, which is what is sent; give a relative path")
        return file

    named = [getattr(asked, name, None) for name in ("experiment", "campaign", "matrix", "search")]
    found = [below(file) for file in named if file is not None]
    folds = asked.protocol if asked.verb == "audit" else ""
    if asked.verb == "train":
        from sermll.config import load_experiment, parse_overrides

        folds = load_experiment(asked.experiment, parse_overrides(asked.overrides)).protocol.folds
    return [*found, below(Path(folds))] if folds.endswith((".yaml", ".yml", ".json")) else found


def _jobs(options: argparse.Namespace) -> int:
    from sermll.submit import Jobs

    if (options.what == "list") == bool(options.job):
        raise ConfigError("jobs list takes no job" if options.job else f"jobs {options.what}: give the job's id")
    jobs = Jobs(options.address)
    if options.what == "list":
        found = jobs.list()
        for job in found:
            print(f"{job.id:<36} {job.status:<10} {job.started:<16}  {job.command}")
        if options.json:
            _print_json([{"job": job.id, "status": job.status, "exit_code": job.exit_code} for job in found])
        elif not found:
            print(f"{jobs.address} has no jobs")
        return 0
    if options.what == "logs" and options.follow:
        return _follow(jobs, options.job, options.json)
    if options.what == "logs":
        print(jobs.logs(options.job), end="")
    job = jobs.find(options.job) if options.what == "logs" else jobs.stop(options.job)
    if options.json:
        _print_json({"job": job.id, "status": job.status, "exit_code": job.exit_code})
    elif options.what == "stop":
        print(f"job {job.id}: {job.status.lower()}; finished epochs are kept, the same command goes on from there")
    return 0


def _follow(jobs: "Jobs", job: str, as_json: bool) -> int:
    """Show what a job prints, and give its exit status: 1 where it has none, because it was stopped."""
    try:
        for text in jobs.follow(job):
            print(text, end="", flush=True)
        ended = jobs.find(job)
    except KeyboardInterrupt:
        print(f"\n{jobs.goes_on(job)}; sermll jobs stop {job} ends it", file=sys.stderr)
        return 130
    if ended.status != "SUCCEEDED":
        status = f"with exit status {ended.exit_code}" if ended.exit_code is not None else f"({ended.message})"
        why = "stopped" if ended.status == "STOPPED" else f"failed {status}"
        print(f"job {job}: {why}; the same command goes on from its last epoch", file=sys.stderr)
    if as_json:
        _print_json({"job": job, "status": ended.status, "exit_code": ended.exit_code})
    if ended.status == "SUCCEEDED":
        return 0
    return ended.exit_code or 1


def _print_json(value: Any) -> None:  # anything JSON holds
    sys.stdout.flush()
    print(json.dumps(value), flush=True)
