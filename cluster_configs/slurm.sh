#!/bin/bash
# A run on Slurm: Ray on every node of the job, the command on the first. Run again, it goes on where it stopped, and near the
# end of its time it does so by itself.
#
#   sbatch slurm.sh python -m pipeline run spec.yaml --set storage=/shared/runs --set cluster.workers=16
#
# The environment with the lock is to be active when this is submitted, on a file system that all nodes see.
#SBATCH --job-name=raylign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))

# Nodes may be shared with others' jobs, and their networks are: nobody gets in without this run's token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
# A node that is gone is noticed after 4 to 12 s instead of 15 to 65 (README.md).
export RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=4
scratch=${SLURM_TMPDIR:-/tmp}/raylign-$SLURM_JOB_ID
export RAYLIGN_CACHE=${RAYLIGN_CACHE:-$scratch/cache}
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:9   # there is no dashboard: Ray Train, which asks for one, is told so at once
options=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="$scratch/ray"
    --min-worker-port=0 --max-worker-port=0 --disable-usage-stats --block)

started=()
finish() {
    for step in "${started[@]}"; do kill "$step" 2>/dev/null || true; done
    wait || true
}
trap finish EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false "${options[@]}" &
started+=($!)
export RAY_ADDRESS=$address:$port
for _ in {1..120}; do (: <"/dev/tcp/$address/$port") 2>/dev/null && break || sleep 1; done
if ((SLURM_JOB_NUM_NODES > 1)); then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --nodes="$others" --ntasks="$others" --exclude="$head" --overlap ray start --address="$RAY_ADDRESS" "${options[@]}" &
    started+=($!)
fi
python - "$SLURM_JOB_NUM_NODES" <<'END'
import sys, time
import ray

ray.init(log_to_driver=False, logging_level="ERROR")
wanted, until = int(sys.argv[1]), time.monotonic() + 300
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > until:
        sys.exit(f"after 300 s {there} of {wanted} nodes are there")
    time.sleep(1)
END

"$@" &
run=$!
started+=("$run")
again() { # the time is nearly over: end the run, which keeps its checkpoints, and get in line again
    kill -TERM "$run" 2>/dev/null || true
    wait "$run" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again USR1
wait "$run" && code=0 || code=$?
started=("${started[@]:0:${#started[@]}-1}")
exit "$code"
