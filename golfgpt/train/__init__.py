"""Training: `train` tells the story of a run, `loop` takes its steps, `step` is one, `export` is what remains of it."""
