#!/usr/bin/env bash
# Trains on a TPU slice, or on several: creates what is not there, copies this tree, runs the same command on all workers,
# shows the log of worker 0, and goes on after a preemption.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/tpu_pod.sh --name NAME --zone ZONE --type TYPE --version VERSION [OPTION...] -- FLAG...
       launch/tpu_pod.sh --name NAME --zone ZONE [OPTION...] --stop | --delete

FLAG... are those of python -m napo_jax.train, such as --config configs/llava7b.py --workdir gs://...
The same command, given again, follows a run that goes on, and resumes one that does not.

  --name NAME          of the slice, and of the folder on its workers
  --zone ZONE          where it is
  --type TYPE          its accelerator type, such as v5litepod-16
  --version VERSION    the image of its workers, such as v2-alpha-tpuv5-lite
  --project PROJECT    default: that of gcloud
  --spot               may be preempted, and costs less
  --queued             waits in Google's queue for it (a queued resource)
  --slices N           so many slices that train together; they are queued (default 1)
  --workers N          how many workers a slice must have; default: as many as it has
  --create-flag=FLAG   one more flag for gcloud's create, such as --create-flag=--network=NET; may be repeated
  --extras LIST        what to install of the project's extras (default tpu,gcs)
  --retries N          how often to go on after a failure or a preemption (default 10)
  --capacity-wait S    how long to wait for the slice, each time (default 86400)
  --grace S            how long a run may take to save when it is stopped (default 600)
  --poll S             how long to wait before asking again (default 30)
  --delete-after       deletes the slice when the run has ended, however it has; not when this script is interrupted
  --stop               has the run save and end, for good; the slice stays
  --delete             deletes the slice. Both need the run's own --queued and --slices, which name what it has made
  --dry-run            prints the commands and runs none

Exit status: 0 done, 2 wrong usage, config or data (not tried again), 143 stopped by --stop, 1 anything else.
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"

texts="--name --zone --type --version --project --extras" counts="--slices --workers"
numbers="--retries --capacity-wait --grace --poll" switches="--spot --queued --delete-after"
name="" zone="" type="" version="" project="" extras=tpu,gcs mode=run
spot=false queued=false delete_after=false
slices=1 workers=0 retries=10 capacity_wait=86400 grace=600 poll=30
create_flags=()
own_flag() {
    case $1 in
        --create-flag=?*) create_flags+=("${1#--create-flag=}") ;;
        --stop | --delete)
            if [[ $mode != run ]]; then wrong "--stop and --delete are one or the other"; fi
            mode=${1#--}
            ;;
        *) return 1 ;;
    esac
}
read_flags "$@"

required name zone
if [[ $mode == run ]]; then required type version; fi
cloud_name --name "$name"
if ! [[ $extras =~ ^[a-z0-9,]+$ ]]; then wrong "--extras must be names with commas between them, got '$extras'"; fi
if [[ $mode == run && ${#flags[@]} -eq 0 ]]; then wrong "there is no -- with the flags of napo_jax.train"; fi
if [[ $mode != run && ${#flags[@]} -gt 0 ]]; then wrong "--$mode runs nothing, and there are flags after --"; fi
if ((slices > 1)); then queued=true; fi # only the queue gives several that know each other

where=("--zone=$zone")
if [[ -n $project ]]; then where+=("--project=$project"); fi
nodes=("$name")
if ((slices > 1)); then
    nodes=()
    for ((slice = 0; slice < slices; slice++)); do nodes+=("$name-$slice"); done
fi
tpus=(gcloud compute tpus)
folder=napo_jax-$name
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# What a dry run takes for the answers of the cloud.
assumed_slice="" assumed_run=none

# ---- the slice

# Prints the state of what a command describes, or nothing if that is not there.
state_of() {
    if "$dry_run"; then
        show "$@"
        echo "$assumed_slice"
        return
    fi
    local state
    if state=$("$@" 2>"$scratch/error"); then
        echo "${state:-UNKNOWN}"
    elif ! grep -qiE 'NOT_FOUND|not found|404' "$scratch/error"; then
        cat "$scratch/error" >&2
        return 1
    fi
}

queue_state() { state_of "${tpus[@]}" queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'; }
node_state() { state_of "${tpus[@]}" tpu-vm describe "$1" "${where[@]}" '--format=value(state)'; }

# Prints one word of all of it: nothing, READY, WAIT, LOST or the state of what is stopped.
slice_state() {
    local state node
    if "$queued"; then
        state=$(queue_state) || return 1
        case $state in
            "" | ACTIVE) ;;
            FAILED | SUSPENDED) state=LOST ;;
            *) state=WAIT ;;
        esac
        if [[ $state != ACTIVE ]]; then
            echo "$state"
            return
        fi
    fi
    for node in "${nodes[@]}"; do
        state=$(node_state "$node") || return 1
        case $state in
            READY | ACTIVE) ;; # ACTIVE is what a dry run assumes
            "") if "$queued"; then echo LOST; fi; return ;;
            PREEMPTED | TERMINATED | UNKNOWN | HIDDEN) echo LOST; return ;;
            STOPPED) echo STOPPED; return ;;
            *) echo WAIT; return ;;
        esac
    done
    echo READY
}

