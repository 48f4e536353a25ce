#!/bin/bash
# Slurm: a Ray cluster over the nodes of one job, which runs any sermll command. The nodes share home and checkout, and
# .venv is in the checkout (make setup). Two minutes before its time is up the job goes back to the queue; when it
# starts again it goes on from the last epoch. From the root of the repository:
#   sbatch cluster/slurm.sh train experiments/ravdess.yaml data.path=$PWD/data/ravdess tracking.runs=$PWD/runs
#   sbatch --nodes=4 --gpus-per-node=4 cluster/slurm.sh run experiments/baselines.campaign.yaml
#SBATCH --job-name=sermll
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sermll-%j.log
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate
export RAY_AUTH_MODE=token RAY_idle_worker_killing_time_threshold_ms=120000
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds; nodes that import from a busy shared disk need more than 30
ray get-auth-token --generate >/dev/null          # ~/.ray/auth_token, made where there is none

head="$(hostname -I | cut -d' ' -f1):6379" # this script runs on the first node
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
# In the background, because bash heeds no signal while it waits for a command in the foreground.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  ray symmetric-run --address "$head" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus="$SLURM_CPUS_PER_TASK" -- \
  env RAY_ADDRESS="$head" python -m sermll "$@" &
wait $!
