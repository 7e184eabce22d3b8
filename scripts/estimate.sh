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
refuse() {
    echo "error: $1" >&2
    echo "$usage" >&2
    exit 2
}
for word in "$@"; do # --small may stand anywhere
    if [ "$word" = --small ]; then
        name=${name}_small held_out=30
    fi
done
run=runs/$name options=() value=false first=true
for word in "$@"; do # RUN is the first word after --small, if it is no option
    [ "$word" != --small ] || continue
    if $value; then
        value=false
        options+=("$word")
    else
        case $word in
            --workers | --device | --batch-size | --allow-import) value=true && options+=("$word") ;;
            --workers=* | --device=* | --batch-size=* | --allow-import=*) options+=("$word") ;;
            -*) refuse "unknown option $word" ;;
            *) if $first; then run=$word; else refuse "unexpected $word"; fi ;;
        esac
    fi
    first=false
done
! $value || refuse "${options[-1]} needs a value"
case $run in /*) ;; *) run=$PWD/$run ;; esac

cd "$(dirname "$0")/.." # where specs look for data/
PATH=$PWD/.venv/bin:$PATH
if ! command -v coar > /dev/null; then
    echo "error: there is no command coar: run \`make install\` first, or activate the environment that has it" >&2
    exit 1
fi
spec=specs/$name.json

if [ ! -e "$run/spec.json" ]; then
    coar plan "$spec"
fi
coar init "$spec" "$run" # also checks that an earlier study there has the same spec
coar run "$run" ${options[@]+"${options[@]}"}
coar fit "$run"
coar evaluate "$run" --num-rows "$held_out" # at the study's own ablation fraction
