#!/usr/bin/env bash
# What the four estimate_*.sh share: a spec from `coar plan` to held-out correlations.
# NAME is a spec in specs/; with --small it is NAME_small. Run again, it goes on where it stopped.
set -euo pipefail

usage="usage: $(basename "$0") NAME [--small] [RUN] [options of coar run, such as --workers 2]"
case ${1:---help} in
    -h | --help)
        echo "$usage"
        echo "specs: $(cd "$(dirname "$0")/../specs" && echo *.json)"
        exit
        ;;
esac
name=$1 held_out=100
shift
options=()
for option in "$@"; do # --small may stand anywhere
    if [ "$option" = --small ]; then
        name=${name}_small held_out=30
    elif [[ $option == --s* ]] && [[ $option != --shards* ]]; then
        echo "error: unknown option $option" >&2
        echo "$usage" >&2
        exit 2
    else
        options+=("$option")
    fi
done
set -- ${options[@]+"${options[@]}"}
run=runs/$name
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    run=$1
    shift
fi
case $run in /*) ;; *) run=$PWD/$run ;; esac

cd "$(dirname "$0")/.." # where specs look for data/
PATH=$PWD/.venv/bin:$PATH
spec=specs/$name.json

if [ ! -e "$run/spec.json" ]; then
    coar plan "$spec"
fi
coar init "$spec" "$run" # also checks that an earlier study there has the same spec
coar run "$run" "$@"
coar fit "$run"
coar evaluate "$run" --num-rows "$held_out" # at the study's own ablation fraction