create() {
    local command common=("--accelerator-type=$type" "${where[@]}")
    if "$spot"; then common+=(--spot); fi
    common+=(${create_flags[@]+"${create_flags[@]}"})
    if "$queued"; then
        command=("${tpus[@]}" queued-resources create "$name" "--runtime-version=$version" "${common[@]}")
        if ((slices > 1)); then
            command+=("--node-count=$slices" "--node-prefix=$name")
        else
            command+=("--node-id=$name")
        fi
    else
        command=("${tpus[@]}" tpu-vm create "$name" "--version=$version" "${common[@]}")
    fi
    assumed_slice=ACTIVE
    if act "${command[@]}" 2>&1 | tee "$scratch/said" >&2; then return; fi
    # It is worth waiting for capacity, and for nothing else.
    if grep -qi quota "$scratch/said" ||
        ! grep -qiE 'no more capacity|resource_?exhausted|stockout|insufficient|enough resources' "$scratch/said"; then
        say "the slice cannot be created; gcloud says why above"
        return 1
    fi
    say "no capacity in $zone"
}

remove() {
    if "$queued"; then
        act "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
    else
        act "${tpus[@]}" tpu-vm delete "$name" "${where[@]}" --quiet
    fi
}

# Creates the slice if need be, and waits until it can be used.
ensure_slice() {
    local until=$((SECONDS + capacity_wait)) state before="-"
    while :; do
        state=$(slice_state) || return 1
        if [[ $state != "$before" ]]; then say "slice $name: ${state:-not there}"; fi
        before=$state
        case $state in
            READY)
                check_workers
                return
                ;;
            "")
                create || return 1
                if "$dry_run"; then continue; fi
                ;;
            LOST) remove || say "it could not be deleted" ;;
            STOPPED) act "${tpus[@]}" tpu-vm start "$name" "${where[@]}" || say "it could not be started" ;;
        esac
        if ((SECONDS >= until)); then
            say "no slice within $capacity_wait s (--capacity-wait)"
            return 1
        fi
        sleep "$poll"
    done
}

check_workers() {
    local node found
    if ((workers == 0)) || "$dry_run"; then return; fi
    for node in "${nodes[@]}"; do
        found=$("${tpus[@]}" tpu-vm describe "$node" "${where[@]}" '--format=value(networkEndpoints.len())') || return 1
        if [[ $found != "$workers" ]]; then
            say "slice $node of type $type has $found workers, and --workers is $workers"
            return 2
        fi
    done
}

# ---- its workers

# Runs one command on a worker of a node, or on all: on NODE WORKER COMMAND
on() { act "${tpus[@]}" tpu-vm ssh "$1" "${where[@]}" "--worker=$2" "--command=$3" --quiet; }

# Does something with each node at once, and fails if one does: with_all FUNCTION ARGUMENT...
with_all() {
    local node failed=0 children=() child
    for node in "${nodes[@]}"; do
        if "$dry_run"; then
            "$1" "$node" "${@:2}"
        else
            "$1" "$node" "${@:2}" &
            children+=($!)
        fi
    done
    for child in ${children[@]+"${children[@]}"}; do wait "$child" || failed=1; done
    return "$failed"
}

on_all() { on "$1" all "$2"; }
copy_to() { act "${tpus[@]}" tpu-vm scp "$scratch/tree.tgz" "$1:$folder.tgz" "${where[@]}" --worker=all --quiet; }

# Does something on the workers until it works, five times at most: one of them may refuse for a while.
patiently() {
    local try
    for try in 1 2 3 4 5; do
        if "${@:2}"; then return; fi
        say "$1 did not work (try $try of 5)"
        if ((try < 5)); then sleep "$poll"; fi
    done
    return 1
}

