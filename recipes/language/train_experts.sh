#!/bin/sh
# Trains the expert vectors that the repo ships, for SmolLM2's hybrid, on texts that Debian and Python bring. Resumes what
# was cut off.
#   sh recipes/language/train_experts.sh [python] [folder] [arguments of train_expert.py, such as --model FOLDER]
set -eu
python=${1:-python}
[ $# -eq 0 ] || shift
folder=${1:-checkpoints/expert-vectors}
[ $# -eq 0 ] || shift
mkdir -p "$folder"
for job in king_james:bible python:python manual:manual french:french changelog:changelog c:c; do
    name=${job%%:*}
    "$python" -m recipes.language.train_expert --model smollm2-hybrid --domain "${job#*:}" --name "$name" \
        --output "$folder/$name.safetensors" --steps 120 --learning-rate 1e-2 --eval-every 40 \
        --held-out-blocks 16 "$@"
done
