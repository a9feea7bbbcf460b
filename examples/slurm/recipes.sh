#!/bin/bash
# A job of SLURM for every recipe of recipes/: bash examples/slurm/recipes.sh --partition gpu --account me
#
# Call it where recipes/ is. All words given are options of every job; with --dry_run the scripts are printed. What a job
# runs is the command that stands, on one line, at the head of its recipe: attributions take the 4 GPUs of a node, unlearning one, and
# experiments are arrays of 8 workers that share tasks. ONLY='original/attribution*' chooses recipes; MODELS='a b' also
# attacks these with every suite of recipes/attack, on the lab in LAB (runs/lab).
#
# Recipes read data/… and selections/…, which recipes/original/README.md says how to make. A run that lacks another's
# result ends at once and says so: call this again then, for what is done is not done again.
set -euo pipefail

for recipe in $(find recipes -name '*.yaml' -path "recipes/${ONLY:-*}" | sort); do
    line=$(grep -E '^# +retrograd (magic|unlearn|experiment) ' "$recipe" | grep -m 1 -oE '^# +retrograd [^#\\]*$' || true)
    [ -n "$line" ] || continue
    line=${line##*retrograd }
    read -r -a words <<< "${line% --workers *}"
    case "${words[0]}" in
        magic) options=(--gpus 4 --time 12:00:00) ;;
        unlearn) options=(--gpus 1 --time 06:00:00) ;;
        experiment) options=(--gpus 1 --workers 8 --time 08:00:00) ;;
    esac
    name=$(basename "$(dirname "$recipe")")_$(basename "$recipe" .yaml)
    retrograd submit --name "$name" "${options[@]}" "$@" "${words[@]}"
done

for suite in ${MODELS:+recipes/attack/*.yaml}; do
    models=(); for model in $MODELS; do models+=(--model "$model"); done
    name=attack_$(basename "$suite" .yaml)
    retrograd submit --name "$name" --gpus 1 --time 12:00:00 "$@" \
        attack "runs/$name" --lab "${LAB:-runs/lab}" --suite "$suite" --seeds 5 "${models[@]}"
done
