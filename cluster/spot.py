# Tells Ray that this spot machine is about to go, as soon as the cloud says so: two minutes before on AWS, half a
# minute on Google Cloud. What trains on it then leaves with a checkpoint. On a worker, once Ray is there:
#   python spot.py aws|gcp HEAD:6379
"""A cloud's notice that it takes a machine back, passed on to Ray."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

METADATA = "http://169.254.169.254"  # of both clouds, for the machine itself
LEFT_S = {"aws": 110, "gcp": 25}
POLL_S = 5.0


def ask(path: str, method: str = "GET", **headers: str) -> str:
    """What the cloud says of this machine; empty where it says nothing."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(METADATA + path, headers=named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):  # AWS answers 404 as long as the machine stays
        return ""


def goes(cloud: str) -> bool:
    """Whether this machine has been told to go."""
    if cloud == "gcp":
        return ask("/computeMetadata/v1/instance/preempted", Metadata_Flavor="Google") == "TRUE"
    session = ask("/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    return bool(session) and bool(ask("/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=session))


def node() -> str:
    """The id of Ray's node on this machine, which its raylet is started with; empty where there is none yet."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        for word in words:
            if word.startswith(b"--node_id="):
                return word.partition(b"=")[2].decode()
    return ""


def main(cloud: str, head: str) -> None:
    """Wait for the notice, and pass it on."""
    while not (goes(cloud) and node()):
        time.sleep(POLL_S)
    command = ["ray", "drain-node", f"--address={head}", f"--node-id={node()}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the cloud takes this spot machine back"]
    subprocess.run([*command, f"--deadline-remaining-seconds={LEFT_S[cloud]}"], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
