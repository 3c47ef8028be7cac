#!/usr/bin/env bash
# Checks a config and submits it to Slurm: the trainer and, on nodes of their own, the rollout servers.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: submit.sh CONFIG [key=value ...] [options]
       submit.sh --convert to-megatron|to-hf IN OUT [options of the tool]    (see convert.sbatch --help)

Checks the config as `gspo-mm train` would on that many ranks, and whether it fits into the memory of GSPO_GPU (as
`gspo-mm plan` does), then submits train.sbatch. Prints the jobs' numbers and
their logs, which are RUN/slurm/*.out. The same command again continues a run that has stopped.

  --nodes N            nodes of the trainer [1]
  --rollout-nodes N    nodes of SGLang servers, as a job of their own; each starts rollout.sglang.servers of them
                       [0: none, the trainer starts them beside itself, as rollout.sglang.start says]
  --gpus-per-node N    GPUs, and so ranks, per node; 0: CPU nodes, one rank each [GSPO_GPUS_PER_NODE]
  --time TIME          time limit of each job, such as 4:00:00 [GSPO_TIME]; must be longer than GSPO_STOP_SECONDS
  --requeue            near the time limit or when preempted: save, go back into the queue and continue; after a crash
                       or a hang too, from the last checkpoint; from bad nodes go to others
  --dry-run            check the config, print the sbatch commands, submit nothing
  -h, --help           this text

Account, partition, container, modules and the like are settings of env.sh; run it to see them.

examples
  scripts/slurm/submit.sh configs/quickstart.yaml run.name=first --dry-run
  scripts/slurm/submit.sh configs/quickstart.yaml rollout.prompts_per_step=64 --nodes 2 --requeue
  scripts/slurm/submit.sh configs/qwen3_vl_30b_a3b.yaml --nodes 4 --rollout-nodes 2 --requeue
HELP
}

script=submit.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/slurm/lib.sh
source "$here/lib.sh"
# shellcheck source=scripts/slurm/env.sh
source "$here/env.sh"
leave_job

printf -v TRAIN_SUBMIT '%q ' "$here/submit.sh" "$@" # for a job that has to start again on other nodes
nodes=1 rollout_nodes=0 requeue=false dry_run=false convert=false
gpus=$GSPO_GPUS_PER_NODE time=$GSPO_TIME
words=()
while (($#)); do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --nodes | --rollout-nodes | --gpus-per-node | --time)
            [[ -n ${2-} && ${2-} != -* ]] || fail "$1 needs a value; see $script --help"
            case $1 in
                --nodes) nodes=$2 ;;
                --rollout-nodes) rollout_nodes=$2 ;;
                --gpus-per-node) gpus=$2 ;;
                --time) time=$2 ;;
            esac
            shift
            ;;
        --requeue) requeue=true ;;
        --dry-run) dry_run=true ;;
        --convert) convert=true ;;
        -*)
            $convert || fail "$1 is no option of $script; see $script --help"
            words+=("$1")
            ;;
        *) words+=("$1") ;;
    esac
    shift
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes $nodes is not a number of nodes; use 1 or more"
[[ $rollout_nodes =~ ^[0-9]+$ ]] || fail "--rollout-nodes $rollout_nodes is not a number of nodes; use 0 or more"
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus-per-node $gpus is not a number of GPUs; use 0 for CPU nodes"
[[ $GSPO_STOP_SECONDS =~ ^[0-9]+$ ]] || fail "GSPO_STOP_SECONDS=$GSPO_STOP_SECONDS is not a number of seconds"
# shellcheck disable=SC2206 # words of the site's flags, which are stronger
flags=($GSPO_SBATCH_FLAGS) limits=("$time" "")
for i in "${!flags[@]}"; do
    case ${flags[i]} in
        --time=*) limits[0]=${flags[i]#*=} ;;
        --time | -t) limits[0]=${flags[i + 1]-} ;;
        -t*) limits[0]=${flags[i]#-t} ;;
        --time-min=*) limits[1]=${flags[i]#*=} ;; # down to which Slurm may shorten the limit
        '--time-min') limits[1]=${flags[i + 1]-} ;;
    esac
done
for limit in "${limits[@]}"; do
    [[ -n $limit ]] || continue # Slurm's default
    seconds=$(seconds_of "$limit") ||
        fail "--time $limit is no time limit that Slurm knows; use minutes, hours:minutes:seconds or days-hours"
    $convert || [[ -z $seconds ]] || ((seconds >= GSPO_STOP_SECONDS + 60)) ||
        fail "--time $limit is $seconds s, and the run is asked to stop GSPO_STOP_SECONDS=$GSPO_STOP_SECONDS s before its end" \
            "or up to a minute earlier; use --time $(((GSPO_STOP_SECONDS + 119) / 60)) or more, or lower GSPO_STOP_SECONDS"
done
command -v "$GSPO_LOGIN_PYTHON" >/dev/null ||
    fail "GSPO_LOGIN_PYTHON=$GSPO_LOGIN_PYTHON is not there; install gspo_mm into it, or name another in $here/env.sh"
$dry_run || command -v sbatch >/dev/null || fail "sbatch is not on PATH; run this where Slurm's commands are, or use --dry-run"
ranks=$((gpus ? gpus : 1)) # per node

exec 3>&1 # for a dry run's commands: the output of `submit` is the number
# submit NAME LOG NODES TASKS CPUS PARTITION [SBATCH_OPTION ...] -- SCRIPT ARGUMENT ...: prints the job's number
submit() {
    local flags=(--job-name="$1" --output="$2" --open-mode=append --nodes="$3" --ntasks-per-node="$4" --cpus-per-task="$5")
    [[ -z $6 ]] || flags+=(--partition="$6")
    [[ -z $GSPO_EXCLUDE ]] || flags+=(--exclude="$GSPO_EXCLUDE")
    [[ -z $GSPO_ACCOUNT ]] || flags+=(--account="$GSPO_ACCOUNT")
    ((gpus == 0)) || flags+=("$GSPO_GPU_FLAG$gpus")
    shift 6
    # --export=ALL: what was set here counts in the job too, also where the site's default is another
    [[ -z $time ]] || flags+=(--time="$time")
    flags+=(--export=ALL)
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    # shellcheck disable=SC2206 # words of the site's flags
    flags+=($GSPO_SBATCH_FLAGS)
    if $dry_run; then
        { printf 'sbatch' && printf ' %q' "${flags[@]}" "$@" && printf '\n'; } >&3
        echo "$1" | sed 's/.*\/\([a-z]*\)\.sbatch/NUMBER_OF_\1/'
    else
        sbatch --parsable "${flags[@]}" "$@" | cut -d';' -f1
    fi
}

told() { # WHAT NUMBER LOG
    $dry_run || echo "$1: job $2, log ${3//%j/$2}"
}

if $convert; then
    ((${#words[@]} >= 3)) || fail "--convert needs a direction, a folder to read and one to write; see convert.sbatch --help"
    [[ ${words[0]} == to-megatron || ${words[0]} == to-hf ]] ||
        fail "--convert ${words[0]} is neither to-megatron nor to-hf; see convert.sbatch --help"
    [[ -d ${words[1]} ]] || fail "--convert ${words[0]}: ${words[1]} is no folder; name the one to read first, then the one to write"
    ((nodes == 1 && rollout_nodes == 0)) || fail "--convert runs on one node; leave out --nodes and --rollout-nodes"
    log=$(realpath -m "${words[2]}")-%j.out # beside the folder, which appears only when it is whole
    mkdir -p "$(dirname "$log")"
    number=$(submit gspo-convert "$log" 1 1 $((ranks * GSPO_CPUS_PER_RANK)) "$GSPO_PARTITION" -- "$here/convert.sbatch" "${words[@]}")
    told conversion "$number" "$log"
    exit 0
fi

((${#words[@]})) || fail "CONFIG is missing; name a YAML file such as configs/quickstart.yaml"
((rollout_nodes == 0)) || words+=(rollout.sglang.start=elsewhere)
# shellcheck disable=SC2016
checked=$(WORLD_SIZE=$((nodes * ranks)) "$GSPO_LOGIN_PYTHON" -c '
import sys
gpu, nodes, per_node, rollout_nodes = sys.argv[-4], *map(int, sys.argv[-3:])
del sys.argv[-4:]
from gspo_mm.checkpoint.owner import check_free
from gspo_mm.runtime.reporting import run_reporting_faults
from gspo_mm.config import load_config
from gspo_mm.inputs import check_files
from gspo_mm.types import GspoError

def check():
    config = load_config(sys.argv[1], sys.argv[2:])
    if rollout_nodes and config.rollout.engine != "sglang":
        raise GspoError(
            f"--rollout-nodes {rollout_nodes} with rollout.engine={config.rollout.engine}: only SGLang has servers; "
            "add rollout.engine=sglang, or leave --rollout-nodes out"
        )
    check_files(config)
    check_free(config.run.path)
    if gpu and per_node:
        from gspo_mm.commands.plan import check_fits
        check_fits(config, nodes=nodes, rollout_nodes=rollout_nodes, per_node=per_node, gpu=gpu)
    servers = config.rollout.sglang.servers if rollout_nodes else 0
    print(config.run.name, config.run.path.absolute(), servers, sep="\n")

run_reporting_faults(check)' "${words[@]}" "$GSPO_GPU" "$nodes" "$gpus" "$rollout_nodes") || exit $?
{ read -r name && read -r run && read -r servers; } <<<"$checked"

if $requeue; then
    options=(--requeue) arguments=(--requeue)
else
    options=(--no-requeue) arguments=()
fi
log=$run/slurm/train-%j.out
$dry_run || mkdir -p "$run/slurm" # Slurm makes no folders for logs: a job without one fails in silence
of_all=() # the trainer waits for the servers of all nodes, each node starts its own
((rollout_nodes == 0)) || of_all=("rollout.sglang.servers=$((servers * rollout_nodes))")
export TRAIN_SUBMIT TRAIN_RUN=$run # a requeue looks there for what is new
trainer=$(submit "gspo-$name" "$log" "$nodes" "$ranks" "$GSPO_CPUS_PER_RANK" "$GSPO_PARTITION" \
    "${options[@]}" --signal="B:USR1@$GSPO_STOP_SECONDS" -- \
    "$here/train.sbatch" "${arguments[@]}" "${words[@]}" "${of_all[@]}")
told trainer "$trainer" "$log"

if ((rollout_nodes)); then
    log=$run/slurm/rollout-%j.out
    # Two jobs rather than one heterogeneous job: each can be cancelled and replaced alone, and wait in a partition of
    # its own. `after`, the trainer's start: before it the servers would be idle.
    rollout=$(submit "gspo-$name-rollout" "$log" "$rollout_nodes" 1 $((ranks * GSPO_CPUS_PER_RANK)) "$GSPO_ROLLOUT_PARTITION" \
        "${options[@]}" --dependency="after:$trainer" -- \
        "$here/rollout.sbatch" "${arguments[@]}" --trainer "$trainer" "${words[@]}")
    told "rollout servers" "$rollout" "$log"
fi
