#!/usr/bin/env bash
# The site: everything that differs from one cluster to the next is in this file, and nowhere else.
#
# Each setting can also come from the environment, which is stronger: GSPO_TIME=1:00:00 submit.sh ...
# Words in a setting are split at spaces. Executed instead of sourced, this file shows what is set.

# --- Python -----------------------------------------------------------------------------------------------------
# on the compute nodes (inside the container, if there is one): an interpreter that has gspo_mm installed
: "${GSPO_PYTHON="$(dirname "${BASH_SOURCE[0]}")/../../.venv/bin/python"}"
# on the machine that submits, to check the config before anything waits in a queue; no GPU needed
: "${GSPO_LOGIN_PYTHON="$GSPO_PYTHON"}"

# --- queue ------------------------------------------------------------------------------------------------------
: "${GSPO_ACCOUNT=}"                         # --account; empty: Slurm's default
: "${GSPO_PARTITION=}"                       # --partition of trainer and conversions; empty: Slurm's default
: "${GSPO_ROLLOUT_PARTITION=$GSPO_PARTITION}"  # --partition of the rollout servers
: "${GSPO_TIME=24:00:00}"                    # --time; empty: Slurm's default; longer than GSPO_STOP_SECONDS
: "${GSPO_SBATCH_FLAGS=}"                    # more for every job: --qos=high --exclusive --mem=0 --mail-type=END

# --- nodes ------------------------------------------------------------------------------------------------------
: "${GSPO_GPUS_PER_NODE=8}"                  # one rank per GPU; 0: CPU nodes, one rank per node
: "${GSPO_GPU_FLAG=--gpus-per-node=}"        # how the site asks for them, the number is appended: --gres=gpu:h200:
: "${GSPO_GPU=}"                             # kind of GPU, for `gspo-mm plan`: h100, h200, b200 ...; empty: memory is not checked
: "${GSPO_CPUS_PER_RANK=8}"                  # cores per rank
: "${GSPO_EXCLUDE=}"                         # nodes never to be used, such as n17,n23; a job adds bad ones that it finds
: "${GSPO_CHECK_NODES=yes}"                  # look at all nodes before a run, which takes half a minute; empty: do not

# --- network ----------------------------------------------------------------------------------------------------
: "${GSPO_INTERFACE=}"                       # of the fast network, such as ib0; empty: each program's own choice

# Printed by each rollout node: the address at which the trainer reaches its servers.
gspo_node_address() {
    if [[ -n $GSPO_INTERFACE ]]; then
        ip -4 -oneline address show dev "$GSPO_INTERFACE" | sed -n 's/.* inet \([0-9.]*\).*/\1/p;q'
    else
        hostname -I | cut -d' ' -f1
    fi
}

# --- end of a job -----------------------------------------------------------------------------------------------
# Seconds before the time limit at which the run is asked to save and stop. It must cover one step and one
# checkpoint; Slurm may ask up to a minute earlier.
: "${GSPO_STOP_SECONDS=600}"
: "${GSPO_POLL_SECONDS=10}"                  # between two looks of the servers' job at the trainer's

# --- container --------------------------------------------------------------------------------------------------
# pyxis/enroot: --container-image=nvcr.io#nvidia/pytorch:25.10-py3 --container-mounts=/scratch:/scratch
: "${GSPO_SRUN_FLAGS=}"                      # more for every srun
# Apptainer: apptainer exec --nv /images/gspo.sif
: "${GSPO_WRAP=}"                            # put before every command on the compute nodes

# --- what runs in a job's shell before srun: modules, network, caches -------------------------------------------
gspo_site_setup() {
    # module load cuda
    # export NCCL_IB_HCA=mlx5 NCCL_DEBUG=WARN
    if [[ -n $GSPO_INTERFACE ]]; then export NCCL_SOCKET_IFNAME=$GSPO_INTERFACE GLOO_SOCKET_IFNAME=$GSPO_INTERFACE; fi
    # export HF_HOME=/scratch/$USER/huggingface
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE-1}" # compute nodes often have no way out: fail at once, not after minutes
    export TOKENIZERS_PARALLELISM=false
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    if [[ ${1-} == --help || ${1-} == -h ]]; then
        sed -n '2,5s/^# \?//p' "$0"
        printf '\nusage: edit it, or copy a line into your environment; run it to see what is set:\n\n'
    fi
    for name in "${!GSPO_@}"; do
        printf '%s=%q\n' "$name" "${!name}"
    done
fi
