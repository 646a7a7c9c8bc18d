"""Modal: `modal run --detach examples/modal_app.py` in the checkout, with `pip install modal`. Not run.

Runs and data lie in a volume. A container that is preempted or fails is started again, and the script resumes its run.
`modal volume get golfgpt runs/first` fetches it.
"""

import os
import subprocess

import modal

GPUS = 8
DATA = "golfgpt data download --variant sp1024 --train-shards 80"
TRAIN = "bash /golfgpt/examples/torchrun_nodes.sh first --recipe baseline --data.path data/fineweb10B_sp1024"

app = modal.App("golfgpt")
image = modal.Image.from_dockerfile("examples/Dockerfile", context_dir=".")
volume = modal.Volume.from_name("golfgpt", create_if_missing=True)


@app.function(image=image, gpu=f"H100:{GPUS}", volumes={"/work": volume}, timeout=3600, retries=3)
def train() -> None:
    try:
        subprocess.run(DATA.split(), cwd="/work", check=True)
        subprocess.run(TRAIN.split(), cwd="/work", check=True, env=os.environ | {"PROCS": str(GPUS)})
    finally:
        volume.commit()


@app.local_entrypoint()
def main() -> None:
    train.remote()
