#!/usr/bin/env bash
# What the jobs share: running a step so that signals reach it, and going back into the queue. No site settings.

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    echo "lib.sh is sourced by train.sbatch, rollout.sbatch, convert.sbatch and submit.sh; see submit.sh --help"
    exit 0
fi

: "${script:?its name, set before lib.sh is sourced}" "${here:?this folder, set before lib.sh is sourced}"

fail() {
    echo "error: $*" >&2
    exit 2
}

# A job's last words, in its log and on stderr, where a person looks first.
say() {
    echo "$script: $*" >&2
}

# Refuse to run outside of a job: there srun would ask for nodes of its own. From here on the job hears what Slurm wants:
# `asked` and `ended` tell it, `heard` that it is news.
need_job() {
    [[ -n ${SLURM_JOB_ID-} ]] || fail "$script runs inside a Slurm job; submit it with $here/submit.sh, see --help"
    # shellcheck disable=SC2034 # the job reads them
    step='' heard=false asked=false ended=false
    trap 'heard=true asked=true; say "Slurm asks to stop (USR1); telling every task"; [[ -z $step ]] || kill -USR1 "$step"' USR1
    trap 'heard=true ended=true; say "Slurm ends this job (TERM); waiting for the tasks"' TERM
}

# Forget the job that this shell may be in, so that nothing of it counts in one that is submitted from here: binding to
# cores, sizes, ranks. What is meant for a job is said in env.sh.
leave_job() {
    local inside=${SLURM_JOB_ID-} name
    for name in "${!SLURM@}" "${!SRUN_@}" "${!PMI@}"; do
        case $name in
            SLURM_CONF | SLURM_JWT | SLURM_CLUSTERS | SLURM_WAIT) ;; # where Slurm is, and what train.sbatch reads
            *) unset "$name" ;;
        esac
    done
    [[ -z $inside ]] || unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT "${!TORCHELASTIC_@}" \
        CUDA_VISIBLE_DEVICES GPU_DEVICE_ORDINAL ROCR_VISIBLE_DEVICES ZE_AFFINITY_MASK
}

# seconds_of TIME: a time limit in any of Slurm's forms, which counts in whole minutes; nothing for one without end.
# Fails for what is no time limit.
seconds_of() {
    local days=0 hours=0 minutes=0 seconds=0 parts
    [[ ${1,,} != unlimited && ${1,,} != infinite ]] || return 0
    [[ $1 =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || return 1
    IFS=: read -ra parts <<<"${1#*-}"
    if [[ $1 == *-* ]]; then
        days=${1%%-*} hours=${parts[0]} minutes=${parts[1]-0} seconds=${parts[2]-0}
    elif ((${#parts[@]} == 3)); then
        hours=${parts[0]} minutes=${parts[1]} seconds=${parts[2]}
    else
        minutes=${parts[0]} seconds=${parts[1]-0}
    fi
    seconds=$((((10#$days * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds))
    ((seconds == 0)) || echo $(((seconds + 59) / 60 * 60)) # 0 asks for no limit
}

# A port of this node that nothing listens on. The start depends on the job, so that jobs on one node differ; the
# range is below the one that systems hand out by themselves.
free_port() {
    local port=$((15000 + SLURM_JOB_ID % 17000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
        port=$((port + 1))
    done
    echo "$port"
}

# run_step SRUN_ARGUMENT...: run srun and leave its exit status in `status`. Of a job that is to stop already nothing is run,
# and `started` is false.
#
# srun runs in the background because a shell that waits for a foreground command hears no signal before it ends.
# USR1 (--signal=B:USR1@...: the time limit is near) is passed on to srun, which passes it on to all tasks. TERM
# (scancel, the time limit itself) Slurm sends to the tasks by its own means; this shell outlives it to report the end.
run_step() {
    local now=0
    # shellcheck disable=SC2034 # the job reads them
    status=2 started=true
    if $heard; then
        # shellcheck disable=SC2034
        started=false
        return
    fi
    unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" # of a step that sbatch was called in; a job by itself has none
    # shellcheck disable=SC2086 # words of the site's flags
    srun ${GSPO_SRUN_FLAGS-} --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" &
    step=$!
    ! $asked || kill -USR1 "$step" # heard a moment ago
    status=0
    wait "$step" || status=$?
    while $heard; do # a signal ends `wait`, not the step
        heard=false now=0
        wait "$step" || now=$?
        ((now == 127)) || status=$now # 127: it had ended, its status is known
    done
    trap - USR1 TERM
}

# State of a job, such as RUNNING; nothing when Slurm has forgotten it.
state_of() {
    squeue --noheader --states=all --jobs="$1" --format=%T 2>/dev/null || true
}

# Whether Slurm takes the nodes away for a job of higher priority. The tasks were then sent TERM, this shell nothing.
preempted() {
    scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -q 'PreemptTime=[0-9]'
}

# Back into the queue under the same number. Slurm does that by itself only with jobs that it has to kill: one that
# ends in its grace time, as ours do, would be over.
requeue() {
    say "$1; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || say "Slurm refuses to requeue; start again with the same command to continue"
    exit "$status"
}
