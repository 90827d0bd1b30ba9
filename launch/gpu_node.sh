#!/usr/bin/env bash
# Trains on one machine with one or more NVIDIA GPUs: one process takes all of them. After a failure it goes on from the
# last checkpoint; SIGTERM, SIGINT or SIGUSR1 to this script has it save and end.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/gpu_node.sh [OPTION...] -- FLAG...

FLAG... are those of python -m napo_jax.train, such as --config configs/llava7b.py --workdir runs/a

  --python PATH   default: .venv/bin/python of this tree if there is one, else python3
  --log FILE      also keeps all that the run prints, at the end of this file
  --retries N     how often to go on after a failure (default 10)
  --poll S        how long to wait before that (default 30)
  --dry-run       prints the command and does not run it

Exit status: 0 done, 2 wrong usage, config or data (not tried again), 143 stopped, else that of the last failure.
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"

texts="--python --log" numbers="--retries --poll"
python="" log="" retries=10 poll=30
read_flags "$@"
if ((${#flags[@]} == 0)); then wrong "there is no -- with the flags of napo_jax.train"; fi
if [[ -z $python ]]; then
    python=python3
    if [[ -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
fi

# Without a GPU jax would train on the CPU, which nobody means who starts this.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
command=("$python" -m napo_jax.train "${flags[@]}")
if "$dry_run"; then
    show env "JAX_PLATFORMS=$JAX_PLATFORMS" "${command[@]}"
    exit
fi
if [[ $JAX_PLATFORMS == cuda* ]]; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || wrong "nvidia-smi shows no GPU here"
    say "$gpus GPUs"
fi
if [[ -n $log ]]; then exec > >(tee -a "$log") 2>&1; fi

stopped=false child=""
stop() {
    stopped=true
    if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap stop TERM INT USR1

for ((retry = 0; ; retry++)); do
    "${command[@]}" &
    child=$!
    wait_for "$child"
    child=""
    case $ended in
        0) exit 0 ;;
        2)
            say "wrong usage, config or data: not tried again"
            exit 2
            ;;
    esac
    if "$stopped"; then exit "$ended"; fi
    if ((retry >= retries)); then
        say "the run ended with status $ended; $retries retries are used up (--retries)"
        exit "$ended"
    fi
    say "the run ended with status $ended: going on from the last checkpoint, retry $((retry + 1)) of $retries"
    for ((waited = 0; waited < poll; waited++)); do
        sleep 1
        if "$stopped"; then exit "$ended"; fi
    done
done
