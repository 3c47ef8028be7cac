#!/usr/bin/env bash
# Installs what tests/slurm needs and a bare machine lacks: Slurm, munge and shellcheck, from Debian's or Ubuntu's packages.
set -euo pipefail

if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "usage: tests/slurm/install.sh    (as root; does nothing where slurmctld, slurmd, munged and shellcheck are there)"
    exit 0
fi
PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd munged shellcheck; do
    command -v "$program" >/dev/null && continue
    packages=(slurm-wlm munge shellcheck)
    if ((EUID)) || ! command -v apt-get >/dev/null; then
        echo "note: $program is not installed, so most of tests/slurm is skipped; to run it, as root: apt-get install ${packages[*]}" >&2
        exit 0
    fi
    echo "installing ${packages[*]} for tests/slurm"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "${packages[@]}" >/dev/null
    exit 0
done
