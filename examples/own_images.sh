#!/usr/bin/env bash
# From a folder of images to a tuned one-step student. Each step can be stopped with Ctrl-C: run the script again.
#
#   examples/own_images.sh my-images runs/mine        # my-images holds one sub-folder of pictures for each class
#
# Set UPDATES for a short try: UPDATES=300 examples/own_images.sh my-images runs/try
set -euo pipefail
images=${1:?name the folder of images} runs=${2:?name a folder for the runs}
reward=${REWARD:-$(dirname "$0")/own_reward.py:score}

# Continue where a state was saved; make the run shorter where UPDATES says so.
options() {
  if compgen -G "$1/state-*" >/dev/null; then echo "--resume"; fi
  if [ -n "${UPDATES:-}" ]; then echo "--updates $UPDATES"; fi
}

marval train --data "folder:$images" --out "$runs/teacher" $(options "$runs/teacher")
marval distill "$runs/teacher" --out "$runs/student" $(options "$runs/student")
marval tune "$runs/student" --reward "$reward" --out "$runs/tuned" $(options "$runs/tuned")
marval sample "$runs/tuned" --out "$runs/samples" --force
