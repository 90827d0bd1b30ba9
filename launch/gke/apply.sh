#!/usr/bin/env bash
# Trains on a GKE cluster: fills in tpu.yaml or gpu.yaml and applies it.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/gke/apply.sh --name NAME --image IMAGE --type TYPE --topology TOPOLOGY --chips N [OPTION...] -- FLAG...
       launch/gke/apply.sh --name NAME --image IMAGE --type nvidia-TYPE --chips N --workers N [OPTION...] -- FLAG...
       launch/gke/apply.sh --name NAME [--namespace SPACE] --delete

FLAG... are those of python -m napo_jax.train, such as --config configs/llava7b.py --workdir gs://...
The same command, given again, leaves a run alone that goes on, and resumes one that has ended.

  --name NAME              of the JobSet, and of its headless service
  --image IMAGE            made from launch/Dockerfile, in a registry that the cluster reads
  --type TYPE              the label of its nodes, such as tpu-v5-lite-podslice or nvidia-h100-80gb
  --topology TOPOLOGY      of a TPU slice, such as 4x4
  --chips N                TPU chips or GPUs of one node
  --workers N              nodes; of a TPU slice they follow from topology and chips
  --slices N               TPU slices that train together (default 1)
  --namespace SPACE        default: default
  --service-account NAME   what may read and write the buckets (default: default)
  --bucket BUCKET          also mounts this bucket by GCS FUSE, at /gcs
  --spot                   on spot nodes
  --grace S                how long a pod may take to save when it is told to end (default 900)
  --retries N              how often to go on after a failure or a preemption (default 10)
  --context CONTEXT        of kubectl; default: the current one
  --delete                 deletes the JobSet and its service
  --dry-run                prints the manifest and the commands, and runs none
END
}

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$folder/../common.sh"

texts="--name --image --type --topology --bucket --context --namespace --service-account"
counts="--chips --workers --slices --grace" numbers="--retries" switches="--spot --delete"
name="" image="" type="" topology="" bucket="" context="" delete=false spot=false
namespace=default service_account=default chips=0 workers=0 slices=1 grace=900 retries=10
read_flags "$@"

required name
cloud_name --name "$name"
cloud_name --namespace "$namespace"
cloud_name --service-account "$service_account"
kubectl=(kubectl)
if [[ -n $context ]]; then kubectl+=("--context=$context"); fi
kubectl+=("--namespace=$namespace")

if "$delete"; then
    if ((${#flags[@]})); then wrong "--delete runs nothing, and there are flags after --"; fi
    act "${kubectl[@]}" delete "jobset/$name" "service/$name" --ignore-not-found
    exit
fi

required image type
if ((chips == 0)); then wrong "--chips is missing"; fi
if ((${#flags[@]} == 0)); then wrong "there is no -- with the flags of napo_jax.train"; fi
for flag in image type topology bucket; do # they stand in YAML as they are
    if ! [[ ${!flag} =~ ^[A-Za-z0-9._:/@-]*$ ]]; then wrong "--$flag cannot be '${!flag}'"; fi
done

if [[ $type == nvidia-* ]]; then
    template=$folder/gpu.yaml job=node
    if ((workers == 0)); then wrong "--workers is missing"; fi
    if ((slices > 1)) || [[ -n $topology ]]; then wrong "--slices and --topology are of TPUs, and the type is $type"; fi
else
    template=$folder/tpu.yaml job=slice
    if ! [[ $topology =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]]; then
        wrong "--topology must be like 4x4 or 2x2x4, got '$topology'"
    fi
    all=$((${topology//x/*}))
    if ((all % chips)); then wrong "topology $topology has $all chips, which are not nodes of $chips (--chips)"; fi
    if ((workers > 0 && workers != all / chips)); then
        wrong "topology $topology has $((all / chips)) nodes of $chips chips, and --workers is $workers"
    fi
    workers=$((all / chips))
fi

# Writes words as a list of JSON, which is YAML too.
json() {
    local word list=""
    for word in "$@"; do
        if [[ $word == *[[:cntrl:]]* ]]; then wrong "a flag holds a line break or the like"; fi
        word=${word//\\/\\\\}
        word=${word//\"/\\\"}
        list+="${list:+, }\"$word\""
    done
    printf '[%s]' "$list"
}

manifest=$(<"$template")
flags_text=$(json "${flags[@]}")
# Kubernetes replaces $(NAME) in arguments; $$ is a dollar.
flags_text=${flags_text//'$'/'$$'}
fill() { manifest=${manifest//"$1"/"$2"}; }
without() { manifest=$(grep -vE "# $1\$" <<<"$manifest"); }
if ! "$spot"; then without spot; fi
if [[ -z $bucket ]]; then without bucket; fi
manifest=$(sed -E 's/ *# (spot|bucket)$//' <<<"$manifest")
fill __NAME__ "$name"
fill __NAMESPACE__ "$namespace"
fill __SERVICE_ACCOUNT__ "$service_account"
fill __TYPE__ "$type"
fill __TOPOLOGY__ "$topology"
fill __IMAGE__ "$image"
fill __BUCKET__ "$bucket"
fill __GRACE__ "$grace"
fill __RETRIES__ "$retries"
fill __SLICES__ "$slices"
fill __WORKERS__ "$workers"
fill __CHIPS__ "$chips"
fill __FLAGS__ "$flags_text" # last: what a user writes is not filled in

# One that has ended is still there, and would be left as it is.
query=("${kubectl[@]}" get jobset "$name" --ignore-not-found '--output=jsonpath={.metadata.name} {.status.terminalState}')
state=""
if "$dry_run"; then show "${query[@]}"; else state=$("${query[@]}"); fi
case ${state#"$name"} in
    " ") # it is there and has not ended
        say "$name goes on, with the flags that it was started with"
        ;;
    *)
        if [[ -n $state ]]; then
            say "$name has ended (${state#"$name "}): it is started again and goes on from its last checkpoint"
            act "${kubectl[@]}" delete "jobset/$name" --wait
        fi
        if "$dry_run"; then
            printf '%s\n' "$manifest" >&3
            show "${kubectl[@]}" apply --filename=-
        else
            "${kubectl[@]}" apply --filename=- <<<"$manifest"
        fi
        ;;
esac
say "its log: ${kubectl[*]} logs --follow --selector=batch.kubernetes.io/job-name=$name-$job-0,batch.kubernetes.io/job-completion-index=0 --container=train"
