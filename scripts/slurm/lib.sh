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

# Refuse to run outside of a job: there srun would ask for nodes of its own.
need_job() {
    [[ -n ${SLURM_JOB_ID-} ]] || fail "$script runs inside a Slurm job; submit it with $here/submit.sh, see --help"
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

# run_step SRUN_ARGUMENT...: run srun and leave its exit status in `status`; `asked` and `ended` tell what Slurm wanted.
#
# srun runs in the background because a shell that waits for a foreground command hears no signal before it ends.
# USR1 (--signal=B:USR1@...: the time limit is near) is passed on to srun, which passes it on to all tasks. TERM
# (scancel, the time limit itself) Slurm sends to the tasks by its own means; this shell outlives it to tell the end.
run_step() {
    local step='' heard=false now
    # shellcheck disable=SC2034 # the job reads them
    status=0 asked=false ended=false
    trap 'heard=true asked=true; say "Slurm asks to stop (USR1); telling every task"; [[ -z $step ]] || kill -USR1 "$step"' USR1
    trap 'heard=true ended=true; say "Slurm ends this job (TERM); waiting for the tasks"' TERM
    # shellcheck disable=SC2086 # words of the site's flags
    srun ${GSPO_SRUN_FLAGS-} --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" &
    step=$!
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
