#!/usr/bin/env bash
# What happens on each worker of a TPU slice. tpu_pod.sh copies the tree to DIR/tree there and calls this in it; beside
# the tree are venv/, run.log, and the run's pid and status.
set -euo pipefail

usage() {
    cat <<'END'
usage: worker.sh install EXTRAS       makes venv/ and installs the tree with these extras (tpu,gcs)
       worker.sh start -- FLAG...     starts the run, unless it runs already, and returns
       worker.sh follow LINES         shows the last lines of its log, and what is added until it ends
       worker.sh status               says "run: none", "running", "halted" or the exit status
       worker.sh stop SECONDS [halt]  has it save and end, and kills it after that time; halt: it is not to be started again
       --dry-run in front shows what would be done
END
}

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$tree/launch/common.sh"
here=$(dirname "$tree")
python=$here/venv/bin/python

# Tells whether the run's process is there. After a reboot its number may be another program's.
running() {
    [[ -s $here/pid ]] && tr '\0' ' ' 2>/dev/null <"/proc/$(<"$here/pid")/cmdline" | grep -q 'worker.sh run'
}

install() {
    local found="" version
    for version in 3.11 3.12 3.13; do
        if "python$version" -c 'import venv, ensurepip' 2>/dev/null; then found=python$version; fi
    done
    if ! "$python" -m pip --version >/dev/null 2>&1; then # not there, or half made
        if [[ -n $found ]]; then
            act "$found" -m venv --clear "$here/venv"
        else # images of TPU VMs may have an older Python alone; uv brings one
            act python3 -m pip install --quiet --user uv
            act python3 -m uv venv --quiet --seed --clear --python 3.12 "$here/venv"
        fi
    fi
    act "$python" -m pip install --quiet --disable-pip-version-check "${tree}[$1]"
}

start() {
    if running; then
        echo "runs already"
        return
    fi
    if "$dry_run"; then
        show "$python" -m napo_jax.train "$@"
        return
    fi
    rm -f "$here/status" "$here/halt" "$here/child"
    # Its own session, so that it outlives the connection.
    setsid bash "$tree/launch/worker.sh" run -- "$@" </dev/null >>"$here/run.log" 2>&1 &
    echo $! >"$here/pid"
}

# The run itself, inside the session that start made.
run() {
    cd "$tree"
    echo $$ >"$here/pid" # setsid may have forked
    trap true TERM HUP INT # the training hears them itself, and its status has to be kept
    printf 'napo_jax: %s starts on %s\n' "$(date -u +%FT%TZ)" "$(hostname)"
    "$python" -m napo_jax.train "$@" &
    echo $! >"$here/child"
    wait_for $!
    printf 'napo_jax: %s ended with status %s\n' "$(date -u +%FT%TZ)" "$ended"
    echo "$ended" >"$here/status.new"
    mv "$here/status.new" "$here/status"
}

status() {
    if running; then
        echo "run: running"
    elif [[ -e $here/halt ]]; then
        echo "run: halted"
    elif [[ -e $here/status ]]; then
        echo "run: $(<"$here/status")"
    elif [[ -e $here/pid ]]; then
        echo "run: 137" # ended by what let it write nothing
    else
        echo "run: none"
    fi
}

follow() {
    if running; then
        tail -n "$1" -f --pid="$(<"$here/pid")" "$here/run.log"
    elif [[ -e $here/run.log ]]; then
        tail -n "$1" "$here/run.log"
    fi
}

stop() {
    if [[ ${2:-} == halt ]]; then act touch "$here/halt"; fi
    if ! running || [[ ! -s $here/child ]]; then return; fi
    act kill -TERM "$(<"$here/child")"
    if "$dry_run"; then return; fi
    for ((waited = 0; waited < $1; waited++)); do
        running || return 0
        sleep 1
    done
    say "no end after $1 s: killed"
    kill -KILL "$(<"$here/child")" || true
}

if [[ ${1:-} == --dry-run ]]; then
    dry_run=true
    shift
fi
verb=${1:-}
if (($#)); then shift; fi
case $verb in
    start | run)
        if [[ ${1:-} != -- ]]; then wrong "$verb needs -- and the flags of napo_jax.train"; fi
        shift
        "$verb" "$@"
        ;;
    install | follow)
        if (($# != 1)); then wrong "$verb needs one argument"; fi
        "$verb" "$1"
        ;;
    stop)
        if (($# < 1 || $# > 2)); then wrong "stop needs SECONDS"; fi
        number SECONDS "$1" 0
        stop "$@"
        ;;
    status) status ;;
    -h | --help) usage ;;
    *) wrong "expected install, start, follow, status or stop, got '$verb'" ;;
esac
