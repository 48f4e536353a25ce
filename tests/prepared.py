"""Prepared data for tests that should not wait for Ray: the same steps, in this process."""

from pathlib import Path

from sermll import prepare
from sermll.corpora import CORPORA


def prepare_without_ray(root: Path, out: Path, corpus: str = "emodb") -> Path:
    """Prepare a corpus folder shard by shard; returns `out`."""
    facts = CORPORA[corpus]
    rows, problems = prepare._read_rows(facts, root)
    (out / "shards").mkdir(parents=True)
    size = prepare.UTTERANCES_PER_SHARD
    for index, start in enumerate(range(0, len(rows), size)):
        prepare._write_one_shard(root, out / "shards", index, rows[start : start + size], None)
    source = prepare._fingerprint(facts, root, rows, problems, None)
    prepare._write_manifest(facts, root, out, rows, problems, None, source)
    return out