# What a worker is told: worker VERB ARGUMENT..., as a word for its shell.
worker() {
    local words
    printf -v words ' %q' "$@"
    printf 'bash ~/%s/tree/launch/worker.sh%s' "$folder" "$words"
}

# Prints how the run stands on one worker, or on all of them: a word each.
run_state() {
    local command said
    command="if test -e ~/$folder/tree; then $(worker status); else echo run: none; fi"
    if "$dry_run"; then
        on "$1" "$2" "$command"
        echo "$assumed_run"
        return
    fi
    said=$(on "$1" "$2" "$command") || return 1
    sed -n 's/^run: //p' <<<"$said" | grep .
}

# Packs the files that git knows, as they are now, and those that it neither knows nor ignores; without git, all but
# what is never wanted.
pack() {
    local file files=(--exclude=.git --exclude=.venv --exclude=runs --exclude=__pycache__ .)
    if git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        git -C "$root" ls-files -z --cached --others --exclude-standard |
            while IFS= read -r -d '' file; do # one that was deleted is still known
                if [[ -e $root/$file || -L $root/$file ]]; then printf '%s\0' "$file"; fi
            done >"$scratch/files"
        files=(--null "--files-from=$scratch/files")
    fi
    act tar -C "$root" -czf "$scratch/tree.tgz" "${files[@]}"
    if ! "$dry_run"; then say "the tree: $(du -h "$scratch/tree.tgz" | cut -f1) packed"; fi
}

# Starts the run on all workers, with the tree as it is now.
start() {
    local unpack="cd && rm -rf $folder/new && mkdir -p $folder/new && tar -xzf $folder.tgz -C $folder/new"
    unpack+=" && rm -rf $folder/tree && mv $folder/new $folder/tree && $(worker install "$extras")"
    local halt
    halt="if test -e ~/$folder/tree; then $(worker stop "$grace"); fi"
    # What may still run of the time before would hold the TPU.
    patiently "stopping what runs" with_all on_all "$halt" &&
        patiently "copying the tree" with_all copy_to &&
        patiently "installing" with_all on_all "$unpack" &&
        patiently "starting" with_all on_all "$(worker start -- "${flags[@]}")" &&
        assumed_run=0
}

# Runs to an end, and leaves in $outcome: an exit status, halted, or lost.
outcome=""
attempt() {
    local state lines=+1 node all
    outcome=lost
    state=$(patiently "asking worker 0" run_state "${nodes[0]}" 0) || return 0
    if [[ $state == running ]]; then
        say "the run goes on, with the flags that it was started with: following worker 0"
        lines=50
    else
        start || return 0
    fi
    while :; do
        on "${nodes[0]}" 0 "$(worker follow "$lines")" || say "the connection to worker 0 ended"
        state=$(patiently "asking worker 0" run_state "${nodes[0]}" 0) || return 0
        if [[ $state != running ]]; then break; fi
        lines=20
        sleep "$poll"
    done
    outcome=$state
    if [[ $state == 0 || $state == halted ]]; then return; fi
    # Worker 0 may only have missed one that had to give up, and may say so itself in vain.
    for node in "${nodes[@]}"; do
        all=$(run_state "$node" all) || continue
        if grep -qx 2 <<<"$all"; then outcome=2; fi
    done
}

# ---- what is asked for

end() {
    if "$delete_after"; then remove || say "the slice could not be deleted: it still costs"; fi
    exit "$1"
}

case $mode in
    delete)
        remove
        exit
        ;;
    stop)
        with_all on_all "$(worker stop "$grace" halt)"
        exit
        ;;
esac

trap 'say "no longer followed; the run goes on. The same command follows it again, --stop ends it"; exit 130' INT
pack
for ((retry = 0; ; retry++)); do
    ensure_slice || end $?
    attempt
    case $outcome in
        0)
            say "done"
            end 0
            ;;
        2)
            say "wrong usage, config or data: not tried again; worker 0 keeps its log in ~/$folder/run.log"
            end 2
            ;;
        halted)
            say "stopped; the same command goes on"
            end 143
            ;;
        lost) say "the slice does not answer" ;;
        *) say "the run ended with status $outcome" ;;
    esac
    if ((retry >= retries)); then
        say "$retries retries are used up (--retries)"
        end 1
    fi
    say "going on from the last checkpoint: retry $((retry + 1)) of $retries"
    sleep "$poll"
done
