#!/usr/bin/env bash
# What the four evaluate_*.sh share: a study as estimate.sh makes it, other methods, held-out correlations.
# FRACTIONS and BASELINES are lists in one word each. Run again, it goes on where it stopped.
set -euo pipefail

usage="usage: $(basename "$0") NAME FRACTIONS BASELINES [--small] [RUN] [options of coar run, such as --workers 2]"
if [ $# -lt 3 ]; then
    echo "$usage"
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit
    exit 2
fi
name=$1 folder=runs/$1 held_out=100
read -r -a fractions <<< "$2"
read -r -a baselines <<< "$3"
shift 3
refuse() {
    echo "error: $1" >&2
    echo "$usage" >&2
    exit 2
}
for word in "$@"; do # --small may stand anywhere
    if [ "$word" = --small ]; then
        folder=runs/${name}_small held_out=60
    fi
done
first=true value=false shared=() # with coar baseline
for word in "$@"; do # RUN is the first word after --small, if it is no option
    [ "$word" != --small ] || continue
    if $value; then
        value=false
        [ "$option" != --workers ] || shared=(--workers "$word")
    else
        case $word in
            --workers | --device | --batch-size | --allow-import) value=true option=$word ;;
            --workers=*) shared=("$word") ;;
            --device=* | --batch-size=* | --allow-import=*) ;;
            -*) refuse "unknown option $word" ;;
            *) if $first; then folder=$word; else refuse "unexpected $word"; fi ;;
        esac
    fi
    first=false
done
! $value || refuse "$option needs a value"
run=$folder
case $run in /*) ;; *) run=$PWD/$run ;; esac
scripts=$(cd "$(dirname "$0")" && pwd)

PATH=$(cd "$scripts/.." && pwd)/.venv/bin:$PATH
if ! command -v coar > /dev/null; then
    echo "error: there is no command coar: run \`make install\` first, or activate the environment that has it" >&2
    exit 1
fi
if [ ! -e "$run/attributions/ridge/index.json" ]; then
    "$scripts/estimate.sh" "$name" "$@"
fi
cd "$scripts/.." # where specs look for data/
coar baseline "$run" "${baselines[@]}" ${shared[@]+"${shared[@]}"}
options=()
for fraction in "${fractions[@]}"; do
    options+=(--fraction "$fraction")
done
coar evaluate "$run" --num-rows "$held_out" "${options[@]}" \
    --figure "$run/evaluation.png" --table "$run/evaluation.csv"
