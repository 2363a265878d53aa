"""Memory of one process, from what a step was seen to take and how the state is split.

Weights are fp32 always, bf16 being autocast. P trained parameters in N processes:

    alone    weights, gradients as they come, the optimizer's state
    DDP      the same, but the buckets that hold the gradients stay
    ZeRO-1   weights; the local 1/N once more, flat, as what the optimizer works on; its state 1/N; gradients whole
    ZeRO-2   the same with 1/N of the gradients
    ZeRO-3   1/N of everything, of the weights twice, and what is gathered

What DeepSpeed holds besides was read from version 0.19.8 and measured (benchmarks/plan_memory.py); the places are named
below. A checkpoint is copied to the host in parts of 1/N.
"""

from dataclasses import dataclass

from prx_post.planning.dry_run import DryRun
from prx_post.planning.parallel import Parallel

FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. The parts need not be at their greatest at one time, so `peak` may be below their sum."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    buffers: int
    """What ZeRO gathers, reduces and copies in passing."""
    peak: int
    host: int
    """On the host: the copy of a checkpoint while it is written, and the optimizer where it is offloaded."""


def memory(run: DryRun, parallel: Parallel, has_ema: bool) -> Memory:
    """What one process takes on its device, and on the host.

    Args:
        run: of the same settings, accumulation included.
    """
    ema = FP32 * run.averaged_parameters if has_ema else 0
    per_rank = (FP32 * run.trained_parameters + run.optimizer + ema) // parallel.num_processes
    split = {0: _whole, 1: _zero_1_2, 2: _zero_1_2, 3: _zero_3}[parallel.zero_stage]
    return split(run, parallel, ema, per_rank)


def _whole(run: DryRun, parallel: Parallel, ema: int, per_rank: int) -> Memory:
    state = run.weights + run.optimizer + ema
    step = run.gradients + run.step_temporaries
    if parallel.num_processes == 1:
        moving = max(run.activations_and_gradients, step)
    else:
        moving = max(run.activations + run.gradients, step)
    return Memory(
        weights=run.weights,
        gradients=run.gradients,
        optimizer=run.optimizer,
        ema=ema,
        activations=run.activations,
        buffers=0,
        peak=state + moving,
        host=per_rank,
    )


def _zero_1_2(run: DryRun, parallel: Parallel, ema: int, per_rank: int) -> Memory:
    trained = FP32 * run.trained_parameters
    part = trained // parallel.num_processes
    # DeepSpeedZeroOptimizer.setup_buckets: made in every backward pass, let go of at its end
    buckets = FP32 * parallel.reduce_bucket_size * (2 if parallel.overlap_comm else 1)
    state, host = run.weights + ema, per_rank
    optimizer = part + run.optimizer // parallel.num_processes
    if parallel.offload:
        # with the gradients, and a buffer in which updated weights are sent back
        host, optimizer = per_rank + optimizer + 2 * part, 0
    kept = 0 if parallel.offload else part
    if parallel.zero_stage == 1:
        backward = max(run.activations_and_gradients, run.gradients + part) + buckets
        gradients = run.gradients
    else:
        # copy_grads_in_partition makes a new 1/N in every backward pass, while the sum of those before is still there
        gradients = kept * (2 if run.accumulates else 1)
        backward = run.activations + buckets + gradients
    step = 2 * kept  # `step` flattens the reduced gradients into a copy
    return Memory(
        weights=run.weights,
        gradients=gradients,
        optimizer=optimizer,
        ema=ema,
        activations=run.activations,
        buffers=buckets,
        peak=state + optimizer + max(backward, step),
        host=host,
    )


def _zero_3(run: DryRun, parallel: Parallel, ema: int, per_rank: int) -> Memory:
    # The second 1/N is there although the weights are fp32 already: _create_fp32_partitions would share them, but it
    # compares a torch.device with a device's name, and these are never equal.
    count = parallel.num_processes
    trained = FP32 * run.trained_parameters
    part, ema = trained // count, ema // count
    gathered = FP32 * min(run.parameters, parallel.max_live_parameters)
    bucket = FP32 * parallel.reduce_bucket_size
    pending = min(bucket, trained)  # gradients that wait for the bucket to fill, and the flat copy that is reduced
    buffers = gathered + bucket + 2 * pending
    # initialize_optimizer_states: zeros as large as a whole sub-group, held until the first step has replaced them
    first = min(trained, FP32 * parallel.sub_group_size * count)
    moments, copy, gradients, host = run.optimizer // count, part, part, per_rank
    if parallel.offload:
        host, moments, copy, gradients, first = per_rank + moments + 3 * part, 0, 0, 0, 0
    whole = run.frozen - run.frozen_split
    weights = whole + (run.weights - whole) // count
    state = weights + copy + gradients + ema
    backward = max(first, moments) + run.activations + buffers
    step = moments + gradients + gathered + bucket
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=copy + moments,
        ema=ema,
        activations=run.activations,
        buffers=buffers + max(0, first - moments),
        peak=state + max(backward, step),
        host=host,
    )
