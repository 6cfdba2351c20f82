"""Stage `centralize`: one learner on the POOLED slices of all sites, to compare a federation with.

It copies no scan, but it reads the prepared cases of all sites in one place: run it where their pooling is allowed, as
with public or synthetic scans, and not on a consortium's nodes. The budget is that of all sites together,
rounds x local_steps x sites optimiser steps of batch_size slices, validated after each round as a federation is.

On Ray, Ray Train runs it in `engine.workers` processes that share each batch and average their gradients: slices,
schedule and number of steps stay those of one. After each round a checkpoint is kept in work_dir/unfinished; the same
command goes on from there. The run's folder is a federation's: `fedsam evaluate evaluation.adapter=FOLDER` scores it.
"""

from functools import partial

from pipelines.baselines import centralized, run_stage
from pipelines.stage import Stage

STAGE = Stage("centralize", __doc__ or "", partial(run_stage, "rounds", centralized))

if __name__ == "__main__":
    STAGE.main()
